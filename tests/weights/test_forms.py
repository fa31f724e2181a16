"""Every form of a Llama becomes the same checkpoint and gives transformers' answers; a model that is not a Llama is
refused by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiktoken
import torch
from synthetic import GROUPED, Tensors, meta_tensors, split, write_meta, write_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scripts import build_checkpoint, build_config, build_hf, reports
from scripts.tokenizer import byte_bpe
from scripts.weights import safetensors as safetensors_file
from scripts.weights import split as split_over
from scripts.weights.shape import SCALED_ROPE, LlamaShape, padded_heads, why_impossible


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 kB, so that these small tensors go by several blocks, as large ones do."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 3000)


def checkpoint(weights: Path, room: Path, tp_size: int = 2, version: str = "0.14.0", **more: Any) -> Path:
    """Straight from the weights: the room config, then the ranks."""
    config = room.with_name(room.name + "-config")
    build_config.build_config(build_config.Settings(weights, config))
    settings = build_checkpoint.Settings(config, room, tp_size, version, weights=weights, **more)
    build_checkpoint.build_checkpoint(settings)
    return room


def published(folder: Path, **changed: Any) -> Path:
    """A random Llama in Hugging Face's form, saved by transformers."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 120,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig(**{**sizes, "vocab_size": 312, "max_position_embeddings": 256, **changed})
    model: Any = LlamaForCausalLM(config)
    model.to(torch.float16).save_pretrained(folder)
    write_model(folder / "meta")
    (folder / "meta/tokenizer.model").rename(folder / "tokenizer.model")
    return folder


def edit(folder: Path, **changed: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


def ranks_of(room: Path) -> list[Tensors]:
    return [safetensors.torch.load_file(path) for path in sorted(room.glob("rank*.safetensors"))]


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*") if path.suffix == ".safetensors" or path.name == "config.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names) and len(names) > 1


# --- the same model in several forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_shards", [1, 2, 4, 8])
def test_metas_shards_go_straight_into_the_ranks(n_shards: int, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "meta", n_shards=n_shards)
    straight = checkpoint(weights, tmp_path / "straight", 4, "0.8.0")
    build_hf.build_hf(build_config.Settings(weights, tmp_path / "hf"))
    build_checkpoint.build_checkpoint(build_checkpoint.Settings(tmp_path / "hf", tmp_path / "detour", 4, "0.8.0"))
    assert same(straight, tmp_path / "detour")


def test_weights_in_bin_files_single_and_several(tmp_path: Path) -> None:
    folder = published(tmp_path / "published")
    expected = checkpoint(folder, tmp_path / "expected", 3)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert same(checkpoint(folder, tmp_path / "single", 3), expected)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(checkpoint(folder, tmp_path / "several", 3), expected)
    build_hf.build_hf(build_config.Settings(folder, tmp_path / "hf"))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())


def test_a_flipped_bit_of_a_bin_file_is_found_and_named(tmp_path: Path) -> None:
    folder = published(tmp_path / "published")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(reports.Problem, match="damaged") as caught:
        checkpoint(folder, tmp_path / "room", 3)
    assert "The bytes of model." in caught.value.seen or "The bytes of lm_head" in caught.value.seen


def test_a_bin_file_that_wants_to_run_something_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return print, ("went off",)

    folder = published(tmp_path / "published")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(reports.Problem) as caught:
        checkpoint(folder, tmp_path / "room")
    assert "wants to call" in caught.value.seen


# --- shapes that Meta's Llama does not have ---------------------------------------------------------------------------


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.float()(torch.arange(3, 40)[None]).logits
        return logits[0]


def joined(room: Path, source: Path) -> Any:
    """The ranks put together again as one of transformers' models, with the heads that their config.json says."""
    config = json.loads((room / "config.json").read_text())
    heads, kv_heads, size, tp_size = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_size"],
        config["mapping"]["tp_size"],
    )
    llama: Any = AutoModelForCausalLM.from_pretrained(source).config
    llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim, llama.tie_word_embeddings = (
        heads,
        kv_heads,
        size,
        False,
    )
    ranks, weights = ranks_of(room), {}
    rows = [heads // tp_size * size, kv_heads // tp_size * size, kv_heads // tp_size * size]
    weights["model.embed_tokens.weight"] = ranks[0]["transformer.vocab_embedding.weight"]
    weights["model.norm.weight"] = ranks[0]["transformer.ln_f.weight"]
    weights["lm_head.weight"] = torch.cat([rank["lm_head.weight"] for rank in ranks])[: config["vocab_size"]]
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        qkv = [rank[ours + "attention.qkv.weight"].split(rows) for rank in ranks]
        for index, name in enumerate("qkv"):
            weights[f"{theirs}self_attn.{name}_proj.weight"] = torch.cat([part[index] for part in qkv])
        for name, ours_name, dim in (
            ("self_attn.o_proj", "attention.dense", 1),
            ("mlp.gate_proj", "mlp.fc", 0),
            ("mlp.up_proj", "mlp.gate", 0),
            ("mlp.down_proj", "mlp.proj", 1),
        ):
            weights[f"{theirs}{name}.weight"] = torch.cat([rank[f"{ours}{ours_name}.weight"] for rank in ranks], dim)
        weights[theirs + "input_layernorm.weight"] = ranks[0][ours + "input_layernorm.weight"]
        weights[theirs + "post_attention_layernorm.weight"] = ranks[0][ours + "post_layernorm.weight"]
    model = LlamaForCausalLM(llama)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    ("changed", "tp_size", "heads"),
    [
        ({}, 2, (8, 4)),  # 6 heads in 3 groups: a group of zeros is added
        ({}, 1, (6, 3)),
        ({}, 3, (6, 3)),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24}, 3, (6, 6)),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 10}, 2, (16, 4)),
        ({"tie_word_embeddings": True}, 2, (8, 4)),
    ],
)
def test_padded_heads_change_nothing(changed: dict[str, Any], tp_size: int, heads: Any, tmp_path: Path) -> None:
    folder = published(tmp_path / "published", **changed)
    room = checkpoint(folder, tmp_path / "room", tp_size, pad_heads=True, dtype="float32")
    config = json.loads((room / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == heads
    torch.testing.assert_close(logits_of(joined(room, folder)), logits_of(AutoModelForCausalLM.from_pretrained(folder)))


def test_what_is_added_is_zero(tmp_path: Path) -> None:
    """6 heads of 16 in 3 groups become 8 in 4: the last two have no rows in q, k and v, and dense has no columns for
    them."""
    folder = published(tmp_path / "published")
    weights = joined(checkpoint(folder, tmp_path / "room", 2, pad_heads=True, dtype="float32"), folder).state_dict()
    attention = "model.layers.1.self_attn."
    for name, first in (("q_proj", 96), ("k_proj", 48), ("v_proj", 48)):
        rows = weights[f"{attention}{name}.weight"]
        assert rows[:first].any(1).all() and not rows[first:].any(), name
    columns = weights[f"{attention}o_proj.weight"]
    assert columns[:, :96].any(0).all() and not columns[:, 96:].any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size", "expected"),
    [
        (9, 3, 2, (12, 4)),
        (9, 3, 3, (9, 3)),
        (14, 2, 4, (16, 2)),
        (9, 3, 6, (12, 3)),
        (32, 8, 4, (32, 8)),
        (8, 1, 3, (9, 1)),
    ],
)
def test_so_many_heads_are_there_after_padding(heads: int, kv_heads: int, tp_size: int, expected: Any) -> None:
    shape = LlamaShape(64 * heads, 840, 2, heads, kv_heads, 100)
    assert padded_heads(shape, tp_size) == expected
    for rank in range(tp_size):
        tensors = split_over.rank_tensors(shape, tp_size, rank)
        rows = (expected[0] // tp_size + 2 * max(1, expected[1] // tp_size)) * 64
        assert tensors["transformer.layers.0.attention.qkv.weight"].shape == (rows, 64 * heads)
        assert tensors["transformer.layers.0.attention.dense.weight"].shape == (64 * heads, expected[0] // tp_size * 64)


def test_padding_is_asked_for_and_only_where_config_json_can_say_the_head_size(tmp_path: Path) -> None:
    folder = published(tmp_path / "published")
    with pytest.raises(reports.Problem) as caught:
        checkpoint(folder, tmp_path / "room", 2)
    assert "the number of key/value heads is 3" in caught.value.seen and "PAD_HEADS=on" in caught.value.seen
    with pytest.raises(reports.Problem) as caught:
        checkpoint(folder, tmp_path / "room", 2, "0.8.0", pad_heads=True)
    assert (
        "8 heads of 16 do not make hidden_size 96" in caught.value.seen and "TOOLCHAIN=0.14.0" in caught.value.command
    )
    assert why_impossible(LlamaShape(96, 121, 2, 6, 3, 312), 2, pad_heads=True) is not None


def test_an_explicit_head_size(tmp_path: Path) -> None:
    folder = published(tmp_path / "published", head_dim=32)
    room = checkpoint(folder, tmp_path / "room", 3, dtype="float32")
    assert json.loads((room / "config.json").read_text())["head_size"] == 32
    torch.testing.assert_close(logits_of(joined(room, folder)), logits_of(AutoModelForCausalLM.from_pretrained(folder)))
    with pytest.raises(reports.Problem, match="head size"):
        checkpoint(folder, tmp_path / "old", 3, "0.8.0")


ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: str(rope["rope_type"]))
def test_scaled_positions_reach_the_checkpoint(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = published(tmp_path / "published", rope_parameters={"rope_theta": 10000.0, **rope})
    config = json.loads((checkpoint(folder, tmp_path / "room", 3) / "config.json").read_text())
    assert config["rotary_scaling"] == {"type" if name == "rope_type" else name: value for name, value in rope.items()}


LLAMA3 = ROPES[2]
BAD_ROPES: dict[str, Any] = {
    "no factor": ({"type": "linear"}, "factor: it must be a number above 0; it is None"),
    "a factor of text": ({"type": "linear", "factor": "2"}, "it is '2'"),
    "a factor below 0": ({"rope_type": "dynamic", "factor": -1}, "it is -1"),
    "a factor of 0": ({"rope_type": "linear", "factor": 0}, "it is 0"),
    "a factor that shrinks": ({"rope_type": "linear", "factor": 0.5}, "it must be at least 1; it is 0.5"),
    "llama3 with its factor alone": ({"rope_type": "llama3", "factor": 8.0}, "original_max_position_embeddings"),
    "llama3 without low": ({**LLAMA3, "low_freq_factor": None}, "low_freq_factor: it must be a number above 0"),
    "llama3 without high": ({**LLAMA3, "high_freq_factor": "4"}, "high_freq_factor: it must be a number above 0"),
    "llama3 with low as high": ({**LLAMA3, "low_freq_factor": 4.0}, "it must be less than high_freq_factor"),
}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("case", BAD_ROPES)
def test_scaled_positions_whose_numbers_are_not_there_are_refused(case: str, spelling: str, tmp_path: Path) -> None:
    rope, says = BAD_ROPES[case]
    folder = edit(published(tmp_path / "published"), **{"rope_parameters": None, spelling: rope})
    with pytest.raises(reports.Problem) as caught:
        checkpoint(folder, tmp_path / "room", 3)
    assert says in caught.value.seen, caught.value.seen


def test_of_two_rope_settings_the_one_that_transformers_takes_is_taken(tmp_path: Path) -> None:
    two = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    folder = edit(published(tmp_path / "published"), **two)
    theirs: Any = LlamaConfig.from_pretrained(folder).rope_parameters
    config = json.loads((checkpoint(folder, tmp_path / "room", 3) / "config.json").read_text())
    assert (theirs["rope_type"], theirs["factor"]) == ("linear", 4.0)
    assert config["rotary_scaling"] == {"type": "linear", "factor": 4.0}
    assert config["rotary_base"] == theirs["rope_theta"]


def test_a_mistral_without_its_window_is_a_llama_and_with_it_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "published")
    expected = checkpoint(folder, tmp_path / "expected", 3)
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert same(checkpoint(edit(folder, **mistral, sliding_window=None), tmp_path / "room", 3), expected)
    for changed in ({"sliding_window": 128}, {"sliding_window": True}):
        with pytest.raises(reports.Problem) as caught:
            checkpoint(edit(folder, **changed), tmp_path / "refused", 3)
        assert "sliding_window is" in caught.value.seen
    values = json.loads((folder / "config.json").read_text())
    del values["sliding_window"]  # transformers takes 4096 then
    (folder / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 8192}))
    with pytest.raises(reports.Problem, match="can be converted"):
        checkpoint(folder, tmp_path / "refused", 3)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GemmaForCausalLM", "Phi3ForCausalLM"])
def test_what_is_no_llama_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as caught:
        checkpoint(edit(published(tmp_path / "published"), architectures=[name]), tmp_path / "room", 3)
    assert name in caught.value.seen and "LlamaForCausalLM" in caught.value.seen


# --- Llama 3 in Meta's form -------------------------------------------------------------------------------------------

WORDS = ["he", "ll", "hell", "hello", " w", "wor", "or", "ld", " world", "12", "123", "  ", "ing", "안", "녕", "'s"]
WORDS += ["\n\n"]


def llama3(folder: Path, **params: Any) -> Path:
    """Meta's form with a tiktoken file: 256 bytes and some words, in an order as training gives it, then 256 special
    tokens."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in WORDS:
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in tokens]
    tokens += [b"even"] * (len(tokens) % 2)  # two shards share them
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    dims = type(GROUPED)(vocab_size=len(tokens) + 256)
    return write_meta(
        folder,
        split(meta_tensors(dims), 2, embedding_dim=0),
        dims.params(rope_theta=500000.0, **{"vocab_size": dims.vocab_size, **params}),
        lines,
    )


def test_llama_3s_tokenizer_gives_tiktokens_ids_for_any_text(tmp_path: Path) -> None:
    folder = llama3(tmp_path / "llama3")
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    ours = Tokenizer.from_file(str(tmp_path / "config/tokenizer.json"))
    model = byte_bpe.read_tiktoken(folder / "tokenizer.model", since_3_1=False)
    special = {token: model.bos_id + index for index, token in enumerate(model.special)}
    ranks = {token: rank for rank, token in enumerate(model.tokens)}
    theirs = tiktoken.Encoding("llama3", pat_str=byte_bpe.LLAMA3, mergeable_ranks=ranks, special_tokens=special)
    generator = torch.Generator().manual_seed(0)
    texts = ["", "hello world", "HELLO'S world's", "안녕하세요 😀", "1234567 12", "  a\n\n  b\t\r\n", "he\u0301llo"]
    pieces = [*WORDS, " ", "x", "é", "漢", "\n"]
    texts += ["".join(pieces[i] for i in torch.randint(len(pieces), (40,), generator=generator)) for _ in range(200)]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, disallowed_special=()), text
    assert ours.encode("hello").ids[0] == special["<|begin_of_text|>"]
    fast = AutoTokenizer.from_pretrained(tmp_path / "config")
    assert (fast.bos_token, fast.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert fast.decode(fast("hello world").input_ids, skip_special_tokens=True) == "hello world"
    ids = json.loads((tmp_path / "config/generation_config.json").read_text())["eos_token_id"]
    assert [fast.convert_ids_to_tokens(i) for i in ids] == ["<|end_of_text|>", "<|eot_id|>"]


def test_special_tokens_have_metas_places() -> None:
    old, new = byte_bpe.special_tokens(False), byte_bpe.special_tokens(True)
    assert old[:11] == (
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>",
    )  # fmt: skip
    assert [new[i] for i in (4, 5, 8, 9, 10, 11)] == [
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
        "<|reserved_special_token_3|>",
    ]  # fmt: skip
    assert len(set(old)) == len(set(new)) == 256


def test_llama_3_in_metas_form_becomes_a_checkpoint(tmp_path: Path) -> None:
    config = json.loads((checkpoint(llama3(tmp_path / "llama3"), tmp_path / "room") / "config.json").read_text())
    assert (config["rotary_base"], config["rotary_scaling"], config["max_position_embeddings"]) == (
        500000.0,
        None,
        8192,
    )


def test_llama_3_1s_positions_are_stretched_as_its_size_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(reports.Problem) as caught:
        checkpoint(llama3(tmp_path / "unknown", use_scaled_rope=True), tmp_path / "room")
    assert "use_scaled_rope is true, with dim 96 and 3 layers" in caught.value.seen
    monkeypatch.setitem(SCALED_ROPE, (96, 3), 32)
    config = json.loads(
        (checkpoint(llama3(tmp_path / "known", use_scaled_rope=True), tmp_path / "room") / "config.json").read_text()
    )
    assert config["max_position_embeddings"] == 131072
    assert config["rotary_scaling"] == {
        "type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    "spoil",
    [lambda d: d[:-3], lambda d: d.replace(b" 7\n", b" 8\n"), lambda d: d + b"IQ== 999\n", lambda d: d + b"junk\n"],
)
def test_a_damaged_tiktoken_file_is_a_report(spoil: Any, tmp_path: Path) -> None:
    folder = llama3(tmp_path / "llama3")
    (folder / "tokenizer.model").write_bytes(spoil((folder / "tokenizer.model").read_bytes()))
    with pytest.raises(reports.Problem) as caught:
        build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    assert caught.value.title.startswith("tokenizer")
