"""What a room's content was made from: the modules and tables that were used while it was filled, as a compiler writes
a depfile.

A room keeps the list in its file RECORD, with a sum of each; make fills it again if a sum is another one now
(journey.py). The list is not in the manifest: it holds for one state of this project, while two states that give the
same bytes give the same manifest.

A module counts by its meaning: its comments, docstrings, empty lines and the lines that a room prints do not count. In
any other file every byte counts. What only decides whether and how a room is made, not what is in it, is not an
ingredient (NO_INGREDIENTS).

The standard library only, any Python from 3.8 on: the Makefile asks this at every make.
"""

from __future__ import annotations

import ast
import atexit
import hashlib
import json
import os
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
RECORD = "made_from.json"
# In the environment of a room's programs: the file to which each of our programs adds what it used, when it ends.
CHILDREN = "ROOM_USED"
# An image holds the words of its reports and the whole launcher: it notes those files by their bytes
# (scripts/images/launcher.py).
NO_INGREDIENTS = (
    "scripts/reports/*",  # wording
    "scripts/settings.py",  # what a room is asked is in its file `args`
    "scripts/making/*",
    "scripts/serve.py",  # launching, the supervisor, and checks of this host
    "scripts/serving/*",
    "scripts/nvidia/gpus.py",  # this machine's GPUs; what is built for them is in the room's arguments and facts
    "scripts/nvidia/memory.py",  # estimates
    "docker/gpus.json",
    "scripts/bench/*",
    "scripts/weights/folder.py",  # which files of a model's folder may be read, and with which limits
    "scripts/weights/bounded.py",
    "scripts/tokenizer/proof.py",
    "scripts/openai/*",  # the endpoint, which proof.py tries a template with; an image notes it by its bytes
    "scripts/nvidia/abilities.py",  # what is refused
    "*/__init__.py",
)
# the functions that print a line of a room's story
SAYING = ("say", "room.say")
_noted: dict[str, str] = {}
_seen: dict[tuple[str, int, int], str] = {}


# --- core: values in, values out --------------------------------------------------------------------------------------


def meaning(source: bytes) -> bytes:
    """A module without the parts that do not change its results: comments, docstrings, empty lines, and statements that
    only print a line.

    It works with positions in the text, not with the parser's tree, whose form differs between the Pythons of the host
    and of NVIDIA's containers. SyntaxError if this Python is too old for the module.
    """
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(node: ast.AST) -> tuple[int, int]:
        first, last = getattr(node, "lineno"), getattr(node, "end_lineno")  # noqa: B009
        return starts[first - 1] + getattr(node, "col_offset"), starts[last - 1] + getattr(node, "end_col_offset")  # noqa: B009

    nodes = list(ast.walk(tree))
    texts = {place(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr)) and node_lines(node) > 1}
    cut = [place(node) for node in nodes if isinstance(node, ast.Expr) and (_is_text(node.value) or _says(node.value))]
    for start, line in zip(starts, lines):
        column = _comment(line) if not any(first < start < end for first, end in texts) else -1
        if column >= 0:
            cut.append((start + column, start + len(line.rstrip())))
    kept, at = [], 0
    for first, end in sorted(cut):
        kept.append(source[at:first] if first > at else b"")
        at = max(at, end)
    text = b"".join([*kept, source[at:]])
    return b"\n".join(filter(None, (line.rstrip() for line in text.splitlines())))


def node_lines(node: ast.AST) -> int:
    return int(getattr(node, "end_lineno", 0) or 0) - int(getattr(node, "lineno", 0)) + 1


def _comment(line: bytes) -> int:
    """The column where a line's comment begins; -1 if it has none. A # in a text of one line is not a comment."""
    if b"#" not in line:
        return -1
    quote = b""
    column = 0
    while column < len(line):
        character = line[column : column + 1]
        if character == b"\\":
            column += 1
        elif quote:
            quote = b"" if character == quote else quote
        elif character in (b"'", b'"'):
            quote = character
        elif character == b"#":
            return column
        column += 1
    return -1


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _says(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return f"{called.value.id}.{called.attr}" in SAYING
    return isinstance(called, ast.Name) and called.id in SAYING


def short_sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def is_ingredient(path: str) -> bool:
    return not any(fnmatch(path, pattern) for pattern in NO_INGREDIENTS)


# --- shell ------------------------------------------------------------------------------------------------------------


def note(pattern: str) -> None:
    """Note that a file, or all files that match a pattern with *, are used. pattern: relative to the project; other
    files are not noted."""
    if is_ingredient(pattern):
        _noted[pattern] = files_now(pattern)


def note_path(path: Path) -> None:
    """The same for a path. A path outside of the project comes from a setting, and settings are in the question."""
    try:
        note(path.resolve().relative_to(ROOT).as_posix())
    except ValueError:
        pass


def note_content(pattern: str) -> None:
    """The same for a file that a room contains unchanged, even if rooms are never made from such files."""
    _noted[pattern] = files_now(pattern)


def note_row(path: str, key: str) -> None:
    """Note that one entry of a JSON file of the project is used: the other entries may change."""
    _noted[f"{path}#{key}"] = row_now(path, key)


def files_now(pattern: str) -> str:
    """The sum of the names and bytes of the matching files; '-' if there are none."""
    digest, count = hashlib.sha256(), 0
    for path in sorted(ROOT.glob(pattern)):
        if path.is_file():
            count += 1
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(ROOT).as_posix()} {content}\n".encode())
    return f"bytes {digest.hexdigest()[:16]}" if count else "-"


def row_now(path: str, key: str) -> str:
    try:
        row = json.loads((ROOT / path).read_bytes())[key]
    except (OSError, ValueError, KeyError):
        return "-"
    return f"row {short_sum(json.dumps(row, sort_keys=True).encode())}"


def code_now(path: str, recorded: str = "") -> str:
    """The sums of a module: of its bytes, and of its meaning; the recorded ones if the first, or the second, is still
    the same."""
    try:
        source = (ROOT / path).read_bytes()
    except OSError:
        return "-"
    data = short_sum(source)
    if recorded.startswith(f"code {data} "):
        return recorded
    try:
        sums = f"code {data} {short_sum(meaning(source))}"
    except (SyntaxError, ValueError):
        return f"code {data} -"
    same = recorded.startswith("code ") and sums.split()[2] == recorded.split()[2]
    return recorded if same else sums


def _modules() -> Iterator[str]:
    """The project's modules that this process has loaded."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file.endswith(".py") and ("/scripts/" in file or "/model_repo_template/" in file):
            try:
                path = Path(file).resolve().relative_to(ROOT).as_posix()
            except ValueError:
                continue
            if path.startswith(("scripts/", "model_repo_template/")) and is_ingredient(path):
                yield path


def _sums(path: str) -> str:
    """code_now, computed once for each state of the file: a room asks often."""
    try:
        stat = (ROOT / path).stat()
    except OSError:
        return "-"
    state = (path, stat.st_mtime_ns, stat.st_size)
    if state not in _seen:
        _seen[state] = code_now(path)
    return _seen[state]


def used(children: Path | None = None) -> dict[str, str]:
    """ingredient -> sum, for this process and its children."""
    found = {**{path: _sums(path) for path in _modules()}, **_noted}
    if children is not None and children.is_file():
        for line in children.read_text().splitlines():
            found.update(json.loads(line))
    return dict(sorted(found.items()))


def as_bytes(record: Mapping[str, str]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


def changed(record: Mapping[str, str]) -> list[str]:
    """The ingredients that differ from the record."""

    def now(name: str, recorded: str) -> str:
        if recorded.startswith("code "):
            return code_now(name, recorded)
        path, _, key = name.partition("#")
        return row_now(path, key) if key else files_now(name)

    return [name for name, recorded in record.items() if now(name, recorded) != recorded]


def stale(room: Path) -> bool:
    """Whether an existing room was made from other ingredients than the present ones, or does not say from which."""
    if not (room / "manifest.json").is_file():
        return False
    try:
        return bool(changed(json.loads((room / RECORD).read_bytes())))
    except (OSError, ValueError, AttributeError):
        return True


def tell_parent() -> None:
    """In a program that a room started: when it ends, add what it used to the room's list."""
    place = os.environ[CHILDREN]

    def tell() -> None:
        try:
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:  # the room is gone
            return
        os.write(fd, (json.dumps(used()) + "\n").encode())  # in one call, because ranks end at the same time
        os.close(fd)

    atexit.register(tell)
