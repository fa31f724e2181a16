"""config opens a model's folder as the server will, stays inside it, and names the file that cannot be served."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project import ROOT
from published import SPECIAL, VOCABULARY, byte_tokenizer, write_published

sys.path.insert(0, str(ROOT / "model_repo_template/tensorrt_llm_bls/1"))

from text import Text  # noqa: E402

from scripts import build_config, build_model_repo, reports
from scripts.build_config import Settings
from scripts.tokenizer import proof
from scripts.weights.bounded import bounded

MARK = "only-the-user-may-read-this"


def described(folder: Path) -> build_config.Described:
    return build_config.describe(Settings(folder, folder / "nowhere"))


def config(folder: Path, room: Path) -> subprocess.CompletedProcess[str]:
    """The script as make starts it."""
    command = [sys.executable, "-m", "scripts.build_config", "--weights", str(folder), "--max-position-embeddings="]
    command += ["--output", str(room)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_published(tmp_path / "model")
    return tmp_path / "model"


def tokenizer(**changed: Any) -> bytes:
    return json.dumps(byte_tokenizer(**changed)).encode()


@pytest.fixture(autouse=True)
def templates_have_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as a good template may take on a busy machine: tests wait for those without end."""
    monkeypatch.setattr(proof, "TEMPLATE_SECONDS", 2)


MODEL = byte_tokenizer()["model"]
ODD: dict[str, dict[str, bytes]] = {
    "a list": {"generation_config.json": b"[]"},
    "broken": {"generation_config.json": b"{"},
    "an end that is a word": {"generation_config.json": b'{"eos_token_id": "</s>"}'},
    "an end that is true": {"generation_config.json": b'{"eos_token_id": true}'},
    "ends that are words": {"generation_config.json": b'{"eos_token_id": [257, "x"]}'},
    "deep": {"generation_config.json": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"},
    "UTF-16": {"tokenizer_config.json": json.dumps({"eos_token": "<|end|>"}).encode("utf-16")},
    "with a mark": {"tokenizer_config.json": b"\xef\xbb\xbf{}"},
    "no text": {"special_tokens_map.json": b"\xff"},
    "added tokens as a list": {"added_tokens.json": b"[]"},
    "no UTF-8": {"chat_template.jinja": b"\xff\xfe"},
    "a template that does not parse": {"chat_template.jinja": b"{% for %}"},
    "a template without end": {"chat_template.jinja": b"{{ 7 ** (9 ** 9) }}"},
    "a loop without end": {
        "chat_template.jinja": b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    },
    "a template of gigabytes": {"chat_template.jinja": b"{{ 'x' * 1800000000 }}"},
    "a template of an unknown filter": {"tokenizer_config.json": b'{"chat_template": "{{ messages | nothing }}"}'},
    "an added token without id": {"tokenizer.json": tokenizer(added_tokens=[{"content": "<|end|>", "special": True}])},
    "added tokens as an object": {"tokenizer.json": tokenizer(added_tokens={"a": 1})},
    "a merge of nothing": {"tokenizer.json": tokenizer(model={**MODEL, "merges": ["xx yy"]})},
    "an unknown model": {"tokenizer.json": tokenizer(model={**MODEL, "type": "Other"})},
    "an unknown decoder": {"tokenizer.json": tokenizer(decoder={"type": "Other"})},
    "an id that is a word": {"tokenizer.json": tokenizer(model={**MODEL, "vocab": {**MODEL["vocab"], "zz": "1"}})},
    "an id beyond the embedding": {"tokenizer.json": tokenizer(model={**MODEL, "vocab": {"a": 0, "zz": 260}})},
    "a beginning beyond the embedding": {
        "tokenizer.json": tokenizer(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [300], "tokens": ["<s>"]}},
            }
        )
    },
    "words without an unknown one": {
        "tokenizer.json": tokenizer(
            model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}, pre_tokenizer=None, decoder=None
        )
    },
    "pieces of words": {
        "tokenizer.json": tokenizer(
            model={
                "type": "WordPiece",
                "vocab": {"a": 0},
                "unk_token": "a",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
            }
        )
    },
    "no model": {"tokenizer.json": b"{}"},
    "a list of tokens": {"tokenizer.json": b"[]"},
    "config.json in UTF-16": {"config.json": b""},
}


@pytest.mark.parametrize("case", ODD)
def test_what_the_server_cannot_open_is_refused_by_the_files_name(case: str, folder: Path) -> None:
    [(name, data)] = ODD[case].items()
    if case == "config.json in UTF-16":
        data = (folder / name).read_text().encode("utf-16")
    (folder / name).write_bytes(data)
    with pytest.raises(reports.Problem) as caught:
        described(folder)
    assert name in str(caught.value.where) + caught.value.seen, caught.value.report()


def test_a_special_token_that_is_not_whole_is_the_tokenizers_fault(folder: Path) -> None:
    """Only the chat template's code reads special tokens with the tokenizers library."""
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    half = [{"id": 256, "content": "<s>", "special": True}]
    (folder / "tokenizer.json").write_bytes(tokenizer(added_tokens=half))
    with pytest.raises(reports.Problem) as caught:
        described(folder)
    assert Path(caught.value.where).name == "tokenizer.json", caught.value.report()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "chat_template.jinja"]
)
def test_a_named_pipe_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    done = config(folder, tmp_path / "room")
    assert done.returncode == 1 and f"-- {name.upper()} IS A NAMED PIPE" in done.stderr, done.stderr
    assert not (tmp_path / "room").exists()


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "chat_template.jinja", "tokenizer.model", "tokenizer_config.json", "model.safetensors"],
)
def test_a_link_that_leaves_the_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(json.dumps({"token": MARK, "eos_token_id": 257}))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../key")
    done = config(folder, tmp_path / "room")
    assert done.returncode == 1 and "A LINK LEAVES THE MODEL'S FOLDER" in done.stderr, done.stderr
    assert MARK not in done.stdout + done.stderr and not (tmp_path / "room").exists()


@pytest.mark.parametrize("target", ["../blobs/0123", "chat_template.jinja"])
def test_a_link_that_leads_nowhere_is_refused(target: str, folder: Path) -> None:
    """A hub cache has it after an interrupted download; without its file the model would be another one."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").symlink_to(target)
    with pytest.raises(reports.Problem, match="a link leads nowhere"):
        described(folder)


def test_a_model_that_other_code_computes_is_refused(folder: Path) -> None:
    """transformers runs what auto_map names if it is told to trust it; its type is not llama then."""
    values = json.loads((folder / "config.json").read_text())
    values.update(model_type="custom", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(reports.Problem) as caught:
        described(folder)
    assert "model_type is 'custom'. Supported: 'llama'" in caught.value.seen


def test_a_link_through_another_link_is_followed_to_its_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(MARK)
    (folder / "inside").symlink_to(tmp_path / "key")
    (folder / "chat_template.jinja").symlink_to("inside")
    with pytest.raises(reports.Problem, match="leaves"):
        described(folder)


@pytest.mark.parametrize("below", ["", "original"])
def test_a_hub_cache_is_read(below: str, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub/models--someone--tiny"
    snapshot = cache / "snapshots/0123abc" / below
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(cache / "blobs" / str(number), snapshot))
    assert described(snapshot).files == described(folder).files


@pytest.mark.parametrize(
    "template", [b"{% for m in messages %}", b"{{ messages | nothing }}", b"{{ messages }}{{ 7 ** (9 ** 9) }}"]
)
def test_a_chat_template_of_the_users_is_tried_too(template: bytes, folder: Path, tmp_path: Path) -> None:
    """CHAT_TEMPLATE counts instead of the model's own; the endpoint would end with it."""
    build_config.build_config(Settings(folder, tmp_path / "config"))
    (tmp_path / "chat.jinja").write_bytes(template)
    with pytest.raises(reports.Problem) as caught:
        build_model_repo.try_chat_template(tmp_path / "config", tmp_path / "chat.jinja", template)
    assert Path(caught.value.where).name == "chat.jinja"
    build_model_repo.try_chat_template(tmp_path / "config", tmp_path / "chat.jinja", b"{{ messages[0].content }}")


def test_what_reads_for_ever_is_ended(tmp_path: Path) -> None:
    def endless() -> None:
        while True:
            pass

    with pytest.raises(reports.Problem) as caught:
        bounded(endless, tmp_path, seconds=1)
    assert "more than 1 s of CPU time" in caught.value.seen


def test_what_takes_all_memory_is_ended(tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as caught:
        bounded(lambda: len(bytearray(3 << 30)) and 0, tmp_path, memory_bytes=1 << 30)
    assert "more than 1 GiB of memory" in caught.value.seen


@pytest.mark.parametrize(("work", "status"), [(lambda: 0, 0), (lambda: None, 0), (lambda: 3, 3)])
def test_a_childs_status_is_ours(work: Callable[[], Any], status: int, tmp_path: Path) -> None:
    assert bounded(work, tmp_path) == status


def test_a_crash_of_the_reader_is_a_report(tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as caught:
        bounded(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path)
    assert "SIGKILL" in caught.value.seen


# --- names from files in reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["n" * 2_000_000, "a\x1b[31mred\x1b]0;title\x07", "a\u202eb\rc\x9b1m"], ids=["long", "escape", "marks"]
)
def test_a_tensors_name_is_shortened_and_escaped(name: str, folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    head = json.dumps({**header, name: {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :] + bytes(4))
    with pytest.raises(reports.Problem) as caught:
        described(folder)
    for text in (caught.value.report(), caught.value.as_json()):
        assert len(text) < 3_000 and not any(c in text for c in "\x1b\x07\r\x9b\u202e")


# --- what the folder says is kept -------------------------------------------------------------------------------------


def test_every_end_that_a_file_names_is_in_the_list(tmp_path: Path) -> None:
    write_published(
        tmp_path / "model",
        **dict[str, Any](
            {
                "generation_config.json": {"eos_token_id": [258, 5]},
                "config.json": {"eos_token_id": 259, "bos_token_id": 256},
            }
        ),
    )
    listed = json.loads(described(tmp_path / "model").files["generation_config.json"])
    assert listed["eos_token_id"] == [258, 5, 259, 257]  # the last is tokenizer_config.json's
    assert listed["bos_token_id"] == 256


def test_an_end_that_the_model_cannot_say_is_none(tmp_path: Path) -> None:
    write_published(
        tmp_path / "model",
        **dict[str, Any]({"generation_config.json": {"eos_token_id": [257, 99_999, -1], "temperature": 0.6}}),
    )
    listed = json.loads(described(tmp_path / "model").files["generation_config.json"])
    assert (listed["eos_token_id"], listed["temperature"]) == (257, 0.6)


def test_files_that_say_one_thing_stay_as_they_are(folder: Path) -> None:
    files = described(folder).files
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert files[name] == (folder / name).read_bytes(), name


def test_tokenizer_json_alone(tmp_path: Path) -> None:
    """The other files name begin and end by their ids."""
    write_published(
        tmp_path / "model", **dict[str, Any]({"tokenizer_config.json": None, "generation_config.json": None})
    )
    files = described(tmp_path / "model").files
    made = json.loads(files["tokenizer_config.json"])
    assert (made["bos_token"], made["eos_token"]) == ("<|begin|>", "<|end|>")
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 256, "eos_token_id": 257}


def test_special_tokens_map_fills_what_tokenizer_config_lacks(tmp_path: Path) -> None:
    write_published(
        tmp_path / "model",
        **dict[str, Any](
            {
                "tokenizer_config.json": b'{"eos_token": "<|end|>"}',
                "special_tokens_map.json": {"bos_token": {"content": "<|begin|>"}},
            }
        ),
    )
    made = json.loads(described(tmp_path / "model").files["tokenizer_config.json"])
    assert made["bos_token"] == {"content": "<|begin|>"} and made["eos_token"] == "<|end|>"


def beyond(**more: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {
        "tokenizer.json": tokenizer(
            added_tokens=[*byte_tokenizer()["added_tokens"], {**flags, "id": VOCABULARY, "content": "<fill>"}], **more
        )
    }


def test_an_added_token_beyond_the_embedding_is_plain_text(tmp_path: Path) -> None:
    config = {
        "pad_token": "<fill>",
        "added_tokens_decoder": {str(VOCABULARY): {"content": "<fill>"}, "257": {"content": "<|end|>"}},
    }
    write_published(tmp_path / "model", **beyond(), **dict[str, Any]({"tokenizer_config.json": config}))
    made = described(tmp_path / "model")
    assert b"<fill>" not in b"".join(data for name, data in made.files.items())
    assert made.notes == ("added token '<fill>' (260) is plain text: the embedding has 260 rows",)
    kept = json.loads(made.files["tokenizer_config.json"])
    assert kept["added_tokens_decoder"] == {"257": {"content": "<|end|>"}} and "pad_token" not in kept


def test_an_end_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    write_published(
        tmp_path / "model", **beyond(), **dict[str, Any]({"tokenizer_config.json": {"eos_token": "<fill>"}})
    )
    with pytest.raises(reports.Problem) as caught:
        described(tmp_path / "model")
    assert "'<fill>'" in caught.value.seen and "260 rows" in caught.value.seen


def test_added_tokens_keep_their_ids_when_special_ones_lie_between(tmp_path: Path) -> None:
    """Qwen2's are in no vocabulary: special ones first, then <tool_call> and others that are plain tokens."""
    described_tokens = byte_tokenizer()
    for text in SPECIAL:
        del described_tokens["model"]["vocab"][text]
    described_tokens["added_tokens"][3]["special"] = False
    write_published(tmp_path / "model", **dict[str, Any]({"tokenizer.json": json.dumps(described_tokens)}))
    described(tmp_path / "model")
    text_model = Text(tmp_path / "model")
    assert text_model.encode(["a<|unused|>b<|end|>"])[0] == [97, 259, 98, *b"<|end|>"]
