"""Reports about the room `verified`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from scripts.reports.problem import PathLike, Problem, indented, make, shown


def side_failed(side: str, status: int, last_lines: Sequence[str]) -> Problem:
    how = "status" if status > 0 else "signal"
    memory = " Usually the kernel killed it because memory ran out." if status in (-9, 137) else ""
    return Problem(
        f"{side} gave no answers",
        "verified",
        f"It ended with {how} {abs(status)} before it had answered every prompt.{memory}\n\nIts last "
        f"lines:\n\n{indented(last_lines)}",
        "Correct the cause, then type:",
        make("verified"),
    )


def side_silent(side: str, seconds: float, last_lines: Sequence[str]) -> Problem:
    return Problem(
        f"{side} does not answer",
        "verified",
        f"No answer came within {seconds:.0f} s, which is enough to load 140 GB from a slow disk. The process "
        f"was ended.\n\nIts last lines:\n\n{indented(last_lines)}",
        "See what this machine lacks:",
        make("doctor"),
    )


def engine_differs(page: PathLike, report: Mapping[str, Any], engines: PathLike) -> Problem:
    """report: the content of report.json in the room `verified`."""

    def shown_value(value: float | None) -> str:
        return "no number" if value is None else f"{value:g}"

    failed = "; ".join(
        f"{check['name']}: {shown_value(check['measured'])}, must be at {'least' if check['at_least'] else 'most'} "
        f"{check['limit']:g}"
        for check in report["checks"]
        if not check["passed"]
    )
    one = report["prompts"][0]
    worst = one.get("worst")
    values = (
        f" At position {worst['position']} the log probability of {worst['token']!r} is "
        f"{shown_value(worst['hugging_face'])} for Hugging Face's model and {shown_value(worst['engine'])} for the "
        "engine."
        if worst
        else ""
    )
    checkpoint = Path(engines).with_name("checkpoint")
    return Problem(
        "the engine says something else",
        page,
        f"{failed}. So the room `verified` was not made.\n\nThe worst prompt is {one['prompt']!r}.{values} "
        f"Hugging Face's model continues with {one['hugging_face']!r}, the engine with {one['engine']!r}.\n\n"
        "The page named above has the whole report.",
        "Make the engines again from the weights, and verify again:",
        f"rm -r {shown(checkpoint)} {shown(engines)} && {make('verified')}",
    )
