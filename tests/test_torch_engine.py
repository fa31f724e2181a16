"""The torch engine says what Hugging Face's model says, whoever else is in the batch and however many ranks there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drive_engine import Answer
from engine import Engine, open_engine
from split_checkpoint import Arrays, meta_to_hf, write_engine
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "models" / "stories"
MPIRUN = Path(sys.executable).with_name("mpirun")

# All sizes differ; a head is not hidden/heads wide; 4 ranks share 2 KV heads and pad the vocabulary.
TINY = {
    "dtype": "float16", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "max_position_embeddings": 96,
}  # fmt: skip
TINY_BUILD = {"max_batch_size": 5, "max_input_len": 48, "max_output_len": 32, "max_num_tokens": 11}
STORIES_NETWORK = {
    "dtype": "float16", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}  # fmt: skip
STORIES_BUILD = {"max_batch_size": 8, "max_input_len": 256, "max_seq_len": 512, "max_num_tokens": 64}
STORY_PROMPTS = [
    "Once upon a time", "The little dog", "One day, Tom", "A cat and a mouse", "In the forest", "She was very happy",
    "There was a big tree", "The sun", "Lily and her mom", "He said", "Two friends", "It was raining", "A brave knight",
    "The old man had", "At the beach", "My favorite", "The bird sang", "Every morning", "Why did", "Max the rabbit",
    "Once there was a king who",
]  # fmt: skip


def random_weights(network: dict[str, Any]) -> Arrays:
    torch.manual_seed(7)
    arrays = {}
    for name, tensor in LlamaForCausalLM(LlamaConfig(**network)).state_dict().items():
        spread = 1 + 0.3 * torch.randn_like(tensor) if tensor.ndim == 1 else 0.2 * torch.randn_like(tensor)
        arrays[name] = spread.half().numpy()
    return arrays


def oracle(network: dict[str, Any], hf: Arrays) -> LlamaForCausalLM:
    """transformers' own model, float32 on the stored values."""
    model = LlamaForCausalLM(LlamaConfig(**{**network, "dtype": "float32"})).float().eval()
    model.load_state_dict({name: torch.from_numpy(array).float() for name, array in hf.items()})
    return model


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int], max_new_tokens: int, end_id: int = -1) -> list[int]:
    tokens, past = list(prompt), None
    while len(tokens) < len(prompt) + max_new_tokens:
        fresh = tokens if past is None else tokens[-1:]
        out = model(torch.tensor([fresh]), past_key_values=past, use_cache=True)
        past, token = out.past_key_values, int(out.logits[0, -1].argmax())
        if token == end_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def run_ranks(engine_dir: Path, requests: list[dict[str, Any]], tp_size: int, folder: Path) -> dict[str, Any]:
    """Answers of the engine under mpirun."""
    asked, answered = folder / f"requests{tp_size}.json", folder / f"answers{tp_size}.pt"
    asked.write_text(json.dumps(requests))
    command = [
        str(MPIRUN), "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", str(tp_size),
        sys.executable, str(ROOT / "tests" / "drive_engine.py"), str(engine_dir), str(asked), str(answered),
    ]  # fmt: skip
    environment = {**os.environ, "OMPI_MCA_mpi_yield_when_idle": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(answered)


@pytest.fixture(scope="module")
def tiny() -> Arrays:
    return random_weights(TINY)


@pytest.fixture(scope="module")
def tiny_oracle(tiny: Arrays) -> LlamaForCausalLM:
    return oracle(TINY, tiny)


@pytest.fixture(scope="module")
def stories() -> Arrays:
    meta = torch.load(STORIES / "consolidated.00.pth", weights_only=True)
    return meta_to_hf({name: tensor.numpy() for name, tensor in meta.items() if name != "rope.freqs"}, 8, 4)


@pytest.fixture(scope="module")
def story_answers(stories: Arrays) -> list[tuple[list[int], list[int]]]:
    """Prompts of the bundled model with transformers' greedy continuation."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=str(STORIES / "tokenizer.model"))
    model = oracle(STORIES_NETWORK, stories)
    prompts = [tokenizer.encode(text, add_bos=True) for text in STORY_PROMPTS]
    return [(prompt, greedy(model, prompt, 16 + index % 9, end_id=2)) for index, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def engine(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_engine(tmp_path_factory.mktemp("tiny") / "engine", tiny, TINY, 1, **TINY_BUILD)
    engine = open_engine(folder)
    assert isinstance(engine, Engine)
    yield engine
    engine.close()


def some_tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, TINY["vocab_size"], length).tolist()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_logits_are_those_of_transformers(tiny, tiny_oracle, tp_size, tmp_path):
    prompts = [some_tokens(length, seed=length) for length in (1, 5, 12, 23, 48)]
    requests = [{"prompt": prompt, "max_new_tokens": 9, "context_logits": True} for prompt in prompts]
    folder = write_engine(tmp_path / "engine", tiny, TINY, tp_size, **TINY_BUILD)
    answers = run_ranks(folder, requests, tp_size, tmp_path)["answers"]
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            expected = tiny_oracle(torch.tensor([prompt])).logits[0]
        assert answer["context_logits"].shape == (len(prompt), TINY["vocab_size"])
        torch.testing.assert_close(answer["context_logits"], expected, rtol=0, atol=1e-4)
        assert answer["tokens"] == greedy(tiny_oracle, prompt, 9)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_bundled_model_tells_transformers_stories(stories, story_answers, tp_size, tmp_path):
    folder = write_engine(tmp_path / "engine", stories, STORIES_NETWORK, tp_size, **STORIES_BUILD)
    requests = [
        {"prompt": prompt, "max_new_tokens": 16 + index % 9, "end_id": 2}
        for index, (prompt, _) in enumerate(story_answers)
    ]
    answers = run_ranks(folder, requests, tp_size, tmp_path)["answers"]
    assert [answer["tokens"] for answer in answers] == [expected for _, expected in story_answers]
    assert len(story_answers) >= 20
