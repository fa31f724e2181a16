"""The model `ensemble`: tensorrt_llm_bls under the name that clients of NVIDIA's backend call."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tensorrt_llm_bls" / "1"))

from text_model import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
