"""Reports about weights and tokenizers in any form."""

from __future__ import annotations

import os
import shlex
from datetime import datetime
from pathlib import Path
from typing import Sequence

from scripts.reports.problem import Outdated, PathLike, Problem, make, shown, some


def look(path: PathLike) -> str:
    """The command to show when the content at `path` is wrong. It depends on the folder: a room is made again, a
    download of Meta's is compared with its checklist, any other folder is listed."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "manifest.json").is_file() and (folder / "args").is_file():
        return f"rm -r {shown(folder)} && {make(folder.name)}"
    if (folder / "checklist.chk").is_file():
        return f"cd {shown(folder)} && md5sum -c checklist.chk"
    return f"ls -l {shown(folder)}"


def chat_template_unfit(path: PathLike, reason: str) -> Problem:
    return Problem(
        "not a chat template",
        path,
        f"CHAT_TEMPLATE is {shown(path)}: {reason}.",
        "See an example of a template, or leave CHAT_TEMPLATE unset to use the model's own:",
        "cat models/llama-2.jinja",
    )


def tokenizer_unreadable(path: PathLike, reason: str) -> Problem:
    return Problem(
        "tokenizer cannot be read",
        path,
        f"{Path(path).name} cannot be read: {reason}.",
        "Fetch it again from the source of the weights. The file as it is now:",
        f"ls -l {shown(path)}",
    )


def tokenizer_unfit(path: PathLike, seen: str) -> Problem:
    return Problem(
        "tokenizer is not of llama 2's kind",
        path,
        f"{seen}. Supported: a SentencePiece BPE model with byte fallback, like Llama 2's.",
        "If the model also exists as a Hugging Face folder with a tokenizer.json, use that:",
        make("hf", MODEL="/path/to/folder"),
    )


def weights_unknown_form(folder: PathLike, found: Sequence[str], goal: str = "hf") -> Problem:
    return Problem(
        "no model in this folder",
        folder,
        "A model in Meta's form has params.json and consolidated.NN.pth, one in Hugging Face's form has config.json "
        f"and .safetensors or .bin, one in GGUF form has a .gguf file. Here is: {some(found, 12)}.",
        "Give the folder of the model:",
        make(goal, MODEL="/path/to/folder"),
    )


def weights_two_forms(folder: PathLike, one: str, ours: Sequence[str], other: str, theirs: Sequence[str]) -> Problem:
    forms = {"meta": "Meta's form", "hf": "Hugging Face's form", "gguf": "GGUF"}
    return Problem(
        "two models in one folder",
        folder,
        f"The folder has {forms[one]} ({some(ours)}) and {forms[other]} ({some(theirs)}), so make cannot tell which "
        "one you mean.",
        "Move one of them to its own folder, for instance:",
        f"cd {shown(folder)} && mkdir {other} && mv {' '.join(theirs)} {other}/",
    )


def weights_file_missing(folder: PathLike, name: str, found: Sequence[str]) -> Problem:
    return Problem(
        f"no {name}",
        folder,
        f"{name} is missing. Here is: {some(found, 12)}.",
        "Fetch it from the source of the other files, and check again:",
        look(folder),
    )


def weights_extra_file(folder: PathLike, extra: Sequence[str], expected: str) -> Problem:
    return Problem(
        "one file too many",
        folder,
        f"{some(extra)} does not belong to a model whose weights are named {expected}, so make cannot tell whether "
        "to read it.",
        "Move it away:",
        f"cd {shown(folder)} && mkdir -p ../extra && mv {' '.join(extra)} ../extra/",
    )


def several_ggufs(folder: PathLike, names: Sequence[str]) -> Problem:
    chosen = shown(Path(folder).parent / Path(names[0]).stem)
    return Problem(
        "several models in one folder",
        folder,
        f"Here are {some(names)}. They are not the parts of one model (parts end in -00001-of-00002.gguf and so on), "
        "so nothing says which one is meant.",
        "Make a folder that has only the one you mean, for instance:",
        f"mkdir {shlex.quote(chosen)} && ln {shlex.quote(shown(Path(folder) / names[0]))} {shlex.quote(chosen)}/",
    )


def weights_unreadable(path: PathLike, reason: str) -> Problem:
    return Problem(
        f"{Path(path).name} cannot be read",
        path,
        f"{Path(path).name} cannot be read: {reason}.",
        "Fetch it again, and compare its size with the source's:",
        look(path),
    )


def not_a_plain_file(path: PathLike, kind: str) -> Problem:
    return Problem(
        f"{Path(path).name} is {kind}",
        path,
        f"{Path(path).name} is {kind}; a model's files are plain files.",
        "See what is there, and fetch the file again:",
        look(path),
    )


def link_leaves(path: PathLike, target: PathLike) -> Problem:
    folder = shown(Path(path).parent)
    return Problem(
        "a link leaves the model's folder",
        path,
        f"{Path(path).name} is a link to {target}, which is not in the folder. The content of a model's folder goes "
        "into rooms and images, so its links may only lead to files inside it. The only exception: "
        "links of a hub cache may lead to the cache's own blobs.",
        "If that file belongs to the model, make a folder that holds the files themselves:",
        f"cp -rL {shlex.quote(folder)} {shlex.quote(folder.rstrip('/') + '-copy')}",
    )


def link_dangles(path: PathLike, target: PathLike) -> Problem:
    return Problem(
        "a link leads nowhere",
        path,
        f"{Path(path).name} is a link to {target}, which is not there. If this is a hub cache, a download was "
        "interrupted.",
        "Fetch the file again, or remove the link if the model has no such file:",
        f"ls -l {shlex.quote(shown(path))}",
    )


def reading_unbounded(path: PathLike, what: str) -> Problem:
    return Problem(
        "this model cannot be read",
        path,
        f"make stopped reading {shown(path)}: {what}. No good model needs so much.",
        "Look at what is there now, then fetch it again from where it came from:",
        f"ls -l {shlex.quote(shown(path))}",
    )


def unopened(path: PathLike, said: str) -> Problem:
    return Problem(
        "the server could not open this file",
        path,
        said,
        "Look at what is there now, then fetch it again from where the weights came from:",
        f"ls -l {shlex.quote(shown(path))}",
    )


def template_unbounded(path: PathLike) -> Problem:
    return Problem(
        "the chat template takes too long",
        path,
        f"The chat template in {Path(path).name} takes seconds, or gigabytes of memory, for a conversation of one "
        "word. Every chat request would take as long.",
        "Fix the template, or take it out of that file and name another template with CHAT_TEMPLATE. To look at it:",
        f"less {shlex.quote(shown(path))}",
    )


def added_token_unfit(path: PathLike, token: str, token_id: int, reason: str) -> Problem:
    return Problem(
        "an impossible added token",
        path,
        f"{Path(path).name} has the added token {token!r} with the id {token_id}: {reason}.",
        "These files do not belong together. Compare them with the source's:",
        look(path),
    )


def tensor_damaged(path: PathLike, tensor: str, expected: str, actual: str) -> Problem:
    return Problem(
        "weights are damaged",
        path,
        f"The bytes of {tensor} changed after they were saved: the file says CRC-32 {expected}, its bytes have "
        f"{actual}.",
        "Fetch the file again. (Meta's download has checklist.chk, which finds every damaged file.) Then check:",
        look(path),
    )


def weights_changed(path: PathLike, before: os.stat_result, now: os.stat_result | None, room: str) -> Problem:
    def described(stat: os.stat_result) -> str:
        written = datetime.fromtimestamp(stat.st_mtime).isoformat(" ", "milliseconds")
        return f"{stat.st_size} bytes, written at {written} (inode {stat.st_ino})"

    return Outdated(
        "weights changed while they were read",
        path,
        f"{Path(path).name} had {described(before)}; now it {'has ' + described(now) if now else 'is gone'}. The "
        f"bytes that were read may come from both versions, so the room {room} was not made.",
        "When no program writes there any more:",
        make(room),
    )


def shards_missing(folder: PathLike, found: int, expected: int) -> Problem:
    return Problem(
        "weight files are missing",
        folder,
        f"The sizes of the tensors show that the weights were split into {expected} files, consolidated.00.pth to "
        f"consolidated.{expected - 1:02d}.pth; this folder has {found} of them.",
        "Fetch the others, and check again:",
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
        f"{says} requires {expected} tensors; {found} are here. Missing: {some(missing, 3)}. Unknown: "
        f"{some(unknown, 3)}.",
        "These files do not belong together. Compare them with the source's:",
        look(path),
    )


def vocabulary_differs(path: PathLike, tokenizer_size: int, model_size: int) -> Problem:
    return Problem(
        "tokenizer of another model",
        path,
        f"{Path(path).name} has {tokenizer_size} tokens, the model has {model_size}.",
        "Put the model's own tokenizer there. The folder as it is now:",
        look(path),
    )


def model_unfit(path: PathLike, seen: str, allowed: str) -> Problem:
    return Problem(
        "not a model that can be converted",
        path,
        f"{seen}. Supported: {allowed}.",
        "Choose another model:",
        make("hf", MODEL="/path/to/folder"),
    )


def checksum_differs(path: PathLike, expected: str, actual: str) -> Problem:
    return Problem(
        f"{Path(path).name} is damaged",
        path,
        f"The checklist.chk that came with the weights lists the md5 {expected}. The file's md5 is {actual}.",
        "Fetch the file again, and compare all of them:",
        f"cd {shlex.quote(shown(Path(path).parent))} && md5sum -c checklist.chk",
    )
