"""A source of weights: its files, with their sizes and what it promises about each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from scripts import reports, room
from scripts.weights import files

PIECE_BYTES = 1 << 20
# Checklists, indexes and configs, which name the other files.
SMALL_MAX_BYTES = 64 << 20
# A file of a model; no name leaves the folder.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
CHECKLIST_LINE = re.compile(r"([0-9a-f]{32})\s+\*?(?:\./)?(\S+)")
# what a report calls the weights that are not there
FIRST = {".pth": files.shard(0), ".safetensors": files.SINGLE, ".gguf": "model.gguf"}


class Broken(Exception):
    """A connection that ended early, a server that is busy: worth another try."""


@dataclass(frozen=True)
class Remote:
    """A file to fetch. key: its name at the source; digests: what the source says about its bytes (md5, sha256,
    git-sha1);
    ranges: whether the source sends parts of it; version: without digests, what distinguishes it from another file of
    the same size."""

    name: str
    key: str
    size_bytes: int
    digests: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = True
    version: str = ""

    def promise(self) -> dict[str, Any]:
        """What its source says about it. An interrupted transfer goes on only with the same promise."""
        return {"size_bytes": self.size_bytes, "digests": dict(self.digests), "version": self.version}

    def is_promised(self, promise: object) -> bool:
        """Whether a promise of an earlier try is about this very file; never if the source names only the size."""
        return bool(self.digests or self.version) and promise == self.promise()


class Source(Protocol):
    """name: as the manifest keeps it, without secrets; revision: the commit, if the source has commits."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    def files(self) -> list[Remote]:
        """Every file of the model; a Problem if the source does not say which these are."""
        ...

    def open(self, remote: Remote, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) of a file, in pieces. Raises Broken if another try is worth it, else a Problem."""
        ...


def public_name(source: str) -> str:
    """The name of a source in a manifest: a URL without user, password and query;
    for a package its name and version."""
    if source.startswith("pip:"):
        lines = Path(source.partition(":")[2]).read_text().splitlines()
        return "pip:" + next(line.split()[0] for line in lines if line and not line.startswith("#"))
    if "://" in source:
        try:
            return _public_url(source)
        except ValueError:  # a wrong port, or wrong brackets
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
    """SOURCE as the user typed it. If it holds a secret, a Problem that does not show it."""
    if "://" in source:
        public_name(source)
        if "?" in source or (source.startswith("http") and "@" in urlsplit(source).netloc):
            raise reports.fetching.secret_in_source()
    return source


def checklist(data: bytes, name: str, source: str) -> dict[str, str]:
    """File name -> md5, from a checklist.chk (md5sum's form); a Problem for anything else,
    for instance an error page."""
    lines = [line for line in data.decode(errors="replace").splitlines() if line.strip()]
    matches = [CHECKLIST_LINE.fullmatch(line.strip()) for line in lines]
    found = {match[2]: match[1] for match in matches if match and NAME.fullmatch(match[2])}
    if not found or len(found) != len(lines):
        raise reports.fetching.fetch_odd(name, source, f"it is not a list of md5 sums: {data[:60]!r}")
    for ours in found:
        if ours in (room.MANIFEST, room.ARGS, room.FINISHED) or ours.endswith((".part", ".writing")):
            raise reports.fetching.fetch_odd(name, source, f"it names {ours}; make itself writes a file of that name")
    return found


def _sha256(data: bytes) -> dict[str, str]:
    """The digests of a file that was read before: the next read must give the same bytes."""
    return {"sha256": hashlib.sha256(data).hexdigest()}


def _named_by(data: bytes, index: str, suffix: str, source: str) -> list[str]:
    """The weight files that an index names."""
    import json

    try:
        names = sorted(set(json.loads(data)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise reports.fetching.fetch_odd(index, source, f"it is not an index ({type(error).__name__})") from None
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or not name.endswith(suffix):
            raise reports.fetching.fetch_odd(
                index, source, f"it names {name!r}, which is not a {suffix} file of this folder"
            )
    return names


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _of_listing(source: str, names: Mapping[str, int], versions: Mapping[str, str], small: Any) -> list[Remote]:
    """The files of a model among those of a folder, name -> bytes: Meta's, Hugging Face's, or one GGUF file
    (scripts.weights.forms.form_of)."""
    found = {ending: files.weights_among(names, ending) for ending in files.WEIGHTS}
    if files.in_metas_form(names):
        kinds, besides = [".pth"], [files.PARAMS, "tokenizer.model", *files.CHECKLISTS]
    elif "config.json" in names:
        kinds, besides = [".safetensors", ".bin"], [*files.HF_FILES]
    else:
        kinds, besides = [".gguf"], []
    weights = next((found[kind] for kind in kinds if found[kind]), [])
    if not weights:
        raise reports.fetching.fetch_odd(
            FIRST[kinds[0]], source, f"no weights are there: {reports.some(sorted(names), 12)}"
        )
    index = files.INDEXES.get(Path(weights[0]).suffix, "")
    wanted = [*weights, *(name for name in (*besides, index) if name in names)]
    lists: dict[str, str] = {}
    digests: dict[str, dict[str, str]] = {}
    for name in files.CHECKLISTS:
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
