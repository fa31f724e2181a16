"""Sends a release's image to a registry: `make push VERSION=x.y.z IMAGE=registry.example/name:tag`.

Reads   dist/<model>-<version>/image.oci.tar, IMAGE from the environment; docker's or buildah's own credentials
Needs   docker or buildah, logged in
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from scripts import reports, room
from scripts.images import archive as image_archive
from scripts.images import builders

# a registry (with a dot or a port, or localhost); a name; a tag
NAMED = re.compile(
    r"(?:[a-z0-9-]+(?:\.[a-z0-9-]+)+(?::\d+)?|[a-z0-9-]+:\d+|localhost)(?:/[a-z0-9._-]+)+:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, required=True)
    parser.add_argument("--builder", default="")
    args = parser.parse_args()
    image = os.environ.get("IMAGE", "").strip()
    archive = args.dist / image_archive.ARCHIVE
    if not NAMED.fullmatch(image) or not archive.is_file():
        raise reports.images.push_what(image, args.dist)
    builder = builders.find_builder(args.builder)
    with image_archive.Archive(archive) as opened:
        iid = opened.iid
        [name] = opened.json("manifest.json")[0]["RepoTags"]
    builder.load(archive, name)
    builder.tag(name, image)
    digest = builder.push(image)
    # beside the release, not in it, because SHA256SUMS is complete
    room.write_synced(
        args.dist.with_name(f"{args.dist.name}.pushed.json"),
        json.dumps({"image": image, "iid": iid, "digest": digest}).encode(),
    )
    room.say("push", f"{image} {iid[:19]}, in the registry {digest}")


if __name__ == "__main__":
    reports.run(main)
