"""Writes and reads .safetensors files by blocks of rows, so that no tensor is ever whole in memory.

Numbers stay what they are on disk: a tensor of 16 bits is an array of uint16, of 32 bits of uint32 (numpy has no bfloat16).
"""

import ctypes
import hashlib
import json
import math
import os
import struct
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import numpy as np
import numpy.typing as npt

from scripts import errors
from scripts.room import FileRecord

Raw = npt.NDArray[Any]  # uint16 or uint32: the bits as stored
Shape = Tuple[int, ...]

ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
# settings, Hugging Face's config.json and TensorRT-LLM's config.json say float16; safetensors headers say F16
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
DTYPE_NAMES = {code: name for name, code in DTYPES.items()}
# 1 MB stays in the processor's cache from reading to hashing; 8 MB took twice the system time (page faults)
BLOCK_BYTES = 1 << 20
# blocks that wait to be written: enough to keep the writer busy
BLOCKS_WAITING = 4
# how much is written before the disk is told to begin with it: without that it idles until the last block and then takes as long again
SYNC_BYTES = 256 << 20
# the format's own limit (safetensors' MAX_HEADER_SIZE)
HEADER_MAX_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` is the offset of its first byte in the file; rows follow each other without gaps."""

    path: Path
    name: str
    dtype: str
    shape: Shape
    start: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def rows(self, first: int, end: int) -> Raw:
        """Rows [first, end) as raw numbers, read from the file: (end - first, *shape[1:]).

        Read and not mapped: a file that was cut meanwhile gives a report, a map of it would end the process with SIGBUS.
        """
        raw = np.uint16 if ITEM_BYTES[self.dtype] == 2 else np.uint32
        count = (end - first) * math.prod(self.shape[1:])
        with self.path.open("rb") as file:
            file.seek(self.start + first * self.row_bytes)
            values = np.fromfile(file, raw, count)
        if values.size != count:
            raise errors.weights_unreadable(self.path, f"it ends inside of {self.name}")
        return values.reshape(end - first, *self.shape[1:])


def row_blocks(first: int, end: int, row_bytes: int, multiple: int = 1) -> Iterator[Tuple[int, int]]:
    """Cut rows [first, end) into blocks of about BLOCK_BYTES, each but the last a multiple of `multiple` rows."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes * multiple)) * multiple
    for start in range(first, end, step):
        yield start, min(start + step, end)


def header_bytes(tensors: Mapping[str, Tuple[str, Shape]], metadata: Optional[Mapping[str, str]] = None) -> bytes:
    """Length and header of a file with these tensors (name -> dtype, shape), byte for byte as the safetensors library writes them.

    Order: larger item sizes first, then names as plain strings (layers.10 before layers.2). Compact JSON, spaces up to a multiple of 8.
    Without metadata there is no `__metadata__`, as in TensorRT-LLM's rank files.
    """
    entries: Dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in stored_order(tensors):
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def stored_order(tensors: Mapping[str, Tuple[str, Shape]]) -> List[str]:
    """The order in which the tensors lie in a file."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))


def write(
    path: Path,
    tensors: Mapping[str, Tuple[str, Shape]],
    blocks: Callable[[str], Iterable[Raw]],
    metadata: Optional[Mapping[str, str]] = None,
    advance: Callable[[int], Any] = lambda size_bytes: None,
) -> FileRecord:
    """Write a file whole and synced; returns its size and sha256, taken while writing.

    blocks(name) gives a tensor's rows in order, as raw arrays; it is called in stored order. advance hears of every block's bytes.
    """
    digest = hashlib.sha256()
    size_bytes = unsynced_bytes = 0
    _keep_freed_memory()
    with open(path, "wb", buffering=0) as file, _Worker() as writer, _Worker() as syncer:

        def take(data: memoryview) -> None:
            digest.update(data)
            _write_all(file.fileno(), data)

        for data in _pieces(tensors, blocks, metadata):
            writer.do(take, data)
            size_bytes += len(data)
            unsynced_bytes += len(data)
            if unsynced_bytes >= SYNC_BYTES and syncer.idle():
                syncer.do(os.fdatasync, file.fileno())
                unsynced_bytes = 0
            advance(len(data))
        writer.finish()
        syncer.finish()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
    return FileRecord(size_bytes, digest.hexdigest())


def read_header(path: Path) -> Dict[str, StoredTensor]:
    """The tensors of a file, from its header alone; a Problem where header and file do not agree.

    The checks are the safetensors library's own: offsets start at 0, have neither gap nor overlap and end where the file ends.
    """

    def unreadable(reason: str) -> errors.Problem:
        return errors.weights_unreadable(path, reason)

    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(HEADER_MAX_BYTES, size_bytes - 8):
                raise unreadable(f"its header should have {length} bytes, the file has {size_bytes}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise unreadable(error.strerror or type(error).__name__) from None
    except (ValueError, RecursionError) as error:
        raise unreadable(f"its header is no JSON ({error})") from None
    tensors: Dict[str, StoredTensor] = {}
    at = 0
    try:
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if dtype not in ITEM_BYTES:
                raise errors.model_unfit(path, f"{name} is of the type {dtype}", ", ".join(ITEM_BYTES))
            if any(type(n) is not int or n <= 0 for n in shape) or not shape:
                raise unreadable(f"{name} has the shape {list(shape)}")
            if begin != at or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
                raise unreadable(
                    f"{name} should lie at bytes {at} to {at + math.prod(shape) * ITEM_BYTES[dtype]} "
                    f"of the data, its header says {begin} to {end}"
                )
            tensors[name] = StoredTensor(path, name, dtype, shape, 8 + length + begin)
            at = end
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(f"its header is not of safetensors' form ({type(error).__name__}: {error})") from None
    if 8 + length + at != size_bytes:
        raise unreadable(f"its header promises {8 + length + at} bytes, the file has {size_bytes}")
    return tensors


def _pieces(
    tensors: Mapping[str, Tuple[str, Shape]],
    blocks: Callable[[str], Iterable[Raw]],
    metadata: Optional[Mapping[str, str]],
) -> Iterator[memoryview]:
    yield memoryview(header_bytes(tensors, metadata))
    for name in stored_order(tensors):
        dtype, shape = tensors[name]
        left = math.prod(shape) * ITEM_BYTES[dtype]
        for block in blocks(name):
            data = np.ascontiguousarray(block).data.cast("B")
            left -= len(data)
            yield data
        assert left == 0, f"{name}: {left} bytes are missing"


class _Worker(ThreadPoolExecutor):
    """One thread that does one thing after the other; what fails there is raised here.

    Hashing, writing and syncing release the interpreter's lock, so they go on while the next block is made.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1)
        self.waiting: Deque[Future[object]] = deque()

    def do(self, what: Callable[..., object], *words: object) -> None:
        if len(self.waiting) >= BLOCKS_WAITING:
            self.waiting.popleft().result()
        self.waiting.append(self.submit(what, *words))

    def idle(self) -> bool:
        return all(future.done() for future in self.waiting)

    def finish(self) -> None:
        while self.waiting:
            self.waiting.popleft().result()


def _keep_freed_memory() -> None:
    """Let glibc keep the blocks that we free instead of giving their pages back and asking for new ones.

    Measured for 1.25 GB: 8,000 page faults instead of 210,000, a quarter of the time. mallopt's numbers: malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt:
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its maximum


def _write_all(fd: int, data: memoryview) -> None:
    """os.write until everything is written: one call writes 2 GB at most, and a full disk may cut it short before it fails."""
    while data:
        data = data[os.write(fd, data) :]
