"""NVIDIA's postprocessing of v0.8.0 for `make bench-text`, written from notes on its behaviour:
every response by itself.

It decodes the tokens of a response without those before them, by Hugging Face's tokenizer;
it copies log probabilities and logits.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from transformers import AutoTokenizer

COPIED = ("CUM_LOG_PROBS", "OUTPUT_LOG_PROBS", "CONTEXT_LOGITS", "GENERATION_LOGITS")
INPUTS = ("TOKENS_BATCH", "SEQUENCE_LENGTH", *COPIED)


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.tokenizer = AutoTokenizer.from_pretrained(parameters["tokenizer_dir"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        given = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in INPUTS}
        lengths = given["SEQUENCE_LENGTH"].reshape(-1)
        beams = given["TOKENS_BATCH"].reshape(len(lengths), -1)
        texts = [
            str(self.tokenizer.decode(beam[:length], skip_special_tokens=True)).encode()
            for beam, length in zip(beams, lengths)
        ]
        values = {"OUTPUT": np.array(texts, dtype=object).reshape(1, -1)}
        values.update({f"OUT_{name}": given[name] for name in COPIED})
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in values.items()])
