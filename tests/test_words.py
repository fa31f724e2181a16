"""The check of the project's prose: each pattern finds its example, leaves good sentences alone,
and reads what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import words
from scripts.words import Pattern


@pytest.mark.parametrize("pattern", words.PATTERNS, ids=[pattern.better for pattern in words.PATTERNS])
def test_a_pattern_finds_its_example_and_leaves_a_good_sentence(pattern: Pattern) -> None:
    found = words.places("page.md", f"A first sentence. {pattern.bad}\n")
    assert [place.better for place in found] == [pattern.better]
    assert words.places("page.md", f"A first sentence. {pattern.good}\n") == []


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    {
        "a line's end inside a habit": ("page.md", "It is\nno number.\n", [1]),
        "a cell": ("page.md", "| a | Of two |\n", [1]),
        "an item": ("page.md", "Text\n* Of two\n", [2]),
        "code in a page": ("page.md", "```\nIt is no number.\n```\n\n    nobody\n\nIt is `no number`.\n", []),
        "a docstring": ("scripts/a.py", '"""A.\n\nOf two\nnobody."""\n', [3, 4]),
        "a comment": ("scripts/a.py", "a = 1  # it is\n# no number\n", [1]),
        "a literal in two pieces": ("scripts/a.py", 'a = f("It is "\n    "no number")\n', [1]),
        "names of a program": ("scripts/a.py", "nobody = behind\n", []),
        "a test's literal": ("tests/test_a.py", 'a = "nobody"  # nobody\n', [1]),
        "a test's docstring": ("tests/test_a.py", '"""Nobody."""\n', [1]),
        "a shell's words": ("scripts/a.sh", "# a\n# anew\necho 'mended'\n", [2, 3]),
        "a description": ("docker/a.yaml", "a:\n  description: nobody reads it # anew\n", [2, 2]),
    }.values(),
)
def test_prose_is_read_and_code_is_not(name: str, text: str, lines: list[int]) -> None:
    assert [place.line for place in words.places(name, text)] == lines


def test_a_place_is_named_with_a_better_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text("Good.\n\nIt is written anew.\n")
    Path("good.md").write_text("Good.\n")
    assert words.main(["page.md", "good.md"]) == 1
    assert capsys.readouterr().out == "page.md:3: 'anew'; better: again\n"
    assert words.main(["good.md"]) == 0
