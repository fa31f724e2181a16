"""Reports of make release before it builds."""

from __future__ import annotations

from typing import Mapping, Sequence

from scripts.reports.problem import PathLike, Problem, indented, make


def tree_not_clean(lines: Sequence[str]) -> Problem:
    listed = "\n".join(f"    {line}" for line in lines[:12]) or "    git does not answer"
    return Problem(
        "the tree is not clean",
        "git status",
        f"A release is made from committed files only. These are not committed:\n\n{listed}",
        "Commit or remove them:",
        "git status",
    )


def toolchain_not_pinned(version: str, image: str) -> Problem:
    return Problem(
        f"toolchain {version} is not pinned",
        "docker/toolchains.json",
        f"The image is {image}, a tag that can move; its digest is not known. A release needs the digest.",
        "On a machine with docker and network:",
        "make pin",
    )


def toolchain_inferred(version: str, cells: Mapping[str, str]) -> Problem:
    listed = indented(f"{cell}: {reason}" for cell, reason in cells.items())
    return Problem(
        f"toolchain {version} is partly inferred",
        "docker/contracts/README.md",
        f"This release would use tables in which {len(cells)} entries were inferred, not read from NVIDIA's source:"
        f"\n\n{listed}",
        "Confirm them on the real image, or accept them:",
        make("release", INFERRED="accept"),
    )


def engines_rehearsed(engines: PathLike) -> Problem:
    return Problem(
        "these engines come from a rehearsal",
        engines,
        "A stand-in for NVIDIA's programs (docker/rehearsal) made these engines. They do not run on a GPU.",
        "Build them on the real toolchain:",
        make("engines", REHEARSAL=None),
    )
