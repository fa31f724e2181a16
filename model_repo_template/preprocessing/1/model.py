"""The model `preprocessing`: text in, token ids out, with the tensors of NVIDIA's model of the same name."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "tensorrt_llm_bls" / "1"))

import sent  # noqa: E402
from text import Text  # noqa: E402


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.text = Text(Path(parameters["tokenizer_dir"]))
        self.add_special_tokens = sent.is_true(parameters["add_special_tokens"])
        self.vocab_size = int(parameters["vocab_size"])
        self.limits = sent.Limits.of(parameters, self.text.longest_piece_bytes)
        self.outputs = {tensor["name"] for tensor in config["output"]}

    def execute(self, requests: list[Any]) -> list[Any]:
        """All texts of all requests are tokenized in one call. A request may be a batch: its rows are padded to the
        longest."""
        responses: list[Any] = [None] * len(requests)
        readable = []
        for n, request in enumerate(requests):
            try:
                given = sent.read(request)
                readable.append((n, given, sent.texts(given, "QUERY", self.limits.prompt_bytes)))
            except Exception as problem:
                responses[n] = sent.failed(problem)
        all_ids = iter(self.text.encode([text for *_, texts in readable for text in texts], self.add_special_tokens))
        for n, given, texts in readable:
            ids = [next(all_ids) for _ in texts]
            try:
                responses[n] = sent.response(requests[n], self._outputs(given, ids))
            except Exception as problem:
                responses[n] = sent.failed(problem)
        return responses

    def _outputs(self, given: sent.Sent, ids: list[list[int]]) -> dict[str, sent.Array]:
        """ids: the token ids of each row."""
        rows = sent.rows(given, len(ids))
        for row, tokens in zip(rows, ids):
            self.limits.check(len(tokens), sent.scalar(row, "REQUEST_OUTPUT_LEN"), "REQUEST_OUTPUT_LEN")
        biased = [sent.weighted_words(row, "EMBEDDING_BIAS_WORDS", "EMBEDDING_BIAS_WEIGHTS") for row in rows]
        bias = [self.text.embedding_bias(words, self.vocab_size if any(biased) else 0) for words in biased]
        own_end_id = np.full((len(rows), 1), -1 if self.text.end_id is None else self.text.end_id, dtype=np.int32)
        end_id = given.get("END_ID", own_end_id)
        pad_id = given.get("PAD_ID", end_id)
        values = {
            "INPUT_ID": padded([np.array(tokens, dtype=np.int32) for tokens in ids], pad_id.reshape(-1)[0]),
            "REQUEST_INPUT_LEN": np.array([[len(tokens)] for tokens in ids], dtype=np.int32),
            "REQUEST_OUTPUT_LEN": given["REQUEST_OUTPUT_LEN"],
            "BAD_WORDS_IDS": self._word_lists(rows, "BAD_WORDS_DICT"),
            # TensorRT-LLM takes one end_id; the model's other ends are stop words
            "STOP_WORDS_IDS": self._word_lists(
                rows, "STOP_WORDS_DICT", [] if "END_ID" in given else self.text.end_ids[1:]
            ),
            "EMBEDDING_BIAS": np.concatenate(bias),
            "OUT_END_ID": end_id,
            "OUT_PAD_ID": pad_id,
            # what an encoder-decoder model begins with; since 0.11 NVIDIA's end_to_end_test.py sends it to every model
            "DECODER_INPUT_ID": pad_id.reshape(-1, 1),
            "REQUEST_DECODER_INPUT_LEN": np.ones((len(rows), 1), dtype=np.int32),
        }
        return {name: value for name, value in values.items() if name in self.outputs}

    def _word_lists(self, rows: list[sent.Sent], name: str, tokens: Sequence[int] = ()) -> sent.Array:
        """int32 (rows, 2, n): upstream pads the ids with 0 and where their sequences end with -1. tokens: see
        Text.word_list."""
        lists = [self.text.word_list(sent.words(row, name), tokens=tokens)[0] for row in rows]
        return np.stack([padded([ids for ids, _ in lists], 0), padded([ends for _, ends in lists], -1)], axis=1)


def padded(rows: list[sent.Array], value: int) -> sent.Array:
    """Rows of different lengths as one array (rows, longest)."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=value) for row in rows])
