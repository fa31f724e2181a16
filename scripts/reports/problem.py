"""What a report is, how it is shown, and how a script ends with one."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import sys
import textwrap
from pathlib import Path
from typing import Callable, Iterable, NoReturn, Sequence, Union

PathLike = Union[str, Path]
WIDTH = 100
# the targets that take ASSUME_GPU
PLANNING = ("plan", "doctor")
# The targets from weights to a server or an image. A user who typed one of them gets a corrected command with the same
# target.
JOURNEY = ("config", "hf", "checkpoint", "engines", "verified", "model_repo", "serve", "demo", "image")
# How many characters of a word, and of a whole report, are shown. A path has up to 4,096, and a command may hold
# several paths.
WORD_MAX, TEXT_MAX = 300, 8_000
COMMAND_WORD_MAX = 5_000


class Problem(Exception):
    """A foreseen failure. It is shown as a report that ends in a command, never as a traceback; the exit status is 1.

    title: in a few words; where: the file or folder concerned; seen: what was found, and what was
    expected; advice: the sentence that introduces the command; command: what the user types next.
    """

    def __init__(self, title: str, where: PathLike, seen: str, advice: str, command: str) -> None:
        super().__init__(title)
        self.title, self.where, self.seen, self.advice, self.command = title, str(where), seen, advice, command

    def report(self) -> str:
        """The report as text, WIDTH columns, the command on the last line."""
        head = f"-- {plain(self.title).upper()} "
        tail = f" {plain(shown(self.where), COMMAND_WORD_MAX)}"
        rule = "-" * max(3, WIDTH - len(head) - len(tail))
        paragraphs = [p if p.startswith("    ") else textwrap.fill(p, WIDTH) for p in plain(self.seen).split("\n\n")]
        command = textwrap.indent(plain(self.command, COMMAND_WORD_MAX), "    ")
        return "\n\n".join([head + rule + tail, *paragraphs, plain(self.advice), command])

    def as_json(self) -> str:
        """The same report for scripts, one line of JSON."""
        texts = {key: plain(getattr(self, key)) for key in ("title", "seen", "advice")}
        places = {key: plain(getattr(self, key), COMMAND_WORD_MAX) for key in ("where", "command")}
        return json.dumps({**texts, **places})


class Reported(Problem):
    """A report that another of our programs has printed; it ends in a command too."""

    def __init__(self, report: str) -> None:
        title = next((line.strip("- ") for line in report.splitlines() if line.startswith("-- ")), "see below")
        super().__init__(title, "", report, "", "")

    def report(self) -> str:
        return self.seen.strip()


class Outdated(Problem):
    """A Problem that also removes the room's partial files, because the next try must not use them."""


class NotYet(Problem):
    """A Problem for the plan alone: a room that is not made yet will know what is missing. The journey goes on."""


class Finished(Exception):
    """Nothing is left to do: what the user wants is already there. Not a failure."""


def plain(text: str, word_max: int = WORD_MAX) -> str:
    """Makes a text safe to show on a terminal, and short enough for one screen. The text may hold a stranger's words:
    names in files, answers of servers.

    Control characters and marks of writing direction are written as escapes, so that the terminal does not act on
    them. Words longer than word_max and texts longer than TEXT_MAX are cut.
    """
    short = re.sub(
        rf"\S{{{word_max + 1},}}", lambda word: f"{word[0][: word_max // 2]}... ({len(word[0]):,} characters)", text
    )
    short = short if len(short) <= TEXT_MAX else f"{short[:TEXT_MAX]}... ({len(short):,} characters)"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "replace").decode() for c in short)


def shown(path: PathLike) -> str:
    """A path as the user knows it: relative to the folder where make runs, if it lies below."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def make(target: str, **changed: object) -> str:
    """The make command that the user would type for `target`: their own settings (BAKE_SETTINGS, from the Makefile) and
    `changed`.

    If `changed` is given, the result is the command that the user typed, corrected. If `target` and the target that the
    user typed (BAKE_GOAL) are both in JOURNEY, the command keeps the typed one. A setting whose new value is None is
    left out.

    Inside an image there is no make. If environment variables can correct the failure, the command is `docker run`
    with them; otherwise it is `make image`.
    """
    if baked := os.environ.get("BAKED_IMAGE"):
        variables = "".join(f"--env {name}={value} " for name, value in changed.items() if value is not None)
        if target in ("serve", "doctor") and set(changed) <= {
            "HOST",
            "HTTP_PORT",
            "GRPC_PORT",
            "METRICS_PORT",
            "OPENAI_PORT",
        }:
            return f"docker run {variables}{baked}{' doctor' if target == 'doctor' else ''}"
        target = "image"
    typed = os.environ.get("BAKE_GOAL", "")
    if changed and target in JOURNEY and typed in JOURNEY:
        target = typed
    settings = dict(
        line.strip().split("=", 1) for line in os.environ.get("BAKE_SETTINGS", "").splitlines() if "=" in line
    )
    settings.update({name: str(value) for name, value in changed.items() if value is not None})
    # make refuses to build or serve for GPUs that are only assumed
    left_out = {name for name, value in changed.items() if value is None}
    left_out |= set() if target in PLANNING else {"ASSUME_GPU"}
    settings = {name: value for name, value in settings.items() if name not in left_out}
    return " ".join(
        ["make", target, *(f"{name}={shlex.quote(value) if value else ''}" for name, value in settings.items())]
    )


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main`: a Problem becomes a report on stderr and status 1; a traceback means our bug."""
    from scripts.reports import packages, rooms  # they build on this module

    as_json = "--json" in sys.argv
    try:
        sys.exit(main() or 0)
    except Problem as problem:
        print(problem.as_json() if as_json else f"\n{problem.report()}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except Finished as finished:
        print(finished, flush=True)
        sys.exit(0)
    except BrokenPipeError:  # the reader of our output has gone (make hf | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = error.filename or Path.cwd()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            report = rooms.disk_full(where, error.strerror).report()
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            report = rooms.not_allowed(where, error.strerror).report()
        else:
            raise
        print(f"\n{report}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "scripts":
            raise
        print(f"\n{packages.package_missing(error.name).report()}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def some(names: Sequence[str], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def indented(lines: Iterable[str]) -> str:
    """Lines of a log or a program as a paragraph of a report, each cut to 300 characters."""
    return "\n".join(f"    {line[:300]}" for line in lines) or "    (it wrote nothing)"
