"""Room `base`: the base of the image. It describes NVIDIA's container or the user's BASE_IMAGE,
or makes one from Debian packages.

Reads   BASE (an image) from the environment; Debian's packages by mmdebstrap, or the image, which docker or buildah has
        already
Writes  base.json (image, digest, layers, Python, TensorRT-LLM); for Debian also base.tar and packages.txt
Needs   mmdebstrap; or docker or buildah

The same packages give the same base.tar, bit for bit (SOURCE_DATE_EPOCH). docker/base.txt pins them for releases:
`make lock-base`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from scripts import reports, room
from scripts.images import archive as image_archive
from scripts.images import builders
from scripts.nvidia import contracts

SUITE = "bookworm"
# Python with its shared library, which Triton's stub links, and the C++ library; all else is Debian's Essential set.
INCLUDE = ("python3-minimal", "libpython3-stdlib", "libpython3.11", "libstdc++6", "ca-certificates")
# Manuals and translations are of no use here; copyright files stay.
DPKG = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/info/*",
)
# Files that depend on the day when Debian's tools ran
TRACES = 'rm -rf "$1"/var/log/* "$1"/var/cache/* "$1"/var/lib/apt/lists/* "$1"/etc/*- "$1"/tmp/*'
DOWNLOAD = "50 MB"
CREATED_BY = f"mmdebstrap {SUITE} {' '.join(INCLUDE)}"
# A program that prints the versions of Python and TensorRT-LLM in an image: one line,
# without a third word if there is no TensorRT-LLM.
QUESTION = """import importlib.metadata as m, sys
try: trtllm = m.version("tensorrt_llm").partition("+")[0]
except m.PackageNotFoundError: trtllm = ""
print("bake", "%d.%d" % sys.version_info[:2], trtllm)"""


@dataclass(frozen=True)
class Settings:
    """base_image: empty for Debian; trtllm_version: the version that it must have, empty if it must have none."""

    output: Path
    base_image: str
    builder: str
    trtllm_version: str
    # the image is NVIDIA's for that version by docker/toolchains.json, or is completed from it
    by_table: bool


def debian_command(output: Path) -> list[str]:
    """mmdebstrap's command for base.tar, without root if the kernel allows that."""
    return [
        "mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(INCLUDE)}",
        *(f"--dpkgopt={option}" for option in DPKG), f"--customize-hook={TRACES}", SUITE, str(output),
    ]  # fmt: skip


def packages_of(status: str) -> list[str]:
    """dpkg's status file -> 'name version architecture' of each installed package, sorted."""
    found = []
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            found.append(f"{fields['Package']} {fields['Version']} {fields['Architecture']}")
    return sorted(found)


def base_tag(manifest: Mapping[str, Any]) -> str:
    """docker's name for the base that was made from Debian packages."""
    return f"localhost/trtllm-bake-base:{manifest['files']['base.tar']['sha256'][:12]}"


def build_base(settings: Settings) -> None:
    reads: dict[str, Path] = {}
    arguments = {"base_image": settings.base_image, "suite": SUITE, "include": list(INCLUDE)}
    with room.filling(settings.output, reads, arguments) as filling:
        if settings.base_image:
            describe(settings, filling)
        else:
            from_debian(filling)


def from_debian(filling: room.Filling) -> None:
    if not shutil.which("mmdebstrap"):
        raise reports.images.no_mmdebstrap()
    room.say("base", f"from Debian {SUITE}'s packages, a download of about {DOWNLOAD}: {', '.join(INCLUDE)}")
    tar = filling.path / "base.tar"
    # apt reads these; our environment's language must not decide
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "0", "LC_ALL": "C.UTF-8"}
    with room.waiting("base", f"mmdebstrap, which fetches about {DOWNLOAD} and unpacks it"):
        done = subprocess.run(
            debian_command(tar), capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False
        )
    if done.returncode:
        raise reports.images.base_not_made(done.returncode, done.stderr.strip().splitlines()[-12:])
    filling.take("base.tar")
    with tarfile.open(tar) as archive:
        for member in archive:
            if image_archive.clean(member.name) == "var/lib/dpkg/status":
                status = archive.extractfile(member)
                assert status is not None
                packages = packages_of(status.read().decode())
    filling.write("packages.txt", "".join(f"{line}\n" for line in packages).encode())
    [python] = [line.split()[1] for line in packages if line.startswith("libpython3.11 ")]
    filling.facts = {
        "made_from": f"Debian {SUITE}",
        "packages": len(packages),
        "python": ".".join(python.split(".")[:2]),
    }


def describe(settings: Settings, filling: room.Filling) -> None:
    builder = builders.find_builder(settings.builder)
    if not builder.has(settings.base_image):
        raise reports.images.base_not_here(settings.base_image, builder.name)
    said = builder.ask(settings.base_image, ["python3", "-c", QUESTION])
    python, trtllm = re.findall(r"^bake (\S+) ?(\S*)$", said, re.MULTILINE)[-1]
    # an image without the Python package (24.02) is accepted by its digest in the table alone
    expected = contracts.reported(settings.trtllm_version) if settings.trtllm_version else ""
    if expected and trtllm != expected and (trtllm or not settings.by_table):
        raise reports.images.base_of_another_version(settings.base_image, expected, trtllm)
    filling.facts = {
        "image": settings.base_image,
        "digest": builder.digest(settings.base_image),
        "layers": builder.layers(settings.base_image),
        "python": python,
        "trtllm_version": trtllm or None,
    }
    filling.write_json("base.json", filling.facts)
    room.say("base", f"{settings.base_image}: Python {python}, {len(filling.facts['layers'])} layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--builder", default="")
    parser.add_argument("--trtllm-version", default="")
    parser.add_argument("--by-table", action="store_true")
    args = parser.parse_args()
    image = os.environ.get("BASE", "").strip()
    build_base(Settings(args.output, image, args.builder, args.trtllm_version, args.by_table))


if __name__ == "__main__":
    reports.run(main)
