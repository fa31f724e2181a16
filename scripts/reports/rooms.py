"""Reports about rooms and the disk."""

import errno
import os
import shlex
from pathlib import Path
from typing import Optional

from scripts.reports.problem import PathLike, Problem, make, shown


def disk_full(where: PathLike, reason: Optional[str] = None) -> Problem:
    folder = next(path for path in [Path(where), *Path(where).absolute().parents] if path.is_dir())
    stat = os.statvfs(folder)
    free_bytes = stat.f_bavail * stat.f_frsize
    return Problem(
        "disk is full",
        where,
        f"Writing stopped: {reason or os.strerror(errno.ENOSPC)}. {free_bytes / 1e6:.1f} MB are free on the file system that holds "
        f"{shown(folder)}. What was finished is kept in the .partial folder; nothing half-written carries a final name.",
        "Look at what takes the space and at your limits, make room, and type your make command again; it goes on where it stopped:",
        f"df -h {shlex.quote(shown(folder))}; ulimit -f; du -sh build/*",
    )


def not_allowed(where: PathLike, reason: Optional[str]) -> Problem:
    return Problem(
        "the system does not allow it",
        where,
        f"{shown(where)}: {reason or os.strerror(errno.EACCES)}. Rooms are written below build/; everything else is only read.",
        "Look at whose it is and what may be done with it:",
        f"id -un; ls -ld {shlex.quote(shown(where))} {shlex.quote(shown(Path(where).parent))}",
    )


def room_missing(room: PathLike) -> Problem:
    name = Path(room).name
    return Problem(
        f"no {name}", room, f"The room {name} has no manifest.json, so it was never finished.", "Make it:", make(name)
    )


def room_damaged(room: PathLike, file: str, expected: str, actual: str) -> Problem:
    name = Path(room).name
    return Problem(
        f"{name} was changed after it was made",
        Path(room) / file,
        f"Its manifest says that {file} has {expected}; now it has {actual}.",
        f"Make {name} again:",
        f"rm -r {shown(room)} && {make(name)}",
    )


def manifest_unreadable(room: PathLike, reason: str) -> Problem:
    name = Path(room).name
    return Problem(
        "manifest cannot be read",
        Path(room) / "manifest.json",
        f"manifest.json of {name} is not what we wrote: {reason}.",
        f"Make {name} again:",
        f"rm -r {shown(room)} && {make(name)}",
    )


def damage_found(room: PathLike, file: str, part: str, count: int) -> Problem:
    name, folder = Path(room).name, Path(room)
    more = f" In all, {count} things are damaged; each has a line above." if count > 1 else ""
    again = make("weights") if folder.parent.name == "weights" else make(name)
    return Problem(
        "not what was written",
        folder / file,
        f"{part or file} is not as it was when {name} was made{f' (it lies in {file})' if part else ''}.{more}",
        "Nothing can mend it; make it again:",
        f"rm -r {shown(folder)} && {again}",
    )


def nothing_made() -> Problem:
    return Problem(
        "nothing to check yet",
        "build/",
        "No room of this model is made with these settings, and its weights have neither a manifest.json nor a .pth.",
        "Make one:",
        make("checkpoint"),
    )


def nothing_to_check(folder: PathLike) -> Problem:
    return Problem(
        "nothing to compare with",
        folder,
        f"{shown(folder)} has no manifest.json, no checklist.chk and no .pth: nothing in it says what its bytes should be.",
        "Fetched weights have a manifest; these can be compared with their source:",
        f"sha256sum {shown(folder)}/*",
    )
