"""Tokens are chosen by the rules that clients of TensorRT-LLM rely on; transformers' processors are the oracle."""

from __future__ import annotations

import math
from typing import Any

import drive_engine  # noqa: F401 (finds the engine's modules)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import Sampling, adjusted, choose, ends_with, kept, limits_of, log_probs, refusal, word_list
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 37
PROMPT = [5, 9, 9, 20]
TOKENS = [*PROMPT, 7, 5]


def some_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def after(sampling: Sampling, logits: torch.Tensor, tokens: list[int] = TOKENS) -> torch.Tensor:
    return adjusted(logits, sampling, tokens, len(tokens) - len(PROMPT))


def by_transformers(logits: torch.Tensor, *processors: Any) -> torch.Tensor:
    processed: torch.Tensor = LogitsProcessorList(processors)(torch.LongTensor([TOKENS]), logits[None].clone())
    return processed[0]


@pytest.mark.parametrize("seed", range(3))
def test_repetition_penalty_and_temperature_are_hugging_faces(seed: int) -> None:
    logits = some_logits(seed)
    expected = by_transformers(logits, RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(0.6))
    torch.testing.assert_close(after(Sampling(repetition_penalty=1.7, temperature=0.6), logits), expected)


def test_presence_and_frequency_penalties_count_the_prompt_too() -> None:
    logits = some_logits(0)
    expected = logits.clone()
    for token, times in {5: 2, 9: 2, 20: 1, 7: 1}.items():
        expected[token] -= 0.5 + 0.25 * times
    torch.testing.assert_close(after(Sampling(presence_penalty=0.5, frequency_penalty=0.25), logits), expected)


def test_embedding_bias_comes_before_the_temperature() -> None:
    logits, bias = some_logits(0), some_logits(1)
    torch.testing.assert_close(after(Sampling(embedding_bias=bias, temperature=2.0), logits), (logits + bias) / 2)


@pytest.mark.parametrize("min_length", [1, 2, 3, 9])
def test_end_id_is_forbidden_until_min_length(min_length: int) -> None:
    logits = some_logits(0)
    expected = by_transformers(logits, MinNewTokensLengthLogitsProcessor(len(PROMPT), min_length, [11]))
    torch.testing.assert_close(after(Sampling(min_length=min_length, end_id=11), logits), expected)


def test_bad_words_are_hugging_faces() -> None:
    logits, words = some_logits(0), ((3,), (7, 5, 8), (5, 6), (9, 12), (20, 7, 5, 30))
    expected = by_transformers(logits, NoBadWordsLogitsProcessor([list(word) for word in words]))
    torch.testing.assert_close(after(Sampling(bad_words=words), logits), expected)


@pytest.mark.parametrize("top_k, top_p", [(4, 0.0), (0, 0.7), (0, 1.0), (12, 0.5), (1000, 0.9), (3, 1e-6)])
def test_sampled_distribution_is_hugging_faces(top_k: int, top_p: float) -> None:
    logits = some_logits(4)
    warpers = ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p else [])
    expected = by_transformers(logits, *warpers).softmax(dim=-1)
    # between others in the batch, which have their own settings
    rows = torch.stack([some_logits(1), logits, some_logits(2)])
    found, ids = kept(rows, torch.tensor([0, top_k, 2]), torch.tensor([0.3, top_p, 0.0]))
    torch.testing.assert_close(torch.zeros(VOCAB).scatter(0, ids[1], found[1]), expected)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=5.0), Sampling(top_k=1, top_p=0.9), Sampling(random_seed=8)]
)
def test_without_top_k_and_top_p_the_best_token_wins(sampling: Sampling) -> None:
    logits = some_logits(2)
    assert choose(after(sampling, logits)[None], [sampling], []).tolist() == [int(logits.argmax())]


def test_draws_follow_the_distribution() -> None:
    """Evenly spaced draws give each token its share; a row that is greedy in between takes none."""
    logits, sampling, n = some_logits(2), Sampling(top_k=3, top_p=0.99), 3000
    draws = [(index + 0.5) / n for index in range(n)]
    tokens = choose(logits.expand(n + 1, -1), [Sampling(), *[sampling] * n], draws)
    found, ids = kept(logits[None], torch.tensor([3]), torch.tensor([0.99]))
    shares = torch.bincount(tokens[1:], minlength=VOCAB) / n
    torch.testing.assert_close(shares, torch.zeros(VOCAB).scatter(0, ids[0], found[0]), rtol=0, atol=1e-3)
    assert tokens[0] == logits.argmax()


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_smallest_and_the_largest_draw_give_a_token_that_may_be_drawn(draw: float) -> None:
    logits = some_logits(2)
    token = int(choose(logits[None], [Sampling(top_k=3)], [draw]))
    assert token in logits.topk(3).indices.tolist()


def test_when_every_token_is_banned_the_row_has_none_and_the_others_have() -> None:
    everything = Sampling(bad_words=tuple((token,) for token in range(VOCAB)))
    rows = torch.stack([some_logits(0), after(everything, some_logits(0)), some_logits(1)])
    tokens = choose(rows, [Sampling(top_k=2), everything, Sampling()], [0.0]).tolist()
    assert tokens == [int(some_logits(0).argmax()), -1, int(some_logits(1).argmax())]


def test_log_probs_are_the_models_own() -> None:
    rows = torch.stack([some_logits(3), some_logits(4)])
    expected = rows.log_softmax(-1)[[0, 1], [6, 30]]
    torch.testing.assert_close(log_probs(rows, torch.tensor([6, 30])), expected)


def test_stop_words_match_at_the_end_and_across_the_prompts_border() -> None:
    assert ends_with(TOKENS, ((7, 5),)) and ends_with(TOKENS, ((1,), (20, 7, 5)))
    assert not ends_with(TOKENS, ((5, 7), (7,))) and not ends_with([5], ((7, 5),)) and not ends_with(TOKENS, ())


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple), max_size=5).map(tuple), st.integers(0, 3)
)
def test_word_lists_survive_upstreams_form(words: tuple[tuple[int, ...], ...], padding: int) -> None:
    flat = [token for word in words for token in word]
    ends = [sum(map(len, words[: index + 1])) for index in range(len(words))]
    length = max(1, len(flat)) + padding
    filled = flat + [0] * (length - len(flat)), ends + [-1] * (length - len(ends))
    assert word_list(*filled) == words


@pytest.mark.parametrize("ends", [[2, 1, -1], [0, -1, -1], [4, -1, -1], [-2, -1, -1], [1, -1, 2], [2, 2, -1]])
def test_malformed_word_lists_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match=r"end offset"):
        word_list([1, 2, 3], ends)


@pytest.mark.parametrize(
    "sampling, seen, limit",
    [
        (Sampling(temperature=math.nan), "nan", "finite"),
        (Sampling(temperature=math.inf), "inf", "finite"),
        (Sampling(temperature=0.0), "0", "greater than 0"),
        (Sampling(temperature=-1.5), "-1.5", "greater than 0"),
        (Sampling(top_p=1.5), "1.5", "between 0 and 1"),
        (Sampling(top_p=-0.1), "-0.1", "between 0 and 1"),
        (Sampling(top_k=-3), "-3", "negative"),
        (Sampling(repetition_penalty=0.0), "0", "greater than 0"),
        (Sampling(frequency_penalty=math.nan), "nan", "finite"),
        (Sampling(min_length=-1), "-1", "negative"),
        (Sampling(end_id=VOCAB), "37", "0 to 36"),
        (Sampling(end_id=-2), "-2", "0 to 36"),
        (Sampling(embedding_bias=torch.zeros(5)), "[5]", "37"),
        (Sampling(embedding_bias=torch.full((VOCAB,), math.nan)), "embedding_bias", "finite"),
        (Sampling(bad_words=((1, 40),)), "40", "0 to 36"),
        (Sampling(stop_words=((-4,),)), "-4", "0 to 36"),
    ],
)
def test_settings_that_mean_nothing_are_refused_with_value_and_limit(sampling: Sampling, seen: str, limit: str) -> None:
    refused = refusal(sampling, VOCAB)
    assert refused is not None and seen in refused and limit in refused


def test_settings_at_their_limits_are_accepted() -> None:
    edge = Sampling(temperature=1e-3, top_k=10_000, top_p=1.0, end_id=VOCAB - 1, random_seed=2**64 - 1)
    assert refusal(edge, VOCAB) is None and refusal(Sampling(), VOCAB) is None


@pytest.mark.parametrize("vocab_size", [8, 100, 256])
def test_a_guides_bits_forbid_exactly_the_tokens_whose_bit_is_0(vocab_size: int) -> None:
    bits = np.random.default_rng(vocab_size).integers(0, 1 << 32, (3, -(-vocab_size // 32)), dtype=np.uint32)
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab_size, bitorder="little").view(bool)
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0))
    kept_by_bits = logits.minimum(limits_of(bits, vocab_size, logits.device))
    assert torch.equal(kept_by_bits, logits.masked_fill(~torch.from_numpy(allowed), -math.inf))
