"""Weights are read by several readers, byte for byte what safetensors reads."""

from __future__ import annotations

from pathlib import Path

import drive_engine  # noqa: F401 (finds the engine)
import pytest
import torch
import weight_file
from safetensors.torch import load_file, save_file


def test_the_readers_fill_what_safetensors_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "PIECE_BYTES", 1000)  # many pieces, also at odd places
    torch.manual_seed(0)
    path = tmp_path / "rank0.safetensors"
    tensors = {
        f"{kind}.{n}": torch.randn(n, 3 * n + 1).to(kind)
        for kind in (torch.float16, torch.bfloat16, torch.float32)
        for n in (1, 7, 40)
    }
    save_file({**tensors, "left.alone": torch.arange(9)}, path)
    found = weight_file.tensors_of(path)
    assert found["left.alone"][0] is None
    places = {name: torch.empty(found[name][1], dtype=found[name][0]) for name in tensors}
    weight_file.read_into(path, {found[name][2]: place for name, place in places.items()})
    expected = load_file(path)
    assert all(torch.equal(places[name], expected[name]) for name in tensors)


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rank0.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    _, shape, begin, _ = weight_file.tensors_of(path)["x"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(EOFError, match="8 bytes more"):
        weight_file.read_into(path, {begin: torch.empty(shape)})
