"""A folder of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from scripts import reports
from scripts.fetching import source as limits
from scripts.fetching.source import NAME, Broken, Remote, _of_listing, public_name
from scripts.weights import files


class Folder:
    """A folder of this machine, perhaps a mount. Its files are copied, so the folder may go away later."""

    revision: str | None = None

    def __init__(self, source: str) -> None:
        self.path, self.name = Path(source), public_name(source)

    def files(self) -> list[Remote]:
        if not self.path.is_dir():
            raise reports.fetching.fetch_odd(self.path.name, self.name, "no folder is there")
        found = {path.name: path.stat() for path in self.path.iterdir() if path.is_file() and NAME.fullmatch(path.name)}
        for name in ("tokenizer.model", files.CHECKLISTS[1]):  # Meta's download leaves them here for all sizes
            above = self.path.resolve().parent / name
            if name not in found and files.PARAMS in found and above.is_file():
                found[name] = above.stat()
        names = {name: stat.st_size for name, stat in found.items()}
        versions = {name: self._version(stat) for name, stat in found.items()}
        return _of_listing(self.name, names, versions, lambda name: self._at(name).read_bytes())

    @staticmethod
    def _version(stat: os.stat_result) -> str:
        # without the inode: a file system in user space may change it while the file is read
        return f"of {stat.st_mtime_ns}, {stat.st_ctime_ns}"

    def _at(self, name: str) -> Path:
        path = self.path / name
        return path if path.is_file() else self.path.resolve().parent / name

    def open(self, remote: Remote, start: int, end: int) -> Iterator[bytes]:
        try:
            with self._at(remote.key).open("rb") as file:
                version = self._version(os.fstat(file.fileno()))
                if remote.version and version != remote.version:
                    raise reports.fetching.fetched_file_changed(remote.name, self.name, remote.version, version)
                file.seek(start)
                while start < end and (data := file.read(min(limits.PIECE_BYTES, end - start))):
                    start += len(data)
                    yield data
        except OSError as error:
            raise Broken(error.strerror or type(error).__name__) from None
