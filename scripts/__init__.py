"""The scripts that make runs. A package that an interpreter lacks is a report for every script,
also while it is imported."""

from __future__ import annotations

import os
import sys
from types import TracebackType


def _report_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook: ModuleNotFoundError of a package of others becomes a report; the status stays 1."""
    if not isinstance(error, ModuleNotFoundError) or (error.name or "scripts").partition(".")[0] == "scripts":
        sys.__excepthook__(kind, error, trace)
        return
    from scripts.reports import packages

    print(f"\n{packages.package_missing(str(error.name)).report()}\n", file=sys.stderr, flush=True)


sys.excepthook = _report_missing_package
if "ROOM_USED" in os.environ:  # a room started this program: it says what it used (scripts/making/ingredients.py)
    from scripts.making import ingredients

    ingredients.tell_parent()
