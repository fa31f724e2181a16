"""Opens the weights of a Llama in whatever form they have;
every form gives Hugging Face's tensors by blocks of rows."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterator, Mapping, Protocol, Sequence

from scripts import reports
from scripts.weights import files
from scripts.weights import gguf as gguf_file
from scripts.weights.folder import check_folder
from scripts.weights.hugging_face import HfConfig, read_hf_model
from scripts.weights.meta import MetaModel, joined, read_shard, shard_paths
from scripts.weights.safetensors import Raw
from scripts.weights.shape import LlamaShape, Shape, read_params


class Weights(Protocol):
    """The tensors of a model under Hugging Face's names, with lm_head.weight, also if it is the embedding."""

    @property
    def shape(self) -> LlamaShape: ...

    @property
    def dtype(self) -> str:
        """float16, bfloat16 or float32; for mixed types, the one that config.json names."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold them."""
        ...

    @property
    def tensors(self) -> Mapping[str, tuple[str, Shape]]:
        """Name -> stored type (F16, BF16, F32) and shape."""
        ...

    def blocks(self, hf_name: str) -> Iterator[Raw]:
        """The rows of a tensor in order, some at a time; a Problem if they are not what was saved."""
        ...

    def origin(self, hf_name: str) -> tuple[Path, str]:
        """The file that holds a tensor, and the tensor's name there."""
        ...


def form_of(folder: Path) -> str:
    """Which form the model of a folder has: meta, hf, or gguf; a Problem if it has none or two, or a file that is not
    plain or lies outside."""
    check_folder(folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    meta = [
        name for name in names if name == files.PARAMS or (name.startswith("consolidated.") and name.endswith(".pth"))
    ]
    if "config.json" in names and meta == [files.PARAMS]:
        meta = []  # Mistral's own repositories have Hugging Face's form, and a params.json besides
    hf = [name for name in names if name in ("config.json", *files.INDEXES.values()) or name.endswith(".safetensors")]
    hf = hf or files.weights_among(names, ".bin")
    gguf = files.weights_among(names, ".gguf")
    found = {form: named for form, named in (("meta", meta), ("hf", hf), ("gguf", gguf)) if named}
    if meta and not any(name == "config.json" for name in hf):
        found.pop("hf", None)  # Meta's own folder may hold other formats of the same weights; Meta's form counts
    if not found:
        raise reports.weights.weights_unknown_form(folder, names)
    if len(found) > 1:
        (one, ours), (other, theirs) = list(found.items())[:2]
        raise reports.weights.weights_two_forms(folder, one, ours, other, theirs)
    return next(iter(found))


def open_weights(folder: Path, config: HfConfig) -> Weights:
    """The weights of a folder, compared with the model's config.json (of the room config). Only headers are read."""
    form = form_of(folder)
    if form == "meta":
        return open_meta(folder, config.shape.vocab_size, config.path)
    if form == "gguf":
        return gguf_file.read_gguf(folder).weights(config.shape)
    return read_hf_model(folder, config)


def open_meta(folder: Path, vocab_size: int, tokenizer_path: Path) -> MetaModel:
    """Meta's shards, compared with their params.json and the size of the tokenizer."""
    return joined(
        folder,
        [read_shard(path) for path in shard_paths(folder)],
        read_params(folder / files.PARAMS),
        tokenizer_path,
        vocab_size,
    )


@contextmanager
def watched(folder: Path, room: str) -> Iterator[Callable[[], None]]:
    """Gives a function that raises a Problem if a file of weights was replaced since the beginning, because what was
    read may mix both files. It also checks this when reading fails.

    Every file is held open, so that no file system reuses its inode number meanwhile.
    """
    with ExitStack() as stack:
        paths = [path for ending in files.WEIGHTS for path in folder.glob(f"*{ending}")]
        begun = {path: os.fstat(stack.enter_context(path.open("rb")).fileno()) for path in paths if path.is_file()}

        def unchanged() -> None:
            for path, before in begun.items():
                now = path.stat() if path.is_file() else None
                if now is None or _identity(now) != _identity(before):
                    raise reports.weights.weights_changed(path, before, now, room)

        try:
            yield unchanged
        except (reports.Problem, FileNotFoundError):
            unchanged()
            raise


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
