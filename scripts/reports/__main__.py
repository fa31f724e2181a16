"""python -m scripts.reports prints docs/troubleshooting.md, which has the reports.

Words in capitals stand for what differs from case to case.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from scripts import reports

SUBJECTS = [name for name in reports.__all__ if inspect.ismodule(getattr(reports, name))]
HEAD = """# Troubleshooting

Every foreseen failure ends in a report like this one. The last line is a command that helps.

    -- ENGINE DOES NOT FIT THIS GPU ------------------------------- build/llama-2-7b/.../engines

    The engines were built for compute capability 9.0; this machine has 8.0.

    Build them here:

        make engines MODEL=llama-2-7b

A traceback is a bug: please report it with the output of `make doctor JSON=1`. If nothing below fits, run
`make doctor` to check the machine and `make plan` to check the model. The server's log is
`build/<model>/<variant>/serve.log`.

`python -m scripts.reports` makes this page from the reports themselves. Words in capitals stand for what differs from
case to case.
"""


def sample(name: str, annotation: Any) -> Any:
    """A sample value of a parameter: its name in capitals if it is text."""
    text = str(annotation)
    if "stat_result" in text:
        return os.stat_result((0,) * 10)
    if "Mapping" in text or "Dict" in text:
        return {name.upper(): 2} if "int" in text else {name.upper(): name.upper()}
    if "Sequence" in text or "List" in text:
        return [name.upper()]
    for kind, value in (("bool", True), ("int", 2), ("float", 2.0)):
        if kind in text:
            return value
    return Path(name.upper()) if "Path" in text else name.upper()


def row(function: Any) -> str:
    """One report as a row: what it says, and its command."""
    values = {one.name: sample(one.name, one.annotation) for one in inspect.signature(function).parameters.values()}
    problem = function(**values)
    return here(
        f"| {problem.title.upper()} | {cell(problem.seen)} | {cell(problem.advice)} `{cell(problem.command)}` |"
    )


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def here(text: str) -> str:
    """The text without what is special to this machine."""
    text = text.replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "FOLDER")
    return re.sub(r"[\d.]+ ([kMG]B) are free", r"N \1 are free", re.sub(rf"\buser {os.getuid()}\b", "user UID", text))


def page() -> str:
    """The whole page; a report that cannot be written from samples is left out."""
    parts: list[str] = [HEAD]
    for subject in SUBJECTS:
        module = getattr(reports, subject)
        found: dict[str, str] = {}
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
            if own and inspect.signature(function).return_annotation in (reports.Problem, "Problem"):
                try:
                    found[name] = row(function)
                except (AttributeError, KeyError, LookupError, OSError, TypeError, ValueError):
                    continue
        if found:
            doc = (module.__doc__ or "").strip().rstrip(".")
            head = f"\n## {doc}\n\n| report | what it says | what to do |\n|---|---|---|\n"
            parts.append(head + "\n".join(found.values()) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
