"""TensorRT-LLM's Python runtime is called as its contract tables say,
and its answers get the same form as Hugging Face's."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.nvidia import contracts, trtllm_build
from scripts.verifying import compare, sides, trtllm_side
from scripts.verifying.trtllm_side import Watcher

VERSIONS = contracts.versions()
VOCAB, PADDED, ANSWER_TOKENS = 101, 104, 5
FLOAT32 = compare.thresholds("float32")
PROMPTS = [[1, 17, 80, 4], [1, 5, 99, 42], [1, 17, 5, 5]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    made: LlamaForCausalLM = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2
        )
    ).eval()  # fmt: skip
    return made


class Runner:
    """ModelRunner as far as it is called: a Hugging Face model whose one buffer of logits is read after the processor
    was there."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.texts: list[list[list[int]]] = []  # one entry per call

    def generate(self, **given: Any) -> dict[str, torch.Tensor]:
        tokens = torch.stack(given["batch_input_ids"]).long()
        buffer = torch.full((len(tokens), PADDED), 7.0)  # larger than any logit: padding must not count
        ended = torch.zeros(len(tokens), dtype=torch.bool)
        longest = tokens.shape[1] + given["max_new_tokens"]
        for step in range(given["max_new_tokens"]):
            buffer[:, :VOCAB] = self.model(tokens).logits[:, -1].float()
            assert given["logits_processor"](step, tokens, buffer) is buffer
            chosen = buffer[:, :VOCAB].argmax(-1).masked_fill(ended, given["end_id"])
            ended |= chosen == given["end_id"]
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            buffer[:, VOCAB:] = 7.0
            if ended.all():
                break
        self.texts.append(tokens.tolist())
        rest = torch.full((len(tokens), longest - tokens.shape[1]), given["end_id"])
        return {"output_ids": torch.cat((tokens, rest), dim=1)[:, None].int()}


def references(model: LlamaForCausalLM, prompts: list[list[int]] = PROMPTS) -> list[dict[str, Any]]:
    return sides.continue_group(model, prompts, ANSWER_TOKENS, top_k=7)


def alone(value: Any) -> list[Any]:
    """MPI's gather for a single rank."""
    return [value]


@pytest.mark.parametrize("prompts", [PROMPTS, [[9]]], ids=["several tokens", "one token"])
def test_the_same_model_says_the_same_at_every_position(model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    asked = references(model, prompts)
    said = trtllm_side.ask_group(Runner(model), asked, VOCAB, alone)
    assert said is not None
    for ours, theirs in zip(asked, said, strict=True):
        assert theirs["tokens"] == ours["tokens"]
        torch.testing.assert_close(
            torch.tensor(theirs["log_probs"]), torch.tensor(ours["log_probs"]), atol=1e-5, rtol=0
        )
        assert theirs["prompt_log_probs"] == pytest.approx(ours["prompt_log_probs"], abs=1e-5)
        found = compare.compare_answer(compare.Reference(**ours), compare.Answer(**theirs), FLOAT32)
        assert (found.equal_tokens, found.count) == (ANSWER_TOKENS, 7 * (len(ours["prompt"]) + ANSWER_TOKENS - 1))


def test_the_prompts_own_text_is_forced_whatever_the_engine_would_say(model: LlamaForCausalLM) -> None:
    runner = Runner(model)
    trtllm_side.ask_group(runner, references(model), VOCAB, alone)
    greedy, forced = runner.texts
    assert [text[:4] for text in greedy] == PROMPTS and {len(text) for text in greedy} == {4 + ANSWER_TOKENS}
    assert forced == PROMPTS


def test_an_engine_that_ends_its_answers_has_parted_there(model: LlamaForCausalLM) -> None:
    """The id that ends an answer is none that the reference holds likely."""
    asked = references(model)
    end_id = trtllm_side.unlikely_id(asked, VOCAB)
    assert not any(end_id in ids for one in asked for ids in (*one["top_ids"], one["tokens"], one["prompt"]))
    said = trtllm_side.ask_group(Always(Runner(model), end_id), asked, VOCAB, alone)
    assert said is not None
    for ours, theirs in zip(asked, said, strict=True):
        assert theirs["tokens"] == [end_id]
        found = compare.compare_answer(compare.Reference(**ours), compare.Answer(**theirs), FLOAT32)
        assert found.turned and found.equal_tokens == 0


class Always:
    """An engine that answers everything with one token."""

    def __init__(self, runner: Runner, token: int) -> None:
        self.runner, self.token = runner, token

    def generate(self, **given: Any) -> dict[str, torch.Tensor]:
        watch = given["logits_processor"]

        def processor(step: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, self.token] = 9.0
            result: torch.Tensor = watch(step, ids, scores)
            return result

        return self.runner.generate(**{**given, "logits_processor": processor})


def test_answers_are_ended_by_an_id_that_nobody_says() -> None:
    asked = [{"prompt": [0, 4], "tokens": [1, 2], "top_ids": [[4, 3], [1, 6], [2, 5]]}]
    assert trtllm_side.unlikely_id(asked, 9) == 7
    assert trtllm_side.unlikely_id(asked, 7) == 3  # where everything is likely somewhere, at least unsaid


def test_with_stages_the_tokens_are_the_first_ones_and_the_numbers_the_last_ones(model: LlamaForCausalLM) -> None:
    """Tokens come out on rank 0 and logits are seen on the last stage's ranks only."""
    asked = references(model)
    gathered: list[Any] = []
    last = trtllm_side.ask_group(Runner(model), asked, VOCAB, gathered.append)  # None, as MPI's gather on other ranks
    assert last is None and len(gathered) == 1

    def gather(value: Any) -> list[Any]:
        assert not any(rows for kept in value.values() for rows in kept)
        return [value, gathered[0]]

    first = trtllm_side.ask_group(FirstStage(asked), asked, VOCAB, gather)
    assert first == trtllm_side.ask_group(Runner(model), asked, VOCAB, alone)


class FirstStage:
    """Rank 0 of two stages: sees no logits, and is told what was chosen."""

    def __init__(self, asked: list[dict[str, Any]]) -> None:
        self.known = {tuple(one["prompt"]): one["tokens"] for one in asked}

    def generate(self, **given: Any) -> dict[str, torch.Tensor]:
        texts = [prompt.tolist() + self.known.get(tuple(prompt.tolist()), []) for prompt in given["batch_input_ids"]]
        return {"output_ids": torch.tensor(texts)[:, None]}


# --- held to the tables ---


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_takes_every_name_that_it_is_called_with(version: str, tmp_path: Any) -> None:
    table = contracts.table("runtime", version)
    watcher = Watcher([], VOCAB)
    calls = {
        "from_dir": trtllm_side.load_arguments(tmp_path, 1),
        "generate": trtllm_side.generate_arguments([], 5, 3, watcher),
    }
    for call, given in calls.items():
        part = table[call]
        assert set(part["required"]) <= set(given) <= {*part["parameters"], *part.get("sampling", [])}
    assert calls["generate"][table["generate"]["result"]["with"]] is True
    assert "output_ids" in table["generate"]["result"]["keys"]
    assert list(inspect.signature(watcher).parameters) == table["logits_processor"]["parameters"]


@pytest.mark.parametrize("version", VERSIONS)
def test_no_engine_is_built_otherwise_for_being_verified(version: str) -> None:
    assert contracts.table("runtime", version)["logits_processor"]["needs_engine_flag"] is None
    flags = contracts.flags("trtllm-build", version)
    assert "--gather_context_logits" in flags
    intent = trtllm_build.Intent("float16", 2, 1, 8.0, 8, 256, 512, 2048)
    assert not [word for word in trtllm_build.argv(intent, flags, "in", "out") if "gather" in word]


@pytest.mark.parametrize("version", VERSIONS)
def test_each_part_of_a_table_names_its_source(version: str) -> None:
    table = contracts.table("runtime", version)
    parts = [table[name] for name in ("from_dir", "generate", "logits_processor")]
    for part in parts:
        assert "@ " in part["source"]
        assert bool(part.get("inferred")) == bool(part.get("inferred_reason"))
    name = f"runtime/{contracts.toolchain(version)['contract']['runtime']}.json"
    said = json.loads((contracts.DOCKER / "contracts/sources.json").read_text())[name]
    assert bool(said.get("inferred")) == any(part.get("inferred") for part in parts)


@pytest.mark.parametrize(
    "version, word", [("4.36.1", "torch_dtype"), ("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.23.0", "dtype")]
)
def test_the_dtype_is_named_as_the_installed_transformers_names_it(version: str, word: str) -> None:
    assert sides.dtype_keyword(version) == word
