"""The torch engine gives the answers of Hugging Face's model,
whatever else is in the batch and however many ranks there are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drive_engine
import numpy as np
import pytest
import torch
from drive_engine import MPI_ENVIRONMENT, Answer, mpirun
from engine import Engine, Refused, open_engine
from engine_config import parse_config
from llama import rotary_frequencies
from ranks import has_code_for
from safetensors.numpy import load_file, save_file
from split_checkpoint import Arrays, engine_config, write_engine
from step import Chunk, Step, decode, encode
from tiny_model import (
    STORIES,
    STORIES_NETWORK,
    TINY,
    TINY_BUILD,
    log_probs_of_next,
    oracle,
    random_weights,
    story_weights,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ROOT = Path(__file__).resolve().parents[2]
STORIES_BUILD = {"max_batch_size": 8, "max_input_len": 256, "max_seq_len": 512, "max_num_tokens": 64}
STORY_PROMPTS = [
    "Once upon a time", "The little dog", "One day, Tom", "A cat and a mouse", "In the forest", "She was very happy",
    "There was a big tree", "The sun", "Lily and her mom", "He said", "Two friends", "It was raining", "A brave knight",
    "The old man had", "At the beach", "My favorite", "The bird sang", "Every morning", "Why did", "Max the rabbit",
    "Once there was a king who",
]  # fmt: skip


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


def run_ranks(engine_dir: Path, requests: list[dict[str, Any]], tp_size: int, folder: Path) -> list[dict[str, Any]]:
    """Answers of the engine, under mpirun when it has more than one rank."""
    asked, answered = folder / "requests.json", folder / "answers.pt"
    asked.write_text(json.dumps(requests))
    if tp_size == 1:
        drive_engine.main(str(engine_dir), str(asked), str(answered))
    else:
        command = mpirun(tp_size, sys.executable, drive_engine.__file__, engine_dir, asked, answered)
        done = subprocess.run(command, env=MPI_ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = torch.load(answered)
    return answers


@pytest.fixture(scope="module")
def tiny() -> Arrays:
    return random_weights(TINY)


@pytest.fixture(scope="module")
def tiny_oracle(tiny: Arrays) -> LlamaForCausalLM:
    return oracle(TINY, tiny)


@pytest.fixture(scope="module")
def stories() -> Arrays:
    return story_weights()


@pytest.fixture(scope="module")
def story_answers(stories: Arrays) -> list[tuple[list[int], list[int]]]:
    """Prompts of the bundled model with transformers' greedy continuation."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=str(STORIES / "tokenizer.model"))
    model = oracle(STORIES_NETWORK, stories)
    prompts = [tokenizer.encode(text, add_bos=True) for text in STORY_PROMPTS]
    return [(prompt, greedy(model, prompt, 8 + index % 7, end_id=2)) for index, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def open_tiny(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Opens engines of one rank over the tiny model, with other limits where given."""
    opened = []

    def open_with(**build: int) -> Engine:
        folder = write_engine(tmp_path_factory.mktemp("tiny") / "engine", tiny, TINY, 1, **{**TINY_BUILD, **build})
        engine = open_engine(folder)
        assert isinstance(engine, Engine)
        opened.append(engine)
        return engine

    yield open_with
    for engine in opened:
        engine.close()


@pytest.fixture(scope="module")
def engine(open_tiny: Callable[..., Engine]) -> Engine:
    return open_tiny()


@dataclass
class Varied:
    """A request whose answer repeats no token, and the same with other settings."""

    engine: Engine

    def again(self, **options: Any) -> Answer:
        return Answer(self.engine, some_tokens(6, 5), 12, repetition_penalty=9.0, **options).wait()

    def __post_init__(self) -> None:
        self.tokens = self.again().tokens
        assert len(set(self.tokens)) == 12


@pytest.fixture
def varied(engine: Engine) -> Varied:
    return Varied(engine)


def some_tokens(length: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, TINY["vocab_size"], length)]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_logits_and_tokens_are_those_of_transformers(
    tiny: Arrays, tiny_oracle: LlamaForCausalLM, tp_size: int, tmp_path: Path
) -> None:
    prompts = [some_tokens(length, seed=length) for length in (1, 5, 12, 23, 48)]
    requests = [{"prompt": prompt, "max_new_tokens": 9, "context_logits": True} for prompt in prompts]
    folder = write_engine(tmp_path / "engine", tiny, TINY, tp_size, **TINY_BUILD)
    for prompt, answer in zip(prompts, run_ranks(folder, requests, tp_size, tmp_path), strict=True):
        with torch.inference_mode():
            expected = tiny_oracle(torch.tensor([prompt])).logits[0]
        assert answer["context_logits"].shape == (len(prompt), TINY["vocab_size"])
        torch.testing.assert_close(answer["context_logits"], expected, rtol=0, atol=1e-4)
        assert answer["tokens"] == greedy(tiny_oracle, prompt, 9)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_bundled_model_tells_transformers_stories(
    stories: Arrays, story_answers: list[tuple[list[int], list[int]]], tp_size: int, tmp_path: Path
) -> None:
    assert len(story_answers) >= 20
    folder = write_engine(tmp_path / "engine", stories, STORIES_NETWORK, tp_size, **STORIES_BUILD)
    requests = [
        {"prompt": p, "max_new_tokens": 8 + index % 7, "end_id": 2} for index, (p, _) in enumerate(story_answers)
    ]
    answers = run_ranks(folder, requests, tp_size, tmp_path)
    assert [answer["tokens"] for answer in answers] == [expected for _, expected in story_answers]


def test_requests_join_and_leave_while_others_run(engine: Engine) -> None:
    """Each says what it says alone, and a step serves all that are running."""
    wanted: list[dict[str, Any]] = [
        {"prompt": some_tokens(5, 1), "max_new_tokens": 9},
        {"prompt": some_tokens(4, 2), "max_new_tokens": 5},
        {"prompt": some_tokens(7, 3), "max_new_tokens": 7, "top_k": 20, "random_seed": 3, "temperature": 2.0},
        {"prompt": some_tokens(3, 4), "max_new_tokens": 6, "top_p": 0.9, "repetition_penalty": 1.3},
    ]
    alone = [Answer(engine, **request).wait().tokens for request in wanted]

    before, joined = engine.steps, []

    def join(index: int) -> Callable[[], None]:
        return lambda: joined.append(Answer(engine, **wanted[index]))

    first = Answer(engine, **wanted[0], on_piece={3: join(1), 6: join(2), 9: join(3)}).wait()
    assert [first.tokens, *(answer.wait().tokens for answer in joined)] == alone
    # the first takes steps 1 to 9, the second 4 to 8, the third 7 to 13, the last 10 to 15
    assert engine.steps - before == 15


def test_a_long_prompt_comes_in_pieces_between_others_tokens(engine: Engine) -> None:
    """11 tokens a step: one for the request that generates, ten of the newcomer's prompt."""
    short: dict[str, Any] = {"prompt": some_tokens(5, 1), "max_new_tokens": 9}
    long: dict[str, Any] = {"prompt": some_tokens(48, 2), "max_new_tokens": 3}
    alone = [Answer(engine, **request).wait().tokens for request in (short, long)]
    before, joined = engine.steps, []
    first = Answer(engine, **short, on_piece={1: lambda: joined.append(Answer(engine, **long))}).wait()
    assert [first.tokens, joined[0].wait().tokens] == alone
    assert engine.steps - before == 9  # steps 2 to 6 take the prompt, and the last gives its first token


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole_prompt(
    engine: Engine, open_tiny: Callable[..., Engine]
) -> None:
    whole = open_tiny(max_num_tokens=200)
    request: dict[str, Any] = {
        "prompt": some_tokens(45, 9),
        "max_new_tokens": 4,
        "context_logits": True,
        "generation_logits": True,
    }
    answers = [Answer(one, **request).wait() for one in (engine, whole)]
    assert [len(answer.pieces) for answer in answers] == [5 + 3, 4]
    for kind in ("context_logits", "generation_logits"):
        torch.testing.assert_close(*(answer.logits(kind) for answer in answers), rtol=0, atol=1e-5)
    assert answers[0].logits("generation_logits").argmax(-1).tolist() == answers[0].tokens == answers[1].tokens


def test_more_requests_than_slots_wait_their_turn(engine: Engine, tiny_oracle: LlamaForCausalLM) -> None:
    prompts = [some_tokens(3 + index % 7, index) for index in range(13)]
    answers = [Answer(engine, prompt, 2 + index % 5) for index, prompt in enumerate(prompts)]
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.wait().tokens == greedy(tiny_oracle, prompt, 2 + index % 5)
    assert (engine.running, engine.waiting) == (0, 0)


def test_cancelling_frees_the_slot_for_who_waits(open_tiny: Callable[..., Engine]) -> None:
    one_slot = open_tiny(max_batch_size=1)
    waiting: list[Answer] = []
    before = one_slot.steps

    def cancel_both() -> None:
        waiting[0].cancel()
        running.cancel()

    running = Answer(
        one_slot,
        some_tokens(4, 1),
        30,
        on_piece={
            2: lambda: waiting.extend(Answer(one_slot, some_tokens(5, seed), 3) for seed in (2, 3)),
            4: cancel_both,
        },
    )
    assert running.wait().error is None and len(running.tokens) == 4
    assert waiting[0].wait().tokens == [] and waiting[0].error is None
    assert len(waiting[1].wait().tokens) == 3
    assert one_slot.steps - before == 4 + 3


def test_end_id_ends_and_is_not_part_of_the_output(varied: Varied) -> None:
    end_id = varied.tokens[4]
    assert varied.again(end_id=end_id).tokens == varied.tokens[:4]
    longer = varied.again(end_id=end_id, min_length=7).tokens
    assert longer[:4] == varied.tokens[:4] and len(longer) >= 7 and end_id not in longer


def test_stop_words_end_and_are_part_of_the_output(varied: Varied) -> None:
    stopped = varied.again(stop_words=((100, 99), tuple(varied.tokens[3:5])))
    assert stopped.tokens == varied.tokens[:5] and stopped.error is None


def test_bad_words_never_appear(varied: Varied) -> None:
    banned = varied.tokens[5], varied.tokens[:2]
    tokens = varied.again(bad_words=((banned[0],), tuple(banned[1]))).tokens
    assert tokens[0] == banned[1][0] and tokens[1] != banned[1][1] and banned[0] not in tokens


def test_a_seed_gives_the_same_text_whoever_is_in_the_batch(engine: Engine) -> None:
    def drawn(seed: int) -> Answer:
        return Answer(engine, some_tokens(6, 5), 12, top_k=50, temperature=3.0, random_seed=seed)

    alone = [drawn(seed).wait().tokens for seed in (0, 1, 0)]
    assert alone[0] == alone[2] != alone[1]
    assert [answer.wait().tokens for answer in [drawn(seed) for seed in (1, 0, 1, 0)]] == [alone[1], alone[0]] * 2
    assert Answer(engine, some_tokens(6, 5), 12, top_k=50, temperature=3.0).wait().tokens == alone[0]


def test_log_probs_are_those_of_transformers(engine: Engine, tiny_oracle: LlamaForCausalLM) -> None:
    prompt = some_tokens(6, 5)
    answer = Answer(engine, prompt, 8, log_probs=True, repetition_penalty=1.5).wait()
    with torch.inference_mode():
        logits = tiny_oracle(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.log_probs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("length", "likeliest"), [(1, 0), (6, 2), (45, 0), (45, 3)])
def test_log_probs_of_a_prompt_are_those_of_transformers(
    engine: Engine, tiny_oracle: LlamaForCausalLM, length: int, likeliest: int
) -> None:
    """45 tokens come in five pieces, beside another request that does not ask for them."""
    prompt, other = some_tokens(length, 5), Answer(engine, some_tokens(6, 3), 9)
    answer = Answer(engine, prompt, 3, log_probs=True, prompt_log_probs=True, likeliest=likeliest).wait()
    told = torch.tensor([value for piece in answer.pieces for value in piece.prompt_log_probs]).view(
        -1, 1 + 2 * likeliest
    )
    expected = log_probs_of_next(tiny_oracle, prompt)
    assert len(told) == length - 1
    torch.testing.assert_close(
        told[:, 0], expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], rtol=0, atol=1e-4
    )
    best = expected.topk(likeliest)
    assert torch.equal(told[:, 1::2].long(), best.indices)
    torch.testing.assert_close(told[:, 2::2], best.values, rtol=0, atol=1e-4)
    assert answer.tokens == greedy(tiny_oracle, prompt, 3)
    assert other.wait().tokens == greedy(tiny_oracle, some_tokens(6, 3), 9)


@pytest.mark.parametrize(
    "request_, seen, limit",
    [
        ({"prompt": [], "max_new_tokens": 3}, "prompt", "empty"),
        ({"prompt": [5] * 49, "max_new_tokens": 3}, "49", "48"),
        ({"prompt": [5, 101], "max_new_tokens": 3}, "101", "0 to 100"),
        ({"prompt": [5, -1], "max_new_tokens": 3}, "-1", "0 to 100"),
        ({"prompt": [5], "max_new_tokens": 0}, "0", "greater than 0"),
        ({"prompt": [5], "max_new_tokens": -7}, "-7", "greater than 0"),
        ({"prompt": [5] * 40, "max_new_tokens": 41}, "81", "80"),
        ({"prompt": [5], "max_new_tokens": 3, "temperature": float("nan")}, "nan", "finite"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_at_once(
    engine: Engine, request_: dict[str, Any], seen: str, limit: str
) -> None:
    with pytest.raises(Refused) as refused:
        Answer(engine, **request_)
    assert seen in str(refused.value) and limit in str(refused.value)


class EvenGuide:
    """A guide that allows even tokens, ready when the test says so."""

    def __init__(self) -> None:
        self.guides, self.ready = self, False

    def when_ready(self, call: Callable[[], None]) -> None:
        self.call = call

    def begin(self) -> None:
        self.ready = True
        self.call()

    def ahead(self, answers: Sequence[tuple[EvenGuide, Sequence[int]]]) -> None:
        self.rows = len(answers)

    def allowed(self, guides: Sequence[EvenGuide]) -> np.ndarray[Any, Any]:
        return np.full((len(guides), -(-TINY["vocab_size"] // 32)), 0x55555555, dtype=np.uint32)


def test_what_waits_for_its_guide_keeps_no_slot_and_no_one_waiting(
    open_tiny: Callable[..., Engine], tiny_oracle: LlamaForCausalLM
) -> None:
    one_slot = open_tiny(max_batch_size=1)
    guide, other, prompt = EvenGuide(), EvenGuide(), some_tokens(5, 1)
    guided = Answer(one_slot, prompt, 6, guide=guide)
    gone = Answer(one_slot, prompt, 6, guide=other)
    assert Answer(one_slot, prompt, 4).wait().tokens == greedy(tiny_oracle, prompt, 4), "it came later and is not kept"
    gone.cancel()
    assert gone.wait().tokens == []
    guide.begin()
    assert all(token % 2 == 0 for token in guided.wait().tokens) and len(guided.tokens) == 6
    assert (one_slot.running, one_slot.waiting) == (0, 0)


REUSED = {**TINY_BUILD, "max_input_len": 60, "max_num_tokens": 37}


def test_requests_that_share_their_beginning_get_the_tokens_they_get_alone(
    tiny: Arrays, tiny_oracle: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Long before short, together and one after the other, also when the cache is full and blocks go;
    whoever else is in the batch."""
    written = write_engine(tmp_path / "engine", tiny, TINY, 1, **REUSED)
    shared = some_tokens(50, 1)
    prompts = [
        shared[:length] + some_tokens(extra, extra)
        for length, extra in ((50, 3), (50, 9), (33, 5), (50, 0), (17, 1), (0, 40))
    ]
    expected = [greedy(tiny_oracle, prompt, 8) for prompt in prompts]
    opened = open_engine(written, reuse=True)
    assert isinstance(opened, Engine)
    for _ in range(3):
        assert [answer.wait().tokens for answer in [Answer(opened, prompt, 8) for prompt in prompts]] == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        answer = Answer(opened, prompt, 8, context_logits=True).wait()
        # whoever wants the logits of a whole prompt gets all of them
        assert answer.tokens == tokens and len(answer.logits("context_logits")) == len(prompt)
    steps, reused = opened.steps, opened.blocks.reused_tokens
    assert Answer(opened, prompts[1], 1).wait().tokens == expected[1][:1]
    assert opened.steps == steps + 1 and opened.blocks.reused_tokens == reused + 48  # of 59 tokens: three blocks of 16
    for seed in range(20):  # others take the room
        Answer(opened, some_tokens(60, 100 + seed), 2).wait()
    assert Answer(opened, prompts[0], 8).wait().tokens == expected[0]
    assert opened.blocks.available == opened.blocks.count
    opened.close()


def test_an_answer_is_the_beginning_of_the_next_prompt(
    tiny: Arrays, tiny_oracle: LlamaForCausalLM, tmp_path: Path
) -> None:
    """As in a chat: what was generated is in the cache too."""
    written = write_engine(tmp_path / "engine", tiny, TINY, 1, **REUSED)
    opened = open_engine(written, reuse=True)
    assert isinstance(opened, Engine)
    first = some_tokens(20, 2)
    said = Answer(opened, first, 16).wait().tokens
    following = [*first, *said, *some_tokens(5, 3)]
    assert Answer(opened, following, 8).wait().tokens == greedy(tiny_oracle, following, 8)
    assert opened.blocks.reused_tokens == 32
    opened.close()


def test_a_step_that_failed_leaves_nothing_to_share(
    tiny: Arrays, tiny_oracle: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_engine(tmp_path / "engine", tiny, TINY, 1, **REUSED)
    opened = open_engine(written, reuse=True)
    assert isinstance(opened, Engine)
    model: Any = opened._model
    prompt, step = some_tokens(50, 4), model.step

    def half_done(chunks: list[tuple[int, int]]) -> None:
        step(chunks)
        for keys in model.keys:
            keys.fill_(7)
        raise RuntimeError("half done")

    monkeypatch.setattr(opened._model, "step", half_done)
    assert Answer(opened, prompt, 4).wait().error is not None
    monkeypatch.undo()
    assert Answer(opened, prompt, 4).wait().tokens == greedy(tiny_oracle, prompt, 4)
    assert opened.blocks.reused_tokens == 0
    opened.close()


def test_a_step_that_fails_ends_its_requests_and_the_next_ones_are_served(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a secret path")

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "launch", broken)
        failed = Answer(engine, some_tokens(4, 1), 5).wait()
    assert failed.error == "a step of the engine failed; the server's log says why" and "a secret path" in caplog.text
    assert len(Answer(engine, some_tokens(4, 1), 5).wait().tokens) == 5


def test_a_request_with_no_token_left_is_told_and_the_others_go_on(engine: Engine) -> None:
    everything = tuple((token,) for token in range(TINY["vocab_size"]))
    answers = [Answer(engine, some_tokens(4, 1), 5), Answer(engine, some_tokens(4, 1), 5, bad_words=everything)]
    assert "no token is left" in str(answers[1].wait().error) and len(answers[0].wait().tokens) == 5


def test_closing_ends_what_still_runs_with_an_error(open_tiny: Callable[..., Engine]) -> None:
    closing = open_tiny()
    answer = Answer(closing, some_tokens(4, 1), 20, on_piece={1: lambda: None})
    answer.next_piece()
    closing.close()
    answer.wait()
    assert answer.error == "the engine is shutting down" or len(answer.tokens) == 20
    with pytest.raises(Refused, match="shutting down"):
        Answer(closing, some_tokens(4, 1), 1)


@pytest.mark.parametrize(
    "how, seen", [("kill", "rank 1 of the engine has ended"), ("stop", "rank 1 of the engine is silent")]
)
def test_a_lost_rank_fails_every_request_and_is_named(tiny: Arrays, tmp_path: Path, how: str, seen: str) -> None:
    done = lose_rank(tiny, tmp_path, how)
    assert json.loads((tmp_path / "said.json").read_text()) == [seen, seen], done.stderr
    assert f"rank 1 {seen.split('engine ')[1]}; every request fails from now on" in done.stderr


def test_a_failed_step_of_rank_0_ends_the_other_ranks(tiny: Arrays, tmp_path: Path) -> None:
    """They wait inside that step for ever otherwise; their end is what the supervisor sees."""
    done = lose_rank(tiny, tmp_path, "break")
    seen = "the engine has failed; the server's log says why"
    assert json.loads((tmp_path / "said.json").read_text()) == [seen, seen], done.stderr
    assert "TypeError" in done.stderr and "rank 1: rank 0 has ended; this rank ends" in done.stderr


def test_a_rank_that_loses_rank_0_ends(tiny: Arrays, tmp_path: Path) -> None:
    done = lose_rank(tiny, tmp_path, "leader")
    assert "rank 1: rank 0 has ended; this rank ends" in done.stderr


def lose_rank(tiny: Arrays, folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    """A run of two ranks that loses one; the shell above each rank waits for a file, so that mpirun ends nothing."""
    engine_dir = write_engine(folder / "engine", tiny, TINY, 2, **{**TINY_BUILD, "max_output_len": 3950})
    command = mpirun(
        2, "sh", "-c", '"$0" "$@" || true', sys.executable, ROOT / "tests/support/lose_rank.py", engine_dir, folder, how
    )
    return subprocess.run(command, env=MPI_ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)


def test_plans_survive_the_way_between_ranks() -> None:
    chunks = (Chunk(3, 17, (-1,), 1), Chunk(0, 0, (1, 2, 3), 0), Chunk(7, 40, (9, 8), 2))
    tables, held = ((7, (4, 9, 2)), (0, (1,))), ((7, 40, 2, -1, -1, -1), (0, 3, -1, -1, -1, -1))
    for step in (Step(chunks, tables, held, with_logits=False), Step(chunks, tables), Step(chunks)):
        assert decode(encode(step)) == step


@pytest.mark.parametrize(
    "change, seen",
    [
        ({"architecture": "MistralForCausalLM"}, "MistralForCausalLM"),
        ({"dtype": "float8"}, "float8"),
        ({"use_parallel_embedding": True}, "use_parallel_embedding True"),
        ({"quantization": {"quant_algo": "W8A16"}}, "W8A16"),
        ({"mapping": {"world_size": 2, "tp_size": 1, "pp_size": 2}}, "pp_size is 2"),
        ({"mapping": {"world_size": 3, "tp_size": 3, "pp_size": 1}}, "tp_size 3"),
    ],
)
def test_an_engine_that_cannot_be_served_is_refused_by_name(change: dict[str, Any], seen: str) -> None:
    config = engine_config(TINY, 1, **TINY_BUILD)
    config["pretrained_config"].update(change)
    with pytest.raises(ValueError, match=seen):
        parse_config(config)


def test_limits_are_read_from_old_and_new_build_configs() -> None:
    old = parse_config(
        engine_config(TINY, 1, max_batch_size=5, max_input_len=48, max_output_len=32, max_num_tokens=None)
    )
    new = parse_config(engine_config(TINY, 1, max_batch_size=5, max_input_len=48, max_seq_len=70, max_num_tokens=9))
    assert (old.max_seq_len, old.max_num_tokens) == (80, 240) and (new.max_seq_len, new.max_num_tokens) == (70, 9)


def test_ranks_that_do_not_match_the_engine_are_refused(tiny: Arrays, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tp_size 2, but 1 rank"):
        open_engine(write_engine(tmp_path / "engine", tiny, TINY, 2, **TINY_BUILD))


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.layers.1.mlp.gate.weight"])
def test_weights_that_contradict_the_config_are_named(tiny: Arrays, tmp_path: Path, name: str) -> None:
    folder = write_engine(tmp_path / "engine", tiny, TINY, 1, **TINY_BUILD)
    tensors = load_file(folder / "rank0.safetensors")
    save_file({**tensors, name: tensors[name][1:]}, folder / "rank0.safetensors")
    with pytest.raises(ValueError, match=rf"{name} has shape .* promises"):
        open_engine(folder)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "rank0.safetensors")
    with pytest.raises(ValueError, match=f"no tensor {name}"):
        open_engine(folder)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    ],
)
def test_rotary_scaling_is_that_of_transformers(scaling: dict[str, Any]) -> None:
    config = parse_config(engine_config({**TINY, "rope_scaling": scaling}, 1, **TINY_BUILD))
    hf = LlamaConfig(**{**TINY, "rope_scaling": {**scaling, "rope_theta": TINY["rope_theta"]}})
    torch.testing.assert_close(rotary_frequencies(config), LlamaRotaryEmbedding(hf).inv_freq)


def test_unknown_rotary_scaling_is_refused_by_name() -> None:
    config = parse_config(engine_config({**TINY, "rope_scaling": {"type": "longrope", "factor": 2.0}}, 1, **TINY_BUILD))
    with pytest.raises(ValueError, match="longrope"):
        rotary_frequencies(config)


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((9, 0), ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # machine code of the generation, older minor number
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_120"], False),  # V100 and PyTorch for CUDA 13
        ((7, 5), ["sm_70", "sm_90a"], True),
        ((12, 1), ["sm_90", "compute_90"], True),  # PTX runs on what comes later
        ((10, 3), ["sm_90", "sm_103a"], True),
    ],
)
def test_a_gpu_that_pytorch_has_no_code_for_is_known(
    capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    assert has_code_for(capability, built_for) is runs
