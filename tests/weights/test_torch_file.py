"""A .pth is read as torch.load reads it, without torch; nothing in it is ever run."""

from __future__ import annotations

import functools
import os
import pickle
import random
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import GROUPED, meta_tensors

from scripts import reports
from scripts.weights.torch_file import directory, read_torch_file

ROOT = Path(__file__).resolve().parents[2]
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def module_state() -> dict[str, torch.Tensor]:
    """An OrderedDict with attributes, as every torch.nn.Module gives it."""
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)).state_dict()


def parameters() -> dict[str, torch.Tensor]:
    return {name: torch.nn.Parameter(tensor) for name, tensor in module_state().items()}


def parts_of_one() -> dict[str, torch.Tensor]:
    whole = torch.arange(60.0).reshape(12, 5)
    return {"first": whole[:4], "rest": whole[4:], "all": whole, "again": whole}


SAVED: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    **{name: functools.partial(meta_tensors, GROUPED, dtype) for name, dtype in TYPES.items()},
    "module": module_state,
    "parameters": parameters,
    "parts of one": parts_of_one,
    "nothing": dict,
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("what", SAVED)
def test_tensors_lie_where_torch_finds_them(what: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(SAVED[what](), path, pickle_protocol=protocol)
    expected = torch.load(
        path, mmap=True, weights_only=protocol == 2
    )  # torch's own reader of weights takes protocol 2 alone
    found = read_torch_file(path)
    assert found.keys() == expected.keys()
    data = path.read_bytes()
    for name, tensor in found.items():
        stored = data[tensor.start : tensor.start + expected[name].nbytes]
        assert torch.equal(
            torch.frombuffer(bytearray(stored), dtype=TYPES[tensor.dtype]).view(tensor.shape), expected[name]
        )
        whole = expected[name].untyped_storage().nbytes() == len(stored)
        assert tensor.crc32 == (zlib.crc32(stored) if whole else None)


def test_files_that_were_saved_from_a_gpu_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta's were: each storage says cuda:0."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(meta_tensors(), tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        assert b"cuda:0" in archive.read("x/data.pkl")
    assert read_torch_file(tmp_path / "x.pth").keys() == meta_tensors().keys()


class Calls:
    """What a hostile file holds: a call of any function when it is unpickled."""

    def __init__(self, function: Any, *words: Any) -> None:
        self.function, self.words = function, words

    def __reduce__(self) -> Any:
        return self.function, self.words


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("call", [Calls(os.system, "touch went-off"), Calls(eval, "1"), Calls(bytearray, 10**12)])
def test_nothing_is_called(call: Calls, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="wants to call"):
        directory(pickle.dumps({"x": call}, protocol))
    assert not (tmp_path / "went-off").exists()


# dict, 1, and 59 times a tuple of twice what was there before; then {that tuple: 1}, or a name made of it
NESTED = b"".join(b"h" + bytes([i - 1]) + b"\x86q" + bytes([i]) for i in range(1, 60))
ONES = b"(" + b"K\x01" * 300_000 + b"t"
TENSOR = (
    b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nHalfStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00" + ONES + ONES + b"tRs."
)
ENDLESS = {
    "a key": (b"\x80\x02}K\x01q\x00" + NESTED + b"K\x01s.", "by what is not text"),
    "a name": (b"\x80\x04K\x01q\x00" + NESTED + b"h\x00\x93.", "makes no sense"),
    "axes": (TENSOR, "has 300000 axes"),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_small_file_that_would_take_for_ever_is_refused_at_once(case: str, tmp_path: Path) -> None:
    directory_bytes, says = ENDLESS[case]
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", directory_bytes)
        archive.writestr("x/data/0", b"\0\0")
    code = "import sys\nfrom pathlib import Path\nfrom scripts import reports\nfrom scripts.weights import torch_file\n"
    code += "reports.run(lambda: torch_file.read_torch_file(Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "x.pth")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert says in " ".join(done.stderr.split())


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_compressed_is_no_torch_file(how: int, damaged: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2) * 3000)
    if damaged:
        data = path.read_bytes()
        path.write_bytes(data[:60] + bytes(byte ^ 0x55 for byte in data[60:75]) + data[75:])
    with pytest.raises(reports.Problem) as caught:
        read_torch_file(path)
    assert "is compressed" in caught.value.seen


def test_a_damaged_file_is_a_report_or_gives_the_same_tensors(tmp_path: Path) -> None:
    """1500 files with a few bytes changed where the directory and the headers are, or cut off."""
    path = tmp_path / "x.pth"
    torch.save(meta_tensors(), path)
    good, expected = path.read_bytes(), read_torch_file(path)
    with zipfile.ZipFile(path) as archive:
        headers = [info.header_offset for info in archive.infolist()]
    generator = random.Random(0)
    for _ in range(1500):
        damaged = bytearray(good)
        for _ in range(generator.choice([1, 1, 3])):
            near = [generator.choice(headers) + generator.randrange(64), generator.randrange(6000)]
            near.append(len(good) - 1 - generator.randrange(4000))
            damaged[generator.choice(near)] = generator.randrange(256)
        if generator.random() < 0.1:
            damaged = damaged[: generator.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            found = read_torch_file(path)
        except reports.Problem:
            continue
        # a changed checksum is found when the bytes are read; another place must not be believed
        assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
            name: (t.dtype, t.shape) for name, t in expected.items()
        }
        assert all(t.start == expected[name].start or t.crc32 is not None for name, t in found.items())
