"""Reads and checks what a client sent to a text model. A refusal is one sentence for the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

Array = np.ndarray[Any, Any]
REQUIRED = object()
# Limits of a list of words: each word is looked for in every piece of text, and spelt in tokens
MAX_WORDS, MAX_WORD_BYTES, MAX_WORDS_BYTES = 128, 512, 4096


class Refused(Exception):
    """A request that cannot be served; the text goes to the client."""


class Busy(Exception):
    """A request that could be served, but not now; the text goes to the client."""


@dataclass(frozen=True)
class Limits:
    """The engine's limits, so that a request that it would refuse does not wait in its queue first."""

    input_tokens: int
    all_tokens: int
    # a longer text cannot fit the engine, and tokenizing it would take seconds per megabyte
    prompt_bytes: int

    @classmethod
    def of(cls, parameters: Mapping[str, str], longest_piece_bytes: int) -> Limits:
        """From a config's parameters."""
        input_tokens = int(parameters["max_input_len"])
        return cls(input_tokens, int(parameters["max_seq_len"]), input_tokens * longest_piece_bytes)

    def check(self, n_tokens: int, max_tokens: int, name: str) -> None:
        """Raises Refused, in the torch engine's words. name: the input that says max_tokens."""
        if n_tokens > self.input_tokens:
            raise Refused(f"the prompt has {n_tokens} tokens; this engine takes at most {self.input_tokens}")
        if max_tokens <= 0:
            raise Refused(f"{name} is {max_tokens}; it must be greater than 0")
        if n_tokens + max_tokens > self.all_tokens:
            raise Refused(
                f"the prompt's {n_tokens} tokens and {name} {max_tokens} make {n_tokens + max_tokens};"
                f" this engine takes at most {self.all_tokens}"
            )


class Sent(dict[str, Array]):
    """All inputs of a Triton request by name, the batch dimension in front.

    Triton counts the inputs of a request, but does not check that the required ones are among them.
    """

    def __missing__(self, name: str) -> Array:
        raise Refused(f"{name} is missing")


def read(request: Any) -> Sent:
    return Sent({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})


def answered(request: Any, outputs: Callable[[Sent], Mapping[str, Array]]) -> Any:
    """One response for a request: what `outputs` makes of its inputs, or an error."""
    try:
        return response(request, outputs(read(request)))
    except Exception as problem:
        return failed(problem)


def response(request: Any, values: Mapping[str, Array]) -> Any:
    """A response with those outputs that the client wants.

    The Python backend would drop the others itself, but it frees them while other threads run Python: with 32 streams
    the heap is corrupt within seconds (seen with Triton 2.51, ResponseSender::Send).
    """
    wanted = [name for name in request.requested_output_names() if name in values]
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, values[name]) for name in wanted])


def failed(problem: Exception) -> Any:
    """The response to a request that failed: the client is told why if it can fix the cause, else the log is."""
    if isinstance(problem, Refused):
        return error(str(problem), pb_utils.TritonError.INVALID_ARG)
    if isinstance(problem, Busy):
        return error(str(problem), pb_utils.TritonError.UNAVAILABLE)
    pb_utils.Logger.log_error(f"a request failed: {type(problem).__name__}: {problem}")
    return error("internal error; the server's log says more", pb_utils.TritonError.INTERNAL)


def error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def is_true(parameter: str) -> bool:
    """An on/off parameter of a config, as NVIDIA's Python models read it."""
    return parameter.lower() in ("true", "yes", "1", "t", "y")


def one_text(sent: Sent, name: str, max_bytes: int) -> str:
    """The one text of a request."""
    n_texts = sent[name].size
    if n_texts != 1:
        raise Refused(f"{name} holds {n_texts} texts; a request is one text")
    return texts(sent, name, max_bytes)[0]


def texts(sent: Sent, name: str, max_bytes: int) -> list[str]:
    """The texts of a batch, one per row. max_bytes: what is longer cannot fit the engine (Limits)."""
    values = sent[name]
    if values.size != len(values):
        raise Refused(f"{name} has shape {list(values.shape)}; a row is one text")
    for value in values.reshape(-1):
        if len(value) > max_bytes:
            raise Refused(f"{name} has {len(value)} bytes; the tokens that this engine takes spell at most {max_bytes}")
        if not len(value):
            raise Refused(f"{name} is empty")
    return [_utf8(name, value) for value in values.reshape(-1)]


def words(sent: Sent, name: str) -> list[str]:
    """A list of words; NVIDIA's clients send [""] for none."""
    values = sent[name].reshape(-1) if name in sent else ()
    if len(values) > MAX_WORDS:
        raise Refused(f"{name} holds {len(values)} words; a request may have {MAX_WORDS}")
    for value in values:
        if len(value) > MAX_WORD_BYTES:
            raise Refused(f"{name} holds a word of {len(value)} bytes; one may have {MAX_WORD_BYTES}")
    if sum(map(len, values)) > MAX_WORDS_BYTES:
        raise Refused(f"{name} holds {sum(map(len, values))} bytes; all words of a request may have {MAX_WORDS_BYTES}")
    return [_utf8(name, value) for value in values if value]


def rows(sent: Sent, n_rows: int) -> list[Sent]:
    """A batch as one Sent per row, each with a batch dimension of 1."""
    for name, values in sent.items():
        if len(values) != n_rows:
            raise Refused(f"{name} has {len(values)} rows; the batch has {n_rows}")
    return [Sent({name: values[n : n + 1] for name, values in sent.items()}) for n in range(n_rows)]


def weighted_words(sent: Sent, words_name: str, weights_name: str) -> list[tuple[str, float]]:
    """Words with their weights; there must be one weight per word."""
    values = sent[words_name].reshape(-1).tolist() if words_name in sent else []
    weights = sent[weights_name].reshape(-1).tolist() if weights_name in sent else []
    words(sent, words_name)  # within their limits
    if values == [b""] and len(weights) <= 1:
        return []
    if len(values) != len(weights):
        raise Refused(f"{words_name} holds {len(values)} words, {weights_name} {len(weights)} weights")
    return [(_utf8(words_name, value), weight) for value, weight in zip(values, weights) if value]


def scalar(sent: Sent, name: str, default: Any = REQUIRED) -> Any:
    """The one value of an input."""
    if name not in sent and default is not REQUIRED:
        return default
    values = sent[name].reshape(-1)
    if len(values) != 1:
        raise Refused(f"{name} holds {len(values)} values; it takes one")
    return values[0].item()


def _utf8(name: str, value: Any) -> str:
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise Refused(f"{name} is not UTF-8: byte {value[at]:#04x} at offset {at} of {len(value)}") from None
