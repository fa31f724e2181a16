"""The READMEs' examples in curl and Python work as they stand, except for ports and the model's name."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT
from server import Served, serve

from scripts import settings

PAGES = ("README.md", "README.ko.md", "docs/serving.md")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def chatting(tree: Path) -> Iterator[Served]:
    """The bundled model with a chat format: it answers whatever the examples ask of a bigger one."""
    running = serve(tree, "TP=1", "CHAT_TEMPLATE=models/llama-2.jinja")
    yield running
    assert running.end() == 0, "".join(running.lines)


def examples(readme: str) -> list[str]:
    """The indented blocks of a README that are curl commands or Python."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (ROOT / readme).read_text(), re.MULTILINE)
    found = []
    for block in map(textwrap.dedent, blocks):
        python = re.search(r"^(import|from) ", block, re.MULTILINE)
        commands, program = (block[: python.start()], [block[python.start() :]]) if python else (block, [])
        # a command goes on where the next line is indented
        found += [*re.findall(r"^curl .*(?:\n +.*)*", commands, re.MULTILINE), *program]
    return found


EXAMPLES = [(readme, example) for readme in PAGES for example in examples(readme)]


@pytest.mark.parametrize(
    ("readme", "example"), EXAMPLES, ids=[f"{readme}-{n}" for n, (readme, _) in enumerate(EXAMPLES)]
)
def test_the_example_answers(chatting: Served, readme: str, example: str) -> None:
    for name, shown in settings.PORTS.items():
        example = example.replace(f"127.0.0.1:{shown}", f"127.0.0.1:{getattr(chatting, name.lower())}")
    example = example.replace("smollm2-135m", "stories")
    command = ["sh", "-c", example] if example.startswith("curl") else [sys.executable, "-c", example]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "error" in done.stdout) == (0, False), done.stdout + done.stderr
    assert len(done.stdout) > 20 and REPLACEMENT not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("pages", [("README.md", "docs/serving.md"), ("README.ko.md",)])
def test_both_protocols_are_shown_with_curl_and_with_python(pages: tuple[str, ...]) -> None:
    def shown(example: str) -> tuple[bool, bool]:
        return example.startswith("curl"), any(word in example for word in ("9000", "OpenAI"))

    found = {shown(example) for page in pages for example in examples(page)}
    assert found == {(a, b) for a in (True, False) for b in (True, False)}


def typed() -> list[tuple[str, str]]:
    """Every make command in an indented block of the pages for users: (page, command)."""
    pages = [ROOT / "README.md", ROOT / "README.ko.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = []
    for page in pages:
        for line in page.read_text().splitlines():
            match = re.match(r" {4}(?:\w+=\S+ )?(make(?: [^#]*)?)(?:#.*)?$", line)
            if match and "&&" not in match[1] and page.name != "troubleshooting.md":
                found.append((page.name, match[1].strip()))
    return found


def test_every_make_command_of_the_pages_is_one_that_make_takes(tree: Path) -> None:
    """`make -n` knows the word and accepts the settings; nothing is made."""
    commands = typed()
    assert len(commands) > 40
    wrong = []
    for page, command in commands:
        command = command.replace("x.y.z", "1.0.0").replace("NAME", "stories")
        words = [command.replace("make", "make -n", 1), f"PYTHON={sys.executable}"]
        if "ENGINE=tensorrt" in command and "GPU" not in command and "REHEARSAL" not in command:
            words.append('ASSUME_GPU="4x V100-SXM2-16GB"')  # this machine has none to ask
        done = subprocess.run(" ".join(words), shell=True, cwd=tree, capture_output=True, text=True, timeout=60)  # noqa: S602
        if done.returncode:
            wrong.append(f"{page}: {command}: {(done.stdout + done.stderr).strip()[:300]}")
    assert not wrong, "\n".join(wrong)


def numbers(text: str) -> set[str]:
    """The numbers of a text, as they are written: 7,167 and 4.47.1 are one each."""
    return {found.rstrip(".,") for found in re.findall(r"(?<![\w.])\d[\d.,]*", text)}


def test_measured_numbers_have_one_source() -> None:
    """What the Korean page says of speed is in docs/numbers.md; what both pages show of a start is the same."""
    korean, english = ((ROOT / page).read_text() for page in ("README.ko.md", "README.md"))
    measured = korean.partition("## 속도 재기")[2].partition("\n## ")[0]
    said = numbers("\n".join(line for line in measured.splitlines() if not line.startswith("    ")))
    assert len(said) > 30 and said <= numbers((ROOT / "docs/numbers.md").read_text())
    start = [line for line in korean.splitlines() if re.match(r"    serve |      (HTTP|OpenAI) ", line)]
    assert len(start) == 3 and set(start) <= set(english.splitlines())
