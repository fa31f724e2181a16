"""The model `preprocessing`: text in, token ids out, with the tensors of NVIDIA's model of the same name."""

import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(str(Path(__file__).resolve().parents[2] / "tensorrt_llm_bls" / "1"))

from text import Text  # noqa: E402


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: Dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.text = Text(Path(config["parameters"]["tokenizer_dir"]["string_value"]))
        self.outputs = {tensor["name"] for tensor in config["output"]}

    def execute(self, requests: List[Any]) -> List[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            texts = [value.decode("utf-8") for value in given["QUERY"].reshape(-1)]
        except UnicodeDecodeError as error:
            return _refusal(f"QUERY is not UTF-8: {error.reason} at offset {error.start}")
        if len(texts) != 1:
            return _refusal(f"QUERY holds {len(texts)} texts; a request is one text")
        [ids] = self.text.encode(texts)
        end_id = given.get("END_ID", np.array([[-1 if self.text.end_id is None else self.text.end_id]], dtype=np.int32))
        words = {
            name: [value.decode("utf-8", "replace") for value in given.get(name, np.zeros(0, dtype=object)).reshape(-1)]
            for name in ("BAD_WORDS_DICT", "STOP_WORDS_DICT", "EMBEDDING_BIAS_WORDS")
        }
        weights = given.get("EMBEDDING_BIAS_WEIGHTS", np.zeros(0, dtype=np.float32)).reshape(-1).tolist()
        bias_words = [word for word in words["EMBEDDING_BIAS_WORDS"] if word]
        try:
            bias = self.text.embedding_bias(bias_words, weights if bias_words else [])
        except ValueError as error:
            return _refusal(str(error))
        values = {
            "INPUT_ID": np.array([ids], dtype=np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], dtype=np.int32),
            "REQUEST_OUTPUT_LEN": given["REQUEST_OUTPUT_LEN"],
            "BAD_WORDS_IDS": self.text.word_list(words["BAD_WORDS_DICT"]),
            "STOP_WORDS_IDS": self.text.word_list(words["STOP_WORDS_DICT"]),
            "EMBEDDING_BIAS": bias if bias_words else np.zeros((1, 0), dtype=np.float32),
            "OUT_END_ID": end_id,
            "OUT_PAD_ID": given.get("PAD_ID", end_id),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(n, v) for n, v in values.items() if n in self.outputs])


def _refusal(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
