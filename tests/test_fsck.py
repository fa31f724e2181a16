"""make fsck: a bit that flipped anywhere is found, and said by the names of room, file and tensor."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
from conftest import ROOT, make
from synthetic import write_model

from scripts import build_checkpoint, build_config, build_engines, build_hf, safetensors_file
from scripts.meta_weights import read_shard


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights, config, hf, checkpoint and engines of a small model. Not to be changed."""
    folder = tmp_path_factory.mktemp("rooms")
    write_model(folder / "weights", n_shards=2)
    build_config.build_config(build_config.Settings(folder / "weights", folder / "config"))
    build_hf.build_hf(build_hf.Settings(folder / "weights", folder / "hf"))
    settings = build_checkpoint.Settings(
        folder / "config", folder / "checkpoint", 2, "0.8.0", weights=folder / "weights"
    )
    build_checkpoint.build_checkpoint(settings)
    build_engines.build_engines(build_engines.Settings(folder / "checkpoint", folder / "engines", "torch", "0.8.0", 4))
    return folder


@pytest.fixture
def own(rooms: Path, tmp_path: Path) -> Path:
    """Rooms to damage."""
    shutil.copytree(rooms, tmp_path / "rooms")
    return tmp_path / "rooms"


def fsck(folder: Path, *names: str) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-m",
        "scripts.fsck",
        *(str(folder / name) if name[0] != "-" else name for name in names),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damages(folder: Path, name: str) -> List[Dict[str, Any]]:
    done = fsck(folder, "--json", name)
    assert (done.returncode, done.stderr) == (1, "")
    return list(json.loads(done.stdout)["damages"])


def test_whole_rooms_are_said_to_be_whole(rooms: Path) -> None:
    done = fsck(rooms, "weights", "config", "hf", "checkpoint", "engines")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("as its manifest says") == 4 and "the checksums in them" in done.stdout


def test_a_flipped_bit_in_any_tensor_of_any_file_is_named(own: Path) -> None:
    for name in ("hf/model.safetensors", "checkpoint/rank0.safetensors", "checkpoint/rank1.safetensors"):
        path = own / name
        for tensor, stored in safetensors_file.read_header(path).items():
            flip(path, stored.start + stored.size_bytes - 1)
            [damage] = damages(own, path.parent.name)
            assert (damage["file"], damage["part"]) == (path.name, tensor)
            flip(path, stored.start + stored.size_bytes - 1)
            if tensor.startswith("model.layers.1") or tensor.startswith("transformer.layers.1"):
                break  # one whole layer, both ends and norms: what is in the others is the same
    assert fsck(own, "hf", "checkpoint").returncode == 0


def test_a_flipped_bit_of_metas_files_is_named(own: Path) -> None:
    path = own / "weights/consolidated.01.pth"
    stored = read_shard(path)["layers.2.feed_forward.w2.weight"]
    flip(path, stored.start + 5)
    [damage] = damages(own, "weights")
    assert (damage["file"], damage["part"]) == ("consolidated.01.pth", "layers.2.feed_forward.w2.weight")


@pytest.mark.parametrize("at", [3, 40, 200])
def test_a_flipped_bit_in_a_header_is_found(at: int, own: Path) -> None:
    flip(own / "checkpoint/rank1.safetensors", at)
    found = damages(own, "checkpoint")
    assert {damage["file"] for damage in found} == {"rank1.safetensors"}


def test_small_files_lost_files_and_cut_files_are_found(own: Path) -> None:
    flip(own / "config/tokenizer.json", 1000)
    (own / "config/config.json").unlink()
    (own / "config/tokenizer.model").write_bytes(b"short")
    by_file = {damage["file"]: damage for damage in damages(own, "config")}
    assert sorted(by_file) == ["config.json", "tokenizer.json", "tokenizer.model"]
    assert by_file["config.json"]["actual"] == "no such file" and by_file["tokenizer.model"]["actual"] == "5 bytes"


def test_the_report_names_the_tensor_and_ends_in_a_command(own: Path) -> None:
    path = own / "checkpoint/rank0.safetensors"
    stored = safetensors_file.read_header(path)["transformer.layers.0.mlp.fc.weight"]
    flip(path, stored.start)
    done = fsck(own, "config", "checkpoint")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "NOT WHAT WAS WRITTEN" in done.stderr and "rank0.safetensors" in done.stderr
    assert "transformer.layers.0.mlp.fc.weight is not as it was" in done.stderr
    assert done.stderr.strip().splitlines()[-1].strip().endswith("make checkpoint")


def test_make_fsck_takes_all_rooms_that_are_made_or_the_one_that_is_asked_for(own_tree: Path) -> None:
    assert make(own_tree, "checkpoint").returncode == 0
    done = make(own_tree, "fsck")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0].rpartition("/")[2] for line in done.stdout.splitlines()] == [
        "config",
        "checkpoint",
        "stories",
    ]
    done = make(own_tree, "fsck", "ROOM=checkpoint", "JSON=1")
    assert json.loads(done.stdout)["held_to"] == "its manifest"
    done = make(own_tree, "fsck", "ROOM=engines")
    assert done.returncode == 2 and "NO ENGINES" in done.stderr
