"""A slow tokenizer's folder keeps its template, its end and its added tokens,
and encodes texts as transformers does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from project import ROOT
from synthetic import tokenizer_model
from tokenizers import Tokenizer

from scripts import reports
from scripts.tokenizer import hugging_face

sys.path.insert(0, str(ROOT / "model_repo_template/tensorrt_llm_bls/1"))

from text import Text  # noqa: E402

SIZE = 312
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
BASE: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
DECODER = {
    "312": {"content": "<|im_start|>", "special": True, **FLAGS},
    "313": {"content": "<|im_end|>", "special": True, **FLAGS},
    "314": {"content": "<tool>", "special": False, **FLAGS},
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TEXTS = ["hello world", "the quick <tool>brown", "<tool>", "a<tool>hello", "안녕 <usr>hello <ctl>", "hello<usr><usr>x"]
TEXTS += ["thethe the"]
# What transformers makes of a folder, in its own process:
# its protobuf files are of a later version than the one that Triton needs
THEIRS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([tokenizer(text, add_special_tokens=False).input_ids for text in json.loads(sys.argv[2])]))
"""


def write_slow(folder: Path, model: bytes, config: Any = BASE, **files: Any) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    for name, value in {"tokenizer_config.json": config, **files}.items():
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def made(folder: Path, vocab_size: int = 320, **config: Any) -> dict[str, bytes]:
    return dict(hugging_face.read_tokenizer(folder, config, vocab_size).files)


def ids_of(files: dict[str, bytes], texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def theirs(folder: Path, texts: list[str]) -> list[list[int]]:
    environment = {**os.environ, "TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK": "true"}
    command = [sys.executable, "-c", THEIRS, str(folder), json.dumps(texts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def user_defined() -> bytes:
    return tokenizer_model(SIZE, user_defined_symbols="<usr>,the", control_symbols="<ctl>")


CASES = {
    "added tokens": (tokenizer_model(SIZE), {**BASE, "added_tokens_decoder": DECODER}, {}),
    "added tokens, legacy": (tokenizer_model(SIZE), {**BASE, "added_tokens_decoder": DECODER, "legacy": True}, {}),
    "added_tokens.json": (tokenizer_model(SIZE), BASE, {"added_tokens.json": {"<tool>": 312}}),
    "user-defined pieces": (user_defined(), BASE, {}),
    "user-defined pieces, legacy": (user_defined(), {**BASE, "legacy": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_texts_are_read_as_transformers_reads_them(case: str, tmp_path: Path) -> None:
    model, config, files = CASES[case]
    folder = write_slow(tmp_path / "slow", model, config, **files)
    assert ids_of(made(folder), TEXTS) == theirs(folder, TEXTS)


def test_user_defined_pieces_are_read_as_sentencepiece_reads_them(tmp_path: Path) -> None:
    """Its control pieces are plain text in a text, and so they are for the text models. (A text that begins with a
    user-defined piece gets a space in front of it there; transformers has none, and neither have we.)"""
    folder = write_slow(tmp_path / "slow", user_defined())
    for name, data in made(folder).items():
        (folder / name).write_bytes(data)
    text, slow = Text(folder), sentencepiece.SentencePieceProcessor(model_proto=user_defined())
    for said in (one for one in TEXTS if not one.startswith(("the", "<usr>"))):
        assert text.encode([said], add_special_tokens=False)[0] == slow.encode(said), said
        assert text.decode(slow.encode(said, add_bos=True)) == said


def test_template_end_and_added_tokens_are_the_folders(tmp_path: Path) -> None:
    config = {
        **BASE,
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
        "added_tokens_decoder": DECODER,
        "use_fast": False,
    }
    files = made(write_slow(tmp_path / "slow", tokenizer_model(SIZE), config), eos_token_id=2)
    kept = json.loads(files["tokenizer_config.json"])
    assert (
        kept["chat_template"] == TEMPLATE
        and kept["eos_token"] == "<|im_end|>"
        and kept["added_tokens_decoder"] == DECODER
    )
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast" and "use_fast" not in kept
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [2, 313]
    described = json.loads(files["tokenizer.json"])
    special = {token["content"]: token["special"] for token in described["added_tokens"]}
    assert special == {
        "<unk>": True,
        "<s>": True,
        "</s>": True,
        "<|im_start|>": True,
        "<|im_end|>": True,
        "<tool>": False,
    }


@pytest.mark.parametrize(
    ("switches", "begin", "end"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
    ],
)
def test_what_begins_and_ends_a_text(
    switches: dict[str, bool], begin: list[int], end: list[int], tmp_path: Path
) -> None:
    files = made(write_slow(tmp_path / "slow", tokenizer_model(SIZE), {**BASE, **switches}))
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    inside = tokenizer.encode("hello", add_special_tokens=False).ids
    assert tokenizer.encode("hello").ids == [*begin, *inside, *end]


def test_gaps_between_the_ids_stay(tmp_path: Path) -> None:
    files = made(
        write_slow(tmp_path / "slow", tokenizer_model(SIZE), BASE, **{"added_tokens.json": {"<a>": 313, "<b>": 317}})
    )
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert (tokenizer.token_to_id("<a>"), tokenizer.token_to_id("<b>")) == (313, 317)


def test_a_model_that_says_nothing_more_is_what_it_was(tmp_path: Path) -> None:
    """Llama 2's own folder: the plain form, whatever transformers thinks is legacy."""
    from scripts.tokenizer import sentencepiece as ours

    files = made(write_slow(tmp_path / "slow", tokenizer_model(SIZE), None))
    pieces = ours.parse_model(tokenizer_model(SIZE))
    assert json.loads(files["tokenizer.json"]) == ours.tokenizer_json(pieces)
    assert json.loads(files["tokenizer_config.json"]) == ours.tokenizer_config(pieces)


BAD: dict[str, Any] = {
    "an id that is a word": ({**BASE, "added_tokens_decoder": {"x": {"content": "a"}}}, {}, "tokenizer_config.json"),
    "a token without content": ({**BASE, "added_tokens_decoder": {"312": {}}}, {}, "tokenizer_config.json"),
    "a list": ({**BASE, "added_tokens_decoder": []}, {}, "tokenizer_config.json"),
    "another piece's id": ({**BASE, "added_tokens_decoder": {"300": {"content": "<x>"}}}, {}, "tokenizer_config.json"),
    "an id below 0": (BASE, {"added_tokens.json": {"<x>": -1}}, "added_tokens.json"),
    "an id of text": (BASE, {"added_tokens.json": {"<x>": "312"}}, "added_tokens.json"),
    "an end beyond the embedding": (
        {**BASE, "eos_token": "<x>"},
        {"added_tokens.json": {"<x>": 320}},
        "tokenizer_config.json",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_added_tokens_that_cannot_be_are_refused_by_the_files_name(case: str, tmp_path: Path) -> None:
    config, files, name = BAD[case]
    if config.get("added_tokens_decoder") == []:
        config = {**config, "added_tokens_decoder": [1]}
    with pytest.raises(reports.Problem) as caught:
        made(write_slow(tmp_path / "slow", tokenizer_model(SIZE), config, **files))
    assert Path(caught.value.where).name == name
