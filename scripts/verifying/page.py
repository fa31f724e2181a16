"""The report of the room verified: report.json for machines, report.html for people, both made from one dictionary."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.verifying.compare import ARITHMETIC, Answer, Check, Difference, Reference, Thresholds, Verdict, shown_up

# Prompts on the page; report.json has all.
WORST_PROMPTS = 10


def report(
    about: Mapping[str, Any],
    texts: Sequence[str],
    pairs: Sequence[tuple[Reference, Answer]],
    found: Sequence[Difference],
    result: Verdict,
    limits: Thresholds,
    tokenizer: Any,
) -> dict[str, Any]:
    """report.json. `about`: what was compared, copied as it is; `texts`: the prompts. The worst prompt comes first.

    Numbers are rounded (compare.shown_up); values below a tenth of the limit become one value, because they are noise.
    """

    def one(i: int) -> dict[str, Any]:
        (reference, answer), difference, largest = pairs[i], found[i], found[i].worst.difference
        entry: dict[str, Any] = {
            "prompt": texts[i],
            "largest_difference": _number(shown_up(largest, limits.log_prob)),
            "tokens_equal": difference.equal_tokens,
            "hugging_face": tokenizer.decode(reference.tokens),
            "engine": tokenizer.decode(answer.tokens),
        }
        if difference.gap is not None:
            entry["parted"] = {"near_tie": not difference.turned, "gap": _rounded(difference.gap, limits.log_prob)}
        if largest > limits.log_prob / 10:
            worst = difference.worst
            entry["worst"] = {
                "position": worst.position,
                "token": tokenizer.id_to_token(worst.token),
                "hugging_face": _rounded(worst.reference, limits.log_prob),
                "engine": _rounded(worst.engine, limits.log_prob),
            }
        return entry

    return {
        "passed": result.passed,
        **about,
        "thresholds": {**vars(limits), "arithmetic": ARITHMETIC},
        "checks": [{**vars(check), "measured": _measured(check), "passed": check.passed} for check in result.checks],
        "perplexity": dict(zip(("hugging_face", "engine"), (_digits(value) for value in result.perplexity))),
        "greedy_tokens": {
            "asked": result.tokens,
            "compared": result.compared_tokens,
            "equal": result.equal_tokens,
            "near_ties": result.near_ties,
            "turned": result.turned,
        },
        "positions": result.positions,
        "prompts": [one(i) for i in result.order],
    }


def _measured(check: Check) -> float | None:
    return _number(round(check.measured, 4) if check.at_least else shown_up(check.measured, check.limit))


def _number(value: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def _rounded(value: float, limit: float) -> float | None:
    return round(value, 1 - math.floor(math.log10(limit))) if math.isfinite(value) else None


def _digits(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { padding: .6rem 1rem; border-radius: .4rem; color: #fff; background: #b3261e } h1.passed { background: #1b6e3c }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 } th, td { text-align: left; vertical-align: top; padding: .35rem .6rem;
border-bottom: 1px solid #ddd } th { font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.bad { color: #b3261e; font-weight: 600 } .good { color: #1b6e3c } mark { background: #ffd9d6 }
code { font: .9em ui-monospace, monospace; white-space: pre-wrap } small { color: #666 }
""".strip()


REHEARSAL = "<p><mark>A rehearsal: stand-ins built the engine and answered in its place. This says nothing about TensorRT.</mark></p>"


def page(said: Mapping[str, Any]) -> str:
    """report.html: one page that needs nothing else, the verdict first. `said` is `report`'s dictionary."""
    engine, asked, greedy, limits = said["engine"], said["asked"], said["greedy_tokens"], said["thresholds"]
    verdict = "The engine says what Hugging Face's model says" if said["passed"] else "The engine says something else"
    where = "GPUs, each side in its own dtype" if said["device"] == "cuda" else "a CPU, both sides in float32"
    perplexity = said["perplexity"]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>verified: {'passed' if said['passed'] else 'failed'}</title><style>{STYLE}</style></head><body>",
            f'<h1 class="{"passed" if said["passed"] else "failed"}">{verdict}.</h1>',
            REHEARSAL if engine.get("rehearsal") else "",
            f"<p>Asked: {asked['prompts']} prompts, {asked['answer_tokens']} tokens of greedy answer each. They are "
            f"compared at {said['positions']} positions: the {asked['top_k']} likeliest tokens' log probabilities. "
            f"Engine: {engine['engine']}, {engine['world_size']} ranks, {engine['dtype']}, TensorRT-LLM "
            f"{engine['trtllm_version']} checkpoint. Hugging Face's weights: {said['stored_dtype']}. This was "
            f"computed on {where}.</p>",
            _table(
                ["Check", "*measured", "*limit", ""],
                [
                    [check["name"], f"*{_shown(check['measured'])}", f"*{_limit(check)}", _mark(check["passed"])]
                    for check in said["checks"]
                ],
            ),
            f"<p>Greedy tokens: {greedy['asked']} asked, {greedy['compared']} compared, {greedy['equal']} equal; "
            f"{greedy['near_ties']} answers parted at a near tie, {greedy['turned']} where there was none. "
            f"Perplexity of the prompts: Hugging Face {_shown(perplexity['hugging_face'])}, engine "
            f"{_shown(perplexity['engine'])}.</p>",
            f"<h2>The {min(WORST_PROMPTS, len(said['prompts']))} worst prompts</h2>",
            _table(
                ["Prompt", "Hugging Face goes on", "The engine goes on", "*largest difference"],
                [
                    [f"<code>{html.escape(one['prompt'])}</code>", *_texts(one), f"*{_worst(one)}"]
                    for one in said["prompts"][:WORST_PROMPTS]
                ],
            ),
            "<h2>How it was judged</h2>",
            f"<p>Thresholds for {said['precision']}: log probabilities (natural) may differ by "
            f"{limits['log_prob']:g}, on average by {limits['mean']:g}, the logarithm of the perplexity by "
            f"{limits['perplexity']:g}. Where the engine's choice was at most {limits['near_tie']:g} less likely to "
            "Hugging Face's model than its own, the choice is a near tie and may turn; what follows is another text "
            f"and is not compared. At least {limits['compared']:.0%} of all tokens must have been.</p>",
            f"<p>{html.escape(limits['arithmetic'])}</p>",
            "<p><small>Values are rounded up to a tenth of their limit, because rounding errors differ from run to "
            "run. All prompts: report.json.</small></p>",
            "</body></html>\n",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; a cell that starts with * is a number."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f'<{tag} class="n">{c[1:]}</{tag}>' if c.startswith("*") else f"<{tag}>{c}</{tag}>" for c in row)

    return "\n".join(
        ["<table>", f"<tr>{cells('th', head)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows), "</table>"]
    )


def _shown(value: float | None) -> str:
    return "not a number" if value is None else f"{value:g}"


def _limit(check: Mapping[str, Any]) -> str:
    return f"at {'least' if check['at_least'] else 'most'} {check['limit']:g}"


def _mark(passed: bool) -> str:
    return '<span class="good">passed</span>' if passed else '<span class="bad">failed</span>'


def _texts(one: Mapping[str, Any]) -> list[str]:
    """Both answers as HTML. From the first difference on they are marked, unless it was a near tie."""
    ours, theirs = one["hugging_face"], one["engine"]
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    tag = "code" if one.get("parted", {"near_tie": True})["near_tie"] else "mark"
    return [f"<code>{html.escape(t[:same])}<{tag}>{html.escape(t[same:])}</{tag}></code>" for t in (ours, theirs)]


def _worst(one: Mapping[str, Any]) -> str:
    if "worst" not in one:
        return f"at most {_shown(one['largest_difference'])}"
    worst = one["worst"]
    return (
        f"{_shown(one['largest_difference'])}<br><small>position {worst['position']}, "
        f"<code>{html.escape(repr(worst['token']))}</code>: {_shown(worst['hugging_face'])} and "
        f"{_shown(worst['engine'])}</small>"
    )
