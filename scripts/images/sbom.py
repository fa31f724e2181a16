"""The bill of materials: CycloneDX 1.6, from the packages found in the image."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, Iterator, Mapping, Sequence

from scripts import verify_image
from scripts.images import archive as image_archive

DPKG_STATUS = "var/lib/dpkg/status"


def packages_in(archive: image_archive.Archive) -> Iterator[tuple[str, str, str]]:
    """(type of package URL, name, version) of every Debian and Python package that the image has."""
    texts: dict[str, bytes] = {}
    for number in range(len(archive.diff_ids)):
        for tar, member in archive.entries(number):
            name = image_archive.clean(member.name)
            wanted = name == DPKG_STATUS or name.endswith(".dist-info/METADATA")
            if wanted and member.isreg() and member.size <= image_archive.JSON_MAX_BYTES:
                file = tar.extractfile(member)
                assert file is not None
                texts[name] = file.read()
    from scripts.build_base import packages_of

    for line in packages_of(texts.pop(DPKG_STATUS, b"").decode()):
        name, version, architecture = line.split()
        yield "deb", f"{name}:{architecture}", version
    for name, version in sorted(verify_image.package(text) for text in texts.values()):
        yield "pypi", name, version


def bill_of_materials(
    packages: Sequence[tuple[str, str, str]], about: Mapping[str, Any], image: image_archive.Image, when: datetime
) -> str:
    """CycloneDX 1.6 as JSON: Debian and Python packages, the launcher, the model with its weights' hashes."""
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    def sha256(value: str) -> HashType:
        return HashType(alg=HashAlgorithm.SHA_256, content=value)

    wheels = {
        verify_image.wheel_name(name): record["sha256"]
        for name, record in about["rooms"]["wheels"]["manifest"]["files"].items()
    }
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, image.iid))
    bom.metadata.timestamp = when
    bom.metadata.component = Component(
        type=ComponentType.CONTAINER,
        name=about["model"],
        version=image.iid,
        bom_ref="image",
        hashes=[sha256(image.iid.partition(":")[2])],
    )
    for kind, name, version in packages:
        name, _, architecture = name.partition(":")
        qualifiers = {"arch": architecture} if architecture else None
        url = PackageURL(kind, "debian" if kind == "deb" else None, name, version, qualifiers)
        hashes = [sha256(wheels[name, version])] if kind == "pypi" and (name, version) in wheels else []
        bom.components.add(
            Component(
                type=ComponentType.LIBRARY, name=name, version=version, purl=url, bom_ref=url.to_string(), hashes=hashes
            )
        )
    bom.components.add(
        Component(
            type=ComponentType.APPLICATION, name="trtllm-bake", version=about["revision"] or "", bom_ref="launcher"
        )
    )
    weights = [
        Component(type=ComponentType.FILE, name=name, bom_ref=f"weights/{name}", hashes=[sha256(record["sha256"])])
        for name, record in about["weights"].items()
    ]
    facts = {
        "engine": about["engine"]["kind"],
        "tp_size": str(about["engine"]["tp_size"]),
        "dtype": about["engine"]["dtype"],
        "licence": about["licence"],
    }
    bom.components.add(
        Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            name=about["model"],
            bom_ref="model",
            components=weights,
            properties=[Property(name=f"trtllm-bake:{name}", value=value) for name, value in facts.items() if value],
        )
    )
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"
