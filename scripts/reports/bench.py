"""Reports of the benchmarks."""

import shlex
from typing import Any, Mapping, Sequence

from scripts.reports.problem import PathLike, Problem, make


def bench_server_failed(what: str, last_lines: Sequence[str]) -> Problem:
    return Problem(
        "the measured server failed",
        "bench-text",
        f"Of the server that was measured: {what}. Its last complaints:\n\n"
        + "\n".join(f"    {line}" for line in last_lines),
        "Measure again, on a machine with nothing else to do:",
        make("bench-text"),
    )


def text_is_wrong(model: str) -> Problem:
    return Problem(
        "wrong text",
        model,
        f"Answers of {model} were not the text of their tokens (the table above says how many), so its speed says nothing.",
        "See what the text models' tests say:",
        make("test", TESTS="tests/text_models/test_text.py tests/text_models/test_text_models.py"),
    )


def loads_failed(failed: Mapping[str, str]) -> Problem:
    listed = "\n".join(f"    {name}: {why}" for name, why in failed.items())
    return Problem(
        "some loads failed",
        "bench",
        f"The other numbers are written. These loads were not served to their end:\n\n{listed}",
        "The server's log, serve.log beside the rooms, says more. Measure again:",
        make("bench"),
    )


def no_bench_run(path: PathLike, seen: str) -> Problem:
    return Problem(
        "no run of make bench",
        path,
        f"It cannot be read as one: {seen}.",
        "A run writes such a file:",
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
        f"{len(lines)} numbers are worse by more than what two runs of one tree differ by:\n\n{listed}",
        "See whether it is this tree, on the same machine with nothing beside it:",
        make("bench"),
    )


def bench_step_failed(command: Sequence[str], status: int) -> Problem:
    return Problem(
        "a measured step failed",
        command[0],
        f"It ended with status {status}, so there is nothing to measure; its own words are above.",
        "See it fail alone:",
        shlex.join(command),
    )
