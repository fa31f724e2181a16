"""Whose fault an error of tensorrt_llm was, told by its words: the strict stand-in makes the errors of each version."""

from __future__ import annotations

import importlib.util
import uuid
from typing import Any

import numpy as np
import pytest
from project import ROOT
from strict_backend import TOOLCHAINS, loaded, refused, strict

LATER = [version for version in TOOLCHAINS if version != "v0.8.0"]


def module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.rsplit("/", 1)[1][:-3], ROOT / path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


told = module("model_repo_template/tensorrt_llm_bls/1/engine_words.py").told


def is_for_clients(text: str) -> bool:
    return bool(text) and not any(
        part in text for part in ("\n", ".cpp", "0x7f", "requestId", "TensorRT-LLM", "Assertion")
    )


@pytest.mark.parametrize("version", LATER)
def test_the_clients_own_mistakes_are_invalid_arguments(version: str) -> None:
    long = np.full((1, loaded(version).max_input_len + 1), 5)
    for mistake in (
        {"temperature": [[-1.0]]},
        {"repetition_penalty": [[0.0]]},
        {"input_ids": long},
        {"runtime_top_k": [[1, 2]]},
        {"stop_words_list": [[[5, 6], [2, 1]]]},
    ):
        code, text = told(refused(version, **mistake), False)
        assert code == "INVALID_ARG" and is_for_clients(text), (mistake, text)
    code, text = told(refused(version, loaded(version, decoupled=False)), False)
    assert (code, text) == ("INVALID_ARG", "Streaming is only supported if model is deployed using decoupled mode.")


def test_the_names_that_0_8_0_does_not_know_are_the_clients_too() -> None:
    assert told(refused("v0.8.0", x=[[1]]), False) == ("INVALID_ARG", "Invalid tensor name: x")


@pytest.mark.parametrize("version", LATER)
def test_a_full_queue_is_no_ones_mistake(version: str) -> None:
    def three(config: Any) -> None:
        config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] = 3

    code, text = told(refused(version, loaded(version, change=three), waiting=3), False)
    assert code == "UNAVAILABLE" and text.startswith("Maximum queue size of 3 has been reached")


@pytest.mark.parametrize("version", TOOLCHAINS)
def test_what_the_engine_does_is_internal_and_has_no_stack_trace(version: str) -> None:
    engine = str(
        strict.engine_said(version, "CUDA runtime error in cudaMemcpy: an illegal memory access was encountered")
    )
    code, text = told(engine, False)
    assert (code, text) == ("INTERNAL", "CUDA runtime error in cudaMemcpy: an illegal memory access was encountered")
    ours = "Error encountered while populating response: " + strict.asserted("sequence_length tensor must be present")
    assert told(ours, False)[0] == "INTERNAL" and is_for_clients(told(ours, False)[1])
    assert told("requestId 3 is already in progress, request is ignored.", False)[0] == "INTERNAL"


def test_a_code_that_says_so_is_believed() -> None:
    """Triton's own checks and the torch engine say INVALID_ARG, where there is a code."""
    assert told("temperature is -1; it must be greater than 0", True) == (
        "INVALID_ARG",
        "temperature is -1; it must be greater than 0",
    )
    assert told("[TensorRT-LLM][ERROR] Assertion failed: (/a/b.cpp:1)\n1 0x7f", False)[1]


def test_ids_are_told_apart_by_every_version() -> None:
    """0.8.0 reads leading digits only: of 300 hexadecimal ids many would be the same number, or none."""
    new_id = module("model_repo_template/tensorrt_llm_bls/1/engine_link.py").new_id
    ids = [new_id() for _ in range(300)]
    assert len({strict.id_number(id) for id in ids} - {0}) == 300
    assert len({strict.id_number(uuid.uuid4().hex) for _ in ids}) < 300  # as the original reads them
