"""The provenance: an in-toto statement with SLSA provenance v1."""

from __future__ import annotations

from typing import Any, Mapping

from scripts.images import archive as image_archive
from scripts.images.archive import ARCHIVE

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
# our own build type: docker/README.md says what the fields of externalParameters mean
BUILD_TYPE = "trtllm-bake/make-image/v1"


def provenance(
    about: Mapping[str, Any], image: image_archive.Image, archive_sha256: str, version: str
) -> dict[str, Any]:
    """in-toto's statement of what the archive was made from (SLSA provenance v1)."""
    base = about["base"]
    dependencies: list[dict[str, Any]] = [{"name": "git", "digest": {"gitCommit": about["revision"]}}]
    if base.get("digest"):
        dependencies.append(
            {"name": "base", "uri": base["image"], "digest": {"sha256": base["digest"].partition(":")[2]}}
        )
    else:
        tar = about["rooms"]["base"]["manifest"]["files"]["base.tar"]
        dependencies.append({"name": "base", "uri": base["made_from"], "digest": {"sha256": tar["sha256"]}})
    for name, record in about["weights"].items():
        dependencies.append({"name": f"weights/{name}", "digest": {"sha256": record["sha256"]}})
    for name, record in about["rooms"]["wheels"]["manifest"]["files"].items():
        dependencies.append({"name": f"wheels/{name}", "digest": {"sha256": record["sha256"]}})
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": ARCHIVE, "digest": {"sha256": archive_sha256}},
            {"name": f"{about['model']}:{version}", "digest": {"sha256": image.manifest_digest.partition(":")[2]}},
        ],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "model": about["model"],
                    "version": version,
                    "rooms": {name: described["manifest"]["arguments"] for name, described in about["rooms"].items()},
                },
                "internalParameters": {"toolchain": about["toolchain"]},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": "trtllm-bake", "version": {"trtllm-bake": about["revision"]}},
                "byproducts": [
                    {"name": f"rooms/{name}", "digest": {"sha256": described["manifest_sha256"]}}
                    for name, described in about["rooms"].items()
                ],
            },
        },
    }
