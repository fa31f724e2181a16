"""API keys of the endpoint's clients: a file that is read again when it changes.

A line is a key, `name: key` or `name key`; then may come what the key may use: `requests=4` at once, `tokens=20000` a
minute. The standard library only: the supervisor checks the file with this code before anything is loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import re
import stat
from dataclasses import dataclass
from typing import NamedTuple

MAX_FILE_BYTES, MAX_KEYS, MAX_KEY_BYTES = 1 << 20, 1000, 4096
NAME = re.compile(r"[\w.@/-]{1,64}")
LIMIT = re.compile(r"(requests|tokens)=([1-9][0-9]{0,11})")


class Key(NamedTuple):
    """The limits of a key. requests: at once; tokens: per minute; 0: no limit."""

    name: str
    requests: int = 0
    tokens: int = 0


def parsed(text: str) -> dict[str, Key]:
    """The lines of a file: key -> its limits. Raises ValueError with words that never repeat a key."""
    found: dict[str, Key] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        limits: dict[str, int] = {}
        while len(words) > 1 and (limit := LIMIT.fullmatch(words[-1])):
            limits.setdefault(limit[1], int(limit[2]))
            words.pop()
        if not words:
            continue
        if len(words) > 2:
            raise ValueError(f"line {number} is neither a key, nor `name: key`, then requests=N or tokens=N")
        name = f"line {number}"
        if len(words) == 2:
            name = words[0][:-1] if words[0].endswith(":") else words[0]
            if not NAME.fullmatch(name):
                raise ValueError(f"line {number}: a name has letters, digits and . @ / _ - and at most 64 of them")
        if len(words[-1].encode()) > MAX_KEY_BYTES:
            raise ValueError(f"line {number}: the key is longer than {MAX_KEY_BYTES} bytes")
        found[words[-1]] = Key(name, **limits)
        if len(found) > MAX_KEYS:
            raise ValueError(f"it has more than {MAX_KEYS} keys")
    if not found:
        raise ValueError("it has no line with a key")
    return found


def read(path: str) -> tuple[bytes, tuple[int, ...]]:
    """A file's bytes, and what distinguishes this version from others. Raises OSError and ValueError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is not a file")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    return data, signature(about)


def signature(about: os.stat_result) -> tuple[int, ...]:
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def checked(path: str) -> dict[str, Key]:
    """The keys of a file. Raises OSError, and ValueError with what is wrong."""
    return decoded(read(path)[0])


def decoded(data: bytes) -> dict[str, Key]:
    try:
        return parsed(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is not text") from None


@dataclass(frozen=True)
class Known:
    """A key that a client showed: its limits, and a number that identifies it."""

    key: Key
    digest: bytes


class Keys:
    """All keys of a server. The parent makes it: the last good content of the file is in memory that its children
    share, so that a worker that begins while the file is broken has the same keys as the others.

    path: of the file, empty for none; alone: a key that is not in a file. Raises OSError and ValueError.
    """

    def __init__(self, path: str = "", alone: str = "") -> None:
        self.path, self.secret = path, os.urandom(16)
        self.shared = mmap.mmap(-1, 8 + MAX_FILE_BYTES)
        self.lock_file = os.memfd_create("keys")
        self.alone = {alone.strip(): Key("BAKE_API_KEY")} if alone.strip() else {}
        self.by_digest: dict[bytes, Key] = {}
        self.seen: tuple[int, ...] | None = None
        self.complaint = ""
        data = b""
        if path:
            data, self.seen = read(path)
        self._take(data)

    @property
    def asked_for(self) -> bool:
        return bool(self.by_digest)

    def digest(self, key: bytes) -> bytes:
        """Keys are looked up by a keyed hash, so the time of a look-up says nothing about them."""
        return hashlib.blake2b(key, digest_size=16, key=self.secret).digest()

    def known(self, given: bytes) -> Known | None:
        digest = self.digest(given)
        key = self.by_digest.get(digest)
        return None if key is None else Known(key, digest)

    def _take(self, data: bytes) -> None:
        found = {**(decoded(data) if data else {}), **self.alone}
        self.by_digest = {self.digest(key.encode()): about for key, about in found.items()}
        fcntl.lockf(self.lock_file, fcntl.LOCK_EX)
        try:
            self.shared[:8] = len(data).to_bytes(8, "little")
            self.shared[8 : 8 + len(data)] = data
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN)

    def adopt(self) -> None:
        """In a forked worker: the keys that the others read last."""
        fcntl.lockf(self.lock_file, fcntl.LOCK_EX)
        try:
            data = self.shared[8 : 8 + int.from_bytes(self.shared[:8], "little")]
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN)
        if data:
            self._take(data)
        self.seen = None

    def refresh(self) -> str:
        """Read the file again if it has changed. Returns a line for the log, mostly an empty one. If the file has
        vanished or is broken, the old keys stay."""
        if not self.path:
            return ""
        try:
            if signature(os.stat(self.path)) == self.seen and not self.complaint:
                return ""
            data, seen = read(self.path)
            before = self.by_digest
            if not data.strip():
                raise ValueError("it has no line with a key")
            self._take(data)
            said = (
                f"{len(self.by_digest)} API keys were read again" if self.complaint or before != self.by_digest else ""
            )
            self.seen, self.complaint = seen, ""
            return said
        except (OSError, ValueError) as error:
            complaint = getattr(error, "strerror", None) or str(error)
            if complaint == self.complaint:
                return ""
            self.complaint = complaint
            return f"the file of API keys cannot be read and the keys of before stay: {complaint}"
