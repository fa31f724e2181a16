"""What make sees of a folder of weights: its path, and the names, sizes and times of its files,
which stand for the content.

python3 -m scripts.making.seen FOLDER
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from scripts.weights import files


def seen(folder: str) -> str:
    """'models/stories ./params.json 85 1700000000.0000000000 ...': files of the folder itself,
    and Meta's tokenizer one level up."""
    place = os.path.realpath(folder)
    here = os.getcwd()
    inside = place == here or place.startswith(here + "/")
    lines = []
    if os.path.isdir(folder):
        found = [(f"./{path.name}", path) for path in Path(place).iterdir() if not path.name.startswith(".")]
        found.append((f"../{files.TOKENIZER}", files.tokenizers_of(Path(place))[1]))
        for name, path in found:
            if path.is_file():
                stat = path.stat()
                seconds, nanoseconds = divmod(stat.st_mtime_ns, 10**9)
                lines.append(f"{plain(name)} {stat.st_size} {seconds}.{nanoseconds:09d}0")
    return " ".join([plain(os.path.relpath(place, here) if inside else place), *sorted(lines)])


def plain(name: str) -> str:
    """A file's name without characters that make or a shell would interpret."""
    return re.sub(rb"[^A-Za-z0-9._/+=,:-]", lambda match: b"%%%02X" % match[0][0], os.fsencode(name)).decode()


if __name__ == "__main__":
    print(seen(sys.argv[1]))
