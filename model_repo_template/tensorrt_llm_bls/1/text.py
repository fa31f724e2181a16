"""Text to token ids and back, exactly as the model's own tokenizer has it, also piece by piece while an answer streams."""

import json
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from tokenizers import Tokenizer

# U+FFFD, what a byte that is no part of a character is shown as
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text:
    """A tokenizer folder (tokenizer.json, tokenizer_config.json) as two functions: encode and stream."""

    def __init__(self, folder: Path) -> None:
        description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        added = description.get("added_tokens") or []
        self.special = {token["id"] for token in added if token.get("special")}
        # A special token's spelling in a user's text is plain text: only rules and chat templates emit special ids.
        description["added_tokens"] = [token for token in added if not token.get("special")]
        self.tokenizer = Tokenizer.from_str(json.dumps(description))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        vocabulary: Dict[str, int] = dict(description["model"]["vocab"])
        vocabulary.update({token["content"]: token["id"] for token in added})
        self.ids = vocabulary
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id = self._id_of(config.get("eos_token"))
        self.bos_id = self._id_of(config.get("bos_token"))
        byte_level = "ByteLevel" in json.dumps(description.get("decoder"))
        self.pieces, self.is_byte = _token_bytes(vocabulary, self.special, byte_level)

    def _id_of(self, token: object) -> Optional[int]:
        """A special token of tokenizer_config.json, written as a string or as an object with `content`."""
        content = token.get("content") if isinstance(token, dict) else token
        return self.ids.get(content) if isinstance(content, str) else None

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> List[List[int]]:
        """Token ids of whole texts, BOS in front where the model's rule has it; many texts in one call run in parallel."""
        batch = self.tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder for one answer."""
        return TextStream(self, skip_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. What starts with BOS is a text from its start; anything else continues one."""
        stream = self.stream(skip_special_tokens)
        text = stream.push(ids) + stream.finish()
        at_start = len(ids) > 0 and ids[0] == self.bos_id
        return text[1:] if at_start and skip_special_tokens and text.startswith(" ") else text

    def spellings(self, word: str) -> List[List[int]]:
        """The token sequences that a word is likely to be generated as: at the start of a word and inside one."""
        alone = self.encode([word], add_special_tokens=False)[0]
        line, continued = self.encode(["\n", "\n" + word], add_special_tokens=False)
        inside = continued[len(line):] if continued[: len(line)] == line else []
        return [ids for ids in ([alone] if alone == inside else [alone, inside]) if ids]

    def word_list(self, words: Sequence[str]) -> np.ndarray:
        """Words in the form of TensorRT-LLM's stop_words_list and bad_words_list.

        Returns int32 (1, 2, n): row 0 the ids of all sequences in a row, row 1 where each sequence ends, padded with -1.
        """
        sequences = [ids for word in words if word for ids in self.spellings(word)]
        flat = [token for ids in sequences for token in ids]
        ends = np.cumsum([len(ids) for ids in sequences]).tolist() if sequences else []
        return np.array([[flat, ends + [-1] * (len(flat) - len(ends))]], dtype=np.int32).reshape(1, 2, len(flat))

    def embedding_bias(self, words: Sequence[str], weights: Sequence[float]) -> np.ndarray:
        """What is added to the logits of the tokens that spell the words: float32 (1, vocab_size)."""
        if len(words) != len(weights):
            raise ValueError(f"embedding_bias_words has {len(words)} entries, embedding_bias_weights has {len(weights)}")
        bias = np.zeros((1, self.vocab_size), dtype=np.float32)
        for word, weight in zip(words, weights):
            for ids in self.spellings(word):
                bias[0, ids] += weight
        return bias


class TextStream:
    """Puts the text of one answer together from token ids as they come.

    push() returns all characters that are whole; never half of one. The pieces joined are the text of all ids.
    The cost of a token does not depend on how many came before.
    """

    def __init__(self, text: Text, skip_special_tokens: bool) -> None:
        self.text, self.skip_special_tokens = text, skip_special_tokens
        self.pending = b""

    def push(self, ids: Sequence[int]) -> str:
        """Take token ids; return the text that is complete with them (possibly none)."""
        pieces = []
        for token in ids:
            if token in self.text.special and self.skip_special_tokens:
                continue
            data = self.text.pieces.get(token, b"")
            if not self.text.is_byte(token):
                pieces.append(self.finish())
            self.pending += data
            pieces.append(self._whole_characters())
        return "".join(pieces)

    def finish(self) -> str:
        """What is left when nothing more can complete it: one U+FFFD for each byte, as SentencePiece decodes it."""
        rest, self.pending = self.pending, b""
        return REPLACEMENT * len(rest)

    def _whole_characters(self) -> str:
        """Take the characters off `pending` that are decided; bytes that can be part of no character become U+FFFD."""
        out = []
        while self.pending:
            try:
                out.append(self.pending.decode("utf-8"))
                self.pending = b""
            except UnicodeDecodeError as error:
                out.append(self.pending[: error.start].decode("utf-8"))
                self.pending = self.pending[error.start:]
                if error.reason == "unexpected end of data":
                    break
                out.append(REPLACEMENT)
                self.pending = self.pending[1:]
        return "".join(out)


class StopStrings:
    """Cuts a streamed text at the first stop string, and streams nothing that may turn out to be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""

    def push(self, piece: str) -> Tuple[str, bool]:
        """Take a piece of text; return (what can be shown now, whether a stop string was reached)."""
        self.held += piece
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            shown, self.held = self.held[: min(found)], ""
            return shown, True
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep:]
        return shown, False

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        rest, self.held = self.held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _token_bytes(vocabulary: Dict[str, int], special: set, byte_level: bool):  # type: ignore[no-untyped-def,type-arg]
    """(id -> the bytes it stands for, whether an id may be part of a character).

    SentencePiece: U+2581 is a space, <0x0A> is a byte. Byte-level BPE: every character of a piece stands for one byte.
    """
    if byte_level:
        table = _byte_level_table()
        pieces = {
            token: content.encode() if token in special else bytes(table[c] for c in content) if all(c in table for c in content) else content.encode()
            for content, token in vocabulary.items()
        }
        return pieces, lambda token: token not in special
    pieces, byte_ids = {}, set()
    for content, token in vocabulary.items():
        if len(content) == 6 and content.startswith("<0x") and content.endswith(">"):
            pieces[token] = bytes([int(content[3:5], 16)])
            byte_ids.add(token)
        else:
            pieces[token] = content.replace("\u2581", " ").encode()
    return pieces, byte_ids.__contains__


def _byte_level_table() -> Dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: the printable Latin-1 ones are themselves, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + n): byte for n, byte in enumerate(others)}}
