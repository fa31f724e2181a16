"""Sources over HTTPS: requests, ranges, and what a server says about a file."""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scripts import reports
from scripts.fetching import source as limits
from scripts.fetching.source import SMALL_MAX_BYTES, Broken, Remote

CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0


class Http:
    """GET with ranges. It follows redirects; a header with a secret is not sent to another host (a rule of urllib3)."""

    def __init__(self, url_of_proxy_for: str, headers: Mapping[str, str] | None = None) -> None:
        import urllib3

        self.headers = dict(headers or {})
        parts = urlsplit(url_of_proxy_for)
        proxies = {} if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies()
        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
            "retries": urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5),
            "maxsize": 16,
        }
        proxy = proxies.get(parts.scheme)
        self.pool: Any = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)

    def get(self, url: str, start: int, end: int | None, version: str = "") -> Any:
        """The response to a request for [start, end), not read yet; end None: to the end.
        Raises Broken if there is none.

        version: the version that is wanted; if the server has another one by now, it sends all of that one (If-Range).
        """
        import urllib3

        last = "" if end is None else end - 1
        headers = {**self.headers, "Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"}
        if version:
            headers["If-Range"] = version
        try:
            response = self.pool.request("GET", url, headers=headers, preload_content=False, decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise Broken(_without_url(error)) from None
        if response.status >= 500 or response.status in (408, 429):
            response.close()
            raise Broken(f"the server answers {response.status} {response.reason or ''}".strip())
        span = str(response.headers.get("Content-Range", ""))
        if response.status == 206 and not re.match(rf"bytes {start}-", span):
            response.close()
            raise Broken(f"the server gives other bytes than those from {start} on: {span[:60] or 'no Content-Range'}")
        return response

    def pieces(self, response: Any, start: int, end: int) -> Iterator[bytes]:
        """The body for [start, end), whether the server respects the range or not. Raises Broken if it ends early."""
        import urllib3

        skip = start if response.status == 200 else 0  # of the whole file
        left = end - start
        try:
            while left and (data := response.read(limits.PIECE_BYTES)):
                data, skip = data[skip:], max(0, skip - len(data))
                yield data[:left]
                left -= min(left, len(data))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Broken(_without_url(error)) from None
        finally:
            # the rest is not wanted; a connection can be used again only if its body was read to the end
            response.release_conn() if not left and response.status == 206 else response.close()
        if left:
            raise Broken(f"the connection ended {left} bytes early")


def _without_url(error: Exception) -> str:
    """What went wrong, in a word or two. urllib3's messages hold the URL, which may be a secret."""
    reason = getattr(error, "reason", None)
    return type(reason if isinstance(reason, Exception) else error).__name__


def _sizes(response: Any) -> tuple[int | None, bool]:
    """(size of the whole file, whether the server respects ranges), from the answer to a request for a range."""
    if response.status == 206:
        total = str(response.headers.get("Content-Range", "")).rpartition("/")[2]
        return (int(total) if total.isdigit() else None), True
    if response.status == 416:  # nothing at byte 0: an empty file
        return 0, False
    length = str(response.headers.get("Content-Length", ""))
    return (int(length) if length.isdigit() else None), False


def _version(response: Any) -> str:
    """A strong ETag, else the time of the last change; nothing if the server says neither."""
    etag = str(response.headers.get("ETag", ""))
    return etag if etag.startswith('"') else str(response.headers.get("Last-Modified", ""))


class HttpSource:
    """The common part of Meta's download, mirrors and the hub."""

    name = ""
    revision: str | None = None

    def __init__(self, http: Http) -> None:
        self.http = http

    def url(self, key: str) -> str:
        """The URL of a file; it may hold a secret."""
        raise NotImplementedError

    def refused(self, name: str, status: int) -> reports.Problem:
        """The report for a status of 400 or above."""
        return reports.fetching.fetch_refused(name, self.name, status)

    def small(self, key: str) -> bytes | None:
        """The content of a small file; None if there is none."""
        response = self._tried(key)
        if response.status in (404, 416):  # 416: it is there, and empty
            response.close()
            return None if response.status == 404 else b""
        if response.status >= 400:
            response.close()
            raise self.refused(key, response.status)
        size, _ = _sizes(response)
        if size is None or size > SMALL_MAX_BYTES:
            response.close()
            raise reports.fetching.fetch_odd(key, self.name, f"it should be a small file, and has {size} bytes")
        return b"".join(self.http.pieces(response, 0, size)) if size else b""

    def _tried(self, key: str) -> Any:
        reason = ""
        for _ in range(3):
            try:
                return self._asked(key, key, 0, None)
            except Broken as broken:
                reason = str(broken)
        raise reports.fetching.fetch_broken(key, self.name, reason, 0, None)

    def remote(
        self, name: str, key: str, digests: Mapping[str, str] | None = None, size_bytes: int | None = None
    ) -> Remote:
        """A file with the size that its server names; a Problem if it is missing or has another size than promised."""
        response = self._tried(key)
        response.close()
        if response.status >= 400 and response.status != 416:
            raise self.refused(name, response.status)
        size, ranges = _sizes(response)
        if size is None:
            raise reports.fetching.fetch_odd(name, self.name, "the server does not say how long it is")
        if size_bytes not in (None, size):
            raise reports.fetching.fetched_file_differs(name, self.name, "size", str(size_bytes), str(size))
        return Remote(name, key, size, digests or {}, ranges, "" if digests else _version(response))

    def _asked(self, name: str, key: str, start: int, end: int | None, version: str = "") -> Any:
        response = self.http.get(self.url(key), start, end, version)
        encoding = str(response.headers.get("Content-Encoding", "")).lower()
        if response.status < 400 and encoding not in ("", "identity"):
            response.close()
            raise reports.fetching.fetch_odd(
                name, self.name, f"the server sends it packed ({encoding[:20]}), but the request was for the plain file"
            )
        return response

    def open(self, remote: Remote, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) of a file."""
        response = self._asked(remote.name, remote.key, start, end, remote.version)
        if response.status >= 400:
            response.close()
            raise self.refused(remote.name, response.status)
        size, _ = _sizes(response)
        if size not in (None, remote.size_bytes):
            response.close()
            raise reports.fetching.fetched_file_differs(
                remote.name, self.name, "size", str(remote.size_bytes), str(size)
            )
        version = _version(response)
        # a partial answer need not repeat the version (RFC 9110, 15.3.7); a whole file instead of a part does
        if remote.version and version != remote.version and (version or (remote.ranges and response.status == 200)):
            response.close()
            raise reports.fetching.fetched_file_changed(
                remote.name, self.name, remote.version, version or "one without a version"
            )
        yield from self.http.pieces(response, start, end)


def _secret_url(name: str, unreadable: Callable[[str], reports.Problem]) -> str:
    """What the variable `name` holds, or the file that `name`_FILE names; nothing if neither is set."""
    path = os.environ.get(f"{name}_FILE", "")
    try:
        url = os.environ.get(name, "") or (Path(path).read_text() if path else "")
    except OSError as error:
        raise unreadable(f"the file {path}, which {name}_FILE names: {error.strerror}") from None
    return url.strip().strip("'\"")
