"""tokenizer.json agrees with SentencePiece: the same ids for any text, the same text for any ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import CORPUS, tokenizer_model

from scripts import reports
from scripts.tokenizer import sentencepiece as tokenizer

STORIES = Path("models/stories/tokenizer.model")
# Two vocabularies: real English, and one trained on repetitions, where the order of equal merges shows.
MODELS = {"stories": STORIES.read_bytes(), "repetitive": tokenizer_model(420)}


def reference(name: str) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=MODELS[name])


def ours(name: str, **changed: Any) -> Any:
    """The tokenizers library on our file, like the server's: without added tokens."""
    value = {**tokenizer.tokenizer_json(tokenizer.parse_model(MODELS[name])), "added_tokens": [], **changed}
    return tokenizers.Tokenizer.from_str(json.dumps(value))


PAIRS = {name: (ours(name), reference(name)) for name in MODELS}
WITH_SPECIAL = tokenizers.Tokenizer.from_str(
    json.dumps(tokenizer.tokenizer_json(tokenizer.parse_model(MODELS["stories"])))
)
# Fragments that meet the rules of either side: spaces, marks, spellings of special tokens, bytes,
# letters outside of the vocabulary
FRAGMENTS = ["a", "an", "na", "ab", "ba", " ", "  ", "\u2581", "</s>", "<s>", "<unk>", "<0x0A>", "\n", "\t", "\0"]
FRAGMENTS += ["\x7f", "\u3000"]
FRAGMENTS += ["안녕", "한국어", "é", "e\u0301", "😀", "👩‍👩‍👧", "שלום", "\ufeff", "the", "hello"]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join),
    st.text("ab ", max_size=60),
    st.tuples(st.text("abn ", min_size=1, max_size=4), st.integers(1, 20)).map(lambda pair: pair[0] * pair[1]),
    st.sampled_from(CORPUS),
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2000, deadline=None)
@given(text=TEXTS)
def test_any_text_gets_the_ids_and_comes_back_as_sentencepiece_has_it(name: str, text: str) -> None:
    fast, slow = PAIRS[name]
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == slow.encode(text)
    assert fast.decode(ids) == slow.decode(ids)


@pytest.mark.parametrize("name", MODELS)
def test_every_piece_and_every_two_pieces_in_a_row_get_the_same_ids(name: str) -> None:
    fast, slow = PAIRS[name]
    pieces = [slow.id_to_piece(token_id).replace("\u2581", " ") for token_id in range(len(slow))]
    texts = [*pieces, *(left + right for left, right in zip(pieces, reversed(pieces), strict=True))]
    assert [encoded.ids for encoded in fast.encode_batch(texts, add_special_tokens=False)] == slow.encode(texts)


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(259, 2047), max_size=12))
def test_any_ids_without_broken_bytes_give_the_same_text(ids: list[int]) -> None:
    assert WITH_SPECIAL.decode([1, *ids], skip_special_tokens=True) == PAIRS["stories"][1].decode(ids)


def test_the_beginning_of_text_is_added_where_special_tokens_are_asked_for() -> None:
    fast, slow = PAIRS["stories"]
    assert fast.encode("Once upon a time").ids == [1, *slow.encode("Once upon a time")]
    assert fast.encode("one", "two").ids == [1, *slow.encode("one"), 1, *slow.encode("two")]


def test_merges_are_written_so_that_older_libraries_load_them() -> None:
    """tokenizers 0.15 refuses merges that are pairs; it reads "a b"."""
    merges = tokenizer.tokenizer_json(tokenizer.parse_model(MODELS["stories"]))["model"]["merges"]
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)


# --- what is refused, by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model_type": "unigram"}, "type unigram, not BPE"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "(True, True, True)"),
        ({"add_dummy_prefix": False}, "(False, False, True)"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_kinds_are_refused_by_name(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer_model(300 if changed.get("byte_fallback", True) else 60, **changed))
    with pytest.raises(reports.Problem) as refused:
        tokenizer.read_tokenizer_model(path)
    assert named in refused.value.seen


def test_pieces_that_cannot_be_written_as_merges_are_refused(tmp_path: Path) -> None:
    """A merge is "left right": a piece that holds a space itself would be read as another merge."""
    data = tokenizer_model()
    texts = [piece.text.encode() for piece in tokenizer.parse_model(data).pieces if piece.type == tokenizer.NORMAL]
    left, right = next((text[:1], text[2:]) for text in texts if len(text) == 3 and text.isascii())
    whole = next(text for text in texts if text[:1] == left and text[2:] == right and len(text) == 3)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data.replace(b"\n\x03" + whole, b"\n\x03" + left + b" " + right))
    with pytest.raises(reports.Problem) as refused:
        tokenizer.read_tokenizer_model(path)
    assert f"'{left.decode()} {right.decode()}' holds a space" in refused.value.seen


def test_llama_3s_tiktoken_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(reports.Problem) as refused:
        tokenizer.read_tokenizer_model(path)
    assert "tiktoken" in refused.value.seen


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, len(MODELS["repetitive"]) - 1), flip=st.integers(0, len(MODELS["repetitive"]) - 1))
def test_a_damaged_file_is_a_report_or_still_a_whole_model(tmp_path_factory: Any, cut: int, flip: int) -> None:
    path = tmp_path_factory.getbasetemp() / "tokenizer.model"
    data = bytearray(MODELS["repetitive"])
    data[flip] ^= 0x55
    for damaged in (MODELS["repetitive"][:cut], bytes(data), bytes(data[:cut])):
        path.write_bytes(damaged)
        try:
            model = tokenizer.read_tokenizer_model(path)
        except reports.Problem as problem:
            assert problem.command
        else:
            tokenizer.tokenizer_json(model)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_scores_and_kinds_are_read_as_sentencepiece_reads_them(name: str) -> None:
    """Its protobuf module cannot be the reference:
    it refuses to load beside the protobuf that Triton's client needs."""
    model, slow = tokenizer.parse_model(MODELS[name]), reference(name)
    assert (model.vocab_size, model.unk_id, model.bos_id, model.eos_id) == (len(slow), 0, 1, 2)
    kinds = {tokenizer.UNKNOWN: slow.is_unknown, tokenizer.CONTROL: slow.is_control, tokenizer.BYTE: slow.is_byte}
    for token_id, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (slow.id_to_piece(token_id), slow.get_score(token_id))
        assert [kind for kind, is_kind in kinds.items() if is_kind(token_id)] == (
            [] if piece.type == tokenizer.NORMAL else [piece.type]
        )
