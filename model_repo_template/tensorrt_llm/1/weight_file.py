"""Reads the bytes of a safetensors file into existing tensors, with several readers, while pieces are copied to the
GPU.

safetensors' own reader maps the file and copies page by page from memory that a GPU cannot reach by itself: 1.6 GB/s
from the page cache. This one reads some 20 GB/s.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

READERS = 4
# Bytes of one piece. A reader holds two: one is copied to the GPU while the next one is read
PIECE_BYTES = 32 << 20
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def tensors_of(path: Path) -> dict[str, tuple[torch.dtype | None, tuple[int, ...], int, int]]:
    """Name -> (dtype, None if it is not one of ours; shape; first byte in the file; bytes), from the header
    (safetensors' format)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    begin = 8 + length
    return {
        name: (
            DTYPES.get(entry["dtype"]),
            tuple(entry["shape"]),
            begin + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_into(path: Path, places: Mapping[int, Tensor]) -> None:
    """Fills contiguous tensors, all on one device, from the file; places: first byte -> tensor. Raises OSError or
    EOFError."""
    if not places:
        return
    device = next(iter(places.values())).device
    pieces = _pieces(places)
    lock, failures = threading.Lock(), list[BaseException]()
    file = os.open(path, os.O_RDONLY)

    def next_piece() -> tuple[int, Tensor] | None:
        with lock:
            return None if failures else next(pieces, None)

    def reader() -> None:
        try:
            if device.type == "cuda":
                _read_to_gpu(file, next_piece, device)
                return
            while (piece := next_piece()) is not None:
                _fill(file, *piece)
        except BaseException as problem:  # the thread that asked raises it
            failures.append(problem)

    threads = [threading.Thread(target=reader, name=f"weights-{n}") for n in range(READERS)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.close(file)
    if failures:
        raise failures[0]


def _read_to_gpu(file: int, next_piece: Callable[[], tuple[int, Tensor] | None], device: torch.device) -> None:
    torch.cuda.set_device(device)
    stream, turn = torch.cuda.Stream(device), 0
    buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers]
    while (piece := next_piece()) is not None:
        offset, target = piece
        copied[turn].synchronize()
        held = buffers[turn][: len(target)]
        _fill(file, offset, held)
        with torch.cuda.stream(stream):
            target.copy_(held, non_blocking=True)
            copied[turn].record()
        turn = 1 - turn
    stream.synchronize()


def _pieces(places: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first byte in the file, its target as bytes), in the order of the file."""
    for offset, tensor in sorted(places.items()):
        flat = tensor.view(-1).view(torch.uint8)
        for begin in range(0, len(flat), PIECE_BYTES):
            yield offset + begin, flat[begin : begin + PIECE_BYTES]


def _fill(file: int, offset: int, target: Tensor) -> None:
    """Reads exactly as many bytes as `target` has, on the CPU."""
    array: Any = target.numpy()  # numpy 1.26 does not say that an array is a buffer
    view = memoryview(array)
    while len(view):
        count = os.preadv(file, [view], offset)
        if not count:
            raise EOFError(f"the file ends at byte {offset}; its header promises {len(view)} bytes more")
        view, offset = view[count:], offset + count
