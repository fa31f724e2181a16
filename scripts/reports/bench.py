"""Reports of the benchmarks."""

from __future__ import annotations

import shlex
from typing import Any, Mapping, Sequence

from scripts.reports.problem import PathLike, Problem, indented, make


def bench_server_failed(what: str, last_lines: Sequence[str]) -> Problem:
    return Problem(
        "the measured server failed",
        "bench-text",
        f"The measured server: {what}. Its last errors:\n\n" + indented(last_lines),
        "Measure again on an idle machine:",
        make("bench-text"),
    )


def text_is_wrong(model: str) -> Problem:
    return Problem(
        "wrong text",
        model,
        f"Some answers of {model} were not the text of their tokens (the table above has the count), so its speed "
        "means nothing.",
        "Run the text models' tests:",
        make("test", TESTS="tests/text_models/test_text.py tests/text_models/test_text_models.py"),
    )


def loads_failed(failed: Mapping[str, str]) -> Problem:
    listed = indented(f"{name}: {why}" for name, why in failed.items())
    return Problem(
        "some loads failed",
        "bench",
        f"The other numbers are written. These loads failed:\n\n{listed}",
        "See serve.log beside the rooms. Measure again:",
        make("bench"),
    )


def no_bench_run(path: PathLike, seen: str) -> Problem:
    return Problem(
        "not a result of make bench",
        path,
        f"This file is not such a result: {seen}.",
        "make bench writes such a file:",
        make("bench"),
    )


def slower_than_baseline(path: PathLike, lines: Sequence[Mapping[str, Any]]) -> Problem:
    listed = "\n".join(
        f"    {' '.join(map(str, line['what']))}: {line['old']:g} -> {line['new']:g} ({100 * line['change']:+.1f} %)"
        for line in lines
    )
    return Problem(
        "worse than the baseline",
        path,
        f"{len(lines)} numbers are worse by more than two runs of the same code differ:\n\n{listed}",
        "Measure again on the same machine, idle:",
        make("bench"),
    )


def bench_step_failed(command: Sequence[str], status: int) -> Problem:
    return Problem(
        "a measured step failed",
        command[0],
        f"It ended with status {status}, so there is nothing to measure. Its own message is above.",
        "Run it alone:",
        shlex.join(command),
    )


def soak_not_clean(count: int, wrong: Sequence[str]) -> Problem:
    return Problem(
        "the soak is not clean",
        "soak",
        f"{count} checks failed. The first ones:\n\n{indented(wrong)}",
        "The figures are in build/soak.json, the server's log is serve.log beside the rooms. Run it again, shorter:",
        make("soak", SECONDS=60),
    )
