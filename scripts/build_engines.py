"""Room `engines`: one engine per rank and the config.json that says what they can do.

Reads   the room checkpoint
Writes  config.json in TensorRT-LLM's engine schema; rank0..N-1.safetensors (torch): the checkpoint's files, linked, not copied
Needs   nothing (torch): the checkpoint's rank files are what the torch engine loads
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from scripts import contracts, errors, room

# TensorRT-LLM's own default since 0.11 (docker/contracts/trtllm-build): tokens of one engine step over all requests
MAX_NUM_TOKENS = 8192


@dataclass(frozen=True)
class Settings:
    """What an engine is built for. Limits in tokens; None: derived from the model's context (see `limits`)."""

    checkpoint: Path
    output: Path
    engine: str
    trtllm_version: str
    max_batch_size: int
    max_input_len: Optional[int] = None
    max_seq_len: Optional[int] = None
    max_num_tokens: Optional[int] = None

    def __post_init__(self) -> None:
        if self.engine != "torch":
            raise errors.engine_kind_missing(self.engine)


def limits(settings: Settings, context_tokens: int) -> Dict[str, int]:
    """The four limits of an engine, every one explicit.

    max_seq_len: the model's context (its max_position_embeddings); max_input_len: half of max_seq_len, so that an answer may be
    as long as its question; max_num_tokens: MAX_NUM_TOKENS, never less than one whole prompt and never more than a full batch.
    """
    max_seq_len = context_tokens if settings.max_seq_len is None else settings.max_seq_len
    if max_seq_len > context_tokens:
        raise errors.limits_do_not_fit(
            "MAX_SEQ_LEN", max_seq_len, "the model's context", context_tokens, context_tokens
        )
    max_input_len = max(1, max_seq_len // 2) if settings.max_input_len is None else settings.max_input_len
    if max_input_len >= max_seq_len:
        raise errors.limits_do_not_fit("MAX_INPUT_LEN", max_input_len, "MAX_SEQ_LEN", max_seq_len, max_seq_len - 1)
    full_batch = settings.max_batch_size * max_input_len
    max_num_tokens = min(MAX_NUM_TOKENS, full_batch) if settings.max_num_tokens is None else settings.max_num_tokens
    if settings.max_num_tokens is None:
        max_num_tokens = max(max_num_tokens, max_input_len, settings.max_batch_size)
    if max_num_tokens < settings.max_batch_size:
        raise errors.limits_do_not_fit(
            "MAX_BATCH_SIZE", settings.max_batch_size, "MAX_NUM_TOKENS", max_num_tokens, max_num_tokens
        )
    return {
        "max_batch_size": settings.max_batch_size,
        "max_input_len": max_input_len,
        "max_seq_len": max_seq_len,
        "max_num_tokens": max_num_tokens,
    }


def engine_config(
    golden: Mapping[str, Any], version: str, checkpoint: Mapping[str, Any], sizes: Mapping[str, int]
) -> Dict[str, Any]:
    """config.json of an engine: the version's golden file, key for key, with this model's values.

    golden: docker/contracts/engine-config; checkpoint: the checkpoint's config.json. Up to 0.10 the schema has max_output_len
    (new tokens) and no max_seq_len (all tokens): upstream derives the one from the other by a sum.
    """
    dtype = checkpoint["dtype"]
    pretrained = _with_values(
        golden["pretrained_config"],
        {
            "head_size": checkpoint["hidden_size"] // checkpoint["num_attention_heads"],
            "kv_dtype": dtype,
            **checkpoint,
        },
    )
    build = _with_values(
        golden["build_config"],
        {
            **sizes,
            "max_output_len": sizes["max_seq_len"] - sizes["max_input_len"],
            "opt_num_tokens": sizes["max_batch_size"],
        },
    )
    plugins = build["plugin_config"]
    build["plugin_config"] = _with_values(
        plugins, {name: dtype for name, value in plugins.items() if value == golden["pretrained_config"]["dtype"]}
    )
    return {"version": version, "pretrained_config": pretrained, "build_config": build}


def _with_values(golden: Mapping[str, Any], values: Mapping[str, Any]) -> Dict[str, Any]:
    """The golden mapping with the values that it has a key for; nested mappings keep the golden keys they do not share."""
    filled: Dict[str, Any] = {}
    for key, value in golden.items():
        new = values.get(key, value)
        filled[key] = {**value, **new} if isinstance(value, dict) and isinstance(new, dict) else new
    return filled


def build_engines(settings: Settings) -> None:
    """Fill the room `engines`."""
    config = json.loads((settings.checkpoint / "config.json").read_bytes()) if settings.checkpoint.is_dir() else {}
    manifest = room.read_manifest(settings.checkpoint)
    sizes = limits(settings, config["max_position_embeddings"])
    world_size = config["mapping"]["world_size"]
    golden = contracts.table("engine-config", settings.trtllm_version)
    arguments = {"engine": settings.engine, "trtllm_version": settings.trtllm_version, **sizes}
    room.say(
        "engines",
        f"{settings.engine}: {world_size} ranks, {config['dtype']}, " + ", ".join(f"{k} {v}" for k, v in sizes.items()),
    )
    with room.filling(settings.output, reads={"checkpoint": settings.checkpoint}, arguments=arguments) as filling:
        for rank in range(world_size):
            name = f"rank{rank}.safetensors"
            filling.link(name, settings.checkpoint / name, room.record_of(manifest, name))
        filling.write_json("config.json", engine_config(golden, settings.trtllm_version, config, sizes))
        filling.facts = {"engine": settings.engine, "world_size": world_size, "trtllm_version": settings.trtllm_version}


def tokens(name: str, value: str) -> Optional[int]:
    """A limit from the command line: a whole number of at least 1, or nothing (None)."""
    if not value.strip():
        return None
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise errors.not_a_number(name, value)
    return int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--checkpoint", "--output"):
        parser.add_argument(flag, type=Path, required=True)
    for flag in ("--engine", "--trtllm-version", "--max-batch-size"):
        parser.add_argument(flag, required=True)
    for flag in ("--max-input-len", "--max-seq-len", "--max-num-tokens"):
        parser.add_argument(flag, default="")
    args = parser.parse_args()
    max_batch_size = tokens("MAX_BATCH_SIZE", args.max_batch_size)
    if max_batch_size is None:
        raise errors.not_a_number("MAX_BATCH_SIZE", "")
    build_engines(
        Settings(
            args.checkpoint,
            args.output,
            args.engine,
            args.trtllm_version,
            max_batch_size,
            tokens("MAX_INPUT_LEN", args.max_input_len),
            tokens("MAX_SEQ_LEN", args.max_seq_len),
            tokens("MAX_NUM_TOKENS", args.max_num_tokens),
        )
    )


if __name__ == "__main__":
    errors.run(main)
