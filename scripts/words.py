"""Finds habits that make a sentence hard to read (CONTRIBUTING.md, "Plain English"). `make lint` runs it.

Reads:  Markdown, comments, docstrings, the literals of scripts/, and shell, Make and YAML files; not the tests'
literals.
Writes: one line per place: file:line, the words, the better form. The exit status is 1 if there is one.
Needs:  git, which names the files, and the standard library.

    python -m scripts.words [FILE ...]
"""

from __future__ import annotations

import re
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Pattern(NamedTuple):
    """One habit. START is where a sentence begins. A match with a group `fine` is not counted.
    A test reads bad and good."""

    words: str
    better: str
    bad: str
    good: str


PARTICIPLE = (
    "(?!Need|Speed|Seed|Indeed|Embed|Proceed|Exceed)([A-Z][a-z]+ed|Said|Written|Made|Given|Taken|Held|Kept|Shown|Told)"
)
AFTER = (
    "(by|in|on|with|from|to|as|at|when|if|for|into|once|twice|after|before|only|are|is|like|without|here|again|beside)"
)
PATTERNS = (
    Pattern(
        r"START(?-i:Of) (?!course)", "the subject first", "Of two the later wins.", "It tells of two. The later wins."
    ),
    Pattern(r"\banew\b", "again", "It is written anew.", "It is a new file."),
    Pattern(r"\bmend(s|ed|ing)?\b", "fix", "A start does not mend it.", "We recommend another."),
    Pattern(r"\bnobody\b", "no client, no process, no one", "Nobody reads it.", "No process reads it."),
    Pattern(
        r"(?P<fine>\b(there|here) )?\b(is|are|was|were) no (?!(longer|more|less|fewer|larger|later|other|better)\b)",
        "is not a",
        "It is no number.",
        "There is no number. It is no longer one.",
    ),
    Pattern(
        r"\b(a|an|one) (token|line|byte|file|row|word|request|rank|thread|step|piece|page) an? (?!second|minute|few)\w+",
        "one X per Y",
        "It sends a token a response.",
        "It sends one token per response, ten a second.",
    ),
    Pattern(
        rf"\bof (its|our|their|his) own(?=\W?$|[^\w ]| \(| ({AFTER}|and|but|each|so|between|which|that|than|under|too)\b)",
        "its own X, a separate X",
        "A folder of its own.",
        "It has its own folder, for engines of its own version.",
    ),
    Pattern(
        r"(?P<fine>\b(left|leave|leaves|leaving|stay|stays|stayed)( \w+)*? )?\bbehind\b(?P<fine2> (a|an|the|one|HAProxy|vLLM|that)\b)?",
        "after",
        "What lies behind is padding.",
        "It leaves no file behind. It runs behind a load balancer.",
    ),
    Pattern(
        r"\bwhat was asked (?!for)", "the request", "It says what was asked and why.", "It gives what was asked for."
    ),
    Pattern(
        f"START(?-i:{PARTICIPLE}) {AFTER} ",
        "the subject first",
        "Written by rank 0.",
        "Rank 0 writes it. Used files stay.",
    ),
    Pattern(
        r"\b(Problem|\w*Error|refused|None|nothing|empty|raises?) where\b",
        "if",
        "A Problem where it is large.",
        "It is where it was.",
    ),
    Pattern(
        r"\b(know|need|want|fit)s? (it|them|you|us) not\b", "does not know", "It knows you not.", "It is not known."
    ),
    Pattern(
        r"\bas( [\w']+){1,3} (has|have) (it|them)\b",
        "as in X",
        "It is read as torch has it.",
        "It has it, as torch does.",
    ),
    Pattern(r"\. [*] (?=\S)", "a list item begins its line", "Workers move tokens. * Readers read.", "It is 2 * 3."),
    Pattern(r"\b(is|are) so here\b", "defaults match X's", "What is a default there is so here.", "So it is here."),
)

# Words that are not this project's: data of other projects, and pages for other eyes than an engineer's.
OTHERS = ("scripts/openai/vendored/", "README.ko.md", "scripts/words.py")
READ = (".py", ".md", ".sh", ".mk", ".yaml", ".yml", ".toml", ".tpl", ".cfg", "Dockerfile", "Makefile", ".ci/run")
DASHBOARDS = "docker/dashboards/trtllm-bake.json"


class Place(NamedTuple):
    """A habit in a file. line is counted from 1."""

    line: int
    words: str
    better: str


def compiled(words: str) -> re.Pattern[str]:
    return re.compile(words.replace("START", "(?:^|[.!?:] )"), re.IGNORECASE)


COMPILED = [(compiled(pattern.words), pattern.better) for pattern in PATTERNS]


def markdown(text: str) -> Iterator[list[tuple[int, str]]]:
    """Paragraphs, list items and table cells, without code."""
    code = False
    block: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        begins = fence or code or not line.strip() or re.match(r"\s*([*#|-]|\d+\. )", line)
        if begins:
            yield block
            block = []
        if code or fence or not line.strip() or (line.startswith("    ") and not block):
            continue
        line = re.sub(r"`[^`]*`", "``", line)
        if line.startswith("|"):
            yield from ([(number, cell.strip())] for cell in line.split("|"))
        else:
            block.append((number, re.sub(r"^\s*([*#-]+|\d+\.) ", "", line)))
    yield block


STRING_OR_COMMENT = re.compile(
    r"(?P<comment>\#[^\n]*)"
    r'|[rbfuRBFU]{0,2}(?P<quote>"""|\'\'\'|"|\')(?P<string>(?:\\.|(?!(?P=quote)).)*)(?P=quote)',
    re.DOTALL,
)


def python(text: str, literals: bool) -> Iterator[list[tuple[int, str]]]:
    """Comments and docstrings, and the other literals if they are wanted. Neighbours are one paragraph."""
    block: list[tuple[int, str]] = []
    end, kind = 0, ""
    line = 1
    for found in STRING_OR_COMMENT.finditer(text):
        now = "comment" if found["comment"] else found["quote"]
        between = text[end : found.start()]
        line += between.count("\n")
        if between.strip() or now != kind or len(now) == 3:
            yield block
            block = []
        for piece in (found["comment"] or found["string"]).split("\n"):
            piece = piece.lstrip("#").strip()
            if not piece:
                yield block
                block = []
            elif now in ("comment", '"""') or literals:
                block.append((line, re.sub(r"`[^`]*`", "``", piece)))
            line += 1
        line -= 1
        end, kind = found.end(), now
    yield block


def others(text: str) -> Iterator[list[tuple[int, str]]]:
    """Lines of comments as paragraphs; every other line for itself."""
    block: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("#"):
            yield block
            block = []
            yield from ([(number, part.strip())] for part in line.split("#"))
        else:
            block.append((number, line.strip().lstrip("#").strip()))
    yield block


def places(name: str, text: str) -> list[Place]:
    """The habits in a file's text; its name decides what of it is prose."""
    if name.endswith(".md"):
        blocks = markdown(text)
    elif name.endswith(".py"):
        blocks = python(text, literals=not name.startswith("tests/"))
    else:
        blocks = others(text)
    found = []
    for block in blocks:
        starts, length = [], 0
        for _, words in block:
            starts.append(length)
            length += len(words) + 1
        whole = " ".join(words for _, words in block)
        for pattern, better in COMPILED:
            for match in pattern.finditer(whole):
                if not any(value for group, value in match.groupdict().items() if group.startswith("fine")):
                    line = block[bisect_right(starts, match.start()) - 1][0]
                    found.append(Place(line, match.group().strip(" .:!?"), better))
    return sorted(found)


def files() -> Iterable[str]:
    """The files of git, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], check=True, capture_output=True, text=True
    )
    return [
        name
        for name in listed.stdout.splitlines()
        if name.endswith((*READ, DASHBOARDS)) and not name.startswith(OTHERS)
    ]


def main(names: list[str]) -> int:
    count = 0
    for name in names or files():
        if Path(name).is_file():
            for place in places(name, Path(name).read_text()):
                count += 1
                print(f"{name}:{place.line}: {place.words!r}; better: {place.better}")
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
