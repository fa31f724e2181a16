"""Guides without a server: JSON Schema's own test suite, held to what llguidance publishes of itself, and tokenizers.

schemas/draft2020-12.json: the suite (LICENSES.txt says where it comes from); llguidance.json: how each of its tests
goes with llguidance by its own table; not_passing.txt: by name, what does not pass here. When llguidance can do more,
this test fails and prints the new list.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
from project import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from scripts.tokenizer import sentencepiece

sys.path.insert(0, str(ROOT / "model_repo_template/tensorrt_llm/1"))
import guides

SCHEMAS = ROOT / "tests/openai/schemas"


def results() -> Iterator[tuple[str, str, str, str]]:
    """(file, group, test, how it went) of each test: pass, refused: WHY, rejects (what is valid),
    accepts (what is not)."""
    tokenizer = llguidance.LLTokenizer("byte")
    for file, groups in json.loads((SCHEMAS / "draft2020-12.json").read_text()).items():
        for group in groups:
            schema = json.dumps(group["schema"])
            why, whole = guides.why_not("json_schema", schema), None
            if why is None:
                grammar = guides.grammar_of("json_schema", schema)
                whole = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=guides.limits())
            for test in group["tests"]:
                name = (file, group["description"], test["description"])
                if whole is None:
                    yield (*name, f"refused: {why}")
                else:
                    accepted = accepts(whole.deep_copy(), test["data"])
                    how = "pass" if accepted == test["valid"] else "accepts" if accepted else "rejects"
                    yield (*name, how)


def accepts(matcher: Any, value: Any) -> bool:
    """Whether an answer can be this value, written as Python's json does."""
    tokens = list(json.dumps(value, ensure_ascii=False).encode())
    return bool(
        matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()
    )


def test_json_schemas_own_examples_pass_or_are_listed() -> None:
    published = json.loads((SCHEMAS / "llguidance.json").read_text())
    failing: dict[str, None] = {}
    passed = 0
    for file, group, test, how in results():
        theirs = published.get(file, {}).get(group, {}).get(test, "not in it")
        assert how == "pass" or theirs != "pass", (
            f"{file}: {group}: {test}: {how}; llguidance's own table says that it passes"
        )
        assert how != "accepts", f"{file}: {group}: {test}: an answer could break its schema"
        passed += how == "pass"
        if how != "pass":
            # a schema that is refused is so with each of its tests
            failing[f"{file}: {group}: {test + ': ' if how == 'rejects' else ''}{how}"] = None
    listed = (SCHEMAS / "not_passing.txt").read_text().splitlines()
    assert list(failing) == listed, "not_passing.txt would be:\n" + "\n".join(failing)
    assert passed > 550


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_what_spells_a_special_token_is_text(tmp_path: Path, kind: str) -> None:
    """llguidance tokenizes what a grammar leaves no choice about: the spelling of a special token is its characters."""
    if kind == "sentencepiece":
        model = sentencepiece.read_tokenizer_model(ROOT / "models/stories/tokenizer.model")
        described, config, end = sentencepiece.tokenizer_json(model), sentencepiece.tokenizer_config(model), "</s>"
    else:
        made = Tokenizer(
            models.BPE(vocab={one: n for n, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
        )
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.add_special_tokens(
            [AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>", normalized=False)]
        )
        described, config, end = json.loads(made.to_str()), {"eos_token": "<|im_end|>"}, "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    end_id, size = whole.get_vocab()[end], whole.get_vocab_size()
    makes = guides.Guides(tmp_path, size)
    guide = makes.guide("json_schema", json.dumps({"const": f"a{end}b"}), [end_id])
    tokens: list[int] = []
    while True:
        makes.ahead([(guide, tokens)])
        bits = guide.allowed([guide])
        [allowed] = np.unpackbits(bits.view(np.uint8), axis=1, count=size, bitorder="little").view(bool)
        if allowed[end_id]:
            break
        assert not allowed[[token["id"] for token in described["added_tokens"]]].any()
        tokens.append(int(allowed.argmax()))
    assert allowed.sum() == 1 and whole.decode(tokens) == f'"a{end}b"'
