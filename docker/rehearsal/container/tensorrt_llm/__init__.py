"""Stand-in for the package tensorrt_llm in a rehearsal: only its Python runtime,
and of that only what the version's table has."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[4]))

from scripts.nvidia import contracts  # noqa: E402

__version__ = contracts.reported(os.environ["REHEARSAL_TRTLLM"])
