"""Every foreseen failure, in the words the user will read: one function per failure, returning a Problem to raise."""

import errno
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Callable, NoReturn, Optional, Sequence, Union

PathLike = Union[str, Path]
WIDTH = 100


class Problem(Exception):
    """A foreseen failure. It is shown as a report that ends in a command, never as a traceback; the exit status is 1.

    title: in a few words; where: the file or folder concerned; seen: what was found, both values; advice: the sentence that
    introduces the command; command: what the user types next.
    """

    def __init__(self, title: str, where: PathLike, seen: str, advice: str, command: str) -> None:
        super().__init__(title)
        self.title, self.where, self.seen, self.advice, self.command = title, str(where), seen, advice, command

    def report(self) -> str:
        """The report as text, WIDTH columns, the command on the last line."""
        head = f"-- {self.title.upper()} "
        tail = f" {shown(self.where)}"
        rule = "-" * max(3, WIDTH - len(head) - len(tail))
        paragraphs = [p if p.startswith("    ") else textwrap.fill(p, WIDTH) for p in self.seen.split("\n\n")]
        return "\n\n".join([head + rule + tail, *paragraphs, self.advice, textwrap.indent(self.command, "    ")])

    def as_json(self) -> str:
        """The same report for scripts, one line of JSON."""
        return json.dumps({key: getattr(self, key) for key in ("title", "where", "seen", "advice", "command")})


class Finished(Exception):
    """Nothing is left to do: what was asked is already there. Not a failure."""


def shown(path: PathLike) -> str:
    """A path as the user knows it: relative to where make runs when it lies below."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def make(target: str, **changed: object) -> str:
    """The make command that the user would type for `target`: their own settings (BAKE_SETTINGS, from the Makefile) and `changed`."""
    settings = dict(pair.split("=", 1) for pair in os.environ.get("BAKE_SETTINGS", "").split() if "=" in pair)
    settings.update({name: str(value) for name, value in changed.items()})
    return " ".join(["make", target, *(f"{name}={value}" for name, value in settings.items())])


def run(main: Callable[[], Optional[int]]) -> NoReturn:
    """Run a script's `main`: a Problem becomes a report on stderr and status 1; a traceback means our bug."""
    as_json = "--json" in sys.argv
    try:
        sys.exit(main() or 0)
    except Problem as problem:
        print(problem.as_json() if as_json else f"\n{problem.report()}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except Finished as finished:
        print(finished, flush=True)
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"\n{disk_full(error.filename or Path.cwd()).report()}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


# --- rooms -----------------------------------------------------------------------------------------------------------


def disk_full(where: PathLike) -> Problem:
    folder = Path(where) if Path(where).is_dir() else Path(where).parent
    folder = folder if folder.is_dir() else Path.cwd()
    stat = os.statvfs(folder)
    free_bytes = stat.f_bavail * stat.f_frsize
    return Problem(
        "disk is full", where,
        f"Writing stopped: {free_bytes / 1e6:.1f} MB are free on the file system that holds {shown(folder)}. "
        "What was finished is kept in the .partial folder; nothing half-written carries a final name.",
        "Look at what takes the space, make room, and type your make command again; it goes on where it stopped:",
        f"df -h {folder} && du -sh build/*",
    )


def room_missing(room: PathLike) -> Problem:
    name = Path(room).name
    return Problem(
        f"no {name}", room, f"The room {name} has no manifest.json, so it was never finished.", "Make it:", make(name)
    )


def room_damaged(room: PathLike, file: str, expected: str, actual: str) -> Problem:
    name = Path(room).name
    return Problem(
        f"{name} was changed after it was made", Path(room) / file,
        f"Its manifest says that {file} has {expected}; now it has {actual}.",
        f"Make {name} again:",
        f"rm -r {shown(room)} && {make(name)}",
    )


def manifest_unreadable(room: PathLike, reason: str) -> Problem:
    name = Path(room).name
    return Problem(
        "manifest cannot be read", Path(room) / "manifest.json", f"manifest.json of {name} is not what we wrote: {reason}.",
        f"Make {name} again:", f"rm -r {shown(room)} && {make(name)}",
    )


# --- settings --------------------------------------------------------------------------------------------------------


def bad_setting(name: str, value: object, allowed: str, command: Sequence[str] = ()) -> Problem:
    return Problem(
        f"{name} cannot be {value}", "Makefile", f"{name} is {value!r}; it must be {allowed}.", "For instance:",
        " ".join(command) if command else make("help"),
    )
