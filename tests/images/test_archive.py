"""The canonical form of an image: traces of the builder do not count, the Dockerfile does."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from project import ROOT

from scripts import reports
from scripts.images import archive as image_archive

Entry = tuple[str, bytes | None, int]  # name, content (None: a folder), mode
BASE: list[Entry] = [("usr", None, 0o755), ("usr/bin", None, 0o755), ("usr/bin/sh", b"base", 0o755)]
OURS: list[Entry] = [
    ("usr", None, 0o755),
    ("srv", None, 0o755),
    ("srv/a", b"engine", 0o600),
    ("srv/.keep", b"", 0o644),
    ("srv/run", b"x", 0o700),
]
DOCKERFILE = "FROM x AS base\nFROM base AS server\n# why it is there\nCOPY rank0 /srv\nENV A=1\n"


def layer(entries: Sequence[Entry], mtime: int, owner: int, prefix: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, mode in entries:
            info = tarfile.TarInfo(prefix + name)
            info.mtime, info.uid, info.gid, info.uname, info.mode = mtime, owner, owner, str(owner), mode
            info.pax_headers = {"atime": str(mtime)}
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
    return out.getvalue()


def saved(path: Path, layers: Sequence[bytes], **config: Any) -> Path:
    """A file as `docker save` writes it."""
    described: dict[str, Any] = {
        "architecture": "amd64",
        "os": "linux",
        "created": config.pop("created", "2026-01-01T00:00:00Z"),
        "config": {"Env": ["A=1"], "Healthcheck": {"Test": ["CMD", "x"]}, "Labels": {"b": "2", "a": "1"}, **config},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "base"}, {"created_by": "builder's words"}],
    }
    entries = [(f"{number}/layer.tar", data) for number, data in enumerate(layers)]
    names = [name for name, _ in entries]
    entries += [("c.json", json.dumps(described).encode())]
    entries += [("manifest.json", json.dumps([{"Config": "c.json", "RepoTags": ["t"], "Layers": names}]).encode())]
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def canonical(path: Path, added: int = 1) -> tuple[image_archive.Image, bytes]:
    out = io.BytesIO()
    with image_archive.Archive(path) as source:
        instructions = image_archive.layers_of(DOCKERFILE) * added
        image = image_archive.write_canonical(
            source, image_archive.Base(1), instructions, out, ["name:tag"], {"k": "v"}
        )
    return image, out.getvalue()


def test_times_order_owners_and_hostnames_do_not_count(tmp_path: Path) -> None:
    base = layer(BASE, 5, 0)
    one, first = canonical(saved(tmp_path / "1.tar", [base, layer(OURS, 1, 1000)], Hostname="a"))
    backwards = layer(OURS[::-1], 99, 0, prefix="./")
    two, second = canonical(saved(tmp_path / "2.tar", [base, backwards], Hostname="b", created="2027-01-01T00:00:00Z"))
    assert first == second and one.iid == two.iid


@pytest.mark.parametrize(
    "other",
    [
        {"entries": [*OURS[:2], ("srv/a", b"ENGINE", 0o600), *OURS[3:]]},
        {"entries": [*OURS[:2], ("srv/b", b"engine", 0o600), *OURS[3:]]},
        {"entries": [*OURS[:2], ("srv/a", b"engine", 0o700), *OURS[3:]]},
        {"Labels": {"a": "1", "b": "3"}},
        {"Healthcheck": {"Test": ["NONE"]}},
    ],
)
def test_what_the_dockerfile_says_counts(tmp_path: Path, other: dict[str, Any]) -> None:
    base = layer(BASE, 5, 0)
    one, _ = canonical(saved(tmp_path / "1.tar", [base, layer(OURS, 1, 0)]))
    two, _ = canonical(saved(tmp_path / "2.tar", [base, layer(other.pop("entries", OURS), 1, 0)], **other))
    assert one.iid != two.iid


def test_everything_is_roots_readable_and_only_programs_run(tmp_path: Path) -> None:
    image, data = canonical(saved(tmp_path / "1.tar", [layer(BASE, 5, 0), layer(OURS, 1, 1000)]))
    (tmp_path / "c.tar").write_bytes(data)
    with image_archive.Archive(tmp_path / "c.tar") as archive:
        found = {member.name: (member.mode, member.uid, member.mtime) for _, member in archive.entries(1)}
        assert archive.config["config"]["Healthcheck"] and "Hostname" not in archive.config["config"]
        assert archive.iid == image.iid
    # the folder `usr` is the base's already; a dot file keeps its name
    assert found == {"srv": (0o755, 0, 0), "srv/.keep": (0o644, 0, 0), "srv/a": (0o644, 0, 0), "srv/run": (0o755, 0, 0)}
    assert image.layers[1].files["srv/a"] == (6, hashlib.sha256(b"engine").hexdigest())


def test_it_is_an_oci_layout_too(tmp_path: Path) -> None:
    """Every descriptor names a blob by what it is; the base's layer is byte for byte the base's."""
    base = layer(BASE, 5, 0)
    image, data = canonical(saved(tmp_path / "1.tar", [base, layer(OURS, 1, 1000)]))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    [described] = json.loads(files["index.json"])["manifests"]
    manifest = files[image_archive.blob_name(described["digest"])]
    assert described["digest"] == image.manifest_digest == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    for descriptor in [json.loads(manifest)["config"], *json.loads(manifest)["layers"]]:
        blob = files[image_archive.blob_name(descriptor["digest"])]
        assert (len(blob), f"sha256:{hashlib.sha256(blob).hexdigest()}") == (descriptor["size"], descriptor["digest"])
    assert files[image_archive.blob_name(json.loads(manifest)["layers"][0]["digest"])] == base


def test_canonical_is_a_fixed_point(tmp_path: Path) -> None:
    """A release writes the archive again from what docker keeps."""
    image, data = canonical(saved(tmp_path / "1.tar", [layer(BASE, 5, 0), layer(OURS, 1, 1000)]))
    (tmp_path / "c.tar").write_bytes(data)
    again, same = canonical(tmp_path / "c.tar")
    assert (again.iid, same) == (image.iid, data)


def test_a_changed_base_layer_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "1.tar", [layer(BASE, 5, 0), layer(OURS, 1, 0)])
    path.write_bytes(path.read_bytes().replace(b"base" + b"\0" * 20, b"evil" + b"\0" * 20, 1))
    with pytest.raises(reports.Problem, match="layer 0 is damaged"):
        canonical(path)


def test_a_layer_with_nothing_new_in_it_is_none(tmp_path: Path) -> None:
    """BuildKit makes one of WORKDIR."""
    base, ours = layer(BASE, 5, 0), layer(OURS, 1, 0)
    one, _ = canonical(saved(tmp_path / "1.tar", [base, ours]))
    two, _ = canonical(saved(tmp_path / "2.tar", [base, ours, layer([("srv", None, 0o755)], 7, 0)]))
    assert one.iid == two.iid


def test_other_layers_than_the_dockerfile_has_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "1.tar", [layer(BASE, 5, 0), layer(OURS, 1, 0)])
    with pytest.raises(reports.Problem, match="layers differ"):
        canonical(path, added=2)


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200, layer(OURS, 0, 0)])
def test_what_is_no_archive_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(reports.Problem, match="not an image's archive"):
        image_archive.Archive(tmp_path / "x")


def test_sizes_in_an_archive_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "1.tar", [layer(BASE, 5, 0), layer(OURS, 1, 0)])
    monkeypatch.setattr(image_archive, "JSON_MAX_BYTES", 10)
    with pytest.raises(reports.Problem, match="not an image's archive"):
        image_archive.Archive(path)


def test_the_dockerfile_tells_the_layers_and_why() -> None:
    text = image_archive.for_ranks((ROOT / "docker/Dockerfile").read_text(), 4)
    assert " AS toolchain" not in text and " AS packages" in text
    layers = image_archive.layers_of(text)
    assert [line for line, _ in layers if "rank" in line] == [f"COPY rank{rank} /srv/engines" for rank in range(4)]
    assert all(why for _, why in layers)
    assert layers[-1][0] == "COPY passport /srv", "what changes with each commit comes last"
