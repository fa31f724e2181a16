"""An image as one file that is the same whichever builder made it: layers and configuration in canonical form,
in an OCI archive.

Builders leave traces: times, the order of files, a hostname, the id of a container (docker 20.10 and buildah 1.28 were
seen to give another digest each time). Here only the Dockerfile's content is kept. The file is both an OCI image layout
(https://github.com/opencontainers/image-spec: image-layout.md, config.md) and a `docker load` archive (manifest.json of
docker-image-spec v1.2). Layers are not compressed: so a layer's digest is its diff_id,
and engines would not get smaller anyway.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import posixpath
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping, Sequence

from scripts import reports

# its name in a release
ARCHIVE = "image.oci.tar"
EPOCH = "1970-01-01T00:00:00Z"
OCI = "application/vnd.oci.image"
# The parts of a builder's configuration that come from the Dockerfile, its base image and `--label`. The rest
# (Hostname, Image, OnBuild, ...) comes from the builder. Healthcheck is docker's key; OCI allows further keys, and
# docker and podman read it.
CONFIG_KEYS = (
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "WorkingDir", "Labels", "StopSignal", "Healthcheck", "Volumes", "Shell",
)  # fmt: skip
# A configuration, a manifest or an index has a few kB; a larger one is not read.
JSON_MAX_BYTES = 16 << 20
BLOCK_BYTES = 1 << 20
INSTRUCTIONS = ("COPY", "RUN", "ADD")


@dataclass(frozen=True)
class Layer:
    """One layer. instruction: of the Dockerfile, empty for a layer of the base; why: the comment above it; files:
    path -> (size, sha256)."""

    digest: str
    size_bytes: int
    instruction: str = ""
    why: str = ""
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Image:
    """What write_canonical wrote: iid is the config's digest, which docker calls the image's id."""

    iid: str
    manifest_digest: str
    config: Mapping[str, Any]
    layers: Sequence[Layer]


# --- the layers of the Dockerfile ---


def for_ranks(dockerfile: str, world_size: int) -> str:
    """The Dockerfile in which each rank has its own line, and so its own layer, like the line that copies rank 0. It
    lacks the stage `toolchain`, which docker's classic builder would build although the server needs nothing from
    it."""
    head, *stages = re.split(r"(?m)^(?=(?:# .*\n)*FROM )", dockerfile)
    dockerfile = head + "".join(stage for stage in stages if " AS toolchain\n" not in stage)
    [line] = [line for line in dockerfile.splitlines() if line.startswith("COPY rank0 ")]
    return dockerfile.replace(line, "\n".join(line.replace("rank0", f"rank{rank}") for rank in range(world_size)))


def layers_of(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, why) for each layer that the last stage adds, in order. why: the comment right above,
    or the line's before."""
    found: list[tuple[str, str]] = []
    comment: list[str] = []
    why = ""
    for line in dockerfile.splitlines():
        word = line.partition(" ")[0]
        if word == "FROM":
            found, why = [], ""
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
            continue
        if word in INSTRUCTIONS:
            why = " ".join(comment) or why
            found.append((line, why))
        comment = []
    return found


# --- reading what builders save ---


class Archive:
    """An image in a file: what `docker save`, `buildah push docker-archive:` or write_canonical wrote.
    Nothing is unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed in __exit__)
            self._members = {member.name: member for member in self._tar}
            [described] = json.loads(self._read("manifest.json"))
            self.config_bytes = self._read(described["Config"])
            self.config: dict[str, Any] = json.loads(self.config_bytes)
            self._layers = [self._followed(name) for name in described["Layers"]]
            diff_ids = self.config["rootfs"]["diff_ids"]
        except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise reports.images.no_image_archive(path, f"{type(error).__name__}: {error}") from None
        if len(diff_ids) != len(self._layers):
            raise reports.images.no_image_archive(path, f"{len(diff_ids)} diff_ids for {len(self._layers)} layers")
        self.diff_ids: list[str] = diff_ids

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    @property
    def iid(self) -> str:
        return _digest(self.config_bytes)

    def _read(self, name: str) -> bytes:
        member = self._members[name]
        if member.size > JSON_MAX_BYTES:
            raise ValueError(f"{name} has {member.size} bytes")
        file = self._tar.extractfile(member)
        assert file is not None
        return file.read()

    def json(self, name: str) -> Any:
        return json.loads(self._read(name))

    def _followed(self, name: str) -> tarfile.TarInfo:
        """A layer's entry; docker 20.10 writes a repeated layer as a link to the first one."""
        member = self._members[name]
        if member.issym():
            member = self._members[posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))]
        return member

    def layer(self, number: int) -> IO[bytes]:
        """The tar of a layer, for reading and seeking."""
        file = self._tar.extractfile(self._layers[number])
        assert file is not None
        return file

    def layer_bytes(self, number: int) -> int:
        return self._layers[number].size

    def entries(self, number: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """What a layer holds, in its order."""
        with tarfile.open(fileobj=self.layer(number), mode="r:") as tar:
            for member in tar:
                yield tar, member


# --- the canonical form ---


def canonical_members(tar: tarfile.TarFile, below: set[str]) -> list[tarfile.TarInfo]:
    """The entries of one of our layers: ordered by name (hard links after their targets), without times, owned by root,
    readable by all and writable by root alone. Folders of a lower layer are left out;
    the new folders are added to `below`."""
    members = []
    for member in tar.getmembers():
        kept = copy.copy(member)
        kept.name = clean(member.name)
        if not kept.name or (member.isdir() and kept.name in below):
            continue
        if member.isdir():
            below.add(kept.name)
        kept.mtime, kept.uid, kept.gid, kept.uname, kept.gname = 0, 0, 0, "", ""
        kept.mode = 0o777 if member.issym() else 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        kept.pax_headers = {}
        if member.islnk():
            kept.linkname = clean(member.linkname)
        members.append(kept)
    return sorted(members, key=lambda member: (member.islnk(), member.name))


def write_layer(tar: tarfile.TarFile, members: Sequence[tarfile.TarInfo], out: Hashed) -> dict[str, tuple[int, str]]:
    """Write a layer's tar; returns its regular files: path -> (size, sha256)."""
    files = {}
    for member in members:
        out.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        if member.isreg():
            source = tar.extractfile(member)
            assert source is not None
            digest = hashlib.sha256()
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                out.write(block)
            out.write(b"\0" * (-member.size % tarfile.BLOCKSIZE))
            files[member.name] = (member.size, digest.hexdigest())
    out.write(b"\0" * 2 * tarfile.BLOCKSIZE)
    return files


def canonical_config(
    config: Mapping[str, Any],
    diff_ids: Sequence[str],
    base_history: Sequence[Mapping[str, Any]],
    added: Sequence[Layer],
) -> dict[str, Any]:
    """The image's configuration: only what the Dockerfile and its base say."""
    settings = {key: config["config"][key] for key in CONFIG_KEYS if config["config"].get(key)}
    # buildah adds its own version
    settings["Labels"] = {k: v for k, v in settings.get("Labels", {}).items() if not k.startswith("io.buildah.")}
    history = [{"created": EPOCH, "created_by": layer.instruction, "comment": layer.why} for layer in added]
    return {
        "architecture": config["architecture"],
        "os": config["os"],
        "created": EPOCH,
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [*base_history, *history],
    }


@dataclass(frozen=True)
class Base:
    """The part of an image that is its base. tar: the file of its layer if that was made here (buildah writes it again,
    in another order); history: replaces the history of the base, or None."""

    layers: int
    tar: Path | None = None
    history: Sequence[Mapping[str, Any]] | None = None


class Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes], heard: Callable[[int], object]) -> None:
        self._file, self._digest, self._heard, self.size_bytes = file, hashlib.sha256(), heard, 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)
        self._heard(len(data))

    @property
    def digest(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"


class Blobs:
    """An OCI archive while it is written: a blob's name is its digest, so the header before it is written last."""

    def __init__(self, file: IO[bytes], heard: Callable[[int], object] = lambda _: None) -> None:
        self._file, self._heard = file, heard
        self._known: set[str] = set()

    def add(self, write: Callable[[Hashed], Any]) -> tuple[str, int, Any]:
        """A blob that `write` writes: (digest, bytes, result of write). Equal blobs are kept once."""
        start = self._file.tell()
        self._file.write(b"\0" * tarfile.BLOCKSIZE)
        blob = Hashed(self._file, self._heard)
        result = write(blob)
        if blob.digest in self._known:
            self._file.seek(start)
            self._file.truncate()
        else:
            self._known.add(blob.digest)
            self._file.write(b"\0" * (-blob.size_bytes % tarfile.BLOCKSIZE))
            end = self._file.tell()
            self._file.seek(start)
            self._file.write(_header(blob_name(blob.digest), blob.size_bytes))
            self._file.seek(end)
        return blob.digest, blob.size_bytes, result

    def add_json(self, value: object) -> tuple[str, int]:
        data = _json(value)
        digest, size_bytes, _ = self.add(lambda blob: blob.write(data))
        return digest, size_bytes

    def file(self, name: str, data: bytes) -> None:
        self._file.write(_header(name, len(data)) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))

    def end(self) -> None:
        self._file.write(b"\0" * 2 * tarfile.BLOCKSIZE)


def write_canonical(
    source: Archive, base: Base, added: Sequence[tuple[str, str]],
    out: IO[bytes], names: Sequence[str], annotations: Mapping[str, str], heard: Callable[[int], object] = lambda _: None,
) -> Image:  # fmt: skip
    """Write `source` in canonical form.

    The base's layers stay as they are, so that they are shared with every other image of that base. added: layers_of
    the Dockerfile.
    names: its names in docker.
    """
    blobs, layers = Blobs(out, heard), []
    below: set[str] = set()
    for number in range(base.layers):
        below.update(clean(member.name) for _, member in source.entries(number) if member.isdir())
        with source.layer(number) if base.tar is None else open(base.tar, "rb") as layer:
            digest, size_bytes, _ = blobs.add(lambda blob: copy_to(blob, layer))  # noqa: B023
        if base.tar is None and digest != source.diff_ids[number]:
            raise reports.images.layer_damaged(source.path, number, source.diff_ids[number], digest)
        layers.append(Layer(digest, size_bytes, why="the base image"))
    contents = []
    for number in range(base.layers, len(source.diff_ids)):
        with tarfile.open(fileobj=source.layer(number), mode="r:") as tar:
            # BuildKit makes a layer for WORKDIR that holds nothing new
            if members := canonical_members(tar, below):
                contents.append((number, members))
    if len(contents) != len(added):
        raise reports.images.layers_do_not_match(source.path, len(contents), [line for line, _ in added])
    for (number, members), (instruction, why) in zip(contents, added):
        with tarfile.open(fileobj=source.layer(number), mode="r:") as tar:
            digest, size_bytes, files = blobs.add(lambda blob: write_layer(tar, members, blob))  # noqa: B023
        layers.append(Layer(digest, size_bytes, instruction, why, files))
    history = base.history
    if history is None:
        written = source.config.get("history", [])
        history = written[: _up_to(written, base.layers)]
    config = canonical_config(source.config, [layer.digest for layer in layers], history, layers[base.layers :])
    iid, config_bytes = blobs.add_json(config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": iid, "size": config_bytes},
        "layers": [
            {"mediaType": f"{OCI}.layer.v1.tar", "digest": layer.digest, "size": layer.size_bytes} for layer in layers
        ],
        "annotations": dict(sorted(annotations.items())),
    }
    manifest_digest, manifest_bytes = blobs.add_json(manifest)
    descriptor = {"mediaType": f"{OCI}.manifest.v1+json", "digest": manifest_digest, "size": manifest_bytes}
    named = (
        {
            "annotations": {
                "io.containerd.image.name": names[0],
                "org.opencontainers.image.ref.name": names[0].rpartition(":")[2],
            }
        }
        if names
        else {}
    )
    index = {"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": [{**descriptor, **named}]}
    docker = [
        {"Config": blob_name(iid), "RepoTags": list(names), "Layers": [blob_name(layer.digest) for layer in layers]}
    ]
    blobs.file("oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
    blobs.file("index.json", _json(index))
    blobs.file("manifest.json", _json(docker))
    blobs.end()
    return Image(iid, manifest_digest, config, layers)


def copy_to(blob: Hashed, source: IO[bytes]) -> None:
    while block := source.read(BLOCK_BYTES):
        blob.write(block)


def blob_name(digest: str) -> str:
    """'sha256:ab...' -> 'blobs/sha256/ab...'."""
    return "blobs/" + digest.replace(":", "/")


def clean(name: str) -> str:
    """A path in a layer in one spelling for all builders: './srv/' -> 'srv'."""
    name = name.strip("/")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return "" if name == "." else name


def _up_to(history: Sequence[Mapping[str, Any]], layers: int) -> int:
    """The place in a history of the last of the first `layers` layers (later entries without a layer belong to the next
    stage)."""
    seen = 0
    for number, entry in enumerate(history):
        seen += not entry.get("empty_layer", False)
        if seen == layers:
            return number + 1
    return len(history)


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _header(name: str, size_bytes: int) -> bytes:
    """A tar header of one block; GNU's form, because sizes above 8 GiB have to fit into it."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size_bytes, 0o644
    header = entry.tobuf(tarfile.GNU_FORMAT)
    assert len(header) == tarfile.BLOCKSIZE, name
    return header


def synced(file: IO[bytes]) -> None:
    """Wait until everything is on the disk."""
    file.flush()
    if not isinstance(file, io.BytesIO):
        os.fsync(file.fileno())
