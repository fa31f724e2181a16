"""NVIDIA's preprocessing of v0.8.0 for `make bench-text`, written from notes on its behaviour:
one request after the other.

It encodes each prompt by itself with Hugging Face's tokenizer, without BOS, word lists by the words' own tokens, and
gives all of its eight outputs.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from transformers import AutoTokenizer


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.tokenizer = AutoTokenizer.from_pretrained(parameters["tokenizer_dir"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        ids = self.tokenizer.encode(given["QUERY"].reshape(-1)[0].decode(), add_special_tokens=False)
        end = np.array([[self.tokenizer.eos_token_id]], np.int32)
        values = {
            "INPUT_ID": np.array([ids], np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], np.int32),
            "REQUEST_OUTPUT_LEN": given["REQUEST_OUTPUT_LEN"],
            "BAD_WORDS_IDS": self._words(given.get("BAD_WORDS_DICT")),
            "STOP_WORDS_IDS": self._words(given.get("STOP_WORDS_DICT")),
            "EMBEDDING_BIAS": np.zeros((1, 0), np.float32),
            "OUT_END_ID": given.get("END_ID", end),
            "OUT_PAD_ID": given.get("PAD_ID", end),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in values.items()])

    def _words(self, words: Any) -> Any:
        texts = [] if words is None else [word.decode() for word in words.reshape(-1) if word]
        sequences = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        flat = [token for ids in sequences for token in ids]
        ends = np.cumsum([len(ids) for ids in sequences]).tolist()
        return np.array([[flat, ends + [-1] * (len(flat) - len(ends))]], np.int32)
