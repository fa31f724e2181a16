"""The place of the engine's compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts import build_image
from scripts.serving import launch


def environment(root: Path, tmp_path: Path) -> str:
    from scripts.serving.toolbox import Toolbox

    tools = Toolbox(Path("/opt/tritonserver"), None, [])
    return launch.server_environment({}, tools, tmp_path, 1, 4, root).get("TRITON_CACHE_DIR", "")


def test_compiled_kernels_stay_beside_the_rooms(tmp_path: Path) -> None:
    root = tmp_path / "variant"
    root.mkdir()
    assert environment(root, tmp_path) == str(root / "compiled")


def test_where_nothing_may_be_written_a_copy_of_what_is_there_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "srv"
    (root / "compiled" / "ABC").mkdir(parents=True)
    (root / "compiled" / "ABC" / "kernel.cubin").write_bytes(b"code")
    monkeypatch.setattr(os, "access", lambda path, mode: root not in (Path(path), *Path(path).parents))
    copy = Path(environment(root, tmp_path))
    assert copy != root / "compiled" and (copy / "ABC" / "kernel.cubin").read_bytes() == b"code"


def test_where_nothing_may_be_written_and_nothing_is_there_the_compiler_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert environment(tmp_path, tmp_path) == ""


def test_an_image_with_the_compiler_gets_whole_kernels_only(tmp_path: Path) -> None:
    folder = tmp_path / "variant" / "compiled" / "ABC"
    folder.mkdir(parents=True)
    for name in ("kernel.cubin", "kernel.json", "tmp.pid_7_kernel.cubin"):
        (folder / name).write_text(name)
    target = tmp_path / "context" / "compiled"
    build_image.place_compiled(tmp_path / "variant", ["torch-2.cpu.whl"], target)
    assert not target.exists()
    build_image.place_compiled(tmp_path / "variant", ["triton-3.6.0-cp312.whl"], target)
    assert sorted(path.name for path in target.rglob("*.*")) == ["kernel.cubin", "kernel.json"]
