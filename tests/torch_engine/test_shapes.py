"""Qwen2's biases, attention_bias, mlp_bias and yarn: from the published folder to the served logits,
equal to transformers'."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import drive_engine
import pytest
import torch
from synthetic import tokenizer_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from scripts import build_checkpoint, build_config, build_engines, reports
from scripts.nvidia import abilities, contracts
from scripts.weights.shape import LlamaShape

MPIRUN = Path(sys.executable).with_name("mpirun")
SIZES = {
    "vocab_size": 312,
    "hidden_size": 96,
    "intermediate_size": 120,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5000.0,
}
SHAPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2 with yarn, tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "attention_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mlp_bias": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True}),
    "both, llama3": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN}),
    "yarn, its numbers said": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {
        **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}}),
    "yarn, two mscales": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7}}),
}  # fmt: skip
PROMPTS = [[5, 9, 200], list(range(3, 180)), [300]]


def published(folder: Path, shape: str) -> Any:
    """A random model of the shape, saved by transformers; every bias is far from 0."""
    torch.manual_seed(0)
    config, model_class, changed = SHAPES[shape]
    model = model_class(config(**{**SIZES, **changed})).eval()
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(value)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_model(312))
    return model


def engine_of(folder: Path, rooms: Path, tp_size: int, version: str = "0.14.0") -> Path:
    """The rooms config, checkpoint and engines for the torch engine."""
    build_config.build_config(build_config.Settings(folder, rooms / "config"))
    settings = build_checkpoint.Settings(rooms / "config", rooms / "checkpoint", tp_size, version, weights=folder)
    build_checkpoint.build_checkpoint(settings)
    build_engines.build_engines(
        build_engines.Settings(
            rooms / "checkpoint", rooms / "engines", "torch", version, 4, max_num_tokens=200, max_input_len=200
        )
    )
    return rooms / "engines"


def answers(engine: Path, tp_size: int, folder: Path) -> list[dict[str, Any]]:
    asked, answered = folder / "requests.json", folder / "answers.pt"
    asked.write_text(json.dumps([{"prompt": p, "max_new_tokens": 4, "context_logits": True} for p in PROMPTS]))
    if tp_size == 1:
        drive_engine.main(str(engine), str(asked), str(answered))
    else:
        words = ["--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", tp_size]
        command = [MPIRUN, *words, sys.executable, drive_engine.__file__, engine, asked, answered]
        environment = {**os.environ, "OMPI_MCA_mpi_yield_when_idle": "1"}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
    said: list[dict[str, Any]] = torch.load(answered)
    return said


@pytest.mark.parametrize(
    ("shape", "tp_size"),
    [*((shape, 1) for shape in SHAPES), *((shape, 4) for shape in ("qwen2 with yarn, tied", "both, llama3"))],
)
@torch.inference_mode()
def test_logits_are_those_of_transformers(shape: str, tp_size: int, tmp_path: Path) -> None:
    """With 4 ranks two of them share a key/value head, and its bias."""
    published(tmp_path / "published", shape)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float32)
    version = "0.14.0" if "llama3" in shape else "0.8.0"
    engine = engine_of(tmp_path / "published", tmp_path, tp_size, version)
    for prompt, answer in zip(PROMPTS, answers(engine, tp_size, tmp_path), strict=True):
        assert answer["error"] is None
        expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(answer["context_logits"], expected, rtol=1e-3, atol=1e-3)
        said = model.generate(
            torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer["tokens"] == said[0, len(prompt) :].tolist()


def test_heads_of_zeros_have_biases_of_zeros(tmp_path: Path) -> None:
    """8 heads in 2 groups for 3 ranks: 9 heads of 3 groups; the third group is of zeros, and so is its bias."""
    model = published(tmp_path / "published", "attention_bias")
    build_config.build_config(build_config.Settings(tmp_path / "published", tmp_path / "config"))
    settings = build_checkpoint.Settings(
        tmp_path / "config", tmp_path / "checkpoint", 3, "0.14.0", weights=tmp_path / "published", pad_heads=True
    )
    build_checkpoint.build_checkpoint(settings)
    build_engines.build_engines(
        build_engines.Settings(
            tmp_path / "checkpoint", tmp_path / "engines", "torch", "0.14.0", 4, max_num_tokens=200, max_input_len=200
        )
    )
    for prompt, answer in zip(PROMPTS, answers(tmp_path / "engines", 3, tmp_path), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(answer["context_logits"], expected, rtol=1e-3, atol=1e-3)


def test_the_checkpoint_says_its_biases_and_others_say_nothing_new(tmp_path: Path) -> None:
    """attn_bias and mlp_bias are read by every version, from 0.8.0 on;
    the config.json of a model without them is what it was."""
    shapes = itertools.cycle(("qwen2", "yarn", "mlp_bias"))
    for version, shape in zip(contracts.versions(), shapes, strict=False):
        folder = tmp_path / version
        published(folder / "published", shape)
        engine = engine_of(folder / "published", folder, 1, version)
        config = json.loads((folder / "checkpoint/config.json").read_text())
        assert config["architecture"] == "LlamaForCausalLM"
        golden = contracts.table("checkpoint-config", version)
        expected = (shape == "qwen2", shape == "mlp_bias")
        assert (bool(config.get("attn_bias")), bool(config.get("mlp_bias"))) == expected
        if shape == "yarn":
            assert list(config) == list(golden)
        network = json.loads((engine / "config.json").read_text())["pretrained_config"]
        assert (network["attn_bias"], network["mlp_bias"]) == expected


def test_what_no_tensorrt_has_is_refused_by_name_with_the_engine_that_has_it(tmp_path: Path) -> None:
    published(tmp_path / "published", "yarn")
    build_config.build_config(build_config.Settings(tmp_path / "published", tmp_path / "config"))
    settings = build_checkpoint.Settings(
        tmp_path / "config", tmp_path / "checkpoint", 2, "1.2.1", weights=tmp_path / "published", engine="tensorrt"
    )
    with pytest.raises(reports.Problem) as caught:
        build_checkpoint.build_checkpoint(settings)
    assert "rope scaling of the type yarn, which TensorRT-LLM 1.2.1 does not have" in caught.value.seen
    assert caught.value.command.startswith("make checkpoint") and "ENGINE=torch" in caught.value.command


def test_quant_is_refused_for_biases() -> None:
    shape = LlamaShape(96, 120, 2, 8, 2, 312, attention_bias="qkv")
    assert abilities.lacks(shape, "default", "0.14.0", "tensorrt", quant="fp8") == "QUANT=fp8 for a model with biases"
    assert abilities.lacks(shape, "default", "0.14.0", "tensorrt") is None
