"""Writes and reads .safetensors files by blocks of rows, so that no tensor is ever whole in memory.

Numbers stay what they are on disk: a tensor of 16 bits is an array of uint16,
of 32 bits of uint32 (numpy has no bfloat16).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import struct
import zlib
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from scripts import reports
from scripts.room import FileRecord, Filling, say

Raw = npt.NDArray[Any]  # uint16 or uint32: the bits as stored
Shape = tuple[int, ...]

ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
# settings, Hugging Face's config.json and TensorRT-LLM's config.json say float16; safetensors headers say F16
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
DTYPE_NAMES = {code: name for name, code in DTYPES.items()}
# 1 MB stays in the processor's cache from reading to hashing; 8 MB took twice the system time (page faults)
BLOCK_BYTES = 1 << 20
# blocks that wait to be written, for each file: enough to keep its threads busy, and more if there are cores for the
# threads of more ranks
BLOCKS_WAITING = 4 * min(8, os.cpu_count() or 1)
# how much is written before it is synced to the disk and noted as kept, in case the conversion is interrupted
SYNC_BYTES = 256 << 20
# the format's own limit (safetensors' MAX_HEADER_SIZE)
HEADER_MAX_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` is the offset of its first byte in the file; rows follow each other without gaps.

    crc32: the checksum of its bytes in the file; None if the file has none for this tensor alone.
    """

    path: Path
    name: str
    dtype: str
    shape: Shape
    start: int
    crc32: int | None = None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def rows(self, first: int, end: int) -> Raw:
        """Rows [first, end) as raw numbers, read from the file: (end - first, *shape[1:]).

        The file is read, not mapped: a file that was cut meanwhile gives a report, while a map would end the process
        with SIGBUS.
        """
        raw = np.uint16 if ITEM_BYTES[self.dtype] == 2 else np.uint32
        count = (end - first) * math.prod(self.shape[1:])
        with self.path.open("rb") as file:
            file.seek(self.start + first * self.row_bytes)
            values = np.fromfile(file, raw, count)
        if values.size != count:
            raise reports.weights.weights_unreadable(self.path, f"it ends inside of {self.name}")
        return values.reshape(end - first, *self.shape[1:])

    def blocks(self, multiple: int = 1, other_row_bytes: int = 0) -> Iterator[Raw]:
        """All rows in order, some at a time (a multiple of `multiple`);
        a Problem at the end if the checksum does not match.

        other_row_bytes: bytes of the same row in other files, so that joined blocks stay small.
        """
        crc = 0
        for first, end in row_blocks(0, self.shape[0], self.row_bytes + other_row_bytes, multiple):
            block = self.rows(first, end)
            if self.crc32 is not None:
                crc = zlib.crc32(block.data.cast("B"), crc)
            yield block
        if self.crc32 is not None and crc != self.crc32:
            raise reports.weights.tensor_damaged(self.path, self.name, f"{self.crc32:08x}", f"{crc:08x}")


def row_blocks(first: int, end: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut rows [first, end) into blocks of about BLOCK_BYTES, each but the last a multiple of `multiple` rows."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes * multiple)) * multiple
    for start in range(first, end, step):
        yield start, min(start + step, end)


def header_bytes(tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and header of a file with these tensors (name -> dtype, shape),
    byte for byte as the safetensors library writes them.

    Order: larger item sizes first, then names as plain strings (layers.10 before layers.2). Compact JSON, spaces up to
    a multiple of 8. Without metadata there is no `__metadata__`, as in TensorRT-LLM's rank files.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in stored_order(tensors):
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def stored_order(tensors: Mapping[str, tuple[str, Shape]]) -> list[str]:
    """The order in which the tensors lie in a file."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))


def write_together(
    room: Filling,
    names: Sequence[str],
    tensors: Mapping[str, tuple[str, Shape]],
    blocks: Callable[[str], Iterable[Sequence[Raw]]],
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], Any] = lambda size_bytes: None,
) -> None:
    """Write files of the same tensors (names and shapes) at once, each with its own threads;
    they are synced and added to the room.

    blocks(tensor) gives its rows in order: for each file a raw array, which may have no rows. It is called in stored
    order. Size, sha256 and the CRC-32 of each tensor are computed while writing. After an interrupted try, all tensors
    stay up to the last one that is on the disk in all files. advance(bytes) is called for every byte.
    """
    _keep_freed_memory()
    order = stored_order(tensors)
    sizes = [math.prod(tensors[name][1]) * ITEM_BYTES[tensors[name][0]] for name in order]
    with contextlib.ExitStack() as stack:
        header = header_bytes(tensors, metadata)
        files = [stack.enter_context(_File(room.path / name, header)) for name in names]
        done = _go_on(files, list(zip(order, sizes)), [room.begun.get(name, {}) for name in names])
        if done:
            say(room.room.name, f"{done} of {len(order)} tensors of {', '.join(names)} were written before; kept")
            advance(sum(sizes[:done]) * len(files))
        syncer = stack.enter_context(_Worker())
        unsynced_bytes = 0

        def sync(written: list[Future[Any]]) -> None:
            begun = {name: future.result() for name, future in zip(names, written)}
            for file in files:
                os.fdatasync(file.fd)
            room.note(begun)

        for name, size in zip(order[done:], sizes[done:]):
            left = [size] * len(files)
            for parts in blocks(name):
                for index, part in enumerate(parts):
                    if part.size:
                        data = np.ascontiguousarray(part).data.cast("B")
                        files[index].put(data)
                        left[index] -= len(data)
                        unsynced_bytes += len(data)
                        advance(len(data))
            assert not any(left), f"{name}: {left} bytes are missing"
            ended = [file.end_tensor(name) for file in files]
            # start syncing now, or the disk would idle until the last block and then take as long again
            if unsynced_bytes >= SYNC_BYTES and syncer.idle():
                syncer.do(sync, ended)
                unsynced_bytes = 0
        syncer.finish()
        for file in files:
            file.finish()
    for name, file in zip(names, files):
        room.add(name, FileRecord(file.size_bytes, file.digest.hexdigest(), file.crcs))


def fingerprint(path: Path, advance: Callable[[int], Any] = lambda size_bytes: None) -> FileRecord:
    """Size, sha256 and the CRC-32 of each tensor of a file that we did not write (so it must be read once)."""
    tensors = sorted(read_header(path).values(), key=lambda tensor: tensor.start)
    digest, crcs = hashlib.sha256(), {}
    size_bytes = 0
    ends = [(None, tensors[0].start)] if tensors else [(None, path.stat().st_size)]
    with path.open("rb", buffering=0) as file:
        for name, size in [*ends, *((tensor.name, tensor.size_bytes) for tensor in tensors)]:
            crc, end = 0, size_bytes + size
            while size_bytes < end:
                data = file.read(min(BLOCK_BYTES, end - size_bytes))
                if not data:
                    raise reports.weights.weights_unreadable(path, f"it ends inside of {name or 'its header'}")
                digest.update(data)
                crc = zlib.crc32(data, crc)
                size_bytes += len(data)
                advance(len(data))
            if name is not None:
                crcs[name] = f"{crc:08x}"
    return FileRecord(size_bytes, digest.hexdigest(), crcs)


def _go_on(files: list[_File], order: list[tuple[str, int]], begun: list[Mapping[str, str]]) -> int:
    """Bring all files to the same tensor, after what an interrupted try wrote, or after the header.
    Returns how many tensors they have."""
    done = min(len(crcs) for crcs in begun)
    if done:
        with ThreadPoolExecutor(len(files)) as pool:
            kept = [pool.submit(file.keep, order[:done], crcs) for file, crcs in zip(files, begun)]
        if all(future.result() for future in kept):
            return done
    for file in files:
        file.begin()
    return 0


class _File:
    """One file while it is written: one thread hashes a block and another writes it, while the next block is made."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.header, self.size_bytes = header, 0
        self.digest, self.crc = hashlib.sha256(), 0
        self.crcs: dict[str, str] = {}
        self.hasher, self.writer = _Worker(), _Worker()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *failure: object) -> None:
        self.hasher.shutdown()
        self.writer.shutdown()
        os.close(self.fd)

    def begin(self) -> None:
        """Write only the header."""
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        _write_all(self.fd, memoryview(self.header))
        self.size_bytes, self.digest, self.crcs = len(self.header), hashlib.sha256(self.header), {}

    def keep(self, tensors: list[tuple[str, int]], crcs: Mapping[str, str]) -> bool:
        """Read again what an interrupted try wrote, tensor after tensor (name, bytes), and cut off the rest.
        False if it differs."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        if self._read(len(self.header)) != zlib.crc32(self.header):
            return False
        self.crcs = {name: f"{self._read(size):08x}" for name, size in tensors}
        os.ftruncate(self.fd, self.size_bytes)
        return self.crcs == crcs

    def _read(self, size: int) -> int:
        crc, end = 0, self.size_bytes + size
        while self.size_bytes < end and (data := os.read(self.fd, min(BLOCK_BYTES, end - self.size_bytes))):
            self.digest.update(data)
            crc = zlib.crc32(data, crc)
            self.size_bytes += len(data)
        return crc

    def put(self, data: memoryview) -> None:
        """The next bytes."""
        self.size_bytes += len(data)
        self.hasher.do(self.digest.update, data)
        self.writer.do(self._write, data)

    def _write(self, data: memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)
        _write_all(self.fd, data)

    def end_tensor(self, name: str) -> Future[Any]:
        """A tensor is complete. The future gives the CRC-32 of each tensor up to this one, once they are written."""
        return self.writer.do(self._end_tensor, name)

    def _end_tensor(self, name: str) -> Mapping[str, str]:
        self.crcs, self.crc = {**self.crcs, name: f"{self.crc:08x}"}, 0
        return self.crcs

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        self.hasher.finish()
        self.writer.finish()
        os.fchmod(self.fd, 0o644)
        os.fsync(self.fd)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, from its header alone; a Problem if header and file do not agree.

    The checks are those of the safetensors library: offsets start at 0, have no gap and no overlap,
    and end where the file ends.
    """

    def unreadable(reason: str) -> reports.Problem:
        return reports.weights.weights_unreadable(path, reason)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise unreadable(f"its header names {twice} twice")
        return named

    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(HEADER_MAX_BYTES, size_bytes - 8):
                raise unreadable(f"its header should have {length} bytes, the file has {size_bytes}")
            header = json.loads(file.read(length), object_pairs_hook=once)
    except OSError as error:
        raise unreadable(error.strerror or type(error).__name__) from None
    except (ValueError, RecursionError) as error:
        raise unreadable(f"its header is not JSON ({error})") from None
    tensors: dict[str, StoredTensor] = {}
    at = 0
    try:
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if dtype not in ITEM_BYTES:
                raise reports.weights.model_unfit(path, f"{name} is of the type {dtype}", ", ".join(ITEM_BYTES))
            if any(type(n) is not int or n <= 0 for n in shape) or not shape:
                raise unreadable(f"{name} has the shape {list(shape)}")
            if type(begin) is not int or type(end) is not int:
                raise unreadable(f"{name} lies at {begin!r} to {end!r} of the data, which are not whole numbers")
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


class _Worker(ThreadPoolExecutor):
    """One thread that does its tasks in order; an exception there is raised here.

    Hashing, writing and syncing release the interpreter's lock, so they go on while the next block is made.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1)
        self.waiting: deque[Future[object]] = deque()

    def do(self, what: Callable[..., object], *words: object) -> Future[Any]:
        if len(self.waiting) >= BLOCKS_WAITING:
            self.waiting.popleft().result()
        self.waiting.append(self.submit(what, *words))
        return self.waiting[-1]

    def idle(self) -> bool:
        return all(future.done() for future in self.waiting)

    def finish(self) -> None:
        while self.waiting:
            self.waiting.popleft().result()


def _keep_freed_memory() -> None:
    """Let glibc keep the blocks that we free instead of giving their pages back and asking for new ones.

    For 1.25 GB this takes 8,000 page faults instead of 210,000, and a quarter of the time. mallopt's numbers: malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt:
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its maximum


def _write_all(fd: int, data: memoryview) -> None:
    """os.write until everything is written: one call writes 2 GB at most,
    and a full disk may cut it short before it fails."""
    while data:
        data = data[os.write(fd, data) :]
