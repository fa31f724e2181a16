"""Text in and out of the text models agrees with the tokenizer to the last byte, however it is cut into pieces."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from project import ROOT
from synthetic import tokenizer_model

from scripts.tokenizer import sentencepiece as tokenizer

sys.path.insert(0, str(ROOT / "model_repo_template" / "tensorrt_llm_bls" / "1"))

from answer import Answer  # noqa: E402
from text import MAX_SPELLINGS, REPLACEMENT, StopStrings, Text  # noqa: E402

STORIES = (ROOT / "models" / "stories" / "tokenizer.model").read_bytes()
SLOW = sentencepiece.SentencePieceProcessor(model_proto=STORIES)

# What breaks tokenizers: spaces, marks, special spellings, control characters, joined emoji, both directions of writing
FRAGMENTS = [
    " ", "  ", "\u2581", "</s>", "<s>", "<unk>", "<0x0A>", "\n", "\r\n", "\t", "\0", "\x1b", "\x7f", "\u3000", "\ufeff", "a", "the",
    "hello", "é", "e\u0301", "한국어", "안녕", "中文", "😀", "👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "שלום", "\u202eabc", "مرحبا", "\U0010ffff",
    REPLACEMENT,
]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join))
MANY = settings(max_examples=4 * settings().max_examples, deadline=None)


def write_tokenizer(folder: Path, description: Any, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def sentencepiece_folder(folder: Path, data: bytes) -> Path:
    model = tokenizer.parse_model(data)
    return write_tokenizer(folder, tokenizer.tokenizer_json(model), tokenizer.tokenizer_config(model))


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(sentencepiece_folder(tmp_path_factory.mktemp("stories"), STORIES))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[Text, tokenizers.Tokenizer]:
    """A tokenizer of GPT-2's and Llama 3's kind, and the library's own view of it without special spellings."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["the quick brown fox 안녕하세요 한국어 😀😀 naïve\n\n  indented"] * 9, trainer)
    made.add_tokens([tokenizers.AddedToken("<tool call>", special=False)])
    made.post_processor = tokenizers.processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    folder = write_tokenizer(
        tmp_path_factory.mktemp("bytes"),
        json.loads(made.to_str()),
        {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"},
    )
    return Text(folder), made


def chunks(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """ids cut at some places; empty chunks included."""
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[begin:end] for begin, end in zip(edges, edges[1:], strict=False)]


def streamed(text: Text, ids: list[int], cuts: list[int]) -> list[str]:
    stream = text.stream()
    return [*(stream.push(chunk) for chunk in chunks(ids, cuts)), stream.finish()]


# Ids as a model may say them: any, and often bytes, which only together are a character
BYTES = [b + 3 for b in "é한😀👩‍👧".encode()] + [
    SLOW.piece_to_id(f"<0x{b:02X}>") for b in (0x20, 0x80, 0xC3, 0xED, 0xF0, 0xFF)
]
ANY_IDS = st.lists(st.one_of(st.integers(0, 2047), st.integers(3, 258), st.sampled_from(BYTES)), max_size=24)
CUTS = st.lists(st.integers(0, 24), max_size=6)


@MANY
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_any_text_gets_sentencepieces_ids_with_the_beginning_in_front(stories: Text, texts: list[str]) -> None:
    assert stories.encode(texts, add_special_tokens=False) == SLOW.encode(texts)
    assert stories.encode(texts) == [[1, *ids] for ids in SLOW.encode(texts)]


@MANY
@given(text=TEXTS)
def test_a_text_comes_back_as_it_was(stories: Text, text: str) -> None:
    assume("\u2581" not in text)  # SentencePiece's own mark for a space comes back as a space
    assert stories.decode(stories.encode([text])[0]) == text


@pytest.mark.parametrize("spelling", ["<s>", "</s>", "<unk>", "Hi</s>", "<s> Once"])
def test_the_spelling_of_a_special_token_is_plain_text(stories: Text, spelling: str) -> None:
    [ids] = stories.encode([spelling])
    assert ids[0] == 1
    assert not stories.special & set(ids[1:])
    assert stories.decode(ids) == spelling


@MANY
@given(ids=ANY_IDS, cuts=CUTS)
def test_streamed_pieces_are_sentencepieces_text_of_a_continuation(
    stories: Text, ids: list[int], cuts: list[int]
) -> None:
    """A continuation: what SentencePiece adds to a text that is already there. It knows no hidden <unk>, we do."""
    ids = [token for token in ids if token != 0]
    start = SLOW.piece_to_id("a")
    pieces = streamed(stories, ids, cuts)
    assert "".join(pieces) == SLOW.decode([start, *ids])[1:]
    assert "".join(pieces) == "".join(streamed(stories, ids, []))


@MANY
@given(ids=ANY_IDS)
@example(ids=[1, 300])
@example(ids=[1, 2, 300, 300])
def test_a_whole_text_is_sentencepieces_text(stories: Text, ids: list[int]) -> None:
    """SentencePiece keeps a space at the start that is spelt as a byte. We take it off,
    as the tokenizers library does."""
    ids = [token for token in ids if token != 0]
    shown = [token for token in ids if token not in stories.special]
    assume(not shown or shown[0] != SLOW.piece_to_id("<0x20>"))
    assert stories.decode([1, *ids]) == SLOW.decode(ids)


@MANY
@given(text=st.text(max_size=12), cuts=CUTS)
def test_never_half_a_character(stories: Text, text: str, cuts: list[int]) -> None:
    """Spelt in bytes alone, each piece that comes is whole characters of the text, as many as there can be."""
    data = text.encode()
    ids = [3 + byte for byte in data]
    stream, shown, taken = stories.stream(), "", 0
    for chunk in chunks(ids, cuts):
        shown += stream.push(chunk)
        taken += len(chunk)
        assert shown == data[:taken].decode(errors="ignore")
    assert stream.finish() == ""


def test_hidden_tokens_and_ids_without_a_token_are_nothing(stories: Text) -> None:
    assert "".join(streamed(stories, [1, 0, 2, 99999, -1], [])) == ""
    assert stories.stream(skip_special_tokens=False).push([1, 2]) == "<s></s>"


def test_a_hidden_token_in_the_middle_of_a_character(stories: Text, byte_level: tuple[Text, Any]) -> None:
    """SentencePiece takes the character for broken; byte-level BPE does not see the token."""
    ids = [3 + 0xC3, 2, 3 + 0xA9]
    assert "".join(streamed(stories, ids, [1, 2])) == SLOW.decode(ids) == REPLACEMENT * 2
    ours, library = byte_level
    first, second = ours.encode(["é"], add_special_tokens=False)[0]
    ids = [first, library.token_to_id("<|end|>"), second]
    assert "".join(streamed(ours, ids, [1, 2])) == library.decode(ids) == "é"


def test_the_cost_of_a_token_does_not_grow(stories: Text) -> None:
    """Counted, not timed: after 20,000 tokens the stream keeps no more than it kept after one."""
    stream = stories.stream()
    stops = StopStrings(["never", "said"])
    for _ in range(20_000):
        stops.push(stream.push([300, 3 + 0xED]))
    assert stream.bytes.getstate()[0] == b"\xed"
    assert len(stops.held) < len("never")


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


@MANY
@given(text=TEXTS)
def test_byte_level_text_comes_back_as_it_was(byte_level: tuple[Text, Any], text: str) -> None:
    ours, _ = byte_level
    [ids] = ours.encode([text])
    assert ids[0] == ours.bos_id == 0
    assert ours.decode(ids) == text


@MANY
@given(ids=st.lists(st.one_of(st.integers(0, 420), st.integers(2, 258)), max_size=24), cuts=CUTS)
def test_byte_level_pieces_are_the_librarys_own_text(
    byte_level: tuple[Text, Any], ids: list[int], cuts: list[int]
) -> None:
    ours, library = byte_level
    assert "".join(streamed(ours, ids, cuts)) == library.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_byte_level_special_spellings_are_plain_text_and_other_added_tokens_are_not(
    byte_level: tuple[Text, Any],
) -> None:
    ours, library = byte_level
    assert ours.end_id == library.token_to_id("<|end|>")
    assert ours.end_id not in ours.encode(["stop <|end|> here"])[0]
    assert library.token_to_id("<tool call>") in ours.encode(["a <tool call> b"])[0]


# --- stop strings -----------------------------------------------------------------------------------------------------


def cut(whole: str, stops: list[str]) -> tuple[str, bool]:
    """The independent statement: read letter by letter;
    the first letter that completes a stop string ends the text before it."""
    for end in range(1, len(whole) + 1):
        complete = [stop for stop in stops if stop and whole[:end].endswith(stop)]
        if complete:
            return whole[: end - max(map(len, complete))], True
    return whole, False


# two letters: what looks like a stop string and is none has another one's start in it
FEW_LETTERS = st.one_of(st.text("ab", max_size=14), st.text("ab한\n", max_size=14))
STOPS = st.one_of(st.lists(st.text("ab", max_size=5), max_size=2), st.lists(st.text("ab한\n", max_size=4), max_size=3))


@settings(max_examples=1000, deadline=None)
@given(whole=FEW_LETTERS, stops=STOPS, cuts=CUTS)
def test_a_stop_string_cuts_where_it_is_first_complete_and_nothing_of_it_is_shown(
    whole: str, stops: list[str], cuts: list[int]
) -> None:
    expected, stopped = cut(whole, stops)
    machine, shown = StopStrings(stops), ""
    for chunk in chunks(list(whole), cuts):  # type: ignore[arg-type]
        piece, now = machine.push("".join(chunk))  # type: ignore[arg-type]
        shown += piece
        assert expected.startswith(shown)
        if now:
            break
    else:
        now = False
        shown += machine.finish()
    assert (shown, now) == (expected, stopped)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    machine = StopStrings(["\n\nUser:"])
    assert machine.push("Hello\n") == ("Hello", False)
    assert machine.push("\nUse") == ("", False)
    assert machine.push("d it") == ("\n\nUsed it", False)


# --- words for the engine ---------------------------------------------------------------------------------------------


def sequences(words: Any) -> list[list[int]]:
    """TensorRT-LLM's [1, 2, n] form, read back."""
    flat, ends = words[0].tolist()
    begins = [0, *ends]
    return [flat[begin:end] for begin, end in zip(begins, ends, strict=False) if end != -1]


@pytest.mark.parametrize("word", ["dog", " dog", "\n", "안녕", "ed", "<s>"])
def test_a_word_is_listed_in_every_spelling_that_a_text_has_it_in(stories: Text, word: str) -> None:
    """At the start of a text, after a space and inside of a word it has different tokens."""
    listed = sequences(stories.word_list([word]))
    for before in ("Once the", "Once ", "x\n"):
        whole, begun = SLOW.encode(before + word), SLOW.encode(before)
        if whole[: len(begun)] == begun:
            assert whole[len(begun) :] in listed
    assert all(stories.decode(ids).strip(" ") == word.strip(" ") for ids in listed)


def every_cut(word: str) -> list[list[int]]:
    """The independent statement: all ways to write a word with SentencePiece's pieces,
    by trying every piece at every place."""
    if not word:
        return [[]]
    starts = [word[:n] for n in range(1, len(word) + 1)]
    found = [(len(start), SLOW.piece_to_id(start.replace(" ", "\u2581"))) for start in starts]
    return [[token, *rest] for n, token in found if token > 2 for rest in every_cut(word[n:])]


@MANY
@given(word=st.text("the dog", min_size=1, max_size=7))
def test_a_word_is_listed_in_every_sequence_that_can_spell_it(stories: Text, word: str) -> None:
    """Alone and with a space before it; the shortest ones of those that are too many."""
    listed = stories.spellings(word)
    for text in (word, " " + word):
        ours, expected = [ids for ids in listed if stories.stream().push(ids) == text], every_cut(text)
        assert all(ids in expected for ids in ours) and len(ours) == min(len(expected), MAX_SPELLINGS)
        assert [len(ids) for ids in ours] == sorted(len(ids) for ids in expected)[:MAX_SPELLINGS]


def test_no_word_of_a_list_may_begin_in_the_prompt(stories: Text) -> None:
    """TensorRT-LLM compares with the prompt too: an answer that goes on with `o`, `g` after `...
    a d` would end at the word `dog`."""
    d, o, g = (SLOW.piece_to_id(letter) for letter in "dog")
    listed = sequences(stories.word_list(["dog"]))
    assert [d, o, g] in listed
    assert sequences(stories.word_list(["dog"], after=[1, 300, d])) == [ids for ids in listed if ids != [d, o, g]]
    assert [d, o, g] not in sequences(stories.word_list(["dog"], after=[1, 300, d, o]))


def test_special_tokens_are_shown_to_who_asks(stories: Text) -> None:
    said = {"output_ids": np.array([[[300, 2]]], np.int32)}
    for skip, expected in ((True, SLOW.decode([300])), (False, SLOW.decode([300]) + "</s>")):
        answer = Answer(stories, [], {}, [], 1, skip_special_tokens=skip)
        answer.push(said)
        answer.finish()
        assert answer.take()["text_output"].strip() == expected.strip()


def test_padding_behind_sequence_length_is_cut(stories: Text) -> None:
    """Also when nothing but padding has come; without sequence_length (0.8.0 may leave it out) every id counts."""
    answer = Answer(stories, [], {}, [], 1)
    assert answer.push({"output_ids": np.array([[[300, 301, -1, -1]]], np.int32), "sequence_length": np.array([[2]])})
    answer.push({"output_ids": np.array([[[-1]]], np.int32), "sequence_length": np.array([[0]])})
    answer.push({"output_ids": np.array([[[302]]], np.int32)})
    answer.finish()
    assert answer.n_output_tokens == 3
    assert answer.take()["text_output"].strip() == SLOW.decode([300, 301, 302]).strip()


def test_byte_level_words_are_listed_with_and_without_their_space(byte_level: tuple[Text, Any]) -> None:
    ours, library = byte_level
    listed = sequences(ours.word_list(["quick"]))
    assert library.encode("quick", add_special_tokens=False).ids in listed
    assert library.encode(" quick", add_special_tokens=False).ids in listed


def test_no_words_are_an_empty_list(stories: Text) -> None:
    assert stories.word_list([]).shape == stories.word_list([""]).shape == (1, 2, 0)


def test_the_bias_of_a_word_lies_on_its_tokens_and_nowhere_else(stories: Text) -> None:
    bias = stories.embedding_bias([("dog", 2.5), ("cat", -1.0)], vocab_size=2050)
    assert (bias.shape, bias.dtype) == ((1, 2050), np.float32)
    dog, cat = (set(ids) for ids in SLOW.encode(["dog", "cat"]))
    assert {n for n, value in enumerate(bias[0]) if value} == dog | cat
    assert all(bias[0, token] == 2.5 for token in dog - cat)


def test_a_vocabulary_of_another_model_works_alike(tmp_path: Path) -> None:
    data = tokenizer_model(420)
    text, slow = Text(sentencepiece_folder(tmp_path, data)), sentencepiece.SentencePieceProcessor(model_proto=data)
    for sample in ("  banana  ", "한국어 hello", "😀"):
        assert text.encode([sample])[0][1:] == slow.encode(sample)
        assert text.decode(text.encode([sample])[0]) == sample
