"""NVIDIA's tensor contract for the model tensorrt_llm, both ways: named arrays to a request, tokens to named arrays.

Names and shapes of the C++ backend at v0.8.0; later names of the same inputs are accepted too. Every array has the
batch dimension in front, and the batch is always 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from engine import Piece, Refused
from guides import Guide, Guides, why_not
from numpy.typing import NDArray
from sampling import Sampling, Words, word_list

Array = NDArray[Any]

SAMPLING = {  # input: (our name, type)
    "end_id": ("end_id", int),
    "temperature": ("temperature", float),
    "runtime_top_k": ("top_k", int),
    "runtime_top_p": ("top_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "min_length": ("min_length", int),
    "min_tokens": ("min_length", int),  # since 0.20
    "random_seed": ("random_seed", int),
    "seed": ("random_seed", int),  # since 0.20
}
FLAGS = {
    "streaming": "streaming",
    "return_log_probs": "log_probs",
    "return_context_logits": "context_logits",
    "return_generation_logits": "generation_logits",
    "exclude_input_in_output": "exclude_input",  # since 0.17; before that only a parameter of the model
    "return_num_input_tokens": "num_input_tokens",  # these two since 0.20
    "return_num_output_tokens": "num_output_tokens",
}
READ_APART = {
    "input_ids",
    "input_lengths",
    "request_output_len",
    "stop_words_list",
    "bad_words_list",
    "embedding_bias",
    "stop",
    "guided_decoding_guide_type",  # these two since 0.17
    "guided_decoding_guide",
}
# A request may give these as parameters, because not every version has an input for them. config.pbtxt names them
# (build_model_repo.REQUEST_PARAMETERS); the endpoint looks there.
MAX_LIKELIEST = 20
# The first ones steer padding and beams, which this engine does not have. A model without an encoder does not read what
# a decoder begins with, but NVIDIA's end_to_end_test.py sends it to every model (preprocessing's DECODER_INPUT_ID).
MEANINGLESS = {"pad_id", "len_penalty", "early_stopping", "decoder_input_ids", "decoder_input_lengths"}
# Outputs with a value in every response
ALWAYS = ("output_ids", "sequence_length")
ONLY = {  # features that this engine lacks: a request may name them with the value that turns them off
    "beam_width": 1,
    "num_return_sequences": 1,
    "beam_search_diversity_rate": 0,
    "prompt_vocab_size": 0,
    "return_perf_metrics": 0,
}


@dataclass(frozen=True)
class Asked:
    """One inference request as the client meant it."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    streaming: bool = False
    log_probs: bool = False
    context_logits: bool = False
    generation_logits: bool = False
    exclude_input: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    likeliest: int = 0
    prompt_log_probs: bool = False


def understood(
    inputs: Mapping[str, Array],
    exclude_input: bool,
    end_ids: Sequence[int] = (),
    parameters: Mapping[str, Any] = {},
    guides: Guides | None = None,
) -> Asked:
    """What these inputs ask for; `exclude_input` is the default. Raises Refused, which names the input.

    end_ids: the model's ends. Upstream's contract has room for one end_id, so a request with one of them means all of
    them.
    parameters: the request's own; guides: makes the guide of an answer; None: guides are not available.
    """
    for name, array in inputs.items():
        if name in ONLY:
            if scalar(name, array) != ONLY[name]:
                raise Refused(f"{name} is {scalar(name, array)}; this engine supports only {ONLY[name]}")
        elif name not in SAMPLING and name not in FLAGS and name not in READ_APART | MEANINGLESS and array.size:
            raise Refused(f"{name} is not supported by this engine (it came with shape {list(array.shape)})")
    for name in ("input_ids", "input_lengths", "request_output_len"):
        if name not in inputs:
            raise Refused(f"the input {name} is missing")
    ids, length = inputs["input_ids"], int(scalar("input_lengths", inputs["input_lengths"]))
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise Refused(f"input_ids has shape {list(ids.shape)}; this engine takes one prompt per request, [1, tokens]")
    if not 0 <= length <= ids.shape[1]:
        raise Refused(f"input_lengths is {length}; input_ids has {ids.shape[1]} tokens")
    sampling: dict[str, Any] = {
        ours: kind(scalar(name, inputs[name])) for name, (ours, kind) in SAMPLING.items() if name in inputs
    }
    bias = inputs.get("embedding_bias")
    if bias is not None and bias.size:
        sampling["embedding_bias"] = torch.from_numpy(bias.reshape(-1).astype(np.float32))
    if sampling.get("end_id") in end_ids:
        sampling["other_end_ids"] = tuple(token for token in end_ids if token != sampling["end_id"])
    sampling["guide"] = guide_of(
        inputs, parameters, guides, (sampling.get("end_id", -1), *sampling.get("other_end_ids", ()))
    )
    sampling["min_p"] = number("min_p", parameters, 0.0, 1.0)
    likeliest = int(number("top_logprobs", parameters, 0, MAX_LIKELIEST))
    flags = {ours: bool(scalar(name, inputs[name])) for name, ours in FLAGS.items() if name in inputs}
    of_prompt = bool(number("prompt_logprobs", parameters, 0, 1))
    if of_prompt and not flags.get("log_probs"):
        raise Refused("prompt_logprobs needs return_log_probs: output_log_probs holds them, before those of the answer")
    return Asked(
        prompt=tuple(ids[0, :length].tolist()),
        max_new_tokens=int(scalar("request_output_len", inputs["request_output_len"])),
        sampling=Sampling(
            **sampling,
            bad_words=words("bad_words_list", inputs),
            stop_words=words("stop_words_list", inputs),
        ),
        likeliest=likeliest,
        prompt_log_probs=of_prompt,
        **{"exclude_input": exclude_input, **flags},
    )


def number(name: str, parameters: Mapping[str, Any], least: float, most: float) -> float:
    """A number among a request's parameters; `least` if it is not given. Raises Refused."""
    value = parameters.get(name, least)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise Refused(f"{name} is {str(value)[:40]}; it must be between {least} and {most}")
    return value


def guide_of(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], guides: Guides | None, end_ids: Sequence[int]
) -> Guide | None:
    """What guides the answer, from inputs or parameters. Raises Refused."""
    kind, text = (
        parameters.get(name) if name not in inputs else scalar(name, inputs[name])
        for name in ("guided_decoding_guide_type", "guided_decoding_guide")
    )
    if kind is None and text is None:
        return None
    kind, text = (
        value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "") for value in (kind, text)
    )
    if guides is None:
        raise Refused("guided_decoding_guide is not supported: this engine was started without the model's tokenizer")
    if (why := why_not(kind, text)) is not None:
        raise Refused(f"guided_decoding_guide: {why}")
    return guides.guide(kind, text, end_ids)


def scalar(name: str, array: Array) -> Any:
    """The one value of an input. Raises Refused."""
    if array.size != 1:
        raise Refused(f"{name} has shape {list(array.shape)}; it must hold one value")
    value = array.reshape(-1)[0]
    return value.item() if isinstance(value, np.generic) else value


def words(name: str, inputs: Mapping[str, Array]) -> Words:
    """The words of an INT32 [1, 2, n] list. Raises Refused when it is malformed."""
    array = inputs.get(name)
    if array is None or not array.size:
        return ()
    if array.ndim != 3 or array.shape[:2] != (1, 2):
        raise Refused(f"{name} has shape {list(array.shape)}; it must be [1, 2, n]")
    try:
        return word_list(*array[0].tolist())
    except ValueError as problem:
        raise Refused(f"{name} is malformed: {problem}") from None


def outputs(
    asked: Asked,
    pieces: Sequence[Piece],
    cum_log_prob: float,
    without_value: Collection[str],
    wanted: Collection[str] | None = None,
) -> dict[str, Array]:
    """The tensors of one response that carries `pieces`; `cum_log_prob` counts all tokens up to here.

    without_value: outputs that this version sends as zeros of the smallest shape if no input asks for their value; it
    leaves out all others (docker/contracts/backend-rules, `without_value`). wanted: those that the client named; None:
    all.
    """
    new = [token for piece in pieces for token in piece.tokens]
    with_input = not asked.streaming and not asked.exclude_input
    shown = [*asked.prompt, *new] if with_input else new
    context = [piece.context_logits for piece in pieces if piece.context_logits is not None]
    generation = [piece.generation_logits for piece in pieces if piece.generation_logits is not None]

    def log_probs() -> Array:
        told = (value for piece in pieces for value in (*piece.prompt_log_probs, *piece.log_probs))
        values = list(told) if asked.log_probs else [0.0] * len(new)
        return np.array(values, dtype=np.float32).reshape(1, 1, -1)

    has_value = {
        "cum_log_probs": asked.log_probs,
        "output_log_probs": asked.log_probs,
        "context_logits": bool(context),
        "generation_logits": bool(generation),
        "num_input_tokens": asked.num_input_tokens,
        "num_output_tokens": asked.num_output_tokens,
    }
    # made when they are sent: 256 streams make 25,000 responses a second
    values: dict[str, Callable[[], Array]] = {
        "output_ids": lambda: np.array(shown, dtype=np.int32).reshape(1, 1, -1),
        "sequence_length": lambda: np.array([[len(shown)]], dtype=np.int32),
        "cum_log_probs": lambda: np.array([[cum_log_prob]], dtype=np.float32),
        "output_log_probs": log_probs,
        "context_logits": lambda: torch.cat(context)[None].numpy() if context else np.zeros((1, 1, 1), np.float32),
        "generation_logits": lambda: (
            torch.cat(generation)[None, None].numpy() if generation else np.zeros((1, 1, 1, 1), np.float32)
        ),
        # declared since 0.11 and 0.14: there is one sequence
        "batch_index": lambda: np.zeros((1, 1), np.int32),
        "sequence_index": lambda: np.zeros((1, 1), np.int32),
        "num_input_tokens": lambda: np.array([[len(asked.prompt)]], np.int32),
        "num_output_tokens": lambda: np.array([[len(new)]], np.int32),
    }
    return {
        name: make()
        for name, make in values.items()
        if (wanted is None or name in wanted) and (name in ALWAYS or has_value.get(name) or name in without_value)
    }
