"""Reports about the rooms `engines` and `model_repo`."""

from __future__ import annotations

from typing import Sequence

from scripts.reports.problem import PathLike, Problem, make
from scripts.reports.settings import bad_setting


def not_a_number(name: str, value: str) -> Problem:
    return bad_setting(name, value, "a whole number of at least 1", make("serve", **{name: 8}))


def limits_do_not_fit(name: str, value: int, other: str, limit: int, mended: int) -> Problem:
    return Problem(
        f"{name} is too large",
        "Makefile",
        f"{name} is {value}; {other} is {limit} and does not allow more.",
        "Lower it:",
        make("serve", **{name: mended}),
    )


def step_smaller_than_prompt(max_input_len: int, max_num_tokens: int) -> Problem:
    """max_num_tokens: tokens of one engine step; max_input_len: tokens of the longest prompt."""
    return Problem(
        "MAX_NUM_TOKENS is too small",
        "Makefile",
        f"MAX_NUM_TOKENS is {max_num_tokens}; MAX_INPUT_LEN is {max_input_len}. TensorRT-LLM reads a whole prompt in "
        "one step (chunked context is off). It would accept prompts longer than MAX_NUM_TOKENS, and then fail.",
        "Raise it, or lower MAX_INPUT_LEN:",
        make("engines", MAX_NUM_TOKENS=max_input_len),
    )


def engine_kind_missing(kind: str) -> Problem:
    return Problem(
        f"ENGINE={kind} is not ready",
        "scripts/build_engines.py",
        f"ENGINE is {kind}; this project has no code for it.",
        "Use the torch engine:",
        make("serve", ENGINE="torch"),
    )


def holes_do_not_match(template: PathLike, unfilled: Sequence[str], unused: Sequence[str]) -> Problem:
    return Problem(
        "template and values do not match",
        template,
        f"Placeholders without a value: {', '.join(unfilled) or 'none'}. Values without a placeholder: "
        f"{', '.join(unused) or 'none'}.",
        "Correct the template or scripts/build_model_repo.py, then:",
        make("model_repo"),
    )


def engine_lacks(feature: str, missing: Sequence[str]) -> Problem:
    without = {"KV_REUSE": "off"} if "KV" in feature else {}
    return Problem(
        f"engines without {feature}",
        "engines/config.json",
        f"The configs need {feature}; these engines were built without {', '.join(missing)}.",
        "Serve without it:" if without else "Build them again:",
        make("serve" if without else "engines", **without),
    )


def config_not_accepted(config: PathLike, reason: str) -> Problem:
    return Problem(
        "Triton would not take this config",
        config,
        f"The filled file is not valid: {reason}",
        "Correct the template, then:",
        make("model_repo"),
    )
