"""How a room is filled: all or nothing, manifest last. A room is a directory under build/; see docs/design.md."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from scripts import reports
from scripts.making import ingredients

# How often a long step prints a line if no terminal watches
SPEAK_SECONDS = 10.0
# The longest line that is written in place: it must not wrap.
TERMINAL_WIDTH = 79

MANIFEST = "manifest.json"
ARGS = "args"
# The output of sha256sum for `args`. It is not in the manifest, because `args` may hold a path of this machine, and two
# trees must give the same manifest.
ARGS_SUM = "args.sha256"
# the key in a manifest for the sha256 of the rest of it
OWN_SHA256 = "sha256"
# Only inside a .partial folder: the question of the interrupted try, and which of its files are whole.
FINISHED = "finished.json"
# Only inside a .partial folder: the modules that the programs started by the room have used.
CHILDREN_USED = "used_by_children"
MANIFEST_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class FileRecord:
    """A manifest's entry for one file. tensors: for a file of weights, the CRC-32 of each tensor, so that fsck can name
    the damaged one."""

    size_bytes: int
    sha256: str
    tensors: Mapping[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """The entry for the manifest."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class Filling:
    """A room while it is being filled; `path` is its .partial folder.

        After an interrupted try with the same question, `kept` holds the files that it had finished: they need not be
        made again; `begun`
    holds the files whose first tensors are whole and on the disk,
    with the CRC-32 of each (safetensors.write_together goes on after them).
    """

    room: Path
    path: Path
    question: dict[str, Any]
    kept: dict[str, FileRecord] = field(default_factory=dict)
    begun: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    # what the source says about each file: the next try keeps a file only if the source still says the same
    # (fetch_weights.py)
    promised: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, record: FileRecord) -> None:
        """Add a finished file to the room. It must be complete and synced at `path / name`;
        its hash was computed while writing."""
        self.files[name] = record
        self.note({name: parts for name, parts in self.begun.items() if name not in self.files})

    def note(self, begun: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what is whole, in case this try is interrupted. begun: for unfinished files,
        which part of them is on the disk."""
        self.begun = dict(begun)
        files = {name: record.as_json() for name, record in {**self.kept, **self.files}.items()}
        finished = {"question": self.question, "files": files, "begun": begun, "promised": self.promised}
        finished["made_from"] = ingredients.used(self.path / CHILDREN_USED)
        write_synced(self.path / FINISHED, json.dumps(finished).encode())

    def write(self, name: str, data: bytes) -> None:
        """Write a small file and add it to the room."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_synced(target, data)
        self.add(name, FileRecord(len(data), hashlib.sha256(data).hexdigest()))

    def write_json(self, name: str, value: object) -> None:
        """Write `value` as upstream writes its configs: indent 4, no newline at the end."""
        self.write(name, json.dumps(value, indent=4, ensure_ascii=False).encode())

    def take(self, name: str) -> None:
        """Add a file that another program wrote at `path / name`."""
        with open(self.path / name, "rb") as file:
            os.fsync(file.fileno())
        self.add(name, sha256_of(self.path / name))

    def link(self, name: str, source: Path, record: FileRecord) -> None:
        """Add a file of another room (or of the user) without copying its bytes.

        A hard link where the file system allows it, else a symbolic one: gigabytes are never copied.
        """
        target = self.path / name
        target.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:
            target.symlink_to(source.resolve())
        self.add(name, record)


def say(room: str, text: str) -> None:
    """Print one line about a room; in a rehearsal (docker/rehearsal) every line says so."""
    print(f"{room:<11} {'[rehearsal] ' if 'REHEARSAL_GPUS' in os.environ else ''}{text}", flush=True)


def human_bytes(size_bytes: float) -> str:
    """9491528 -> '9.5 MB' (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.95:  # from there on it would be written as 1000.0
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def human_gpu_bytes(size_bytes: float) -> str:
    """16944988160 -> '15.8 GiB': for GPU memory, because nvidia-smi and the GPU's name use binary units."""
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"


def write_synced(path: Path, data: bytes) -> None:
    """Give `path` its content in one step: the final name appears when the bytes are on the disk."""
    writing = path.with_name(path.name + ".writing")
    with open(writing, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(writing, path)


def sha256_of(path: Path) -> FileRecord:
    """Size and sha256 of a file that we did not write (so it must be read once)."""
    digest, size_bytes = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size_bytes += len(block)
    return FileRecord(size_bytes, digest.hexdigest())


def manifest_bytes(room: Path) -> bytes:
    """A room's manifest, unchecked; a Problem if there is none."""
    try:
        with open(room / MANIFEST, "rb") as file:
            return file.read(MANIFEST_MAX_BYTES)
    except OSError:
        raise reports.rooms.room_missing(room) from None


def manifest_sha256(room: Path) -> str:
    """The hash that identifies everything in a room, and through `reads` everything before it."""
    return hashlib.sha256(manifest_bytes(room)).hexdigest()


def as_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest in its room."""
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def own_sha256(manifest: Mapping[str, Any]) -> str:
    """A manifest's own checksum, so that damage to it is found: the sha256 of the manifest without this entry."""
    rest = {name: value for name, value in manifest.items() if name != OWN_SHA256}
    return hashlib.sha256(as_bytes(rest)).hexdigest()


def args_sum(args: bytes) -> bytes:
    """The content of ARGS_SUM; `sha256sum -c` takes it."""
    return f"{hashlib.sha256(args).hexdigest()}  {ARGS}\n".encode()


def read_manifest_only(room: Path) -> dict[str, Any]:
    """A finished room's manifest, whatever happened to its files; a Problem if it is missing or not a manifest."""
    try:
        manifest = json.loads(manifest_bytes(room))
        for name, _ in manifest["files"].items():
            record_of(manifest, name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise reports.rooms.manifest_unreadable(room, f"{type(error).__name__}: {error}") from None
    return dict(manifest)


def is_room(folder: Path) -> bool:
    """Whether we filled this room; other tools also write a manifest.json into their folders."""
    if (folder / ARGS).is_file() or not (folder / MANIFEST).is_file():
        return (folder / MANIFEST).is_file()
    try:
        return "reads" in read_manifest_only(folder)
    except reports.Problem:
        return False


def read_manifest(room: Path) -> dict[str, Any]:
    """A finished room's manifest; a Problem if the room is missing or damaged,
    or if a file has another size than was written."""
    manifest = read_manifest_only(room)
    for name in manifest["files"]:
        record = record_of(manifest, name)
        path = room / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != record.size_bytes:
            seen = "no such file" if actual is None else f"{actual} bytes"
            raise reports.rooms.room_damaged(room, name, f"{record.size_bytes} bytes", seen)
    return manifest


def record_of(manifest: Mapping[str, Any], name: str) -> FileRecord:
    """A manifest's record of one of its files."""
    record = FileRecord(**manifest["files"][name])
    if type(record.size_bytes) is not int or not isinstance(record.sha256, str):
        raise TypeError(f"no size and sha256 of {name}")
    return record


@contextmanager
def filling(
    room: Path,
    reads: Mapping[str, Path] | None = None,
    arguments: Mapping[str, Any] | None = None,
    tools: Mapping[str, str] | None = None,
    name: str | None = None,
    asked: str | None = None,
) -> Iterator[Filling]:
    """Fill `room` from the rooms it `reads`.

    The body writes into `filling.path`. When it returns, the manifest is written last and the folder gets the room's
    name. If it fails or is killed, the room is as before, and the evidence stays in the .partial folder until the next
    try.
    arguments: what the room was made with (no path, no time, no user name: two trees give the same digest). tools: name
    -> version. A second make that wants the same room waits and finds it made. A room that was complete when it was
    interrupted only gets its name. Both raise Finished. From the Makefile come ROOM_ARGS (the room's question, kept in
    its file `args`) and ROOM_NEEDS (the files it is made from). The room itself lists the modules and tables that it is
    made from (scripts/making/ingredients.py). `args` may hold a path of this machine, because it is the question and
    not part of the answer.
    name: the room's name, if its folder has another one. asked: replaces ROOM_ARGS, for a room that does not depend on
    files of this tree and stays whatever code changes (weights).
    """
    room = room.absolute()
    partial, old = room.with_name(room.name + ".partial"), room.with_name(room.name + ".old")
    room.parent.mkdir(parents=True, exist_ok=True)
    made_from_files = asked is None
    asked = os.environ.get("ROOM_ARGS", "") if asked is None else asked
    partial_lock = _lock_partial(partial)
    read_locks = []
    try:
        if _answers(room, asked, made_from_files):
            shutil.rmtree(partial)
            raise reports.Finished(f"{name or room.name:<11} made by another make in this tree meanwhile")
        if _answers(partial, asked, made_from_files):
            _publish(partial, room, old)
            raise reports.Finished(
                f"{name or room.name:<11} -> {reports.shown(room)}: it was whole already, and has its name now"
            )
        if old.is_dir() and not room.exists():  # killed between the two renames of _publish
            os.rename(old, room)
        read_locks = [_lock_for_reading(path) for path in (reads or {}).values()]
        started = time.monotonic()
        reads_sha256 = {name: manifest_sha256(path) for name, path in (reads or {}).items()}
        question = {"asked": asked, "arguments": dict(arguments or {}), "reads": reads_sha256}
        for path in (reads or {}).values():
            read_manifest(path)
        kept, begun, promised = _keep_finished(partial, question, made_from_files)
        filling_room = Filling(room, partial, question, kept, begun, promised)
        os.environ[ingredients.CHILDREN] = str(partial / CHILDREN_USED)
        before = ingredients.used()  # their present state, in case a module is edited while this runs
        yield filling_room
        manifest = {
            "room": name or room.name,
            "arguments": question["arguments"],
            "reads": reads_sha256,
            "tools": {"python": platform.python_version(), **(tools or {})},
            "facts": filling_room.facts,
            "files": {name: filling_room.files[name].as_json() for name in sorted(filling_room.files)},
        }
        if made_from_files:
            made_from = {**ingredients.used(partial / CHILDREN_USED), **before}
            write_synced(partial / ingredients.RECORD, ingredients.as_bytes(made_from))
        (partial / CHILDREN_USED).unlink(missing_ok=True)
        write_synced(partial / ARGS, asked.encode())
        write_synced(partial / ARGS_SUM, args_sum(asked.encode()))
        write_synced(partial / MANIFEST, as_bytes({**manifest, OWN_SHA256: own_sha256(manifest)}))
        _publish(partial, room, old)
        size_bytes = sum(record.size_bytes for record in filling_room.files.values())
        say(
            name or room.name,
            f"-> {reports.shown(room)}: {len(filling_room.files)} files, {human_bytes(size_bytes)}, "
            f"{time.monotonic() - started:.1f} s",
        )
    except reports.Outdated:
        (partial / FINISHED).unlink(missing_ok=True)
        raise
    except OSError as error:
        error.filename = error.filename or str(partial)  # a failed write does not name its file
        raise
    finally:
        os.environ.pop(ingredients.CHILDREN, None)
        for lock in [partial_lock, *read_locks]:
            os.close(lock)


def _lock(folder: Path, how: int, waiting: str) -> int:
    """Lock a directory itself, so that no lock file is left behind. The lock ends with the process, however it ends."""
    while True:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            say(folder.stem, waiting)
            fcntl.flock(fd, how)
        # Another make may have renamed the folder that we waited for.
        if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()):
            return fd
        os.close(fd)


def _lock_for_reading(room: Path) -> int:
    try:
        return _lock(room, fcntl.LOCK_SH, "is being replaced; waiting for it")
    except FileNotFoundError:
        raise reports.rooms.room_missing(room) from None


def _lock_partial(partial: Path) -> int:
    """The right to fill: an exclusive lock on the .partial folder."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            return _lock(partial, fcntl.LOCK_EX, "another make is filling this room; waiting for it")
        except FileNotFoundError:  # between these two lines the other make gave it its final name
            continue


def _answers(folder: Path, asked: str, made_from_files: bool) -> bool:
    """Make's question, asked again under the lock: is this room complete, and right for the present question?"""
    try:
        return (
            (not made_from_files or (_newer_than_needs(folder / MANIFEST) and not ingredients.stale(folder)))
            and (folder / ARGS).read_text() == asked
            and bool(read_manifest(folder))
        )
    except (OSError, reports.Problem):
        return False


def _newer_than_needs(path: Path) -> bool:
    """Whether none of the files that make names as needs is newer ('none': there are none); False if make named
    nothing, or runs with -B."""
    needs = os.environ.get("ROOM_NEEDS", "").split()
    made_ns = path.stat().st_mtime_ns
    return bool(needs) and all(os.stat(need).st_mtime_ns <= made_ns for need in needs if need != "none")


def interrupted_arguments(room: Path) -> dict[str, Any]:
    """The question of an interrupted try to fill a room; empty if there was none."""
    try:
        return dict(
            json.loads((room.with_name(room.name + ".partial") / FINISHED).read_bytes())["question"]["arguments"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep_finished(
    partial: Path, question: Mapping[str, Any], made_from_files: bool
) -> tuple[dict[str, FileRecord], dict[str, Mapping[str, Any]], dict[str, Any]]:
    """Empty the .partial folder, except for files that an interrupted try with the same question and code finished or
    began."""
    try:
        finished = json.loads((partial / FINISHED).read_bytes())
        same = finished["question"] == question and (
            not made_from_files
            or (
                ("ROOM_NEEDS" not in os.environ or _newer_than_needs(partial / FINISHED))
                and not ingredients.changed(finished["made_from"])
            )
        )
        kept = {name: FileRecord(**record) for name, record in finished["files"].items()} if same else {}
        begun = dict(finished["begun"]) if same else {}
        promised = dict(finished.get("promised", {}))
    except (OSError, ValueError, KeyError, TypeError):
        kept, begun, promised = {}, {}, {}
    kept = {
        name: record
        for name, record in kept.items()
        if (partial / name).is_file() and (partial / name).stat().st_size == record.size_bytes
    }
    begun = {name: tensors for name, tensors in begun.items() if name not in kept and (partial / name).is_file()}
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(partial)) not in {*kept, *begun, FINISHED}:
            path.unlink()
    return kept, begun, promised


def _publish(partial: Path, room: Path, old: Path) -> None:
    """Give the complete folder its final name. os.replace cannot overwrite a non-empty directory,
    so the old room moves aside first."""
    (partial / FINISHED).unlink(missing_ok=True)
    if old.exists():
        shutil.rmtree(old)
    if room.exists():
        reader_lock = _lock(room, fcntl.LOCK_EX, "is still read by another make; waiting for it")
        os.rename(room, old)
        os.close(reader_lock)
    os.rename(partial, room)
    parent = os.open(room.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(parent)
    os.close(parent)
    if old.exists():
        shutil.rmtree(old)


class Spoken:
    """Progress in a log: one line every SPEAK_SECONDS, none for a shorter step."""

    def __init__(self, total_bytes: int, room: str, spoken: bool = True) -> None:
        self.total_bytes, self.room, self.spoken, self.done_bytes = total_bytes, room, spoken, 0
        self.said = time.monotonic()

    def update(self, size_bytes: int) -> None:
        self.done_bytes += size_bytes
        if self.spoken and time.monotonic() - self.said >= SPEAK_SECONDS:
            self.said = time.monotonic()
            done = f"{human_bytes(self.done_bytes)} of {human_bytes(self.total_bytes)}"
            print(f"{self.room:<11} {done}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

    def __enter__(self) -> Spoken:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress(total_bytes: int, room: str, spoken: bool = True) -> Any:
    """A progress bar in bytes on a terminal, else Spoken. It has update(bytes) and close(). spoken: False if the caller
    itself writes the lines for a log."""
    if not sys.stderr.isatty():
        return Spoken(total_bytes, room, spoken)
    try:
        from tqdm import tqdm
    except ImportError:  # the host of NVIDIA's container needs none of our packages
        return Spoken(total_bytes, room, spoken)
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=f"{room:<11}", leave=False)


@contextmanager
def waiting(room: str, awaited: str | Callable[[], str]) -> Iterator[None]:
    """While a step without a measure of progress runs, say what it waits for: one line every SPEAK_SECONDS; on a
    terminal, the seconds in place."""
    over, watched, began = threading.Event(), sys.stderr.isatty(), time.monotonic()

    def speak() -> None:
        while not over.wait(1.0 if watched else SPEAK_SECONDS):
            what = awaited if isinstance(awaited, str) else awaited()
            line = f"{room:<11} waiting for {what}: {time.monotonic() - began:.0f} s"
            print(
                f"\r{line[:TERMINAL_WIDTH]}\033[K" if watched else line,
                end="" if watched else "\n",
                file=sys.stderr,
                flush=True,
            )
        if watched:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()
