"""If a TOOLCHAIN lacks something for a model, plan, doctor,
checkpoint and engines refuse in the same words and name another one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from published import write_published

from scripts import build_checkpoint, build_config, build_engines, doctor, plan, reports
from scripts.nvidia import abilities, contracts, gpus

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# what config.json says, the engine, the version that lacks it, words of the report, words of the advice
CASES: dict[str, Any] = {
    "llama3": ({"rope_scaling": LLAMA3}, "torch", "0.8.0", "rope scaling of the type llama3", "TOOLCHAIN=0.14.0"),
    "llama3, tensorrt": ({"rope_scaling": LLAMA3}, "tensorrt", "0.8.0", "rope scaling of the type llama3", "TOOLCHAIN=0.14.0"),
    "yarn, tensorrt": ({"rope_scaling": YARN}, "tensorrt", "1.2.1", "rope scaling of the type yarn", "ENGINE=torch"),
}  # fmt: skip


def choice_of(folder: Path, engine: str, version: str) -> plan.Choice:
    return plan.Choice({"MODEL": str(folder), "WEIGHTS": str(folder), "ENGINE": engine, "TOOLCHAIN": version, "TP": "1", "PP": "1",
                        "MAX_BATCH_SIZE": "2", "HOST": "127.0.0.1"})  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_all_refuse_the_same_model_in_the_same_words(case: str, tmp_path: Path) -> None:
    changed, engine, version, says, advice = CASES[case]
    folder = tmp_path / "model"
    write_published(folder, **dict[str, Any]({"config.json": changed}))
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    settings = build_checkpoint.Settings(
        tmp_path / "config", tmp_path / "checkpoint", 1, version, weights=folder, engine=engine
    )
    with pytest.raises(reports.Problem) as of_checkpoint:
        build_checkpoint.build_checkpoint(settings)
    choice = choice_of(folder, engine, version)
    for host in ([], gpus.assumed("2x A100-80GB")):
        with pytest.raises(reports.Problem) as of_plan:
            plan.journey_of(choice, plan.model_of(choice), host)
        assert of_plan.value.seen == of_checkpoint.value.seen
        found = doctor.checked("fit", doctor.check_fit, doctor.Case(choice, host))
        assert found.mark == "stop" and found.problem == of_plan.value.report()
    assert says in of_plan.value.seen and version in of_plan.value.seen
    assert of_plan.value.command.startswith("make plan") and advice in of_plan.value.command
    assert of_checkpoint.value.command.startswith("make checkpoint") and advice in of_checkpoint.value.command


def test_the_advice_works(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_published(folder, **dict[str, Any]({"config.json": {"rope_scaling": LLAMA3}}))
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    with pytest.raises(reports.Problem) as caught:
        build_checkpoint.build_checkpoint(
            build_checkpoint.Settings(tmp_path / "config", tmp_path / "checkpoint", 1, "0.8.0", weights=folder)
        )
    named = re.search(r"TOOLCHAIN=(\S+)", caught.value.command)
    assert named
    build_checkpoint.build_checkpoint(
        build_checkpoint.Settings(tmp_path / "config", tmp_path / "checkpoint", 1, named[1], weights=folder)
    )
    plan.journey_of(choice_of(folder, "torch", named[1]), plan.model_of(choice_of(folder, "torch", named[1])), [])


def test_engines_refuse_what_a_checkpoint_of_another_hand_needs(tmp_path: Path) -> None:
    """A checkpoint that was made for the torch engine, given to the other one."""
    folder = tmp_path / "model"
    write_published(folder, **dict[str, Any]({"config.json": {"rope_scaling": YARN}}))
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    build_checkpoint.build_checkpoint(
        build_checkpoint.Settings(tmp_path / "config", tmp_path / "checkpoint", 1, "0.14.0", weights=folder)
    )
    with pytest.raises(reports.Problem) as caught:
        build_engines.build_engines(
            build_engines.Settings(tmp_path / "checkpoint", tmp_path / "engines", "tensorrt", "0.14.0", 2)
        )
    assert "rope scaling of the type yarn" in caught.value.seen and caught.value.command.startswith("make engines")


@pytest.mark.parametrize("spelling", ["config", "rope_parameters"])
def test_heads_that_turn_in_part_are_refused_and_whole_ones_are_not(spelling: str, tmp_path: Path) -> None:
    for value, refused in ((0.5, True), (1.0, False), (None, False)):
        turned = {"partial_rotary_factor": value}
        changed = (
            turned
            if spelling == "config"
            else {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **turned}}
        )
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        write_published(tmp_path / "model", **dict[str, Any]({"config.json": changed}))
        settings = build_config.Settings(tmp_path / "model", tmp_path / "config")
        if refused:
            with pytest.raises(reports.Problem) as caught:
                build_config.describe(settings)
            assert (
                "partial_rotary_factor is 0.5" in caught.value.seen and Path(caught.value.where).name == "config.json"
            )
        else:
            assert json.loads(build_config.describe(settings).files["config.json"])


def test_able_versions_are_those_that_lack_nothing(tmp_path: Path) -> None:
    from scripts.weights.shape import LlamaShape

    shape = LlamaShape(96, 120, 2, 8, 2, 312, head_dim=32)
    assert abilities.able_versions(shape, "default", "torch") == contracts.versions()[1:]
    assert (
        abilities.lacks(shape, "default", "0.8.0", "torch") == "a head size (8 heads of 32 do not make hidden_size 96)"
    )
    assert (
        abilities.able_versions(LlamaShape(96, 120, 2, 8, 2, 312, attention_bias="qkv"), "default", "tensorrt")
        == contracts.versions()
    )
