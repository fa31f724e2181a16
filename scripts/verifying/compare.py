"""Compares an engine's answers with Hugging Face's: which differences are rounding, which are faults, and the verdict.

Numbers in, numbers out: it opens no file, model or engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# From exact to coarse; the last two are the size of the weights (and perhaps of the activations).
PRECISIONS = ("float32", "float16", "bfloat16", "8 bits", "4 bits")


# The reasons for the thresholds, which the report repeats. Measurements on the bundled model with TP=2, largest and
# mean: float32 on a CPU 0.00002 and 0.000002; on two H100 float16 0.04 and 0.004, bfloat16 (engine only) 0.19 and
# 0.024. A real fault, fc and gate of one layer of one rank exchanged, gives 3.5 and 0.34 in bfloat16.
ARITHMETIC = (
    "The residual stream of the deepest preset (80 layers) is rounded 160 times; roundings are independent, so they "
    "grow with the root: 12.6 units of roundoff. Logits are of a size of 16 or so: 12.6 * 16 = 200 units. float16: "
    "200 * 2^-11 = 0.1. bfloat16: 200 * 2^-8 = 0.8. In float32 200 units are only 0.000012, and what counts is that "
    "sums of up to 28 672 products are taken in another order (in float32 whatever the dtype): 80 times that, 0.001. "
    "The mean may be a tenth: the largest of 20 000 normal values is 4 standard deviations or 5 mean absolute "
    "values, and twice that is room. A near tie is twice the threshold: the one token may gain and the other lose "
    "it. Quantized weights change the model, and no rounding of sums explains by how much: rounding a normal row of "
    "weights to 8 bits moves it by 0.8 %, to 4 bits in groups of 128 by 10 %. 8 bits may differ twice as much as "
    "bfloat16, 4 bits six times (and their texts part sooner); perplexity, which is published to change by less than "
    "0.01 and 0.03, by 0.05 and 0.1. Those of 8 and 4 bits are estimates, held against no GPU yet."
)


@dataclass(frozen=True)
class Thresholds:
    """What counts as rounding (ARITHMETIC). Differences are of natural log probabilities, absolute."""

    log_prob: float  # the largest of all differences
    mean: float  # their mean
    perplexity: float  # the logarithm of the perplexities' ratio, which is a mean of differences too
    near_tie: float  # a greedy choice may differ if the gap was at most this
    compared: float = 0.5  # share of the answers' tokens that must have been compared


def thresholds(precision: str) -> Thresholds:
    """The thresholds for the coarsest arithmetic of both sides (see `coarsest`)."""
    largest = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.8, "8 bits": 1.6, "4 bits": 4.8}[precision]
    return Thresholds(
        log_prob=largest,
        mean=largest / 10,
        perplexity={"8 bits": 0.05, "4 bits": 0.1}.get(precision, largest / 10),
        near_tie=2 * largest,
        compared=0.25 if precision == "4 bits" else 0.5,
    )


def coarsest(stored: str, engine: str, on_gpu: bool, quant_algo: str | None = None) -> str:
    """The coarsest arithmetic between the two sides; dtypes of the Hugging Face weights and of the engine.

    On a CPU both sides compute in float32, so only the engine's rounding of the weights counts, if there is any.
    On a GPU each side computes in its own dtype. quant_algo: TensorRT-LLM's word ('W8A16', 'FP8', 'W4A16_AWQ',
    ...), None for none.
    """
    if quant_algo is not None:
        return "4 bits" if quant_algo.startswith("W4") else "8 bits"
    if on_gpu:
        return max(stored, engine, key=PRECISIONS.index)
    return "float32" if engine in (stored, "float32") else engine


@dataclass(frozen=True)
class Reference:
    """Hugging Face's answer to one prompt: `tokens` follow `prompt`, greedily.

    Position i predicts the token after the first i + 1: positions 0 .. len(prompt) + len(tokens) - 2.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...]  # (positions, k), best first
    log_probs: tuple[tuple[float, ...], ...]  # (positions, k), of top_ids
    prompt_log_probs: tuple[float, ...]  # (len(prompt) - 1,), of the prompt's own tokens


@dataclass(frozen=True)
class Answer:
    """The engine's answer to the same prompt: its own greedy tokens, and its numbers for the reference's ids."""

    tokens: tuple[int, ...]
    log_probs: tuple[tuple[float, ...], ...]  # (positions, k), of the reference's top_ids
    prompt_log_probs: tuple[float, ...]


@dataclass(frozen=True)
class Worst:
    """The largest difference of one prompt: its position, its token, and both values."""

    difference: float
    position: int
    token: int
    reference: float
    engine: float


@dataclass(frozen=True)
class Difference:
    """The result for one prompt. Tokens after the first difference are not compared,
    because they follow different texts."""

    equal_tokens: int
    compared_tokens: int
    gap: float | None  # at the first difference: how much likelier the reference's token was; None: no difference
    turned: bool  # they differ, and it was not a near tie
    worst: Worst
    total: float  # sum of the differences
    count: int  # how many


def compare_answer(reference: Reference, answer: Answer, limits: Thresholds) -> Difference:
    """Compare up to and with the first greedy token that differs: until then both sides read the same text.

    A value that is not finite differs by infinity.
    """
    pairs = list(zip(reference.tokens, answer.tokens))
    equal = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    parted = equal < len(reference.tokens)
    compared = min(equal + 1, len(pairs))
    gap = None
    if parted:
        position = len(reference.prompt) - 1 + equal
        known = dict(zip(reference.top_ids[position], reference.log_probs[position]))
        chosen = answer.tokens[equal] if equal < len(answer.tokens) else -1
        gap = reference.log_probs[position][0] - known.get(chosen, -math.inf)
    worst, total, count = Worst(0.0, 0, reference.top_ids[0][0], 0.0, 0.0), 0.0, 0
    for position in range(len(reference.prompt) - 1 + compared):
        rows = zip(reference.top_ids[position], reference.log_probs[position], answer.log_probs[position])
        for token, ours, theirs in rows:
            difference = _apart(ours, theirs)
            total, count = total + difference, count + 1
            if difference > worst.difference:
                worst = Worst(difference, position, token, ours, theirs)
    turned = gap is not None and not gap <= limits.near_tie
    return Difference(equal, compared, gap, turned, worst, total, count)


def _apart(ours: float, theirs: float) -> float:
    difference = abs(ours - theirs)
    return difference if math.isfinite(difference) else math.inf


@dataclass(frozen=True)
class Check:
    """One line of the verdict: a measured value and its limit."""

    name: str
    measured: float
    limit: float
    at_least: bool = False  # else: at most

    @property
    def passed(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True)
class Verdict:
    """The verdict over all prompts. `order`: the prompts' numbers, worst first."""

    checks: tuple[Check, ...]
    order: tuple[int, ...]
    positions: int
    tokens: int
    compared_tokens: int
    equal_tokens: int
    near_ties: int
    turned: int
    perplexity: tuple[float, float]  # of the prompts' own text: Hugging Face's, the engine's

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verdict(pairs: Sequence[tuple[Reference, Answer]], found: Sequence[Difference], limits: Thresholds) -> Verdict:
    """The verdict over all prompts; `found` is compare_answer's result for each pair."""
    tokens = sum(len(reference.tokens) for reference, _ in pairs)
    compared = sum(difference.compared_tokens for difference in found)
    turned = sum(difference.turned for difference in found)
    mean = sum(difference.total for difference in found) / sum(difference.count for difference in found)
    perplexities = (
        perplexity([value for reference, _ in pairs for value in reference.prompt_log_probs]),
        perplexity([value for _, answer in pairs for value in answer.prompt_log_probs]),
    )
    checks = (
        Check("greedy answers that differ, near ties apart", turned, 0),
        Check("largest difference of a log probability", max(d.worst.difference for d in found), limits.log_prob),
        Check("mean difference of a log probability", mean, limits.mean),
        Check("logarithm of the perplexities' ratio", _apart(*map(math.log, perplexities)), limits.perplexity),
        Check("share of the answers' tokens compared", compared / tokens, limits.compared, at_least=True),
    )
    order = sorted(
        range(len(found)),
        key=lambda i: (not found[i].turned, -shown_up(found[i].worst.difference, limits.log_prob), i),
    )
    return Verdict(
        checks=checks,
        order=tuple(order),
        positions=sum(len(ours.prompt) - 1 + d.compared_tokens for (ours, _), d in zip(pairs, found)),
        tokens=tokens,
        compared_tokens=compared,
        equal_tokens=sum(difference.equal_tokens for difference in found),
        near_ties=sum(difference.gap is not None and not difference.turned for difference in found),
        turned=turned,
        perplexity=perplexities,
    )


def perplexity(log_probs: Sequence[float]) -> float:
    """exp of the mean negative log probability; 1 for no token, infinite if a value is NaN."""
    mean = -sum(log_probs) / max(1, len(log_probs))
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf


def shown_up(value: float, limit: float) -> float:
    """A measured value as reports show it: rounded up to a tenth of the limit's power of ten.

    Rounding errors differ from run to run (which requests share a step); the report of two trees should not.
    """
    if not math.isfinite(value) or limit <= 0:
        return value
    exponent = math.floor(math.log10(limit)) - 1
    return float(f"{math.ceil(value / 10.0**exponent - 1e-9)}e{exponent}")
