"""What a release refuses: an unpinned image, inferred tables, a rehearsal's or unverified engines,
a tree that is not clean."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from project import make

from scripts import release, reports, room
from scripts.images import signing
from scripts.nvidia import contracts

SOURCES = json.loads((contracts.DOCKER / "contracts/sources.json").read_text())


def pinned(tree: Path) -> None:
    table = tree / "docker/toolchains.json"
    table.write_text(table.read_text().replace('"digest": null', f'"digest": "sha256:{"5f" * 32}"'))


def committed(tree: Path) -> None:
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tree / ".gitignore").write_text("build/\n__pycache__/\n")
    for words in (["init", "-q"], ["add", "-A"], [*name, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tree, check=True, timeout=60)


def test_a_release_is_asked_what_can_be_known_before_anything_is_made(own_tree: Path) -> None:
    def refused(*words: str) -> str:
        done = make(own_tree, "release", *words)
        assert done.returncode != 0 and not (own_tree / "build").exists()
        return done.stderr

    tensorrt = ("ENGINE=tensorrt", "TOOLCHAIN=0.8.0", "VERSION=1.0.0")
    assert "VERSION CANNOT BE" in refused()
    assert "THE TREE IS NOT CLEAN" in refused("VERSION=1.0.0")
    committed(own_tree)
    assert "TOOLCHAIN 0.8.0 IS NOT PINNED" in refused(*tensorrt)
    pinned(own_tree)
    assert "docker/toolchains.json" in refused(*tensorrt)
    committed(own_tree)
    report = refused(*tensorrt)
    assert "TOOLCHAIN 0.8.0 IS PARTLY INFERRED" in report and "contracts/runtime/v0.8.0.json" in report
    assert "INFERRED=accept" in report and "contracts/quantize" not in report


def test_base_and_key_are_asked_for_before_anything_is_made(own_tree: Path, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        done = make(own_tree, "release", "VERSION=1.0.0", *words)
        assert done.returncode != 0 and not (own_tree / "build" / "stories").exists(), done.stdout
        return done.stderr

    committed(own_tree)
    assert "COULD NOT SIGN" in refused(f"KEY={tmp_path / 'none.pem'}")
    (tmp_path / "rsa.pem").write_bytes(
        subprocess.run(["openssl", "genrsa", "1024"], capture_output=True, check=True).stdout
    )
    assert "a private key of another kind" in refused(f"KEY={tmp_path / 'rsa.pem'}")
    for there in (True, False):  # empty, then missing
        (own_tree / "docker/base.txt").write_text("") if there else (own_tree / "docker/base.txt").unlink()
        committed(own_tree)
        report = refused()
        assert "THE BASE IS NOT PINNED" in report and "make lock-base" in report


def test_what_is_missing_is_told_before_docker_is_asked_for_anything(
    own_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if every room before the image is there already, as after a release that was refused."""
    asked = tmp_path / "asked"
    for name in ("docker", "buildah"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$0 $*" >>{asked}\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (own_tree / "docker/base.txt").unlink()
    committed(own_tree)
    for words in ([], ["KEY=none.pem"], ["LICENSE=llama2"]):
        done = make(own_tree, "release", "VERSION=1.0.0", *words)
        assert done.returncode != 0 and "Nothing was made" not in done.stdout
        assert "IS NOT PINNED" in done.stderr or "LICENCE IS NOT WITH IT" in done.stderr, done.stderr
        assert not (own_tree / "build").exists() and not asked.exists(), done.stdout


def test_a_base_that_was_made_is_held_to_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = release.BASE_LOCK.read_text()
    room_of(tmp_path, "base", {}, {})
    (tmp_path / "base/packages.txt").write_text(pinned)
    release.check_base("torch", "", "", tmp_path / "base")
    release.check_base("torch", "", "", tmp_path / "not made yet")
    (tmp_path / "base/packages.txt").write_text(pinned.replace("base-files 12", "base-files 11"))
    with pytest.raises(reports.Problem) as caught:
        release.check_base("torch", "", "", tmp_path / "base")
    assert "+ base-files 11" in caught.value.seen and "- base-files 12" in caught.value.seen
    release.check_base("torch", "example.org/base@sha256:00", "", tmp_path / "base")


def test_a_key_of_the_right_kind_passes(tmp_path: Path) -> None:
    command = ["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", str(tmp_path / "key.pem")]
    subprocess.run(command, check=True)
    signing.check_key(tmp_path / "key.pem")


def test_a_llama_is_passed_on_with_its_licence(own_tree: Path, tmp_path: Path) -> None:
    """Llama 2's licence, 1.b: whoever passes the model on passes licence, use policy and notice on."""
    committed(own_tree)
    weights = tmp_path / "meta" / "llama-2-7b"
    weights.mkdir(parents=True)
    words = ("VERSION=1.0.0", "MODEL=llama-2-7b", f"WEIGHTS={weights}")
    report = make(own_tree, "release", *words).stderr
    assert "THE MODEL'S LICENCE IS NOT WITH IT" in report and "LICENSE and USE_POLICY" in report
    (weights.parent / "LICENSE").write_text("terms")
    assert "must be shipped with USE_POLICY" in make(own_tree, "release", *words).stderr
    (weights / "USE_POLICY.md").write_text("policy")
    release.check_license("llama2", weights)
    assert "Meta Platforms" in release.NOTICES["llama2"]
    folder = make(own_tree, "release", "VERSION=1.0.0", f"MODEL={weights}").stderr
    assert "THE MODEL'S LICENCE IS NOT KNOWN" in folder and "LICENSE=llama2" in folder


def test_quantizing_uses_more_tables(tmp_path: Path) -> None:
    row = contracts.toolchain("1.2.1")
    plain, quantized = (set(release.inferred_cells(row, SOURCES, quant)) for quant in ("", "fp8"))
    assert quantized - plain == {"contracts/convert/v1.3.0rc3.json", "contracts/quantize/v1.3.0rc3.json"}


def room_of(root: Path, name: str, reads: dict[str, str], facts: dict[str, object]) -> None:
    manifest = {"room": name, "arguments": {}, "reads": reads, "tools": {}, "facts": facts, "files": {}}
    (root / name).mkdir()
    (root / name / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("engine_facts", "passed", "same", "title"),
    [
        ({"rehearsal": True}, True, True, "these engines come from a rehearsal"),
        ({}, False, True, "verified was changed"),
        ({}, True, False, "verified was changed"),
    ],
)
def test_engines_are_real_and_verified(
    tmp_path: Path, engine_facts: dict[str, object], passed: bool, same: bool, title: str
) -> None:
    room_of(tmp_path, "engines", {}, engine_facts)
    digest = room.manifest_sha256(tmp_path / "engines") if same else "0" * 64
    room_of(tmp_path, "verified", {"engines": digest}, {"passed": passed})
    with pytest.raises(reports.Problem, match=title):
        release.check_rooms(tmp_path)


def test_verified_engines_pass(tmp_path: Path) -> None:
    room_of(tmp_path, "engines", {}, {})
    room_of(tmp_path, "verified", {"engines": room.manifest_sha256(tmp_path / "engines")}, {"passed": True})
    release.check_rooms(tmp_path)
