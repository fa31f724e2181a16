"""A GGUF file becomes the model that transformers reads from it: every weight, the tokenizer, the chat template; others are refused."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from synthetic import tokenizer_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import build_checkpoint, build_config, build_hf, reports
from scripts.room import read_manifest
from scripts.tokenizer import sentencepiece
from scripts.weights import gguf as gguf_file
from scripts.weights import safetensors as safetensors_file

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, WIDE, LAYERS = 64, 4, 2, 32, 96, 2
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 kB, so that these small tensors go by several blocks, as large ones do."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 3000)


def byte_tokens() -> List[str]:
    """GPT-2's writing of the 256 bytes: what is no visible character of Latin-1 moves behind it."""
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
    **changed: Any,
) -> Path:
    """A small random Llama as llama.cpp's converter writes it. changed: metadata, name -> value, None to leave it out. norms: their
    type, where it is not float32."""
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    fields: Dict[str, Any] = {
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
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
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
    build_hf.build_hf(build_hf.Settings(folder, tmp_path / "hf"))
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
    build_hf.build_hf(build_hf.Settings(folder, tmp_path / "hf"))
    ours = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "small.gguf").tensors}["output_norm.weight"]
    assert np.array_equal(ours["model.norm.weight"].numpy(), gguf.dequantize(stored.data, stored.tensor_type))


def test_the_checkpoint_needs_no_hugging_face_model(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "weights")
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    build_hf.build_hf(build_hf.Settings(folder, tmp_path / "hf"))
    for name, model, weights in (("straight", "config", folder), ("detour", "hf", None)):
        settings = build_checkpoint.Settings(tmp_path / model, tmp_path / name, 2, "0.14.0", "float16", weights=weights)
        build_checkpoint.build_checkpoint(settings)
    for file in ("config.json", "rank0.safetensors", "rank1.safetensors"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "detour" / file).read_bytes()


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
def test_a_sentencepiece_vocabulary_reads_texts_as_sentencepiece_does(ids: Dict[str, int], tmp_path: Path) -> None:
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


BAD = {
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
        folder = write_gguf(tmp_path / "weights", **changed)
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


def lengths(data: bytes) -> Dict[str, bytes]:
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
