"""One answer on its way: the tokens from tensorrt_llm become the outputs of the text models' responses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from text import StopStrings, Text

Array = np.ndarray[Any, Any]

# The input that asks for each output's value
ASKED_BY = {
    "cum_log_probs": "return_log_probs",
    "output_log_probs": "return_log_probs",
    "context_logits": "return_context_logits",
    "generation_logits": "return_generation_logits",
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
}
# Outputs that are counted here; all others except the text are passed on from tensorrt_llm
COUNTED = ("batch_index", "sequence_index", "num_input_tokens", "num_output_tokens")
# A stream's parts are joined along the axis of their tokens; for other outputs the last part counts.
TOKEN_AXIS = {"output_log_probs": 2, "context_logits": 1, "generation_logits": 2}


class Answer:
    """Collects what to send next. It does not know Triton.

    wanted: the outputs that may be filled, name -> dtype, as the model's config declares them; asked: those whose value
    the request asks for; without_value: those that this version of NVIDIA's backend sends nevertheless, as zeros of the
    smallest shape. end_ids: the first of these tokens ends the answer and is not part of it, whether the engine leaves
    it out (end_id) or sends it (a stop word).
    """

    def __init__(
        self,
        text: Text,
        stops: Sequence[str],
        wanted: Mapping[str, Any],
        asked: Sequence[str],
        n_input_tokens: int,
        skip_special_tokens: bool = True,
        without_value: Collection[str] = (),
        end_ids: Sequence[int] = (),
    ) -> None:
        self.stream, self.stops = text.stream(skip_special_tokens), StopStrings(stops)
        self.wanted, self.asked, self.without_value = wanted, asked, without_value
        self.end_ids = frozenset(end_ids)
        self.n_input_tokens, self.n_output_tokens, self.n_waiting = n_input_tokens, 0, 0
        self.parts: dict[str, list[Array]] = {name: [] for name in asked}
        self.waiting: list[str] = []
        self.stopped = False

    def push(self, outputs: Mapping[str, Array]) -> bool:
        """Take one response of tensorrt_llm: output_ids int32 (1, 1, n) and the outputs that were requested. Returns
        whether there is text to send.

        What comes after sequence_length (1, 1) is padding.
        """
        ids = outputs["output_ids"].reshape(-1).tolist()
        if "sequence_length" in outputs:
            ids = ids[: outputs["sequence_length"].item(0)]
        end = next((n for n, token in enumerate(ids) if token in self.end_ids), None)
        ids = ids[:end]
        piece, self.stopped = self.stops.push(self.stream.push(ids))
        self.n_output_tokens += len(ids)
        self.n_waiting += len(ids)
        for name in self.asked:
            if name in outputs:
                # outputs with one value per new token have one for the end too
                of_tokens = end is not None and TOKEN_AXIS.get(name) == 2
                self.parts[name].append(outputs[name][:, :, :end] if of_tokens else outputs[name])
        if piece:
            self.waiting.append(piece)
        if end is not None:
            self.finish()
            self.stopped = True
        return bool(piece) or self.stopped

    def finish(self) -> bool:
        """No more tokens come. Returns whether there is anything left to send."""
        if not self.stopped:
            piece, self.stopped = self.stops.push(self.stream.finish())
            self.waiting += [piece] if self.stopped else [piece, self.stops.finish()]
        return bool(any(self.waiting) or self.n_waiting)

    def take(self) -> dict[str, Any]:
        """The outputs of the response that is sent now: everything since the last one. text_output is a str here."""
        counts = {"batch_index": 0, "sequence_index": 0}
        counts.update(num_input_tokens=self.n_input_tokens, num_output_tokens=self.n_output_tokens)
        values: dict[str, Any] = {"text_output": "".join(self.waiting)}
        for name, dtype in self.wanted.items():
            if self.parts.get(name):
                values[name] = joined(self.parts[name], TOKEN_AXIS.get(name))
            elif name in counts and (name in self.asked or name in self.without_value):
                values[name] = np.array([[counts[name]]], dtype=dtype)
            elif name not in self.without_value:
                continue
            elif name == "output_log_probs":
                values[name] = np.zeros((1, 1, self.n_waiting), dtype)
            else:
                values[name] = np.zeros((1,) * (TOKEN_AXIS.get(name, 0) + 2), dtype)
        self.waiting, self.n_waiting, self.parts = [], 0, {name: [] for name in self.asked}
        return values


def joined(parts: Sequence[Array], axis: int | None) -> Array:
    """The parts of an output as one; a part without logits has a stand-in of size 1."""
    if axis is None:
        return parts[-1]
    is_logits = axis < parts[0].ndim - 1
    return np.concatenate([part for part in parts if part.shape[-1] > 1 or not is_logits] or parts[:1], axis=axis)
