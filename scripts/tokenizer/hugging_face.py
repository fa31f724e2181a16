"""The tokenizer of a Hugging Face folder and its side files, as the room config keeps them.

A tokenizer.json and the files beside it go in as they are. A missing file is made from the others: a slow tokenizer has
no tokenizer.json, and some conversions leave no tokenizer_config.json. A report names what cannot be used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import reports
from scripts.tokenizer import ends, sentencepiece
from scripts.tokenizer.proof import check_json
from scripts.weights.folder import check_file

GENERATION, CONFIG, SPECIAL, ADDED = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Data that transformers reads beside the tokenizer. Never code.
COPIED = (GENERATION, CONFIG, SPECIAL, ADDED, "chat_template.jinja")
FILE_MAX_BYTES = 64 << 20
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
# Fields of a slow tokenizer's tokenizer_config.json that name its code or its files
OF_SLOW = ("use_fast", "auto_map", "legacy", "sp_model_kwargs", "tokenizer_file", "name_or_path", "add_prefix_space")


@dataclass(frozen=True)
class HfTokenizer:
    """path: the file that holds the vocabulary; files: name -> content; notes: what the user should know."""

    path: Path
    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path, config: Mapping[str, Any], vocab_size: int) -> HfTokenizer:
    """A folder's tokenizer for a model whose embedding has vocab_size rows; a Problem if the two do not fit.
    config: config.json."""
    files = {name: small_file(folder / name) for name in COPIED if (folder / name).is_file()}
    said: dict[str, dict[str, Any]] = {}
    for name in files:
        if name.endswith(".json"):
            check_json(folder / name, files[name])
            said[name] = json.loads(files[name].decode())
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        described, settings, left_out = _fast(path, said, vocab_size)
    else:
        path = sentencepiece.path_of(folder)
        if path.parent != folder:
            check_file(path, path.parent.resolve())
        described, settings, left_out = _slow(path, folder, said, vocab_size)
    changed = {SPECIAL: said.get(SPECIAL, {}), ADDED: said.get(ADDED, {})}
    if left_out:
        changed = {name: _without(values, set(left_out)) for name, values in changed.items()}
    ids = ids_of(described)
    own = ids.get(content(settings.get("eos_token")) or "")
    generation = said.get(GENERATION)
    named = [
        (folder / GENERATION, (generation or {}).get("eos_token_id")),
        (folder / "config.json", config.get("eos_token_id")),
    ]
    listed = ends.end_ids(named, [own], vocab_size)
    settings = _with_roles(settings, ids, config, generation or {}, listed, CONFIG in said)
    if (folder / "tokenizer.model").is_file():
        files["tokenizer.model"] = small_file(folder / "tokenizer.model")
    for name, values in {**changed, CONFIG: settings}.items():
        if values != said.get(name, {}):
            files[name] = json_bytes(values)
    if path.name == "tokenizer.model":
        files["tokenizer.model"] = path.read_bytes()
        files["tokenizer.json"] = json_bytes(described)
        files.setdefault(SPECIAL, json_bytes({name: settings[name] for name in ROLES if settings.get(name)}))
    else:
        files["tokenizer.json"] = (
            small_file(path) if not left_out else json.dumps(described, ensure_ascii=False).encode()
        )
    if set(ends.ids_of((generation or {}).get("eos_token_id"), "eos_token_id", folder / GENERATION)) != set(listed):
        kept = {name: value for name, value in (generation or {}).items() if name != "eos_token_id"}
        bos = config.get("bos_token_id")
        files[GENERATION] = json_bytes(ends.generation_config(kept, listed, bos if type(bos) is int else None))
    notes = [
        f"added token {token!r} ({token_id}) is plain text: the embedding has {vocab_size} rows"
        for token, token_id in left_out.items()
    ]
    return HfTokenizer(path, files, tuple(note[:200] for note in notes[:3]))


def content(token: object) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with `content`."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def ids_of(described: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of a tokenizer.json."""
    vocab = described["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {str(entry[0]): n for n, entry in enumerate(vocab)}
    return {**ids, **{token["content"]: token["id"] for token in described.get("added_tokens") or []}}


def json_bytes(value: object) -> bytes:
    """A JSON file as upstream writes its configs: indent 4, no newline at the end."""
    return json.dumps(value, indent=4, ensure_ascii=False).encode()


def small_file(path: Path) -> bytes:
    """The content of a file that is not weights; a Problem if it is too large to be one."""
    with path.open("rb") as file:
        data = file.read(FILE_MAX_BYTES + 1)
    if len(data) > FILE_MAX_BYTES:
        raise reports.weights.weights_unreadable(path, f"it has more than {FILE_MAX_BYTES} bytes")
    return data


# The result for both kinds: the content of tokenizer.json and of tokenizer_config.json, and the added tokens that the
# embedding has no row for.
Made = tuple[dict[str, Any], dict[str, Any], dict[str, int]]


def _fast(path: Path, said: Mapping[str, Mapping[str, Any]], vocab_size: int) -> Made:
    data = small_file(path)
    check_json(path, data)
    described = json.loads(data.decode())
    model = described.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, (dict, list)):
        raise reports.weights.tokenizer_unreadable(path, "it has no model with a vocabulary")
    kind = model.get("type") or "BPE"
    if kind in (
        "WordPiece",
        "WordLevel",
    ):  # their texts are put together from words, by rules that the server does not have
        raise reports.weights.tokenizer_unfit(path, f"Its tokenizer is of the kind {kind}, not BPE or Unigram")
    numbers = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    if any(type(number) is not int for number in numbers) or not all(
        map(_is_entry, vocab if isinstance(vocab, list) else ())
    ):
        raise reports.weights.tokenizer_unreadable(path, "its vocabulary is not one of tokens and ids")
    size = max(len(vocab), 1 + max(numbers, default=-1))
    if size > vocab_size:  # fewer is usual: embeddings are often padded
        raise reports.weights.vocabulary_differs(path, size, vocab_size)
    added = described.get("added_tokens") or []
    for token in added if isinstance(added, list) else [None]:
        if not (isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str)):
            raise reports.weights.tokenizer_unreadable(path, "one of its added tokens has no id or no content")
    left_out = {token["content"]: token["id"] for token in added if token["id"] >= vocab_size}
    settings = dict(said.get(CONFIG, {}))
    settings.update(
        {name: value for name, value in said.get(SPECIAL, {}).items() if name in ROLES and name not in settings}
    )
    if left_out:
        _refuse_needed(path, left_out, vocab_size, settings, described.get("post_processor"))
        described["added_tokens"] = [token for token in added if token["content"] not in left_out]
        settings = _without(settings, set(left_out))
    return described, settings, left_out


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and bool(entry)


def _slow(path: Path, folder: Path, said: Mapping[str, Mapping[str, Any]], vocab_size: int) -> Made:
    """A SentencePiece model with the additions of the files beside it, as transformers does it."""
    pieces = sentencepiece.read_tokenizer_model(path)
    if pieces.vocab_size > vocab_size:
        raise reports.weights.vocabulary_differs(path, pieces.vocab_size, vocab_size)
    if CONFIG not in said and SPECIAL not in said and ADDED not in said:
        return sentencepiece.tokenizer_json(pieces), sentencepiece.tokenizer_config(pieces), {}
    own = said.get(CONFIG, {})
    roles = {
        name: value for name, value in {**said.get(SPECIAL, {}), **own}.items() if name in ROLES and content(value)
    }
    added = _added(folder, said, {content(value) or "" for value in roles.values()})
    left_out = {str(token["content"]): token_id for token_id, token in added.items() if token_id >= vocab_size}
    added = {token_id: token for token_id, token in added.items() if token_id < vocab_size}
    _refuse_needed(folder / CONFIG, left_out, vocab_size, roles, None)
    for token_id, token in added.items():
        if token_id < pieces.vocab_size and pieces.pieces[token_id].text != token["content"]:
            piece = f"{path.name} calls this id {pieces.pieces[token_id].text!r}"
            raise reports.weights.added_token_unfit(folder / CONFIG, token["content"], token_id, piece)
    ids = {piece.text: token_id for token_id, piece in enumerate(pieces.pieces)}
    ids.update({str(token["content"]): token_id for token_id, token in added.items()})

    def of_role(name: str, default: int) -> int:
        return ids.get(content(roles.get(name)) or "", default)

    begin = of_role("bos_token", pieces.bos_id) if own.get("add_bos_token", True) else None
    end = of_role("eos_token", pieces.eos_id) if own.get("add_eos_token", False) else None
    # Without added tokens a text is one stretch, and transformers' old rule (`legacy`) and its new one are the same.
    has_own = bool(added.keys() - {pieces.unk_id, pieces.bos_id, pieces.eos_id}) or any(
        piece.type == sentencepiece.USER_DEFINED for piece in pieces.pieces
    )
    spaces = ("always" if own.get("legacy") else "first") if has_own else None
    described = sentencepiece.tokenizer_json(pieces, added, (begin, end), spaces)
    if sorted(added.keys() - set(range(pieces.vocab_size))) != list(
        range(pieces.vocab_size, max([*added, pieces.vocab_size - 1]) + 1)
    ):
        # the library itself numbers tokens that are in no vocabulary, without gaps
        described["model"]["vocab"].update({str(token["content"]): token_id for token_id, token in added.items()})
    kept = {name: value for name, value in own.items() if name not in OF_SLOW}
    settings = {**sentencepiece.tokenizer_config(pieces), **roles, **kept, "tokenizer_class": "PreTrainedTokenizerFast"}
    return described, _without(settings, set(left_out)), left_out


def _added(folder: Path, said: Mapping[str, Mapping[str, Any]], special: set[str]) -> dict[int, Mapping[str, Any]]:
    """Added tokens by id: tokenizer_config.json's added_tokens_decoder, then what only added_tokens.json has."""
    for values in (said.get(CONFIG, {}), said.get(SPECIAL, {})):
        for name in LISTS:
            listed = values.get(name) or []
            special |= {content(token) or "" for token in (listed.values() if isinstance(listed, dict) else listed)}
    decoder = said.get(CONFIG, {}).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise reports.weights.weights_unreadable(folder / CONFIG, "its added_tokens_decoder is not an object")
    added: dict[int, Mapping[str, Any]] = {}
    for number, token in decoder.items():
        if not (number.isascii() and number.isdigit() and isinstance(token, dict) and content(token)):
            raise reports.weights.weights_unreadable(
                folder / CONFIG, f"its added_tokens_decoder has {number!r}, which is not an id with a content"
            )
        added[int(number)] = token
    spelt = {content(token) for token in added.values()}
    for token, token_id in said.get(ADDED, {}).items():
        if type(token_id) is not int or not token or token_id < 0:
            raise reports.weights.weights_unreadable(folder / ADDED, f"the id of {token!r} is {token_id!r}")
        if token not in spelt and token_id not in added:
            added[token_id] = {"content": token, "special": token in special}
    return added


def _refuse_needed(
    path: Path, left_out: Mapping[str, int], vocab_size: int, settings: Mapping[str, Any], post_processor: Any
) -> None:
    """A Problem if a text begins or ends with a token that the embedding has no row for."""
    needed = {content(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token")}
    used = json.dumps(post_processor)
    for token, token_id in left_out.items():
        if token in needed or json.dumps(token) in used:
            raise reports.weights.added_token_unfit(
                path, token, token_id, f"the model's embedding has {vocab_size} rows"
            )


def _without(values: Mapping[str, Any], tokens: set[str]) -> dict[str, Any]:
    """A side file without certain tokens, wherever it names them."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in tokens or (name.endswith("_token") and content(value) in tokens):
            continue
        if isinstance(value, list):
            value = [token for token in value if content(token) not in tokens]
        elif name in ("added_tokens_decoder", *LISTS) and isinstance(value, dict):
            value = {key: token for key, token in value.items() if content(token) not in tokens}
        kept[name] = value
    return kept


def _with_roles(
    settings: Mapping[str, Any],
    ids: Mapping[str, int],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    listed: list[int],
    given: bool,
) -> dict[str, Any]:
    """tokenizer_config.json; if the folder has none, it gets the ids that the other files name as begin and end."""
    if given or "tokenizer_class" in settings:
        return dict(settings)
    texts = {token_id: token for token, token_id in ids.items()}
    bos = next(
        (number for number in (generation.get("bos_token_id"), config.get("bos_token_id")) if type(number) is int), None
    )
    named = {"bos_token": texts.get(-1 if bos is None else bos), "eos_token": texts.get(listed[0]) if listed else None}
    return {
        **{name: token for name, token in named.items() if token is not None},
        **settings,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
