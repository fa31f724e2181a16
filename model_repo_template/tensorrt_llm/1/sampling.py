"""From logits to the next token: pure functions that follow TensorRT-LLM v0.8.0's rules for sampling and stopping."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = tuple[tuple[int, ...], ...]
# Rows of logits whose probabilities are computed at a time, of prompts: each takes a row's memory again
ROWS_AT_ONCE = 64
# Logits divided by less are no longer finite in float32.
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens, under upstream's names; the defaults are greedy and change nothing."""

    temperature: float = 1.0
    top_k: int = 0  # 0: not given
    top_p: float = 0.0  # 0: not given
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    random_seed: int = 0
    min_length: int = 0  # generated tokens before end_id is allowed
    end_id: int = -1  # -1: none
    other_end_ids: tuple[int, ...] = ()  # with end_id, the model's other ends
    embedding_bias: Tensor | None = None  # (vocab_size,), added to the logits
    bad_words: Words = ()
    stop_words: Words = ()
    min_p: float = 0.0  # tokens less likely than the likeliest times this are left out; not upstream's
    guide: Any = None  # guides.Guide: what may come next

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends the answer."""
        return (self.end_id, *self.other_end_ids) if self.end_id >= 0 else ()

    @property
    def greedy(self) -> bool:
        """Without top_k and top_p the choice is greedy whatever the temperature, as in upstream's runtime arguments."""
        return self.top_k == 1 or (self.top_k == 0 and self.top_p == 0.0)

    @property
    def best_of_logits(self) -> bool:
        """The choice is the largest of the model's own logits: no earlier token and no setting changes which one that
        is."""
        return self.greedy and not self.from_history and self.embedding_bias is None

    @property
    def from_history(self) -> bool:
        """The choice depends on the tokens before it."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.bad_words) or self.guide is not None

    @property
    def held(self) -> bool:
        """The end tokens may not be chosen at first. That depends only on the number of tokens, which is known
        ahead."""
        return bool(self.end_ids) and self.min_length > 0

    @property
    def adjusts(self) -> bool:
        """Something but a guide and min_p changes the logits."""
        penalties = (self.temperature, self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 1.0, 0.0, 0.0) or self.held or bool(self.bad_words) or self.embedding_bias is not None


def on(device: torch.device, values: Any) -> Tensor:
    """Numbers, or a tensor, on a device. The copy to a GPU waits for nothing that runs there."""
    made = torch.as_tensor(values)
    return made.to(device) if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


def refusal(sampling: Sampling, vocab_size: int) -> str | None:
    """Why these settings cannot be used, with the value and the limit; None when they can."""
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            return f"{field.name} is {value}; it must be a finite number"
    if 0 < sampling.temperature < MIN_TEMPERATURE:
        return f"temperature is {sampling.temperature:g}; it must be at least {MIN_TEMPERATURE:g} (without top_k and top_p: greedy)"
    for name in ("temperature", "repetition_penalty"):
        if getattr(sampling, name) <= 0:
            return f"{name} is {getattr(sampling, name):g}; it must be greater than 0"
    if not 0 <= sampling.top_p <= 1:
        return f"top_p is {sampling.top_p:g}; it must be between 0 and 1"
    if not 0 <= sampling.min_p <= 1:
        return f"min_p is {sampling.min_p:g}; it must be between 0 and 1"
    for name in ("top_k", "min_length", "random_seed"):
        if getattr(sampling, name) < 0:
            return f"{name} is {getattr(sampling, name)}; it must not be negative"
    if not -1 <= sampling.end_id < vocab_size:
        return f"end_id is {sampling.end_id}; the vocabulary has ids 0 to {vocab_size - 1} (-1: no end)"
    if (bias := sampling.embedding_bias) is not None:
        if bias.shape != (vocab_size,):
            return f"embedding_bias has shape {list(bias.shape)}; the vocabulary has {vocab_size} ids"
        if not bool(bias.isfinite().all()):
            return "embedding_bias holds a value that is not a finite number"
    for name in ("bad_words", "stop_words"):
        for token in (token for word in getattr(sampling, name) for token in word):
            if not 0 <= token < vocab_size:
                return f"{name}_list holds the id {token}; the vocabulary has ids 0 to {vocab_size - 1}"
    return None


def word_list(flat: Sequence[int], ends: Sequence[int]) -> Words:
    """Upstream's INT32 [2, n] form as tuples: all ids in a row, and where each word ends, padded with -1.

    `([5, 6, 7, 0], [2, 3, -1, -1])` is the words (5, 6) and (7,). Raises ValueError when the ends do not rise or lie
    outside.
    """
    words, begin = [], 0
    for index, end in enumerate(ends):
        if end == -1:
            if any(later != -1 for later in ends[index:]):
                raise ValueError(f"an end offset follows the -1 at index {index}")
            break
        if not begin < end <= len(flat):
            raise ValueError(f"end offset {end} at index {index}; it must lie between {begin + 1} and {len(flat)}")
        words.append(tuple(flat[begin:end]))
        begin = end
    return tuple(words)


def ends_with(tokens: Sequence[int], words: Words) -> bool:
    """Whether the sequence (prompt and generated tokens, as upstream compares) ends with one of the words."""
    return any(tuple(tokens[-len(word) :]) == word for word in words)


def adjusted(logits: Tensor, sampling: Sampling, tokens: Sequence[int], n_generated: int) -> Tensor:
    """The logits (vocab_size,) that the next token is chosen from, but for guides and min_p (`guided`).

    tokens: the prompt and the generated tokens that are known; n_generated counts all that were chosen.
    Order and rules of v0.8.0's batchApplyPenalty and ban_bad_words: bias, temperature, repetition penalty
    (multiplicative), presence, frequency, min_length, bad words. All three penalties count the prompt's tokens too.
    """
    logits = logits.clone()
    if sampling.embedding_bias is not None:
        logits += sampling.embedding_bias.to(logits.device)
    if sampling.temperature != 1.0:
        logits /= sampling.temperature
    if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0):
        counts = on(logits.device, torch.bincount(torch.tensor(tokens), minlength=len(logits)))
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        penalised -= sampling.presence_penalty + sampling.frequency_penalty * counts
        logits = torch.where(counts > 0, penalised, logits)
    if sampling.held and n_generated < sampling.min_length:
        for token in sampling.end_ids:
            logits[token] = -math.inf
    for word in sampling.bad_words:
        if len(word) == 1 or ends_with(tokens, (word[:-1],)):
            logits[word[-1]] = -math.inf
    return logits


@functools.cache
def byte_limits(device: torch.device) -> Tensor:
    """For each byte of a mask: infinity at its bits that are 1, minus infinity at the others, (256, 8)."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.where(bits == 1, math.inf, -math.inf).to(device)


def limits_of(bits: NDArray[np.uint32], vocab_size: int, device: torch.device) -> Tensor:
    """The largest value that each logit may have, (rows, vocab_size), from a bit per token.

    A table of bytes and `minimum` take a tenth of the time that masked_fill takes on CPUs.
    """
    of_bytes = on(device, torch.from_numpy(bits.view(np.uint8)))
    limits = byte_limits(device).index_select(0, of_bytes.flatten().int())
    return limits.view(len(bits), -1)[:, :vocab_size]


def guided(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Adjusted logits (rows, vocab_size) without the tokens that a row's guide forbids,
    then without those that its min_p excludes."""
    rows = [row for row, sampling in enumerate(samplings) if sampling.guide is not None]
    if rows:
        guides = [samplings[row].guide for row in rows]
        limits = limits_of(guides[0].allowed(guides), logits.shape[1], logits.device)
        if len(rows) == len(logits):
            logits = logits.minimum(limits)
        else:
            at = on(logits.device, rows)
            logits = logits.index_copy(0, at, logits[at].minimum(limits))
    for row, sampling in enumerate(samplings):
        if sampling.min_p > 0:
            one = logits[row]
            one.masked_fill_(one < one.max() + math.log(sampling.min_p), -math.inf)
    return logits


def kept(logits: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """What rows that are not greedy draw from: probabilities in falling order and their token ids, both (rows,
    vocab_size).

    logits: adjusted, (rows, vocab_size). top_k comes first, then the smallest set of the remaining tokens whose
    probability reaches top_p. top_k, top_p: one per row, 0 if not given.
    """
    ordered, ids = logits.sort(descending=True, stable=True)
    beyond = torch.arange(ordered.shape[1], device=ordered.device) >= top_k[:, None]
    probabilities = ordered.masked_fill(beyond & (top_k > 0)[:, None], -math.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p[:, None]) & (top_p > 0)[:, None], 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True), ids


def choose(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """The next token of each row of adjusted logits (rows, vocab_size): (rows,), -1 where every token is banned.

    draws: a number in [0, 1) for each row that is not greedy; the same number gives the same token on every device.
    """
    tokens = logits.argmax(dim=-1)
    best = logits.amax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if drawn:
        rows = on(logits.device, drawn)
        probabilities, ids = kept(
            logits[rows],
            on(logits.device, [samplings[row].top_k for row in drawn]),
            on(logits.device, [samplings[row].top_p for row in drawn]),
        )
        at = (probabilities.cumsum(dim=-1) <= on(logits.device, list(draws))[:, None]).sum(dim=-1, keepdim=True)
        # a draw beyond the last sum, because of rounding, means the last token
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        tokens[rows] = ids.gather(1, torch.minimum(at, last)).flatten()
    return torch.where(best.isfinite(), tokens, -1)


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities of the tokens (rows,) under the model itself: log_softmax of its logits (rows, vocab_size),
    unadjusted."""
    return logits.gather(1, tokens[:, None].long().clamp(min=0)).flatten() - logits.logsumexp(dim=-1)


def with_likeliest(logits: Tensor, chances: Tensor, most: int) -> Tensor:
    """The tokens' log probabilities (rows,) and beside each the `most` likeliest tokens: (rows, 1 + 2 * most), ids and
    log probabilities in turn, the likeliest first. An id is exact in float32 up to 2^24."""
    best, ids = logits.topk(most, dim=-1)
    best = best - logits.logsumexp(dim=-1, keepdim=True)
    return torch.cat((chances[:, None], torch.stack((ids.float(), best), dim=-1).flatten(1)), dim=1)


def of_prompt(logits: Tensor, following: Sequence[int], most: int) -> tuple[float, ...]:
    """Log probabilities of a prompt's tokens, each out of the logits (rows, vocab_size) of the position before it, in
    the form of
    `with_likeliest`: 1 + 2 * most numbers for each."""
    told: list[float] = []
    for first in range(0, len(following), ROWS_AT_ONCE):
        rows = logits[first : first + ROWS_AT_ONCE]
        tokens = torch.tensor(following[first : first + ROWS_AT_ONCE]).to(logits.device)
        told += with_likeliest(rows, log_probs(rows, tokens), most).flatten().tolist()
    return tuple(told)
