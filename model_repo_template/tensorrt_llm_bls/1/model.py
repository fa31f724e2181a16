"""The model `tensorrt_llm_bls`: text in, text out, over the model tensorrt_llm."""

from __future__ import annotations

from text_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
