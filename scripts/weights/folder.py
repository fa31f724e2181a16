"""Which files of a model's folder may be read: plain files inside it. This module needs only the standard library."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from scripts import reports
from scripts.weights.files import READ

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def check_folder(folder: Path) -> None:
    """A Problem for a file of the model that is a pipe, a device or a link to something outside the folder.

    The folder's content ends up in rooms and images, and the folder may come from a stranger: a link could name any
    file of the user. A hub cache keeps its files in blobs/ beside snapshots/REVISION; then that is the folder.
    """
    if not folder.is_dir():
        return
    root = folder.resolve()
    inside = [root]
    for cache in root.parents[:2]:  # the snapshot itself, or a folder in it
        if cache.name == "snapshots":
            inside.append((cache.parent / "blobs").resolve())
    for path in sorted(folder.iterdir()):
        if READ.fullmatch(path.name):
            check_file(path, *inside)


def check_file(path: Path, *inside: Path) -> None:
    """A Problem unless the path is a plain file and, if it is a link, lies in one of the folders.
    A missing file is fine."""
    try:
        mode = path.stat().st_mode
    except OSError:
        if path.is_symlink():
            raise reports.weights.link_dangles(path, os.readlink(path)) from None
        return
    if not stat.S_ISREG(mode):
        raise reports.weights.not_a_plain_file(path, KINDS.get(stat.S_IFMT(mode), "not a plain file"))
    target = Path(os.path.realpath(path))
    if inside and not any(folder in target.parents for folder in inside):
        raise reports.weights.link_leaves(path, target)
