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
    Outdated,
    PathLike,
    Problem,
    Reported,
    make,
    run,
    shown,
    some,
)

__all__ = ["Finished", "Outdated", "PLANNING", "PathLike", "Problem", "Reported", "WIDTH", "bench", "charts"]
__all__ += ["checkpoint", "engines", "fetching", "images", "make", "nvidia", "packages", "planning", "releasing"]
__all__ += ["rooms", "run", "serving", "settings", "shown", "some", "verifying", "weights"]
