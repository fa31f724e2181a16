"""Object stores: s3, gs, az."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from scripts import reports
from scripts.fetching import source as limits
from scripts.fetching.source import NAME, Broken, Remote, _first_line, _of_listing, public_name


class Store:
    """A folder of an object store. Credentials, region and endpoint come from the environment,
    as for the store's own tools."""

    revision: str | None = None

    def __init__(self, url: str) -> None:
        import obstore
        import obstore.store

        self.obstore, self.name = obstore, public_name(url)
        try:
            self.store = obstore.store.from_url(url)
        except Exception as error:
            raise reports.fetching.store_refused(self.name, "", _first_line(error)) from None

    def files(self) -> list[Remote]:
        def small(name: str) -> bytes:
            return bytes(self._asked(name, self.obstore.get, name).bytes())

        for _ in range(3):
            try:
                found = [
                    entry for batch in self._asked("", lambda store: list(self.obstore.list(store))) for entry in batch
                ]
                found = [entry for entry in found if NAME.fullmatch(str(entry["path"]))]
                names = {str(entry["path"]): int(entry["size"]) for entry in found}
                versions = {str(entry["path"]): str(entry["e_tag"] or entry["last_modified"]) for entry in found}
                return _of_listing(self.name, names, versions, small)
            except Broken as broken:
                reason = str(broken)
        raise reports.fetching.fetch_broken("the list of files", self.name, reason, 0, None)

    def open(self, remote: Remote, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) of a file."""
        for at in range(start, end, 8 * limits.PIECE_BYTES):
            span = (at, min(at + 8 * limits.PIECE_BYTES, end))
            got = self._asked(remote.name, self.obstore.get, remote.key, options={"range": span})
            etag = got.meta["e_tag"]
            if remote.version.startswith('"') and etag and etag != remote.version:
                raise reports.fetching.fetched_file_changed(remote.name, self.name, remote.version, etag)
            yield bytes(self._asked(remote.name, lambda store, got=got: got.bytes()))

    def _asked(self, name: str, ask: Any, *words: Any, **more: Any) -> Any:
        try:
            return ask(self.store, *words, **more)
        except FileNotFoundError:
            raise reports.fetching.fetch_refused(name, self.name, 404) from None
        except Exception as error:
            if type(error).__name__ == "InvalidPathError":  # for instance a key with .. in it, which the text names
                raise reports.fetching.fetch_odd(name or "the list of files", self.name, _first_line(error)) from None
            status = re.search(r"\b40[13] \w+", str(error))  # listing gives a GenericError for these
            if status or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
                raise reports.fetching.store_refused(
                    self.name, name, status[0] if status else type(error).__name__
                ) from None
            raise Broken(_first_line(error)) from None
