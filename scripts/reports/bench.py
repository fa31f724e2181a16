"""Reports of the benchmarks."""

from __future__ import annotations

import shlex
from typing import Any, Mapping, Sequence

from scripts.reports.problem import PathLike, Problem, indented, make, shown


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
        f"In some answers of {model} the text does not match the tokens that were generated. The table above counts "
        "them. The measured speed means nothing.",
        "Run the text models' tests:",
        make("test", TESTS="tests/text_models/test_text.py tests/text_models/test_text_models.py"),
    )


def loads_failed(failed: Mapping[str, str]) -> Problem:
    listed = indented(f"{name}: {why}" for name, why in failed.items())
    return Problem(
        "some measurements failed",
        "bench",
        f"These measurements failed:\n\n{listed}\n\nThe numbers of all others were written.",
        "See serve.log, in the folder that holds engines/. Measure again:",
        make("bench"),
    )


def no_bench_run(path: PathLike, seen: str) -> Problem:
    return Problem(
        "not a result of make bench",
        path,
        f"{shown(path)} is not a file that `make bench` wrote: {seen}.",
        "To write such a file, build/bench/NAME-tpN.json:",
        make("bench", BASELINE=None, WITH=None),
    )


def slower_than_baseline(path: PathLike, lines: Sequence[Mapping[str, Any]]) -> Problem:
    listed = "\n".join(
        f"    {' '.join(map(str, line['what']))}: {line['old']:g} -> {line['new']:g} ({100 * line['change']:+.1f} %)"
        for line in lines
    )
    return Problem(
        "worse than the baseline",
        path,
        f"{len(lines)} numbers are worse than the baseline. The differences are larger than those between two "
        f"runs of the same code:\n\n{listed}",
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
        "build/soak.json has the figures. The server's log is serve.log, in the folder that holds engines/. Run it "
        "again, shorter:",
        make("soak", SECONDS=60),
    )
