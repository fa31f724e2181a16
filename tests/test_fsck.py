"""make fsck finds a flipped bit anywhere, and names room, file and tensor."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, make
from synthetic import write_model

from scripts import build_checkpoint, build_config, build_engines, build_hf, room
from scripts.fsck import check_room
from scripts.weights import safetensors
from scripts.weights.meta import read_shard


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights, config, hf, checkpoint and engines of a small model. Not to be changed."""
    folder = tmp_path_factory.mktemp("rooms")
    write_model(folder / "weights", n_shards=2)
    build_config.build_config(build_config.Settings(folder / "weights", folder / "config"))
    build_hf.build_hf(build_config.Settings(folder / "weights", folder / "hf"))
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


def fsck(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
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


def damages(folder: Path, name: str) -> list[dict[str, Any]]:
    done = fsck(folder, "--json", name)
    assert (done.returncode, done.stderr) == (1, "")
    return list(json.loads(done.stdout)["damages"])


def test_whole_rooms_are_said_to_be_whole(rooms: Path) -> None:
    done = fsck(rooms, "weights", "config", "hf", "checkpoint", "engines")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("checked against its manifest: no damage") == 4 and "the checksums in them" in done.stdout


def test_a_flipped_bit_in_any_tensor_of_any_file_is_named(own: Path) -> None:
    for name in ("hf/model.safetensors", "checkpoint/rank0.safetensors", "checkpoint/rank1.safetensors"):
        path = own / name
        for tensor, stored in safetensors.read_header(path).items():
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


@pytest.mark.parametrize("name", ["config", "hf", "checkpoint", "engines"])
def test_a_flipped_bit_anywhere_in_a_manifest_is_named(name: str, own: Path) -> None:
    path = own / name / room.MANIFEST
    good, generator = path.read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        [damage] = check_room(own / name, lambda size_bytes: None, {}).damages
        assert damage.file == room.MANIFEST, data
    path.write_bytes(good)
    assert not check_room(own / name, lambda size_bytes: None, {}).damages


def test_a_changed_value_in_a_manifest_ends_in_the_command_and_other_rooms_are_still_checked(own: Path) -> None:
    path = own / "checkpoint" / room.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"tp_size": 2', b'"tp_size": 3', 1))
    (own / "config" / room.MANIFEST).write_bytes(b"{")
    flip(own / "engines/config.json", 5)
    done = fsck(own, "config", "checkpoint", "hf", "engines")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    lines = [line for line in done.stdout.splitlines() if "made from" not in line]
    assert "config: DAMAGED manifest.json" in lines[0] and "checkpoint: DAMAGED manifest.json" in lines[1]
    assert "checked against its manifest: no damage" in lines[2] and "engines: DAMAGED config.json" in lines[3]
    assert "3 parts are damaged" in " ".join(done.stderr.split())
    assert done.stderr.strip().splitlines()[-1].strip().endswith("make config")


@pytest.mark.parametrize("name", [room.ARGS, room.ARGS_SUM])
def test_a_flipped_bit_in_the_question_or_its_sum_is_named(name: str, own: Path) -> None:
    (own / "checkpoint" / room.ARGS).write_bytes(b"--tp-size 2")
    (own / "checkpoint" / room.ARGS_SUM).write_bytes(room.args_sum(b"--tp-size 2"))
    assert fsck(own, "checkpoint").returncode == 0
    flip(own / "checkpoint" / name, 5)
    [damage] = damages(own, "checkpoint")
    assert damage["file"] == name
    (own / "checkpoint" / name).unlink()
    [damage] = damages(own, "checkpoint")
    assert (damage["file"], damage["actual"]) == (name, "no such file")


def test_a_room_from_before_manifests_could_be_checked_says_so_and_is_held_to_what_was_made_from_it(own: Path) -> None:
    path = own / "config" / room.MANIFEST
    manifest = json.loads(path.read_bytes())
    del manifest[room.OWN_SHA256]
    path.write_bytes(room.as_bytes(manifest))
    done = fsck(own, "config")
    assert done.returncode == 0 and "made before manifests had their own checksum" in done.stdout
    [damage] = damages(own, "checkpoint")
    assert (damage["file"], damage["part"]) == ("manifest.json", "its entry for config")


def test_what_is_no_damage_is_mentioned(own: Path) -> None:
    (own / "checkpoint/rank7.safetensors").write_bytes(b"x")
    build_config.build_config(build_config.Settings(own / "weights", own / "config", 64))
    done = fsck(own, "config", "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "checkpoint: not in its manifest: rank7.safetensors" in done.stdout
    assert "checkpoint: made from another config than lies in" in done.stdout


def test_a_manifest_of_another_tool_makes_no_room(own: Path) -> None:
    (own / "weights" / room.MANIFEST).write_text('{"files": {}}')
    build_config.build_config(build_config.Settings(own / "weights", own / "again"))
    done = fsck(own, "weights")
    assert done.returncode == 0 and "the checksums in them" in done.stdout


def test_the_report_names_the_tensor_and_ends_in_a_command(own: Path) -> None:
    path = own / "checkpoint/rank0.safetensors"
    stored = safetensors.read_header(path)["transformer.layers.0.mlp.fc.weight"]
    flip(path, stored.start)
    done = fsck(own, "config", "checkpoint")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "NOT WHAT WAS WRITTEN" in done.stderr and "rank0.safetensors" in done.stderr
    assert "transformer.layers.0.mlp.fc.weight changed after" in done.stderr
    assert done.stderr.strip().splitlines()[-1].strip().endswith("make checkpoint")


def test_make_fsck_says_where_nothing_is_made(own_tree: Path) -> None:
    folder = own_tree / "someone"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    done = make(own_tree, "fsck", "MODEL=./someone")
    assert done.returncode == 2 and "NOTHING TO CHECK YET" in done.stderr and "usage" not in done.stderr


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
