"""Every foreseen failure, in the words that the user reads: one function per failure, one module per subject.

Each function returns a Problem to raise: `raise reports.weights.tensor_damaged(...)`.
"""

from __future__ import annotations

from scripts.reports import (
    bench,
    charts,
    checkpoint,
    engines,
    fetching,
    images,
    nvidia,
    packages,
    planning,
    releasing,
    rooms,
    serving,
    settings,
    verifying,
    weights,
)
from scripts.reports.problem import (
    PLANNING,
    WIDTH,
    Finished,
    NotYet,
    Outdated,
    PathLike,
    Problem,
    Reported,
    make,
    run,
    shown,
    some,
)

__all__ = ["Finished", "NotYet", "Outdated", "PLANNING", "PathLike", "Problem", "Reported", "WIDTH", "bench"]
__all__ += ["charts", "checkpoint", "engines", "fetching", "images", "make", "nvidia", "packages", "planning"]
__all__ += ["releasing", "rooms", "run", "serving", "settings", "shown", "some", "verifying", "weights"]
