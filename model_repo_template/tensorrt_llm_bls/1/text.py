"""Text to token ids and back, exactly like the model's own tokenizer, also piece by piece while an answer streams."""

from __future__ import annotations

import codecs
import heapq
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# U+FFFD is shown for a byte that is not part of a character
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# How many ways to spell a word are listed at most; a word of six letters has at most 32
MAX_SPELLINGS = 64
# What a token stands for: text, or bytes that are a character only together with their neighbours
Piece = str | bytes

# SentencePiece shows a broken character as one U+FFFD for each byte; byte-level BPE, as Python does, one for each
# attempt
codecs.register_error("each_byte", lambda error: (REPLACEMENT * (error.end - error.start), error.end))  # type: ignore[attr-defined]


class Text:
    """A tokenizer folder (tokenizer.json, tokenizer_config.json): SentencePiece's kind of BPE, or byte-level BPE.

    end_ids: every token that ends an answer, as the room config listed them in generation_config.json. A folder without
    that file names one at most, in tokenizer_config.json. end_id: the first of them.
    """

    def __init__(self, folder: Path) -> None:
        description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        added = description.get("added_tokens") or []
        self.special = {token["id"] for token in added if token.get("special")}
        # A special token's spelling in a user's text is plain text: only rules and chat templates emit special ids.
        kept = description["added_tokens"] = [token for token in added if not token.get("special")]
        description.update(padding=None, truncation=None)
        # the library numbers added tokens that are in no vocabulary by itself, without the special ones between them
        vocab = description["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab.update({token["content"]: token["id"] for token in kept})
        self.tokenizer = Tokenizer.from_str(json.dumps(description))
        for token in kept:
            if self.tokenizer.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"the added token {token['content']!r} cannot have the id {token['id']}")
        self.ids: dict[str, int] = {**self.tokenizer.get_vocab(), **{token["content"]: token["id"] for token in added}}
        listed = folder / "generation_config.json"
        named = json.loads(listed.read_text(encoding="utf-8")).get("eos_token_id") if listed.is_file() else None
        own = self._id_of(config.get("eos_token"))
        self.end_ids: list[int] = [named] if isinstance(named, int) else list(named or ([] if own is None else [own]))
        self.end_id = self.end_ids[0] if self.end_ids else None
        self.bos_id = self._id_of(config.get("bos_token"))
        byte_level = "ByteLevel" in json.dumps(description.get("decoder"))
        self.pieces = byte_level_pieces(self.ids, added) if byte_level else sentencepiece_pieces(self.ids)
        # A hidden token ends a broken character for SentencePiece, as any text does; byte-level BPE does not see it.
        self.nothing: Piece = b"" if byte_level else ""
        self.broken_bytes = "replace" if byte_level else "each_byte"
        self.longest_piece_bytes = max(len(p if isinstance(p, bytes) else p.encode()) for p in self.pieces.values())
        # SentencePiece writes a space before a text that has none, and takes it off again
        self.adds_space = self.stream().push(self.encode(["x"], add_special_tokens=False)[0][:1]).startswith(" ")

    def _id_of(self, token: object) -> int | None:
        """A special token of tokenizer_config.json, written as a string or as an object with `content`."""
        content = token.get("content") if isinstance(token, dict) else token
        return self.ids.get(content) if isinstance(content, str) else None

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of whole texts, with BOS in front if the model's rule says so.
        Texts of one call run in parallel."""
        batch = self.tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for one answer."""
        return TextStream(self, skip_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence.

        A sequence that starts with BOS is a whole text and loses the space that encode added. Any other sequence
        continues a text, and keeps a space at its start.
        """
        stream = self.stream(skip_special_tokens)
        text = stream.push(ids) + stream.finish()
        from_start = len(ids) > 0 and ids[0] == self.bos_id and skip_special_tokens and self.adds_space
        return text[1:] if from_start and text.startswith(" ") else text

    def spellings(self, word: str) -> list[list[int]]:
        """The token sequences that spell a word, alone and with a space before it: all of them, the shortest
        MAX_SPELLINGS of each.

        Byte tokens count only where they are needed: SentencePiece never spells a character that has a token in bytes.
        """
        return [ids for text in (word, " " + word) for ids in itertools.islice(self._cuts(text), MAX_SPELLINGS)]

    def _cuts(self, text: str) -> Iterator[list[int]]:
        """Every way to cut a text into tokens, those with the fewest tokens first. Best-first search; the bound is what
        the rest needs."""
        data = text.encode()
        options: list[list[tuple[int, int]]] = [[] for _ in data]  # at each byte: (where a token ends, the token)
        at = 0
        for character in map(str.encode, text):
            if character not in self._tokens_of:
                for n in range(at, at + len(character)):
                    options[n] += [(n + 1, token) for token in self._byte_tokens_of.get(data[n : n + 1], ())]
            at += len(character)
        needed: list[float] = [float("inf")] * len(data) + [0]
        for at in range(len(data) - 1, -1, -1):
            for end in range(at + 1, min(len(data), at + self.longest_piece_bytes) + 1):
                options[at] += [(end, token) for token in self._tokens_of.get(data[at:end], ())]
            options[at] = [(end, token) for end, token in options[at] if needed[end] < float("inf")]
            needed[at] = 1 + min((needed[end] for end, _ in options[at]), default=float("inf"))
        # (least number of tokens; minus the bytes spelt, so that the nearest to the end comes first; tokens so far)
        waiting: list[tuple[float, int, list[int]]] = [(needed[0], 0, [])]
        while waiting:
            _, at, ids = heapq.heappop(waiting)
            at = -at
            if at == len(data):
                yield ids
            for end, token in options[at] if at < len(data) else ():
                heapq.heappush(waiting, (len(ids) + 1 + needed[end], -end, [*ids, token]))

    @cached_property
    def _tokens_of(self) -> dict[bytes, list[int]]:
        """The tokens that stand for a text; with byte-level BPE for any bytes."""
        return self._by_bytes(bytes if self.nothing == b"" else str)

    @cached_property
    def _byte_tokens_of(self) -> dict[bytes, list[int]]:
        """SentencePiece's tokens of single bytes."""
        return {} if self.nothing == b"" else self._by_bytes(bytes)

    def _by_bytes(self, kind: type) -> dict[bytes, list[int]]:
        found: dict[bytes, list[int]] = {}
        for token, piece in self.pieces.items():
            if isinstance(piece, kind) and piece and token not in self.special:
                found.setdefault(piece if isinstance(piece, bytes) else piece.encode(), []).append(token)
        return found

    def word_list(
        self, words: Sequence[str], after: Sequence[int] = (), tokens: Sequence[int] = ()
    ) -> np.ndarray[Any, Any]:
        """Words in the form of TensorRT-LLM's stop_words_list and bad_words_list.

        tokens: ids that are in the list, each as a sequence by itself.
        after: a prompt in which no sequence may begin. TensorRT-LLM compares with the prompt too: it would end an
        answer whose first tokens complete a word that the prompt's last tokens began. Such sequences are left out.
        Returns int32 (1, 2, n): row 0 the ids of all sequences in a row, row 1 where each sequence ends, padded with
        -1.
        """
        spelt = [ids for word in words if word for ids in self.spellings(word)]
        sequences = [[token] for token in tokens]
        sequences += [ids for ids in spelt if not any(list(after[-n:]) == ids[:n] for n in range(1, len(ids)))]
        flat = [token for ids in sequences for token in ids]
        ends = np.cumsum([len(ids) for ids in sequences], dtype=np.int32).tolist()
        return np.array([[flat, ends + [-1] * (len(flat) - len(ends))]], dtype=np.int32)

    def embedding_bias(self, weighted_words: Sequence[tuple[str, float]], vocab_size: int) -> np.ndarray[Any, Any]:
        """What is added to the logits of the tokens that spell the words: float32 (1, vocab_size).

        Only the spelling at the start of a word counts, as in NVIDIA's preprocessing. Inside a word the spelling is
        made of letters that many other words have too.
        """
        bias = np.zeros((1, vocab_size), dtype=np.float32)
        for ids, (_, weight) in zip(self.encode([word for word, _ in weighted_words], False), weighted_words):
            bias[0, list(set(ids))] += weight
        return bias


class TextStream:
    """Puts the text of one answer together from token ids as they come.

    push() returns all characters that are complete, never half of one. The pieces joined are the text of all ids.
    The cost of a token does not depend on how many came before.
    """

    def __init__(self, text: Text, skip_special_tokens: bool) -> None:
        self.pieces, self.nothing = text.pieces, text.nothing
        self.hidden = text.special if skip_special_tokens else frozenset()
        self.bytes = codecs.getincrementaldecoder("utf-8")(text.broken_bytes)

    def push(self, ids: Sequence[int]) -> str:
        """Take token ids; return the text that is complete with them (possibly none).
        Ids without a token are ignored."""
        out = []
        for token in ids:
            piece = self.nothing if token in self.hidden else self.pieces.get(token, self.nothing)
            out += [self.bytes.decode(piece)] if isinstance(piece, bytes) else [self.finish(), piece]
        return "".join(out)

    def finish(self) -> str:
        """The rest of a character that will never be complete, as U+FFFD."""
        return self.bytes.decode(b"", final=True)


class StopStrings:
    """Cuts a streamed text where the first stop string is complete. It shows nothing that may be the start of one.

    If several stop strings end at the same character, the longest counts. This is Knuth, Morris and Pratt's search, one
    character at a time: the cost of a piece depends on its length and on the number of stop strings,
    not on their length.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [(stop, _fallbacks(stop)) for stop in stops if stop]
        self.begun = [0] * len(self.stops)  # how many characters of each stop string the text ends with
        self.held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take a piece of text; return (what can be shown now, whether a stop string was reached)."""
        if not self.stops:
            return piece, False
        text = self.held + piece
        found = []
        for n, (stop, fallbacks) in enumerate(self.stops):
            begun = self.begun[n]
            for end, character in enumerate(piece, len(self.held) + 1):
                while begun and stop[begun] != character:
                    begun = fallbacks[begun - 1]
                begun += stop[begun] == character
                if begun == len(stop):
                    found.append((end, end - begun))
                    break
            self.begun[n] = begun
        if found:
            self.held = ""
            return text[: min(found)[1]], True
        shown = len(text) - max(self.begun)
        self.held = text[shown:]
        return text[:shown], False

    def finish(self) -> str:
        """The text that was held back, once no more text comes."""
        rest, self.held = self.held, ""
        return rest


def _fallbacks(stop: str) -> list[int]:
    """For each start of `stop`: the length of its longest own end that is a start of `stop` too."""
    lengths = [0] * len(stop)
    for n in range(1, len(stop)):
        length = lengths[n - 1]
        while length and stop[n] != stop[length]:
            length = lengths[length - 1]
        lengths[n] = length + (stop[n] == stop[length])
    return lengths


def sentencepiece_pieces(vocabulary: Mapping[str, int]) -> dict[int, Piece]:
    """SentencePiece's spelling: U+2581 is a space, <0x0A> is a byte."""
    return {
        token: bytes([int(spelt[3:5], 16)])
        if len(spelt) == 6 and spelt.startswith("<0x") and spelt.endswith(">")
        else spelt.replace("\u2581", " ")
        for spelt, token in vocabulary.items()
    }


def byte_level_pieces(vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> dict[int, Piece]:
    """GPT-2's spelling: each character of a token stands for one byte. Added tokens are spelt as they are.

    Printable Latin-1 characters stand for themselves, the other bytes follow in order from U+0100.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    plain = {token["id"] for token in added}
    return {
        token: spelt.encode() if token in plain or set(spelt) - table.keys() else bytes(table[c] for c in spelt)
        for spelt, token in vocabulary.items()
    }
