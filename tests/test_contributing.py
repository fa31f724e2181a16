"""CONTRIBUTING.md names every part of the tree, and each module says in its first line what it knows."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess

import pytest
from project import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def test_every_part_of_the_tree_has_its_row_and_every_row_its_part() -> None:
    table = PAGE[PAGE.index("## Where things are") : PAGE.index("## Add something")]
    named = [
        place.rstrip("/")
        for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
        for place in re.findall(r"`([^`]+)`", cell)
    ]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    parts = [path.split("/") for path in listed if not path.startswith(".") and (ROOT / path).is_file()]
    there = {"/".join(part[: 2 if part[0] == "scripts" else 1]) for part in parts} - {"scripts/__init__.py"}
    assert {path for path in there if not any(fnmatch.fnmatch(path, place) for place in named)} == set()
    assert [place for place in named if not fnmatch.filter(there, place)] == []


@pytest.mark.parametrize("folder", ["scripts", "model_repo_template", "tests", "docker"])
def test_the_first_line_of_every_module_says_what_it_knows(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text()
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path
