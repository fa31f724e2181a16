"""How a room is filled: all or nothing, and nothing finished is done twice."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from project import ROOT

from scripts import reports, room


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(path: Path, text: str = "new", **arguments: Any) -> None:
    with room.filling(path, arguments=arguments) as filling:
        filling.write("folder/a.txt", text.encode())


@pytest.fixture
def asked_by_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ROOM_ARGS and ROOM_NEEDS as the Makefile exports them; the file that the room is made from."""
    source = tmp_path / "source.py"
    source.write_text("")
    monkeypatch.setenv("ROOM_ARGS", "--size 3")
    monkeypatch.setenv("ROOM_NEEDS", str(source))
    yield source


def newer(path: Path) -> None:
    """A later time than anything has now."""
    time_ns = path.stat().st_mtime_ns + 10**12
    os.utime(path, ns=(time_ns, time_ns))


def interrupted(path: Path, **arguments: Any) -> None:
    """A try that finished one file and was cut off in the second."""
    with pytest.raises(KeyboardInterrupt), room.filling(path, arguments=arguments) as filling:
        filling.write("rank0", b"whole")
        (filling.path / "rank1").write_bytes(b"ha")
        raise KeyboardInterrupt


def kept_in(path: Path, **arguments: Any) -> list[str]:
    with room.filling(path, arguments=arguments) as filling:
        assert sorted(found.name for found in filling.path.iterdir() if found.name != room.FINISHED) == sorted(
            filling.kept
        )
        kept = sorted(filling.kept)
        filling.write("rank0", b"whole")
    return kept


def test_a_room_tells_what_it_is_made_of(tmp_path: Path) -> None:
    fill(tmp_path / "hf", tp_size=2)
    with room.filling(tmp_path / "checkpoint", reads={"hf": tmp_path / "hf"}, tools={"numpy": "1.26"}) as filling:
        filling.write_json("config.json", {"a": 1})
        filling.facts = {"ranks": 2}
    manifest = room.read_manifest(tmp_path / "checkpoint")
    assert manifest["reads"] == {"hf": room.manifest_sha256(tmp_path / "hf")}
    assert manifest["tools"]["numpy"] == "1.26" and manifest["facts"] == {"ranks": 2}
    assert manifest["files"]["config.json"]["size_bytes"] == len(b'{\n    "a": 1\n}')
    assert list(files_of(tmp_path / "checkpoint")) and not list(tmp_path.glob("*.partial"))


def test_a_failure_leaves_the_old_room_and_the_evidence(tmp_path: Path) -> None:
    fill(tmp_path / "hf", "old")
    before = files_of(tmp_path / "hf")
    with pytest.raises(ValueError), room.filling(tmp_path / "hf") as filling:
        filling.write("folder/a.txt", b"new")
        raise ValueError
    assert files_of(tmp_path / "hf") == before
    assert (tmp_path / "hf.partial/folder/a.txt").read_bytes() == b"new"
    fill(tmp_path / "hf", "new")
    assert files_of(tmp_path / "hf")["folder/a.txt"] == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_two_places_give_one_digest(tmp_path: Path) -> None:
    for place in ("here", "there"):
        fill(tmp_path / place / "hf", tp_size=2)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


def test_finished_files_survive_an_interruption(tmp_path: Path) -> None:
    interrupted(tmp_path / "checkpoint", tp_size=2)
    assert kept_in(tmp_path / "checkpoint", tp_size=2) == ["rank0"]


def test_nothing_is_kept_for_another_question(tmp_path: Path) -> None:
    interrupted(tmp_path / "checkpoint", tp_size=2)
    assert kept_in(tmp_path / "checkpoint", tp_size=4) == []


def test_nothing_is_kept_from_older_code(tmp_path: Path, asked_by_make: Path) -> None:
    interrupted(tmp_path / "checkpoint")
    newer(asked_by_make)
    assert kept_in(tmp_path / "checkpoint") == []


def test_nothing_is_kept_that_changed_its_size(tmp_path: Path) -> None:
    interrupted(tmp_path / "checkpoint")
    (tmp_path / "checkpoint.partial/rank0").write_bytes(b"who")
    assert kept_in(tmp_path / "checkpoint") == []


def test_what_was_made_meanwhile_is_not_made_again(tmp_path: Path, asked_by_make: Path) -> None:
    fill(tmp_path / "hf", "by another make")
    with pytest.raises(reports.Finished, match="by another make"):
        fill(tmp_path / "hf", "mine")
    assert [path.name for path in tmp_path.glob("hf*")] == ["hf"]


@pytest.mark.parametrize("change", ["source", "args", "always"])
def test_what_was_made_meanwhile_for_something_else_is_made_again(
    tmp_path: Path, asked_by_make: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    fill(tmp_path / "hf", "by another make")
    if change == "source":
        newer(asked_by_make)
    if change == "args":
        monkeypatch.setenv("ROOM_ARGS", "--size 4")
    if change == "always":  # make -B
        monkeypatch.setenv("ROOM_NEEDS", "")
    fill(tmp_path / "hf", "mine")
    assert files_of(tmp_path / "hf")["folder/a.txt"] == b"mine"


@pytest.mark.parametrize("moved", ["nothing", "old"])
def test_a_room_that_was_whole_when_killed_only_gets_its_name(tmp_path: Path, asked_by_make: Path, moved: str) -> None:
    """The room is killed after its manifest was written: before both renames, or between them."""
    fill(tmp_path / "hf", "whole")
    os.rename(tmp_path / "hf", tmp_path / "hf.partial")
    (tmp_path / ("hf" if moved == "nothing" else "hf.old")).mkdir()
    with pytest.raises(reports.Finished, match="whole already"):
        fill(tmp_path / "hf", "again")
    assert files_of(tmp_path / "hf")["folder/a.txt"] == b"whole"
    assert [path.name for path in tmp_path.glob("hf*")] == ["hf"]


def test_a_room_killed_between_the_renames_is_there_again_when_the_next_try_fails(tmp_path: Path) -> None:
    fill(tmp_path / "hf", "old")
    os.rename(tmp_path / "hf", tmp_path / "hf.old")
    with pytest.raises(ValueError), room.filling(tmp_path / "hf"):
        raise ValueError
    assert files_of(tmp_path / "hf")["folder/a.txt"] == b"old"


def test_a_write_that_fails_says_in_which_room(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, room.filling(tmp_path / "hf"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "hf.partial")


def test_a_room_that_is_read_is_not_taken_away(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A script that fills from hf holds it; who replaces hf says that it waits."""
    fill(tmp_path / "hf", "old")
    with room.filling(tmp_path / "checkpoint", reads={"hf": tmp_path / "hf"}) as filling:
        fd = os.open(tmp_path / "hf", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        filling.write("a", b"")
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def test_a_file_of_another_room_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"gigabytes")
    record = room.sha256_of(source)
    with room.filling(tmp_path / "near") as filling:
        filling.link("model.safetensors", source, record)
    assert os.path.samefile(tmp_path / "near/model.safetensors", source)

    def other_disk(*paths: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    with room.filling(tmp_path / "far") as filling:
        filling.link("model.safetensors", source, record)
    assert (tmp_path / "far/model.safetensors").is_symlink()
    assert room.read_manifest(tmp_path / "near")["files"] == room.read_manifest(tmp_path / "far")["files"]


def test_damage_is_a_report_with_both_values(tmp_path: Path) -> None:
    fill(tmp_path / "hf")
    (tmp_path / "hf/folder/a.txt").write_bytes(b"longer")
    with pytest.raises(reports.Problem, match="changed after it was made") as caught:
        room.read_manifest(tmp_path / "hf")
    assert "3 bytes" in caught.value.seen and "6 bytes" in caught.value.seen
    (tmp_path / "hf/folder/a.txt").unlink()
    with pytest.raises(reports.Problem) as caught:
        room.read_manifest(tmp_path / "hf")
    assert "no such file" in caught.value.seen


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": {"a": 1}}', b'{"files": []}', b"\xff"])
def test_a_manifest_that_is_not_ours_is_a_report(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path / "hf")
    (tmp_path / "hf" / room.MANIFEST).write_bytes(content)
    with pytest.raises(reports.Problem, match="manifest cannot be read"):
        room.read_manifest(tmp_path / "hf")


def test_a_room_that_was_never_finished_is_a_report(tmp_path: Path) -> None:
    for reads in (tmp_path / "hf", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with (
            pytest.raises(reports.Problem, match="no hf|no empty"),
            room.filling(tmp_path / "checkpoint", {"hf": reads}),
        ):
            raise AssertionError("must not start")


def test_the_manifest_is_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write_synced = room.write_synced

    def noted(path: Path, data: bytes) -> None:
        written.append(path.name)
        write_synced(path, data)

    monkeypatch.setattr(room, "write_synced", noted)
    fill(tmp_path / "hf")
    assert written[-1] == room.MANIFEST
    assert json.loads((tmp_path / "hf" / room.MANIFEST).read_text())["room"] == "hf"


def test_a_long_step_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(room, "SPEAK_SECONDS", 0.01)
    spoken = threading.Event()
    said: list[str] = []

    def awaited() -> str:
        if len(said) == 2:
            spoken.set()
        said.append("")
        return "a friend"

    with room.waiting("base", awaited):
        assert spoken.wait(20)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 2 and set(lines) == {"base        waiting for a friend: 0 s"}
    with pytest.raises(ValueError, match="mine"), room.waiting("base", "a friend"):
        raise ValueError("mine")


def test_a_terminal_sees_the_seconds_in_place() -> None:
    """In its own terminal: one line that is written over, and nothing is left of it."""
    leader, follower = os.openpty()
    code = "from scripts import room; over = room.threading.Event()\n"
    code += "def awaited(): over.set(); return 'a friend'\n"
    code += "with room.waiting('base', awaited): over.wait()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=follower, timeout=60, check=True)
    seen = os.read(leader, 1000).decode()
    os.close(leader)
    os.close(follower)
    assert seen.startswith("\rbase        waiting for a friend: 1 s") and seen.endswith("\r\033[K")
    assert "\n" not in seen


def test_progress_in_a_log_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with room.progress(2_000_000, "hf") as bar:
        bar.update(500_000)
        assert capfd.readouterr().err == ""
        monkeypatch.setattr(room, "SPEAK_SECONDS", 0)
        bar.update(500_000)
    assert capfd.readouterr().err == "hf          1.0 MB of 2.0 MB\n"
    with room.progress(2_000_000, "weights", spoken=False) as bar:
        bar.update(2_000_000)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9491528, "9.5 MB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
     (141 * 10**9, "141.0 GB"), (10**12 - 1, "1.0 TB")],
)  # fmt: skip
def test_sizes_are_rounded_to_the_unit_that_they_reach(size_bytes: int, words: str) -> None:
    assert room.human_bytes(size_bytes) == words


def test_the_memory_of_gpus_is_counted_as_nvidia_smi_does() -> None:
    assert room.human_gpu_bytes(16160 << 20) == "15.8 GiB" and room.human_gpu_bytes(500 << 20) == "500 MiB"
