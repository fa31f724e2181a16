"""Reads which tensors a .pth (torch.save's zip file) holds and where their bytes lie,
without torch and without running its pickle.

A .pth names its tensors in a pickle, which is a program for a small stack machine. torch.load(weights_only=True) runs
that program and allows few functions. Here no function is called at all: the machine below knows the few operations
that torch.save writes, and notes what they say. It also gives what torch does not: where in the file each tensor
begins, and its CRC-32. And it saves the 1.5 s that importing torch takes.
tests/weights/test_torch_file.py compares it with torch.load.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scripts import reports
from scripts.weights.safetensors import ITEM_BYTES

# Real ones have about 100 bytes per tensor: 100 kB for 70B.
DIRECTORY_MAX_BYTES = 16 << 20
# a Llama's tensors have 2
AXES_MAX = 4

# torch's storage classes -> safetensors' names for what they hold
STORAGES = {"torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16", "torch.FloatStorage": "F32"}


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a .pth. start: offset of its first byte in the file.

    crc32: the checksum of its bytes in the file; None if the tensor is only a part of what was saved together.
    dtype: F16, BF16, F32, or torch's name of any other storage (start is 0 then).
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    crc32: int | None


@dataclass(frozen=True)
class _Function:
    """A function or class that the pickle names. It is never looked up, let alone called."""

    name: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    n_items: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path) -> dict[str, FileTensor]:
    """Name -> tensor; a Problem if the file is damaged, cut off, not a torch file,
    or holds anything but named tensors."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _read(path, file, archive)
    except (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, struct.error) as error:
        size_bytes = path.stat().st_size if path.is_file() else 0
        reason = f"it is cut off, damaged or no torch file of version 1.6 or later ({size_bytes} bytes; {error})"
        raise reports.weights.weights_unreadable(path, reason) from None


def directory(pickle: bytes) -> Any:
    """The content of a pickle of torch.save, with _Tensor for tensors. ValueError if it is anything but named tensors.

    The operations are those of pickle protocols 2 to 5 (Python's pickletools.py describes each).
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under a mark
    memo: dict[int, Any] = {}

    def after_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    try:
        argument: Any
        for operation, argument, _ in pickletools.genops(pickle):
            name = operation.name
            if name in ("PROTO", "FRAME"):
                pass
            elif name == "STOP":
                return stack.pop()
            elif name == "MARK":
                below.append(stack)
                stack = []
            elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"):
                stack.append(argument)
            elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            elif name == "TUPLE":
                items = after_mark()
                stack.append(tuple(items))
            elif name in ("SETITEMS", "SETITEM"):
                items = after_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(isinstance(key, str) for key in items[::2]):
                    # hashing a tuple of tuples of the same tuple would never end
                    raise ValueError("it names something by what is not text")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name in ("APPENDS", "APPEND"):
                items = after_mark() if name == "APPENDS" else [stack.pop()]
                stack[-1].extend(items)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                stack.append(_Function(argument.replace(" ", ".")))
            elif name == "STACK_GLOBAL":
                stack[-2:] = [_Function(".".join(stack[-2:]))]
            elif name == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(_result(stack.pop(), arguments))
            elif name == "BUILD":
                stack.pop()  # attributes of the dict of a module's state, as its version numbers
            else:
                raise ValueError(f"its directory does what torch.save never writes: {name}")
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"its directory makes no sense ({error})") from None
    raise ValueError("its directory has no end")


def _read(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, FileTensor]:
    infos = {info.filename: info for info in archive.infolist()}
    roots = [name[: -len("data.pkl")] for name in infos if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it has no directory of tensors, data.pkl")
    root = roots[0]
    for name in (f"{root}data.pkl", f"{root}byteorder"):
        if name in infos and infos[name].file_size > DIRECTORY_MAX_BYTES:
            raise ValueError(f"its {name} has {infos[name].file_size} bytes, {DIRECTORY_MAX_BYTES} are the limit")
    compressed = [name for name, info in infos.items() if info.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(f"{compressed[0]} is compressed, torch stores plainly")
    if f"{root}byteorder" in infos and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    named = directory(archive.read(f"{root}data.pkl"))
    if not isinstance(named, dict) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in named.items()
    ):
        raise ValueError("it holds something else than named tensors")
    return {name: _located(name, tensor, root, infos, file) for name, tensor in named.items()}


def _located(name: str, tensor: _Tensor, root: str, infos: dict[str, zipfile.ZipInfo], file: BinaryIO) -> FileTensor:
    storage = tensor.storage
    if storage.kind not in STORAGES:
        return FileTensor(storage.kind, tensor.shape, 0, None)
    dtype = STORAGES[storage.kind]
    n_items = math.prod(tensor.shape)
    steps = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    if not tensor.shape or not n_items or tensor.stride != steps:
        raise ValueError(f"{name} is not stored whole, row after row")
    info = infos[f"{root}data/{storage.key}"]
    if info.file_size != storage.n_items * ITEM_BYTES[dtype] or tensor.offset + n_items > storage.n_items:
        raise ValueError(
            f"{name} needs {(tensor.offset + n_items) * ITEM_BYTES[dtype]} bytes, {info.filename} has {info.file_size}"
        )
    # the local header repeats name and extra field with its own lengths (PKWARE's APPNOTE.TXT, 4.3.7)
    file.seek(info.header_offset)
    signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError(f"{info.filename} does not lie where the file says")
    start = info.header_offset + 30 + name_bytes + extra_bytes + tensor.offset * ITEM_BYTES[dtype]
    return FileTensor(dtype, tensor.shape, start, info.CRC if n_items == storage.n_items else None)


def _storage(persistent_id: Any) -> _Storage:
    """('storage', its class, its key, its device, its number of items), as torch.save writes it."""
    # the device says where the tensor was when it was saved (Meta's: on a GPU), not where its bytes are
    word, kind, key, _, n_items = persistent_id
    if word != "storage" or not isinstance(kind, _Function) or not isinstance(key, str):
        raise ValueError("a storage is not named as torch.save does")
    return _Storage(kind.name, key, _size(n_items))


def _result(function: Any, arguments: Any) -> Any:
    """The result of one of the three calls that torch.save writes; ValueError for any other call."""
    called = function.name if isinstance(function, _Function) else type(function).__name__
    if called == "collections.OrderedDict" and arguments == ():
        return {}
    if called == "torch._utils._rebuild_parameter":
        return arguments[0]
    if called == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor has no storage")
        if max(len(shape), len(stride)) > AXES_MAX:
            raise ValueError(f"a tensor has {max(len(shape), len(stride))} axes, {AXES_MAX} are the limit")
        return _Tensor(storage, _size(offset), tuple(map(_size, shape)), tuple(map(_size, stride)))
    raise ValueError(f"its directory wants to call {called}, which weights have no use for")


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError("a size in its directory is not a number of items")
    return value
