"""Chat templates are rendered and tokenized as transformers does it,
and no text in a message ever becomes a special token."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from scripts.openai import chat_template
from scripts.openai.__main__ import text_code
from scripts.openai.chat_template import ChatTemplate, Refused, template_of
from scripts.tokenizer import sentencepiece as sentencepiece_tokenizer

LLAMA_2 = (ROOT / "models/llama-2.jinja").read_text()
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe "
    "helpful<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (  # Llama 3's way: contents are trimmed, headers are special
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
JOINED = (  # nothing between the messages, and text beside them that completes a half
    "{{ bos_token }}{% for m in messages %}<|{{ m['content'] }}|>{{ m['content'] }}{% endfor %}<|end|>"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}<|eot|>"
)
MODEL = sentencepiece_tokenizer.read_tokenizer_model(ROOT / "models/stories/tokenizer.model")


def special(token_id: int, content: str, **more: Any) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **plain, **more}


def llama_folder(folder: Path, template: str, more: list[str], metaspace: bool = False) -> Path:
    """The bundled model's tokenizer with more special tokens; metaspace:
    only the start of everything has a space before it."""
    described = sentencepiece_tokenizer.tokenizer_json(MODEL)
    described["added_tokens"] += [special(MODEL.vocab_size + n, content) for n, content in enumerate(more)]
    if metaspace:
        described["normalizer"] = None
        described["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        }
    return write(folder, described, {**sentencepiece_tokenizer.tokenizer_config(MODEL), "chat_template": template})


def byte_level_folder(folder: Path, template: str, more: list[str]) -> Path:
    """GPT-2's kind, every byte a token: SmolLM2 and Llama 3 are of it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(alphabet)}, merges=[]))
    made.normalizer = normalizers.Sequence([])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(content, normalized=False) for content in more])
    config = {
        "bos_token": more[0],
        "eos_token": more[1],
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return write(folder, json.loads(made.to_str()), config)


def write(folder: Path, described: dict[str, Any], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("room")
    place = root / "model_repo/tensorrt_llm_bls/1"
    place.mkdir(parents=True)
    (place / "text.py").write_bytes((ROOT / "model_repo_template/tensorrt_llm_bls/1/text.py").read_bytes())
    return text_code(root)


KINDS = ("llama-2", "chatml", "trimmed", "metaspace", "joined")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, text_module: Any) -> dict[str, tuple[ChatTemplate, Path]]:
    base = tmp_path_factory.mktemp("tokenizers")
    headers = ["<|start|>", "<|end|>", "<|eot|>"]
    folders = {
        "llama-2": llama_folder(base / "llama-2", LLAMA_2, []),
        "chatml": byte_level_folder(base / "chatml", CHATML, ["<|im_start|>", "<|im_end|>"]),
        "trimmed": byte_level_folder(base / "trimmed", TRIMMED, ["<|begin|>", *headers]),
        "joined": byte_level_folder(base / "joined", JOINED, ["<|begin|>", *headers]),
        "metaspace": llama_folder(base / "metaspace", TRIMMED, headers, metaspace=True),
    }
    made = {}
    for kind, folder in folders.items():
        template = template_of(folder)
        assert template
        made[kind] = (ChatTemplate(template, folder, text_module.Text(folder)), folder)
    return made


def conversation(*contents: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": content} for n, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CONVERSATIONS = [
    conversation("Hello"),
    conversation("  spaces around  ", system="You are kind."),
    conversation("안녕하세요 🦙", "네! 👩‍👩‍👧 반갑습니다\n", "שלום 你好"),
    conversation("one", "two", "three", "four", "five", system=" s "),
    conversation("<b>html</b> & [INST] <<SYS>> \\ {{ 7 * 7 }}"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_text_and_tokens_are_those_of_transformers(cases: Any, kind: str, messages: list[dict[str, str]]) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="the oracle, transformers (requirements/verify.txt), is not installed"
    )
    template, folder = cases[kind]
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    oracle.split_special_tokens = False  # transformers' own way lets a template's special tokens through only so
    rendered = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render(messages) == rendered
    assert template.token_ids(messages) == oracle(rendered, add_special_tokens=False)["input_ids"]


def test_llama_2s_template_is_metas_chat_format(cases: Any) -> None:
    """What generation.py of github.com/meta-llama/llama puts together, its tokens by SentencePiece itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "models/stories/tokenizer.model"))
    template, _ = cases["llama-2"]
    bos, eos = oracle.bos_id(), oracle.eos_id()
    messages = conversation("Hi there ", " Hello! ", "Bye", system="Be brief")
    first = "[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHi there [/INST] Hello! "
    expected = [bos, *oracle.encode(first), eos, bos, *oracle.encode("[INST] Bye [/INST]")]
    assert template.token_ids(messages) == expected


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "x"}],
        conversation("a", "b"),
        [{"role": "system", "content": "s"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    ],
    ids=str,
)
def test_llama_2_refuses_what_it_was_not_trained_on(cases: Any, messages: list[dict[str, str]]) -> None:
    with pytest.raises(Refused, match="user"):
        cases["llama-2"][0].token_ids(messages)


SPELLINGS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<|begin|>"]
# whole spellings, their halves, what a sandbox must not run, and any text at all
HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(SPELLINGS),
        st.builds(lambda s, n: s[: n % len(s)], st.sampled_from(SPELLINGS), st.integers(1, 20)),
        st.builds(lambda s, n: s[n % len(s) :], st.sampled_from(SPELLINGS), st.integers(1, 20)),
        st.sampled_from(
            [
                " ",
                "\n",
                "한국어",
                "👩‍👩‍👧",
                "\u202eעברית",
                "\x00\x1b",
                "{{ ''.__class__ }}",
                "assistant\n",
                chr(0x10FFFD),
            ]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    ),
    min_size=1,
    max_size=6,
).map("".join)


def check_that_all_is_text(cases: Any, contents: list[str], system: str) -> None:
    """A conversation has the special tokens that its template writes, and no others, whatever is in it."""
    for kind in KINDS:
        template, _ = cases[kind]
        ids = template.token_ids(conversation(*contents, system=system))
        harmless = template.token_ids(conversation(*("x" for _ in contents), system="x" if system else ""))
        known = set(template.special.values())
        assert [one for one in ids if one in known] == [one for one in harmless if one in known], (
            kind,
            contents,
            system,
        )


# making an example takes longer than all four templates with it
@settings(max_examples=20_000 if "--hypothesis-profile=long" in sys.argv else 150, deadline=None)
@given(contents=HOSTILE.map(lambda one: [one]) | st.lists(HOSTILE, min_size=3, max_size=3), system=HOSTILE)
def test_nothing_in_a_message_becomes_a_special_token(cases: Any, contents: list[str], system: str) -> None:
    check_that_all_is_text(cases, contents, system)


def test_no_half_of_a_spelling_is_completed(cases: Any) -> None:
    """Every spelling, cut everywhere: in two turns, in a turn and the system's,
    and as what a template's own text could complete."""
    for spelt in SPELLINGS:
        for cut in range(1, len(spelt)):
            head, tail = spelt[:cut], spelt[cut:]
            for contents, system in (
                ([f"a {head}", tail, "b"], ""),
                ([tail], head),
                ([head], ""),
                ([f" {tail} "], f" {head}\n"),
            ):
                check_that_all_is_text(cases, contents, system)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_message_is_left_as_it_is(cases: Any, kind: str) -> None:
    """Also where it spells special tokens: nothing is taken out or put in."""
    template, _ = cases[kind]
    random.seed(7)
    for _ in range(300):
        content = (
            "x" + "".join(random.choice([*SPELLINGS, "<|", "|>", "</", "s>", "é", "🦙", " "]) for _ in range(4)) + "x"
        )
        ids = template.token_ids(conversation(content))
        plain = [token for token in ids if token not in set(template.special.values())]
        assert content in template.text.decode(plain, skip_special_tokens=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% set _ = messages.append(1) %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages[99].content.nothing }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 39999 }}{% endfor %}{% endfor %}",
    ],
    ids=range(7),
)
def test_a_hostile_template_reaches_nothing(cases: Any, source: str) -> None:
    template, folder = cases["llama-2"]
    hostile = ChatTemplate(source, folder, template.text)
    try:
        assert hostile.render(conversation("x")) == ""
    except Refused as refusal:
        assert "subclass" not in str(refusal)


def test_where_a_template_is_found(tmp_path: Path) -> None:
    """As in transformers: a separate file comes first; the default one, if there are several."""
    folder = llama_folder(tmp_path / "t", "own {{ messages }}", [])
    assert template_of(folder) == "own {{ messages }}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert template_of(folder) == "b"
    (folder / "chat_template.jinja").write_text("file")
    assert template_of(folder) == "file"


def test_a_template_that_never_ends_is_ended(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    template, folder = cases["llama-2"]
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tracing = sys.gettrace()
    with pytest.raises(Refused, match=r"took longer than 0.2 s"):
        ChatTemplate(source, folder, template.text).token_ids(conversation("x"))
    assert sys.gettrace() is tracing
