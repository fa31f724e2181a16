"""A GGUF file becomes the model that transformers reads from it: every weight, the tokenizer, the chat template;
others are refused."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from synthetic import tokenizer_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from scripts import build_checkpoint, build_config, build_hf, plan, reports
from scripts.room import read_manifest
from scripts.tokenizer import sentencepiece
from scripts.weights import gguf as gguf_file
from scripts.weights import safetensors as safetensors_file
from scripts.weights.shape import LlamaShape

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, WIDE, LAYERS = 64, 4, 2, 32, 96, 2
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 kB, so that these small tensors go by several blocks, as large ones do."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 3000)


def byte_tokens() -> list[str]:
    """GPT-2's writing of the 256 bytes: what is not a visible character of Latin-1 moves to the end."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + others.index(byte)) for byte in range(256)]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ 1"]
TOKENS = [*SPECIAL, *byte_tokens(), *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(
    folder: Path,
    tied: bool = True,
    quantization: str = "Q4_1",
    vocabulary: str = "gpt2",
    bos_id: int = 1,
    norms: str = "",
    pre: str = "smollm",
    eos_id: int = 2,
    add_bos: Any = False,
    rope_freqs: Any = None,
    **changed: Any,
) -> Path:
    """A small random Llama as llama.cpp's converter writes it. changed: metadata, name -> value, None to leave it out.
    norms: their type, where it is not float32."""
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    fields: dict[str, Any] = {
        "llama.block_count": LAYERS, "llama.context_length": 128, "llama.embedding_length": HIDDEN, "llama.feed_forward_length": WIDE,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS, "llama.attention.key_length": HEAD_SIZE,
        "llama.rope.dimension_count": HEAD_SIZE, "llama.vocab_size": len(TOKENS), **changed,
    }  # fmt: skip
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model(vocabulary)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(eos_id)
    writer.add_unk_token_id(0)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)
    generator = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[quantization]

    def add(name: str, *shape: int) -> None:
        values = generator.standard_normal(shape).astype(np.float32) * HIDDEN**-0.5
        if len(shape) == 1 and norms:
            of_norms = gguf.GGMLQuantizationType[norms]
            writer.add_tensor(name, gguf.quantize(1 + values, of_norms), raw_dtype=of_norms)
        elif len(shape) == 1:
            writer.add_tensor(name, 1 + values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(TOKENS), HIDDEN)
    add("output_norm.weight", HIDDEN)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    if not tied:
        add("output.weight", len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_q.weight", HEADS * HEAD_SIZE, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", KV_HEADS * HEAD_SIZE, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", KV_HEADS * HEAD_SIZE, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * HEAD_SIZE)
        add(f"blk.{layer}.ffn_gate.weight", WIDE, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", WIDE, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, WIDE)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize(("tied", "quantization"), [(True, "Q4_1"), (False, "Q8_0"), (True, "F16")])
def test_every_weight_is_the_one_that_transformers_dequantizes(tied: bool, quantization: str, tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "weights", tied, quantization)
    build_hf.build_hf(build_config.Settings(folder, tmp_path / "hf"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="small.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-7)
    for name in ("hidden_size", "head_dim", "rope_parameters", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / "hf/model.safetensors") or not tied
    n_parameters = sum(parameter.numel() for parameter in theirs.parameters())
    assert read_manifest(tmp_path / "hf")["facts"]["parameters"] == n_parameters


def test_norms_may_be_quantized_too(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "weights", norms="Q8_0")
    build_hf.build_hf(build_config.Settings(folder, tmp_path / "hf"))
    ours = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "small.gguf").tensors}["output_norm.weight"]
    assert np.array_equal(ours["model.norm.weight"].numpy(), gguf.dequantize(stored.data, stored.tensor_type))


def test_the_checkpoint_needs_no_hugging_face_model(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "weights")
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    build_hf.build_hf(build_config.Settings(folder, tmp_path / "hf"))
    for name, model, weights in (("straight", "config", folder), ("detour", "hf", None)):
        settings = build_checkpoint.Settings(tmp_path / model, tmp_path / name, 2, "0.14.0", "float16", weights=weights)
        build_checkpoint.build_checkpoint(settings)
    for file in ("config.json", "rank0.safetensors", "rank1.safetensors"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "detour" / file).read_bytes()


def test_a_plan_knows_the_shape_from_the_room_config(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "weights")
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    found = plan.model_of(plan.Choice({"MODEL": "./m", "WEIGHTS": str(folder), "CONFIG": str(tmp_path / "config")}))
    assert found.shape == LlamaShape(HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS, len(TOKENS), head_dim=HEAD_SIZE)
    assert (found.form, found.dtype, found.context) == ("gguf", "float32", 128)


def test_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "weights")
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    ours = AutoTokenizer.from_pretrained(tmp_path / "config")
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="small.gguf")
    for text in ("hello world", "  two\n\ttabs", "안녕 😀", "it's one o'clock", "<|im_end|>"):
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    # SmolLM cuts a number into its digits, and so does llama.cpp; transformers does not look at sentencepiece.ggml.pre
    assert [ours.decode([number]) for number in ours("12 12").input_ids] == ["1", "2", " ", "1", "2"]
    said = ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "<|im_start|>hello<|im_end|>"
    assert (ours.bos_token, ours.eos_token) == ("<|im_start|>", "<|im_end|>")
    ids = json.loads((tmp_path / "config/generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2}


def sentencepiece_gguf(folder: Path, **ids: int) -> Any:
    """tokenizer.json of a GGUF file with the vocabulary of tokenizer_model(), and these ids of special tokens."""
    pieces = sentencepiece.parse_model(tokenizer_model()).pieces
    folder.mkdir()
    model = gguf.GGUFWriter(folder / "x.gguf", "llama")
    model.add_tokenizer_model("llama")
    model.add_token_list([piece.text for piece in pieces])
    model.add_token_scores([piece.score for piece in pieces])
    model.add_token_types([piece.type for piece in pieces])
    for name, number in ids.items():
        model.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    model.write_header_to_file()
    model.write_kv_data_to_file()
    model.write_tensors_to_file()
    model.close()
    return gguf_file.read_gguf(folder).tokenizer_files()["tokenizer.json"]


@pytest.mark.parametrize("ids", [{"bos": 1, "eos": 2, "unknown": 0}, {}])
def test_a_sentencepiece_vocabulary_reads_texts_as_sentencepiece_does(ids: dict[str, int], tmp_path: Path) -> None:
    """Where the file does not say the special tokens, they are llama.cpp's."""
    made = sentencepiece_gguf(tmp_path / "weights", **ids)
    expected = Tokenizer.from_str(
        json.dumps(sentencepiece.tokenizer_json(sentencepiece.parse_model(tokenizer_model())))
    )
    found = Tokenizer.from_str(json.dumps(made))
    for text in ("hello world", "banana  ana", "안녕하세요", "x = [[0, 0]]"):
        assert found.encode(text).ids == expected.encode(text).ids


@pytest.mark.parametrize("name", ["bos", "eos", "unknown"])
def test_a_special_token_that_is_no_token_is_a_report(name: str, tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as caught:
        sentencepiece_gguf(tmp_path / "weights", **{name: 312})
    assert f"{name}_token_id is 312, which is none of its 312 tokens" in caught.value.seen
    with pytest.raises(reports.Problem) as caught:
        sentencepiece_gguf(tmp_path / "none", **{name: 0xFFFFFFFF})
    assert f"has no {name[:3]}_token" in caught.value.seen


BAD: dict[str, tuple[Any, str]] = {
    "another architecture": ({"general.architecture": None}, "general.architecture"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is 8"),
    "rope scaling": ({"llama.rope.scaling.type": "yarn"}, "yarn"),
    "no layers": ({"llama.block_count": None}, "llama.block_count: it must be a number above 0; it is None"),
    "another size": ({"llama.feed_forward_length": 128}, "says [128, 64]; the tensor has [96, 64]"),
    "more layers": ({"llama.block_count": 3}, "Missing: blk.2."),
    "far more layers": ({"llama.block_count": 10**9}, "num_hidden_layers is 1000000000"),
    "a special token that is none": ({"bos_id": 5000}, "bos_token_id is 5000, which is none of its"),
    "another tokenizer": ({"vocabulary": "bert"}, "'bert'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changed, says = BAD[case]
    if case == "another architecture":
        folder = tmp_path / "weights"
        folder.mkdir()
        writer = gguf.GGUFWriter(folder / "x.gguf", "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        folder = write_gguf(tmp_path / "weights", **dict[str, Any](changed))
    with pytest.raises(reports.Problem) as caught:
        build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    assert says in caught.value.seen, caught.value.seen


@pytest.mark.parametrize("size", [0, 3, 100, 5000, 60000])
def test_a_file_that_was_cut_off_is_a_report(size: int, tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "weights")
    os.truncate(folder / "small.gguf", size)
    with pytest.raises(reports.Problem) as caught:
        build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    assert "small.gguf" in caught.value.seen


def lengths(data: bytes) -> dict[str, bytes]:
    """The file with one number of its header changed to what it cannot be."""
    tokens = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    tensor = data.index(b"output_norm.weight") + len(b"output_norm.weight")

    def changed(at: int, form: str, *values: int) -> bytes:
        return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]

    return {
        "tensors": changed(8, "<Q", 1 << 40),
        "fields": changed(16, "<Q", 1 << 40),
        "entries": changed(tokens + 8, "<Q", 1 << 40),
        "kind of entries": changed(tokens + 4, "<I", 0),
        "numbers without end": changed(tokens + 4, "<IQ", 0, 1 << 31),
        "lists of lists": changed(tokens + 4, "<IQ", 9, 1 << 30),
        "kind": changed(tokens, "<I", 77),
        "a name": changed(data.index(b"tokenizer.ggml.tokens") - 8, "<Q", 1 << 62),
        "axes": changed(tensor, "<I", 1 << 30),
        "numbers for texts": changed(tokens + 4, "<IQ", 5, 3),
        "nothing of GGUF": b"GGML" + data[4:],
    }


@pytest.mark.parametrize("what", lengths(b"tokenizer.ggml.tokens output_norm.weight"))
def test_a_length_that_cannot_be_is_a_report_at_once(what: str, tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "weights")
    path = folder / "small.gguf"
    path.write_bytes(lengths(path.read_bytes())[what])
    words = ["--weights", str(folder), "--output", str(tmp_path / "config")]
    command = [sys.executable, "-m", "scripts.build_config", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "SMALL.GGUF CANNOT BE READ" in done.stderr


def test_a_damaged_file_is_a_report_or_a_model(tmp_path: Path) -> None:
    """300 files with a few bytes of their header changed: what is read is whole."""
    folder = write_gguf(tmp_path / "weights")
    path = folder / "small.gguf"
    good, generator = path.read_bytes(), random.Random(0)
    end = good.index(b"blk.1.ffn_norm.weight") + 60
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(generator.choice([1, 2, 3])):
            damaged[generator.choice([generator.randrange(24, end), generator.randrange(end - 900, end)])] = (
                generator.randrange(256)
            )
        path.write_bytes(damaged)
        try:
            weights = build_config.describe(build_config.Settings(folder, tmp_path / "config")).weights
            for name, (_, shape) in weights.tensors.items():
                assert sum(len(block) for block in weights.blocks(name)) == shape[0]
        except reports.Problem:
            continue


# --- llama.cpp's defaults, parts, scaling, quantized blocks -----------------------------------------------------------


def described(folder: Path) -> dict[str, Any]:
    files = build_config.describe(build_config.Settings(folder, folder / "nowhere")).files
    return {name: json.loads(data) for name, data in files.items() if name.endswith(".json")}


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize(("pre", "default"), [("smollm", False), ("llama-bpe", True), ("gpt-2", False)])
def test_bos_begins_a_text_where_llama_cpp_has_it(pre: str, default: bool, said: Any, tmp_path: Path) -> None:
    """llama-vocab.cpp: add_bos is true for llama-bpe unless the file says otherwise."""
    files = described(write_gguf(tmp_path / "weights", pre=pre, add_bos=said))
    begins = Tokenizer.from_str(json.dumps(files["tokenizer.json"])).encode("hello").ids[0] == 1
    assert begins is files["tokenizer_config.json"]["add_bos_token"] is (default if said is None else said)


ENDS = {
    "eos alone, and it ends a turn": ({}, 2),
    "eot": ({"tokenizer.ggml.eot_token_id": 1}, [2, 1]),
    "eot and eom": ({"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 0}, [2, 1, 0]),
    "eot that is eos": ({"tokenizer.ggml.eot_token_id": 2}, 2),
    "none, found by its text": ({"eos_id": 0}, [0, 2]),
    "none, by llama.cpp's number": ({"tokenizer.ggml.eot_token_id": 0xFFFFFFFF}, 2),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_answer_ends_at_eos_eot_and_eom(case: str, tmp_path: Path) -> None:
    changed, listed = ENDS[case]
    files = described(write_gguf(tmp_path / "weights", **dict[str, Any](changed)))
    assert files["generation_config.json"]["eos_token_id"] == listed


def parts_of(folder: Path, count: int, **changed: Any) -> Path:
    """The same model in parts, as llama-gguf-split writes it: the first has the metadata, all have tensors."""
    write_gguf(folder / "whole")
    reader = gguf.GGUFReader(folder / "whole/small.gguf")
    (folder / "parts").mkdir()
    tensors = list(reader.tensors)
    for number in range(count):
        writer = gguf.GGUFWriter(folder / f"parts/small-{number + 1:05d}-of-{count:05d}.gguf", "llama")
        for name, field in reader.fields.items() if number == 0 else ():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            value = field.contents()
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], sub_type)
        numbers = {"split.no": number, "split.count": count, **changed}
        for name, value in numbers.items():
            writer.add_uint16(name, value)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / "parts"


def test_parts_are_one_model(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, 3)
    for name in ("whole", "parts"):
        build_hf.build_hf(build_config.Settings(tmp_path / name, tmp_path / f"hf-{name}"))
    whole, joined = (
        safetensors.torch.load_file(tmp_path / f"hf-{name}/model.safetensors") for name in ("whole", "parts")
    )
    assert set(whole) == set(joined) and all(torch.equal(whole[name], joined[name]) for name in whole)
    weights = build_config.describe(build_config.Settings(parts, tmp_path)).weights
    assert [path.name for path in weights.files] == [f"small-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, 3)
    (parts / "small-00002-of-00003.gguf").unlink()
    with pytest.raises(reports.Problem) as caught:
        described(parts)
    assert caught.value.title == "no small-00002-of-00003.gguf"
    assert not re.search(r"\b(mv|rm)\b", caught.value.command)


def test_parts_that_say_other_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as caught:
        described(parts_of(tmp_path, 2, **{"split.count": 5}))
    assert "split.no and split.count" in caught.value.seen


def test_of_several_models_the_advice_moves_none(tmp_path: Path) -> None:
    """It links the one that is meant into its own folder: nothing is lost, whichever it is."""
    folder = write_gguf(tmp_path / "weights")
    (folder / "other.gguf").write_bytes((folder / "small.gguf").read_bytes())
    with pytest.raises(reports.Problem) as caught:
        described(folder)
    done = subprocess.run(["bash", "-ec", caught.value.command], cwd=ROOT, check=False)
    assert done.returncode == 0 and sorted(path.name for path in folder.iterdir()) == ["other.gguf", "small.gguf"]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["other.gguf"]
    assert described(tmp_path / "other")


LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def their_divisors(factor: float) -> Any:
    """By transformers: plain frequencies over scaled ones."""

    def frequencies(scaling: dict[str, Any]) -> Any:
        config = LlamaConfig(
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            head_dim=HEAD_SIZE,
            max_position_embeddings=131072,
            rope_parameters={"rope_theta": 100000.0, **scaling},
        )
        return LlamaRotaryEmbedding(config).inv_freq

    return (frequencies({"rope_type": "default"}) / frequencies({**LLAMA31, "factor": factor})).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_are_llama_3_1s_scaling(factor: float, tmp_path: Path) -> None:
    files = described(write_gguf(tmp_path / "weights", rope_freqs=their_divisors(factor)))
    assert files["config.json"]["rope_scaling"] == {**LLAMA31, "factor": factor}


def test_rope_freqs_of_ones_scale_nothing(tmp_path: Path) -> None:
    files = described(write_gguf(tmp_path / "weights", rope_freqs=np.ones(HEAD_SIZE // 2, np.float32)))
    assert files["config.json"]["rope_scaling"] is None


@pytest.mark.parametrize("values", [np.linspace(1, 7, HEAD_SIZE // 2), np.ones(5)], ids=["others", "too few"])
def test_other_rope_freqs_are_refused_by_their_name(values: Any, tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as caught:
        described(write_gguf(tmp_path / "weights", rope_freqs=values.astype(np.float32)))
    assert "rope_freqs.weight" in caught.value.seen and "rope scaling" in caught.value.seen


def test_yarn_is_read(tmp_path: Path) -> None:
    more = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4,
        "llama.rope.scaling.original_context_length": 32,
    }
    scaling = described(write_gguf(tmp_path / "weights", **dict[str, Any](more)))["config.json"]["rope_scaling"]
    assert scaling == {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_heads_that_turn_in_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as caught:
        described(write_gguf(tmp_path / "weights", **dict[str, Any]({"llama.rope.dimension_count": HEAD_SIZE // 2})))
    assert "llama.rope.dimension_count is 16 of the 32 of a head" in caught.value.seen


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_quantized_blocks_are_what_ggufs_own_dequantization_gives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows of random blocks, read some at a time, and at once by the package;
    for q in Meta's order of rows too."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 20_000)
    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    rows, columns, heads = 12, 512, 3
    raw = np.random.default_rng(1).integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    raw.reshape(-1, size)[:, :2] = np.frombuffer(
        np.float16(0.01).tobytes(), np.uint8
    )  # scales that are numbers, wherever they are
    raw.reshape(-1, size)[:, -2:] = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
    whole = gguf.dequantize(raw, quantization)
    shape = LlamaShape(columns, columns, 1, heads, heads, rows, head_dim=4)
    stored = SimpleNamespace(name="t", data=raw, tensor_type=quantization)
    for hf_name, permuted in (("model.embed_tokens.weight", False), ("model.layers.0.self_attn.q_proj.weight", True)):
        weights = gguf_file.GgufWeights((tmp_path,), shape, {hf_name: "t"}, {"t": stored}, {"t": tmp_path})
        ours = np.concatenate(list(weights.blocks(hf_name))).view(np.float32)
        pairs = whole.reshape(heads, 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        np.testing.assert_array_equal(ours, pairs if permuted else whole)
