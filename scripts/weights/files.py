"""Which files a model has, by the form of its weights. This module needs only the standard library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Collection, Iterable

# Meta's form: the sizes, the tokenizer, and lists of md5 sums of the other files
PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")
# Hugging Face's form: one file of weights, or an index of several
SINGLE, BIN_SINGLE = "model.safetensors", "pytorch_model.bin"
INDEXES = {".safetensors": f"{SINGLE}.index.json", ".bin": f"{BIN_SINGLE}.index.json"}
INDEX, BIN_INDEX = INDEXES.values()
# What belongs to a model in Hugging Face's form, besides its weights. Never code.
HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# ending of a file of weights -> how such files are called; Mistral's folders have a consolidated.safetensors besides
WEIGHTS = {
    ".pth": re.compile(r"consolidated\.\d\d\.pth"),
    ".safetensors": re.compile(r"model.*\.safetensors"),
    ".bin": re.compile(r"pytorch_model.*\.bin"),
    ".gguf": re.compile(r".*\.gguf"),
}
# Every file of a model that is read, by any form; other files do not matter.
READ = re.compile(
    "|".join([*map(re.escape, (PARAMS, *HF_FILES)), rf".*({'|'.join(map(re.escape, WEIGHTS))}|\.index\.json)"])
)


def shard(index: int) -> str:
    """Meta's name of a shard: consolidated.00.pth is the first."""
    return f"consolidated.{index:02d}.pth"


def tokenizers_of(folder: Path) -> tuple[Path, Path]:
    """SentencePiece's file beside the weights, and one level up, where Meta's download leaves it for all sizes."""
    return folder / TOKENIZER, folder.resolve().parent / TOKENIZER


def weights_among(names: Iterable[str], ending: str) -> list[str]:
    """The files of weights with one ending, sorted."""
    return sorted(name for name in names if WEIGHTS[ending].fullmatch(name))


def in_metas_form(names: Collection[str]) -> bool:
    """Whether these are Meta's files. Mistral's repositories have a params.json beside a config.json, and no shards."""
    shards = any(name.startswith("consolidated.") and name.endswith(".pth") for name in names)
    return PARAMS in names and (shards or "config.json" not in names)


def weights_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder; 0 if there is none. An index may give files of one form other names."""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    usual = [name for ending in WEIGHTS for name in weights_among(names, ending)]
    return sum((folder / name).stat().st_size for name in usual or names if Path(name).suffix in WEIGHTS)
