"""Reports about rooms and the disk."""

from __future__ import annotations

import errno
import os
import shlex
from pathlib import Path

from scripts.reports.problem import PathLike, Problem, make, shown


def disk_full(where: PathLike, reason: str | None = None) -> Problem:
    folder = next(path for path in [Path(where), *Path(where).absolute().parents] if path.is_dir())
    stat = os.statvfs(folder)
    free_bytes = stat.f_bavail * stat.f_frsize
    return Problem(
        "disk is full",
        where,
        f"Writing stopped: {reason or os.strerror(errno.ENOSPC)}. {free_bytes / 1e6:.1f} MB are free on the file "
        f"system that holds {shown(folder)}. Finished files are kept in the .partial folder. No half-written file "
        "has its final name.",
        "Free some space and type your make command again; it continues where it stopped. To see what takes the space:",
        f"df -h {shlex.quote(shown(folder))}; ulimit -f; du -sh build/*",
    )


def not_allowed(where: PathLike, reason: str | None) -> Problem:
    return Problem(
        "the system does not allow it",
        where,
        f"{shown(where)}: {reason or os.strerror(errno.EACCES)}. make writes rooms below build/ and only reads "
        "everything else.",
        "Check the owner and the permissions:",
        f"id -un; ls -ld {shlex.quote(shown(where))} {shlex.quote(shown(Path(where).parent))}",
    )


def room_missing(room: PathLike) -> Problem:
    name = Path(room).name
    return Problem(
        f"no {name}", room, f"The room {name} has no manifest.json, so it is not finished.", "Make it:", make(name)
    )


def room_damaged(room: PathLike, file: str, expected: str, actual: str) -> Problem:
    name = Path(room).name
    return Problem(
        f"{name} was changed after it was made",
        Path(room) / file,
        f"The manifest says that {file} has {expected}; it now has {actual}.",
        f"Make {name} again:",
        f"rm -r {shown(room)} && {make(name)}",
    )


def manifest_unreadable(room: PathLike, reason: str) -> Problem:
    name = Path(room).name
    return Problem(
        "manifest cannot be read",
        Path(room) / "manifest.json",
        f"manifest.json of {name} was changed: {reason}.",
        f"Make {name} again:",
        f"rm -r {shown(room)} && {make(name)}",
    )


def damage_found(room: PathLike, file: str, part: str, count: int) -> Problem:
    name, folder = Path(room).name, Path(room)
    more = f" {count} parts are damaged in total; each has a line above." if count > 1 else ""
    again = make("weights") if folder.parent.name == "weights" else make(name)
    return Problem(
        "not what was written",
        folder / file,
        f"{part or file} changed after {name} was made{f' (file {file})' if part else ''}.{more}",
        "It cannot be repaired. Make it again:",
        f"rm -r {shown(folder)} && {again}",
    )


def nothing_made() -> Problem:
    return Problem(
        "nothing to check yet",
        "build/",
        "No room exists for this model with these settings, and its weights have neither a manifest.json nor a .pth "
        "file.",
        "Make a room:",
        make("checkpoint"),
    )


def nothing_to_check(folder: PathLike) -> Problem:
    return Problem(
        "nothing to compare with",
        folder,
        f"{shown(folder)} has no manifest.json, no checklist.chk and no .pth file, so there are no checksums to "
        "compare with.",
        "Only weights from `make weights` have a manifest. Compare these files with their source yourself:",
        f"sha256sum {shown(folder)}/*",
    )
