"""The model `preprocessing`: text in, token ids out, with the tensors of NVIDIA's model of the same name."""

import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "tensorrt_llm_bls" / "1"))

import sent  # noqa: E402
from text import Text  # noqa: E402


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: Dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.text = Text(Path(parameters["tokenizer_dir"]))
        self.add_special_tokens = sent.is_true(parameters["add_special_tokens"])
        self.vocab_size = int(parameters["vocab_size"])
        self.max_prompt_bytes = int(parameters["max_input_len"]) * self.text.longest_piece_bytes
        self.outputs = {tensor["name"] for tensor in config["output"]}

    def execute(self, requests: List[Any]) -> List[Any]:
        return [sent.answered(request, self._outputs) for request in requests]

    def _outputs(self, given: sent.Sent) -> Dict[str, sent.Array]:
        prompt = sent.one_text(given, "QUERY", self.max_prompt_bytes)
        [ids] = self.text.encode([prompt], self.add_special_tokens)
        bias = sent.weighted_words(given, "EMBEDDING_BIAS_WORDS", "EMBEDDING_BIAS_WEIGHTS")
        no_bias = np.zeros((1, 0), dtype=np.float32)
        end_id = given.get("END_ID", np.array([[-1 if self.text.end_id is None else self.text.end_id]], dtype=np.int32))
        values = {
            "INPUT_ID": np.array([ids], dtype=np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], dtype=np.int32),
            "REQUEST_OUTPUT_LEN": given["REQUEST_OUTPUT_LEN"],
            "BAD_WORDS_IDS": self.text.word_list(sent.words(given, "BAD_WORDS_DICT")),
            "STOP_WORDS_IDS": self.text.word_list(sent.words(given, "STOP_WORDS_DICT")),
            "EMBEDDING_BIAS": self.text.embedding_bias(bias, self.vocab_size) if bias else no_bias,
            "OUT_END_ID": end_id,
            "OUT_PAD_ID": given.get("PAD_ID", end_id),
        }
        return {name: value for name, value in values.items() if name in self.outputs}
