"""Signatures in cosign's formats, made with openssl."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path

from scripts import reports
from scripts.images import archive as image_archive
from scripts.images.archive import ARCHIVE

PAYLOAD_TYPE = "application/vnd.in-toto+json"


def pre_authentication(payload: bytes) -> bytes:
    """The bytes that a DSSE envelope signs (github.com/secure-systems-lab/dsse, protocol.md)."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def openssl(key: Path, *words: str, data: bytes | None = None) -> bytes:
    """openssl with a private key; its password comes from COSIGN_PASSWORD, never from a command line."""
    password = ["-passin", "env:COSIGN_PASSWORD"] if "COSIGN_PASSWORD" in os.environ else []
    try:
        done = subprocess.run(["openssl", *words, *password], input=data, capture_output=True, timeout=600, check=False)
    except FileNotFoundError:
        raise reports.serving.program_missing("openssl") from None
    if done.returncode:
        raise reports.images.not_signed(
            key, (done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"])[0]
        )
    return done.stdout


def check_key(key: Path) -> None:
    """A Problem unless the key fits cosign's formats: EC on P-256, and readable by openssl."""
    said = openssl(key, "pkey", "-in", str(key), "-noout", "-text")
    if b"P-256" not in said:
        raise reports.images.not_signed(key, "a private key of another kind")


def sign(key: Path, folder: Path, statement: bytes, image: image_archive.Image, name: str) -> None:
    """Signatures in cosign's formats: of the archive (sign-blob), of the image (simple signing),
    and of the provenance (DSSE)."""
    (folder / "cosign.pub").write_bytes(openssl(key, "pkey", "-in", str(key), "-pubout"))

    def signature(*data: str, of: bytes | None = None) -> str:
        return base64.b64encode(openssl(key, "dgst", "-sha256", "-sign", str(key), *data, data=of)).decode()

    (folder / f"{ARCHIVE}.sig").write_text(signature(str(folder / ARCHIVE)))
    payload = {
        "critical": {
            "identity": {"docker-reference": name.rpartition(":")[0]},
            "image": {"docker-manifest-digest": image.manifest_digest},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    simple = json.dumps(payload, separators=(",", ":")).encode()
    (folder / "image.payload.json").write_bytes(simple)
    (folder / "image.payload.json.sig").write_text(signature(of=simple))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(statement).decode(),
        "signatures": [{"keyid": "", "sig": signature(of=pre_authentication(statement))}],
    }
    (folder / "provenance.dsse.json").write_text(json.dumps(envelope) + "\n")
