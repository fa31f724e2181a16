"""make lock with a stand-in for uv, which notes what it is asked; no index is reached."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from stand_ins import on_path

# Each list's lock is written by uv, except torch.txt and toolchain-0.8.0.txt, which are written by hand.
PYTHON = """
case "$1 $2 $3" in
    "-c print(7) ") echo 7 ;;
    "-m uv pip")
        echo "$*" >>"$RECORD"
        [ "$4" != "${FAILS:-}" ] || exit 1
        while [ $# -gt 1 ]; do [ "$1" != -o ] || echo "written==1" >"$2"; shift; done ;;
esac
"""
BY_HAND = {"torch.txt", "toolchain-0.8.0.txt"}


def lock(tree: Path, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tree / "tmp").mkdir(exist_ok=True)
    on_path(tree / "bin", "given", PYTHON)
    path = f"{tree}/bin:{os.environ['PATH']}"
    places = {"PATH": path, "TMPDIR": f"{tree}/tmp", "RECORD": f"{tree}/record"}
    return subprocess.run(
        ["make", "lock", f"PYTHON={python}"], cwd=tree, env={**os.environ, **places, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("python", ["bin/given", "given"])
def test_every_list_is_locked_with_an_interpreter_named_from_here_or_on_path(own_tree: Path, python: str) -> None:
    before = {path.name: path.read_text() for path in (own_tree / "requirements").glob("*.txt")}
    done = lock(own_tree, python)
    assert done.returncode == 0, done.stderr
    after = {path.name: path.read_text() for path in (own_tree / "requirements").glob("*.txt")}
    assert {name for name in after if after[name] == before.get(name)} == BY_HAND
    lists = {path.stem for path in (own_tree / "requirements").glob("*.in")} - {"torch"}
    asked = (own_tree / "record").read_text().split()
    assert {word[:-3] for word in asked if word.endswith(".in")} == lists
    assert list((own_tree / "tmp").iterdir()) == []


def test_nothing_stays_in_tmp_after_a_failure(own_tree: Path) -> None:
    """The last step of openai's locks asks for a wheel of every package."""
    assert lock(own_tree, "bin/given", FAILS="install").returncode != 0
    assert list((own_tree / "tmp").iterdir()) == []
