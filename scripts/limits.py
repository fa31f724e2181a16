"""The limits that engines were built for, from their config.json. Standard library only:
the image's endpoint uses it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping


@dataclass(frozen=True)
class Limits:
    """Most requests at once, and most tokens of a prompt, of prompt and answer together, and of one step (None:
    no limit)."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int | None


def limits_of(config: Mapping[str, Any]) -> Limits:
    """The limits in an engine's config.json.

    Up to TensorRT-LLM 0.10 its build_config has max_output_len, the answer's tokens; since 0.11 max_seq_len, which
    counts the prompt too (docker/contracts/engine-config).
    """
    build = config["build_config"]
    return Limits(
        max_batch_size=build["max_batch_size"],
        max_input_len=build["max_input_len"],
        max_seq_len=build.get("max_seq_len") or build["max_input_len"] + build["max_output_len"],
        max_num_tokens=build.get("max_num_tokens"),
    )
