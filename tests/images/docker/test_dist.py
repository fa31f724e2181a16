"""A release: what it refuses, what dist/ holds, that signatures fit and a changed byte breaks them,
and the push to a registry."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from baking import Baked, committed, docker
from project import make
from server import free_ports

pytestmark = pytest.mark.timeout(1500)
VERSION = "VERSION=1.2.3"
FILES = {
    "image.oci.tar", "passport.json", "sbom.cdx.json", "provenance.intoto.json", "RELEASE.md", "SHA256SUMS",
    "cosign.pub", "image.oci.tar.sig", "image.payload.json", "image.payload.json.sig", "provenance.dsse.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key.pem"
    subprocess.run(
        ["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", path],
        check=True,
        capture_output=True,
    )
    return path


@pytest.fixture(scope="module")
def released(baked: Baked, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with dist/stories-1.2.3: the base's packages pinned and committed, as its report says."""
    tree = tmp_path_factory.mktemp("release") / "tree"
    shutil.copytree(baked.tree, tree, symlinks=True)
    done = make(tree, "lock-base")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tree / ".git")
    committed(tree)
    done = make(tree, "release", VERSION, f"KEY={key}", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    # its commit is another, so its image has taken the name of the one that the other tests use
    [described] = tree.glob("build/*/*/image/image.iid")
    docker("tag", described.read_text(), "bake-test/released:1")
    docker("tag", baked.iid, baked.tag)
    return tree


@pytest.fixture(scope="module")
def dist(released: Path) -> Path:
    return released / "dist/stories-1.2.3"


def test_an_unpinned_base_is_refused(baked: Baked, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(baked.tree, tree, symlinks=True)
    (tree / "docker/base.txt").unlink(missing_ok=True)
    shutil.rmtree(tree / ".git")
    committed(tree)
    image = (tree / "build").glob("*/*/image/manifest.json")
    before = [path.stat().st_mtime_ns for path in image]
    done = make(tree, "release", VERSION, timeout=1200)
    assert [path.stat().st_mtime_ns for path in (tree / "build").glob("*/*/image/manifest.json")] == before
    assert done.returncode != 0 and "THE BASE IS NOT PINNED" in done.stderr, done.stdout + done.stderr
    assert "make lock-base" in done.stderr and not (tree / "dist").exists()


def test_dist_has_everything_and_its_checksums(dist: Path) -> None:
    assert {path.name for path in dist.iterdir()} == FILES
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not dist.with_name(dist.name + ".partial").exists()


def test_the_archive_is_the_image(released: Path, dist: Path) -> None:
    layers = json.loads(next(released.glob("build/*/*/image/layers.json")).read_text())
    said = docker("load", "--quiet", "--input", str(dist / "image.oci.tar")).stdout
    name = said.split("Loaded image: ")[1].strip()
    assert name == "trtllm-bake/stories:1.2.3"
    assert docker("image", "inspect", "--format", "{{.Id}}", name).stdout.strip() == layers["iid"]
    docker("image", "rm", name)
    done = make(released, "verify-image", f"IMAGE={dist / 'image.oci.tar'}")
    assert done.returncode == 0 and "✗" not in done.stdout, done.stdout + done.stderr


def test_another_reader_of_oci_archives_takes_it(dist: Path) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    done = subprocess.run(
        ["skopeo", "inspect", "--config", f"oci-archive:{dist / 'image.oci.tar'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["Entrypoint"] == ["/opt/venv/bin/python", "-m", "scripts.images.entry"]


def test_the_bill_of_materials_is_valid_and_complete(dist: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (dist / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = {
        component.get("purl", component["name"]).partition("?")[0]: component
        for component in json.loads(text)["components"]
    }
    assert any(name.startswith("pkg:deb/debian/libc6@") for name in found)
    torch = next(component for name, component in found.items() if name.startswith("pkg:pypi/torch@"))
    assert torch["hashes"][0]["alg"] == "SHA-256"
    weights = {part["name"]: part["hashes"][0]["content"] for part in found["stories"]["components"]}
    assert weights["consolidated.00.pth"].startswith("ad12b003adec")


def test_the_provenance_names_what_it_was_made_from(released: Path, dist: Path) -> None:
    statement = json.loads((dist / "provenance.intoto.json").read_text())
    assert (
        statement["_type"] == "https://in-toto.io/Statement/v1"
        and statement["predicateType"] == "https://slsa.dev/provenance/v1"
    )
    digest = hashlib.sha256((dist / "image.oci.tar").read_bytes()).hexdigest()
    assert statement["subject"][0] == {"name": "image.oci.tar", "digest": {"sha256": digest}}
    named = {each["name"]: each["digest"] for each in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=released, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert named["git"] == {"gitCommit": head} and "base" in named and "weights/params.json" in named


def verified(key: Path, data: bytes, signature: str, tmp_path: Path) -> bool:
    """As openssl sees it, and anyone can without us."""
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "sig").write_bytes(base64.b64decode(signature))
    command = ["openssl", "dgst", "-sha256", "-verify", str(key), "-signature", str(tmp_path / "sig")]
    command += [str(tmp_path / "data")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_signatures_hold_and_a_changed_byte_breaks_them(dist: Path, tmp_path: Path) -> None:
    public = dist / "cosign.pub"
    payload = (dist / "image.payload.json").read_bytes()
    signature = (dist / "image.payload.json.sig").read_text()
    assert verified(public, payload, signature, tmp_path) and not verified(public, payload + b" ", signature, tmp_path)
    manifest = json.loads((dist / "provenance.intoto.json").read_text())["subject"][1]["digest"]["sha256"]
    assert json.loads(payload)["critical"]["image"] == {"docker-manifest-digest": f"sha256:{manifest}"}
    envelope = json.loads((dist / "provenance.dsse.json").read_text())
    body = base64.b64decode(envelope["payload"])
    assert body == (dist / "provenance.intoto.json").read_bytes()
    kind = envelope["payloadType"].encode()
    signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(body)).encode(), body])
    assert verified(public, signed, envelope["signatures"][0]["sig"], tmp_path)
    archive = (dist / "image.oci.tar").read_bytes()
    assert verified(public, archive, (dist / "image.oci.tar.sig").read_text(), tmp_path)


def test_the_notes_say_how_to_run_and_check_it(dist: Path) -> None:
    notes = (dist / "RELEASE.md").read_text()
    assert (
        "docker load --input image.oci.tar" in notes and "trtllm-bake/stories:1.2.3" in notes and "| passed |" in notes
    )


def test_a_version_names_one_image(released: Path, dist: Path) -> None:
    before = (dist / "SHA256SUMS").read_bytes()
    done = make(released, "release", VERSION, timeout=600)
    assert done.returncode == 0 and "is this image already" in done.stdout, done.stdout + done.stderr
    assert (dist / "SHA256SUMS").read_bytes() == before


def test_a_wrong_key_is_reported(released: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    done = make(released, "release", "VERSION=1.2.4", f"KEY={tmp_path / 'key'}", timeout=600)
    assert done.returncode != 0 and "COULD NOT SIGN" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (released / "dist/stories-1.2.4").exists()


# --- push ---


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[int]:
    """A real registry on loopback, from Debian."""
    if not shutil.which("docker-registry"):
        pytest.skip("docker-registry is not installed")
    [port] = free_ports(1)
    config = f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
    (tmp_path / "config.yml").write_text(config)
    with open(tmp_path / "registry.log", "w") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(tmp_path / "config.yml")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "registry.log").read_text()
        yield port
    finally:
        process.kill()
        process.wait()


def test_a_release_is_pushed_and_comes_back_the_same(released: Path, registry: int) -> None:
    image = f"127.0.0.1:{registry}/models/stories:1.2.3"
    done = make(released, "push", VERSION, f"IMAGE={image}", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    pushed = json.loads((released / "dist/stories-1.2.3.pushed.json").read_text())
    docker("image", "rm", image)
    docker("pull", f"127.0.0.1:{registry}/models/stories@{pushed['digest']}")
    found = docker(
        "image", "inspect", "--format", "{{.Id}}", f"127.0.0.1:{registry}/models/stories@{pushed['digest']}"
    ).stdout.strip()
    assert found == pushed["iid"]
    docker("image", "rm", f"127.0.0.1:{registry}/models/stories@{pushed['digest']}")


def test_the_chart_names_what_the_registry_has(released: Path, registry: int) -> None:
    name = f"127.0.0.1:{registry}/models/stories"
    assert make(released, "push", VERSION, f"IMAGE={name}:1.2.3", timeout=600).returncode == 0
    digest = json.loads((released / "dist/stories-1.2.3.pushed.json").read_text())["digest"]
    done = make(released, "chart", VERSION)
    assert done.returncode == 0 and "make push" not in done.stdout, done.stdout + done.stderr
    [written] = released.glob("build/*/*/chart/values.yaml")
    text = written.read_text()
    assert f'repository: "{name}"' in text and f'digest: "{digest}"' in text, text


def test_an_archive_that_is_carried_to_another_registry_keeps_its_digest(
    released: Path, dist: Path, registry: int
) -> None:
    """docs/operations.md, "Without a network": the digest that make chart writes is the archive's."""
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    name = f"docker://127.0.0.1:{registry}/models/stories:1.2.3"
    archive = f"oci-archive:{dist / 'image.oci.tar'}"
    for words in (
        ["copy", "--preserve-digests", "--dest-tls-verify=false", archive, name],
        ["inspect", "--tls-verify=false", "--format", "{{.Digest}}", name],
    ):
        done = subprocess.run(["skopeo", *words], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
    manifest = json.loads((dist / "provenance.intoto.json").read_text())["subject"][1]["digest"]["sha256"]
    assert done.stdout.strip() == f"sha256:{manifest}"
    [layers] = released.glob("build/*/*/image/layers.json")
    assert json.loads(layers.read_text())["manifest"] == f"sha256:{manifest}"


def test_a_push_that_cannot_be_is_reported(released: Path) -> None:
    assert "NOTHING TO PUSH" in make(released, "push", VERSION, "IMAGE=stories").stderr
    assert "NOTHING TO PUSH" in make(released, "push", "VERSION=9.9.9", "IMAGE=127.0.0.1:1/stories:1").stderr
    [port] = free_ports(1)
    done = make(released, "push", VERSION, f"IMAGE=127.0.0.1:{port}/stories:1", timeout=600)
    assert done.returncode != 0 and "THE PUSH FAILED" in done.stderr and "does not answer" in done.stderr, done.stderr
