"""Every foreseen failure, in the words the user will read: one function per failure, returning a Problem to raise."""

import errno
import json
import os
import shlex
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
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "scripts":
            raise
        print(f"\n{package_missing(error.name).report()}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def package_missing(module: str) -> Problem:
    locks = "-r requirements/run.txt -r requirements/torch.txt"
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks the module {module}; the journey needs what requirements/run.txt and torch.txt pin.",
        "Install them there, or leave PYTHON unset so that make installs them into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes {locks}",
    )


# --- rooms -----------------------------------------------------------------------------------------------------------


def disk_full(where: PathLike) -> Problem:
    folder = Path(where) if Path(where).is_dir() else Path(where).parent
    folder = folder if folder.is_dir() else Path.cwd()
    stat = os.statvfs(folder)
    free_bytes = stat.f_bavail * stat.f_frsize
    return Problem(
        "disk is full",
        where,
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


# --- settings --------------------------------------------------------------------------------------------------------


def bad_setting(name: str, value: object, allowed: str, command: str) -> Problem:
    return Problem(
        f"{name} cannot be {value}",
        "Makefile",
        f"{name} is {str(value)!r}; it must be {allowed}.",
        "For instance:",
        command,
    )


def path_not_for_make(name: str, value: str, characters: Sequence[str]) -> Problem:
    listed = " ".join(repr(character) for character in characters)
    return Problem(
        f"{name} is a path that make cannot take",
        value,
        f"The path holds {listed}; a makefile gives such characters another meaning. Paths with spaces, quotes or any of "
        "$ # % : ; cannot be used.",
        "Make a link with a plain name and use that:",
        f"ln -s {shlex.quote(value)} /tmp/llama && make serve {name}=/tmp/llama",
    )


def no_such_model(model: str, presets: Sequence[str]) -> Problem:
    return Problem(
        f"no model named {model}",
        "models/",
        f"MODEL is {model!r}; the presets are: {', '.join(presets)}.\n\n"
        "A folder with weights is named with a slash in it, so that it is not taken for a preset.",
        "For instance:",
        f"make serve MODEL={presets[0]}    # or MODEL=./{model}",
    )


def no_contract_table(trtllm_version: str, kind: str, path: PathLike) -> Problem:
    return Problem(
        f"no {kind} table for TensorRT-LLM {trtllm_version}",
        path,
        f"TOOLCHAIN is {trtllm_version}, but the table {shown(path)} is not there, so what that version takes is not known.",
        "Use a version whose tables are complete:",
        make("serve", TOOLCHAIN="0.8.0"),
    )


# --- engines and model_repo ------------------------------------------------------------------------------------------


def not_a_number(name: str, value: str) -> Problem:
    return bad_setting(name, value, "a whole number of at least 1", make("serve", **{name: 8}))


def limits_do_not_fit(name: str, value: int, other: str, limit: int, mended: int) -> Problem:
    return Problem(
        f"{name} is too large",
        "Makefile",
        f"{name} is {value}; {other} is {limit}, and it cannot be more than that allows.",
        "Lower it:",
        make("serve", **{name: mended}),
    )


def engine_kind_missing(kind: str) -> Problem:
    return Problem(
        f"ENGINE={kind} is not ready",
        "scripts/build_engines.py",
        f"ENGINE is {kind}; this release builds and serves ENGINE=torch only.",
        "Use the torch engine:",
        make("serve", ENGINE="torch"),
    )


def holes_do_not_match(template: PathLike, unfilled: Sequence[str], unused: Sequence[str]) -> Problem:
    return Problem(
        "template and values do not match",
        template,
        f"Holes without a value: {', '.join(unfilled) or 'none'}. Values without a hole: {', '.join(unused) or 'none'}.",
        "Mend the template or scripts/build_model_repo.py, then:",
        make("model_repo"),
    )


def config_not_accepted(config: PathLike, reason: str) -> Problem:
    return Problem(
        "Triton would not take this config",
        config,
        f"The filled file does not pass: {reason}",
        "Mend the template it was filled from, then:",
        make("model_repo"),
    )
