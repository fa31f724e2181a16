"""Reads whole rooms again and compares every byte with their manifests. It names damaged files,
and the tensors in them.

python -m scripts.fsck [--json] ROOM...   a room is a folder with a manifest.json, or a folder of weights in Meta's form

Weights that make did not fetch have no manifest. Meta's are compared with checklist.chk and the CRC-32 of each tensor
in a .pth, .bin files with these CRC-32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts import reports, room
from scripts.making import ingredients
from scripts.weights import files, safetensors
from scripts.weights.hugging_face import read_bin
from scripts.weights.meta import read_shard

# what manifests say that were written before they had a sha256
OLDER_KEYS = {"room", "arguments", "reads", "tools", "facts", "files"}
# Reading and hashing release the interpreter's lock.
AT_ONCE = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Damage:
    """One damage. part: the tensor, or another part of the file; empty: the file itself."""

    room: str
    file: str
    part: str
    expected: str
    actual: str


@dataclass(frozen=True)
class Checked:
    """One room. held_to: what its bytes were compared with; files: how many were read; notes:
    remarks that are not damage."""

    room: str
    files: int
    size_bytes: int
    held_to: str
    damages: tuple[Damage, ...] = ()
    notes: tuple[str, ...] = ()


# --- core -------------------------------------------------------------------------------------------------------------


def differences(expected: room.FileRecord, found: room.FileRecord) -> list[tuple[str, str, str]]:
    """(part, expected, actual) for every difference between a file and its record."""
    if expected.size_bytes != found.size_bytes:
        return [("", f"{expected.size_bytes} bytes", f"{found.size_bytes} bytes")]
    if expected.sha256 == found.sha256:
        return []
    tensors, now = dict(expected.tensors or {}), dict(found.tensors or {})
    parts = [
        (name, f"CRC-32 {crc}", f"CRC-32 {now[name]}" if name in now else "no such tensor")
        for name, crc in tensors.items()
        if now.get(name) != crc
    ]
    where = "its header" if tensors else ""
    return parts or [(where, f"sha256 {expected.sha256[:16]}...", f"sha256 {found.sha256[:16]}...")]


def manifest_damage(data: bytes) -> tuple[str, str] | None:
    """(expected, actual) if a manifest was changed after it was written; None if it was not, or is too old to tell."""
    manifest = json.loads(data)
    said, actual = manifest.get(room.OWN_SHA256), room.own_sha256(manifest)
    if said is None and set(manifest) == OLDER_KEYS:
        return None
    if said != actual:
        return f"sha256 {str(said)[:16]}...", f"sha256 {actual[:16]}..."
    if data != room.as_bytes(manifest):
        return "written as we write it", "written in another way"
    return None


# --- shell ------------------------------------------------------------------------------------------------------------


def check_room(
    folder: Path, advance: Any, seen: dict[tuple[int, int], room.FileRecord], others: Sequence[Path] = ()
) -> Checked:
    """Compares every file of a room with its manifest, and the manifest with its own checksum. seen: files that were
    read before, by device and inode (engines are links); others: rooms to search for those that it was made from."""
    try:
        manifest = room.read_manifest_only(folder)
        damage = manifest_damage(room.manifest_bytes(folder))
    except reports.Problem as problem:
        damage = ("as it was written", problem.seen)
    if damage:  # then the other rooms cannot be compared with it
        return Checked(str(folder), 1, 0, "itself", (Damage(str(folder), room.MANIFEST, "", *damage),))
    records = {name: room.record_of(manifest, name) for name in manifest["files"]}

    def check(name: str) -> list[Damage]:
        path, record = folder / name, records[name]
        try:
            stat = path.stat()
            found = seen.get((stat.st_dev, stat.st_ino))
            if found is None or (record.tensors is not None and found.tensors is None):
                found = _read(path, record, advance)
                seen[(stat.st_dev, stat.st_ino)] = found
        except FileNotFoundError:
            return [Damage(str(folder), name, "", f"{record.size_bytes} bytes", "no such file")]
        except reports.Problem as problem:
            return [Damage(str(folder), name, "its header", "as it was written", problem.seen)]
        return [Damage(str(folder), name, *difference) for difference in differences(record, found)]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        damages = [damage for found in pool.map(check, records) for damage in found]
    more, notes = _check_around(folder, manifest, others)
    size_bytes = sum(record.size_bytes for record in records.values())
    return Checked(str(folder), len(records), size_bytes, "its manifest", (*damages, *more), tuple(notes))


def _check_around(folder: Path, manifest: Mapping[str, Any], others: Sequence[Path]) -> tuple[list[Damage], list[str]]:
    """Damage and remarks about other things than a room's files: its question, the rooms that it was made from,
    extra files."""
    damages, notes = [], []
    has_sums = room.OWN_SHA256 in manifest
    if not has_sums:
        notes.append("made before manifests had their own checksum: its manifest and args could not be checked")
    for name in (room.ARGS, room.ARGS_SUM) if has_sums else ():
        if not (folder / name).is_file():
            damages.append(Damage(str(folder), name, "", "a file", "no such file"))
    if has_sums and not damages:
        said, actual = (folder / room.ARGS_SUM).read_bytes(), room.args_sum((folder / room.ARGS).read_bytes())
        if said != actual:
            # if only the sum itself is damaged, most of its characters are still the same
            file = room.ARGS if sum(a != b for a, b in zip(said, actual)) > 8 else room.ARGS_SUM
            damages.append(
                Damage(
                    str(folder),
                    file,
                    "",
                    *(f"sha256 {line[:16].decode(errors='replace')}..." for line in (said, actual)),
                )
            )
    for name, read in manifest["reads"].items():
        places = [*others, folder.parent / name, folder.parent.parent / name]
        before = [place for place in places if place.name == name and (place / room.MANIFEST).is_file()]
        here = [room.manifest_sha256(place) for place in before]
        if not here or read in here:
            continue
        if _says_its_own_sha256(before[0]):
            notes.append(f"made from another {name} than lies in {reports.shown(before[0])}")
        else:  # an older manifest cannot say itself that it is whole
            part = f"its entry for {name}"
            damages.append(
                Damage(str(folder), room.MANIFEST, part, f"sha256 {read[:16]}...", f"sha256 {here[0][:16]}...")
            )
    known = {*manifest["files"], room.MANIFEST, room.ARGS, room.ARGS_SUM, ingredients.RECORD}
    extra = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    extra = [name for name in extra if name not in known]
    if extra:
        notes.append(f"not in its manifest: {reports.some(extra)}")
    return damages, notes


def _says_its_own_sha256(folder: Path) -> bool:
    try:
        return room.OWN_SHA256 in room.read_manifest_only(folder)
    except reports.Problem:
        return True  # reported as damage of the room itself


def _read(path: Path, record: room.FileRecord, advance: Any) -> room.FileRecord:
    if record.tensors is not None and path.stat().st_size == record.size_bytes:
        return safetensors.fingerprint(path, advance)
    found = room.sha256_of(path)
    advance(found.size_bytes)
    return found


def check_weights(folder: Path, advance: Any) -> Checked:
    """Compares weights that make did not fetch with their own checksums."""
    lists = {}
    for name in files.CHECKLISTS:
        if (folder / name).is_file():
            lines = (folder / name).read_text(errors="replace").splitlines()
            matches = [re.fullmatch(r"([0-9a-f]{32})\s+\*?(?:\./)?([\w.-]+)", line.strip()) for line in lines]
            lists.update({match[2]: match[1] for match in matches if match and (folder / match[2]).is_file()})
    torch_files = sorted([*folder.glob("*.pth"), *folder.glob("*.bin")])

    def check(path: Path) -> list[Damage]:
        parts: list[Damage] = []
        size_bytes = path.stat().st_size
        if path in torch_files:
            try:
                tensors = read_shard(path) if path.suffix == ".pth" else read_bin(path)
            except reports.Problem as problem:
                return [Damage(str(folder), path.name, "its directory", "as it was saved", problem.seen)]
            for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
                try:
                    for block in tensor.blocks():
                        advance(block.nbytes)
                except reports.Problem as problem:
                    parts.append(Damage(str(folder), path.name, name, "as it was saved", problem.seen))
        elif path.name in lists:
            advance(size_bytes)
        if path.name in lists and not parts:
            actual = _md5(path)
            if actual != lists[path.name]:
                parts.append(Damage(str(folder), path.name, "", f"md5 {lists[path.name]}", f"md5 {actual}"))
        return parts

    paths = sorted({*torch_files, *(folder / name for name in lists)})
    if not paths:
        raise reports.rooms.nothing_to_check(folder)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        damages = [damage for found in pool.map(check, paths) for damage in found]
    held_to = " and ".join([*(["checklist.chk"] if lists else []), *(["the checksums in them"] if torch_files else [])])
    return Checked(str(folder), len(paths), sum(path.stat().st_size for path in paths), held_to, tuple(damages))


def _md5(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def total_bytes(folder: Path) -> int:
    """How many bytes there are to read."""
    if room.is_room(folder):
        try:
            files: Mapping[str, Any] = room.read_manifest_only(folder)["files"]
        except reports.Problem:
            return 0
        return sum(int(record["size_bytes"]) for record in files.values())
    return sum(path.stat().st_size for path in folder.glob("*.*") if path.suffix in (".pth", ".bin"))


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object for each room")
    parser.add_argument("rooms", type=Path, nargs="*", metavar="ROOM")
    args = parser.parse_args()
    if not args.rooms:
        raise reports.rooms.nothing_made()
    checked: list[Checked] = []
    seen: dict[tuple[int, int], room.FileRecord] = {}
    for folder in args.rooms:
        if not folder.is_dir():
            raise reports.rooms.room_missing(folder)
    with room.progress(sum(map(total_bytes, args.rooms)), "fsck") as bar:
        for folder in args.rooms:
            checked.append(
                check_room(folder, bar.update, seen, args.rooms)
                if room.is_room(folder)
                else check_weights(folder, bar.update)
            )
            one = checked[-1]
            if args.json:
                print(json.dumps(asdict(one)), flush=True)
                continue
            says = f"{one.files} {'file' if one.files == 1 else 'files'}, {room.human_bytes(one.size_bytes)}"
            if not one.damages:
                room.say("fsck", f"{reports.shown(folder)}: {says}, checked against {one.held_to}: no damage")
            for damage in one.damages:
                part = f", {damage.part}" if damage.part else ""
                room.say(
                    "fsck",
                    f"{reports.shown(folder)}: DAMAGED {damage.file}{part}: expected {damage.expected}, found "
                    f"{damage.actual}",
                )
            for note in one.notes:
                room.say("fsck", f"{reports.shown(folder)}: {note}")
    damaged = [damage for one in checked for damage in one.damages]
    if damaged and not args.json:
        raise reports.rooms.damage_found(damaged[0].room, damaged[0].file, damaged[0].part, len(damaged))
    return 1 if damaged else 0


if __name__ == "__main__":
    reports.run(main)
