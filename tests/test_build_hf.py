"""The room hf: Meta's weights become a model that Hugging Face's code loads and that gives the same answers;
bad input gets a report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import GROUPED, PLAIN, Dims, Tensors, meta_tensors, split, tokenizer_model, write_meta, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import build_config, build_hf, reports
from scripts.room import read_manifest
from scripts.weights import meta as meta_weights
from scripts.weights import safetensors as safetensors_file

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "models" / "stories"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 kB, so that these small tensors go by several blocks, as large ones do."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 3000)


def build(weights: Path, room: Path, **settings: Any) -> Path:
    build_hf.build_hf(build_config.Settings(weights, room, **settings))
    return room


def load(room: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(room.glob("*.safetensors")):
        tensors.update(safetensors.torch.load_file(path))
    return tensors


def expected_hf(meta: Tensors, dims: Dims) -> Tensors:
    """The documented re-naming, spelled out; q and k row by row:
    pair j of a head becomes row j and row j + head_size/2."""
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    parts = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj"}
    parts |= {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    parts |= {
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(dims.n_layers):
        names |= {f"layers.{layer}.{meta_part}": f"model.layers.{layer}.{part}" for meta_part, part in parts.items()}
    result = {}
    for name, tensor in meta.items():
        if name.endswith(("wq.weight", "wk.weight")):
            rows, half = tensor.clone(), dims.head_size // 2
            for head in range(len(tensor) // dims.head_size):
                for pair in range(half):
                    start = head * dims.head_size
                    rows[start + pair] = tensor[start + 2 * pair]
                    rows[start + half + pair] = tensor[start + 2 * pair + 1]
            tensor = rows
        result[names[name.removesuffix(".weight")] + ".weight"] = tensor
    return result


def meta_logits(tensors: Tensors, dims: Dims, token_ids: torch.Tensor, rope_theta: float = 10000.0) -> torch.Tensor:
    """Llama 2 from its paper and RoFormer's, in float32: rotary positions as complex numbers on neighbouring pairs.

    token_ids (length) -> logits (length, vocab_size).
    """
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    length, head = len(token_ids), dims.head_size
    angles = torch.outer(torch.arange(length), rope_theta ** -(torch.arange(0, head, 2) / head))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (length, 1, head/2)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + dims.norm_eps) * weight

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)

    x = weights["tok_embeddings.weight"][token_ids]
    for layer in range(dims.n_layers):
        w = {name.removeprefix(f"layers.{layer}."): tensor for name, tensor in weights.items()}
        y = norm(x, w["attention_norm.weight"])
        q, k, v = ((y @ w[f"attention.w{name}.weight"].T).unflatten(-1, (-1, head)) for name in "qkv")
        shared = dims.n_heads // dims.n_kv_heads
        k, v = rotate(k).repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / head**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", scores, v).flatten(-2) @ w["attention.wo.weight"].T
        y = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(y @ w["feed_forward.w1.weight"].T) * (y @ w["feed_forward.w3.weight"].T)
        x = x + gate @ w["feed_forward.w2.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tensors_equal_metas_bit_for_bit_from_any_number_of_shards(
    n_shards: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    room = build(write_model(tmp_path / "meta", GROUPED, dtype, n_shards), tmp_path / "hf")
    found, expected = load(room), expected_hf(meta_tensors(GROUPED, dtype), GROUPED)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name


def test_an_embedding_that_was_split_by_rows_is_joined_by_rows(tmp_path: Path) -> None:
    tensors = meta_tensors()
    weights = write_meta(tmp_path / "meta", split(tensors, 2, embedding_dim=0), GROUPED.params(), tokenizer_model())
    assert torch.equal(
        load(build(weights, tmp_path / "hf"))["model.embed_tokens.weight"], tensors["tok_embeddings.weight"]
    )


@pytest.mark.parametrize("dims", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_hugging_faces_model_says_what_metas_model_says(dims: Dims, tmp_path: Path) -> None:
    room = build(write_model(tmp_path / "meta", dims, n_shards=2), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(room, dtype=torch.float32)
    token_ids = torch.tensor([1, 300, 17, 260, 260, 311, 5, 270])
    with torch.no_grad():
        logits = model(token_ids[None]).logits[0]
    torch.testing.assert_close(logits, meta_logits(meta_tensors(dims), dims, token_ids), rtol=1e-4, atol=1e-4)


def test_params_reach_the_config(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "meta")
    (weights / "params.json").write_text(json.dumps(GROUPED.params(rope_theta=500000.0, norm_eps=2e-6)))
    config = AutoModelForCausalLM.from_pretrained(build(weights, tmp_path / "hf")).config
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps, config.max_position_embeddings) == (
        500000.0,
        2e-6,
        8192,
    )
    assert str(config.dtype) == "torch.float16"
    old_names = json.loads((tmp_path / "hf" / "config.json").read_text())  # transformers 4.36 reads these two
    assert (old_names["torch_dtype"], old_names["rope_theta"]) == ("float16", 500000.0)


@pytest.mark.parametrize(
    ("asked", "params", "expected"),
    [(7, {"max_seq_len": 9}, 7), (None, {"max_seq_len": 9}, 9), (None, {}, 4096), (None, {"rope_theta": 1e6}, 16384)],
)
def test_the_number_of_positions_and_its_source_are_told(
    asked: Any, params: dict[str, Any], expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_model(tmp_path / "meta")
    (weights / "params.json").write_text(json.dumps(GROUPED.params(**params)))
    room = build(weights, tmp_path / "hf", max_position_embeddings=asked)
    assert json.loads((room / "config.json").read_text())["max_position_embeddings"] == expected
    assert f"{expected} positions: " in capsys.readouterr().out


def test_a_large_model_goes_into_several_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_hf, "FILE_MAX_BYTES", 200_000)
    room = build(write_model(tmp_path / "meta"), tmp_path / "hf")
    files = sorted(room.glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 210_000 for path in files)
    model = AutoModelForCausalLM.from_pretrained(room, dtype="auto")
    expected = expected_hf(meta_tensors(), GROUPED)
    assert {name: torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()} == dict.fromkeys(
        expected, True
    )
    index = json.loads((room / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_the_bundled_model_tells_its_story_and_its_tokenizer_reads_as_sentencepiece(tmp_path: Path) -> None:
    room = build(STORIES, tmp_path / "hf", max_position_embeddings=512)
    tokenizer: Any = AutoTokenizer.from_pretrained(room)
    model: Any = AutoModelForCausalLM.from_pretrained(room, dtype=torch.float32)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert sorted(tokenizer("Once upon a time")) == ["attention_mask", "input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith(
        "Once upon a time, in a small village surrounded by a beautiful forest, there lived a little girl named Lily."
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(STORIES / "tokenizer.model"))
    for text in (
        "",
        " x",
        "   three",
        "a\nb",
        "</s>",
        "x<s>y",
        "<unk>",
        "<0x0A>",
        "안녕하세요 😀",
        "tail  ",
        "\u2581\0",
    ):
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)
        assert tokenizer(text).input_ids == [1, *reference.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == reference.decode(
            reference.encode(text)
        )


def test_the_room_is_the_same_wherever_it_is_made_and_others_may_read_it(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "meta", n_shards=2)
    one, other = build(weights, tmp_path / "one" / "hf"), build(weights, tmp_path / "other" / "hf")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert (one / "model.safetensors").stat().st_mode & 0o777 == 0o644
    facts = read_manifest(one)["facts"]
    n_parameters = sum(tensor.numel() for tensor in meta_tensors().values())
    assert facts == {"form": "meta", "shards": 2, "dtype": "float16", "parameters": n_parameters}


def test_the_tokenizer_may_lie_one_level_up_as_metas_download_leaves_it(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "meta")
    (weights / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert (build(weights, tmp_path / "hf") / "tokenizer.model").read_bytes() == tokenizer_model()


@given(heads=st.integers(1, 4), half=st.integers(1, 5), columns=st.integers(1, 3))
def test_halves_to_pairs_is_the_way_back(heads: int, half: int, columns: int) -> None:
    rows = np.arange(heads * 2 * half * columns, dtype=np.uint16).reshape(-1, columns)
    there = meta_weights.pairs_to_halves(rows, 2 * half)
    assert np.array_equal(meta_weights.halves_to_pairs(there, 2 * half), rows)


# --- a Hugging Face folder as input -----------------------------------------------------------------------------------


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A folder as somebody else would publish it: several files, an index, a script that must not come along."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_hf, "FILE_MAX_BYTES", 200_000)
        folder = build(write_model(tmp_path / "meta"), tmp_path / "published")
    for name in ("manifest.json", "args", "args.sha256", "made_from.json"):
        (folder / name).unlink()
    (folder / "modeling_llama.py").write_text("raise SystemExit")
    return folder


def test_a_hugging_face_folder_passes_through_without_copying_its_weights(hf_folder: Path, tmp_path: Path) -> None:
    room = build(hf_folder, tmp_path / "hf")
    for path in hf_folder.glob("*.safetensors"):
        assert (room / path.name).samefile(path)
    assert not (room / "modeling_llama.py").exists()
    same = (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    )
    assert all((room / name).read_bytes() == (hf_folder / name).read_bytes() for name in same)
    read_manifest(room)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(room).lm_head.weight, meta_tensors()["output.weight"])


def test_a_single_file_that_only_the_index_names_passes_through_too(tmp_path: Path) -> None:
    folder, only = build(write_model(tmp_path / "meta"), tmp_path / "published"), "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / only)
    (folder / "manifest.json").unlink()
    tensors = safetensors.torch.load_file(folder / only)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, only)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    room = build(folder, tmp_path / "hf")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(room).lm_head.weight, meta_tensors()["output.weight"])


def test_weights_that_are_replaced_while_they_are_hashed_make_no_room(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = sorted(hf_folder.glob("*.safetensors"))[0], safetensors_file.fingerprint

    def replaced_behind(read: Path, *more: Any) -> Any:
        record = plain(read, *more)
        if read == path:
            (hf_folder / "other").write_bytes(path.read_bytes()[:-1] + b"x")
            os.replace(hf_folder / "other", path)
        return record

    monkeypatch.setattr(safetensors_file, "fingerprint", replaced_behind)
    assert "now it " in refused(hf_folder, tmp_path / "hf").seen


@pytest.mark.parametrize("content", ['{"other": "tool"}', "[1]", "no JSON", '{"files": {}}'])
def test_a_manifest_of_another_tool_in_the_folder_is_left_alone(content: str, hf_folder: Path, tmp_path: Path) -> None:
    (hf_folder / "manifest.json").write_text(content)
    build_config.build_config(build_config.Settings(hf_folder, tmp_path / "config"))
    assert "weights" not in read_manifest(tmp_path / "config")["facts"]


def test_a_missing_tokenizer_json_is_made_from_tokenizer_model(hf_folder: Path, tmp_path: Path) -> None:
    made = (hf_folder / "tokenizer.json").read_bytes()
    (hf_folder / "tokenizer.json").unlink()
    assert (build(hf_folder, tmp_path / "hf") / "tokenizer.json").read_bytes() == made


def test_rotary_frequencies_that_old_files_carry_are_no_unknown_tensor(hf_folder: Path, tmp_path: Path) -> None:
    path = sorted(hf_folder.glob("*.safetensors"))[0]
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    build(hf_folder, tmp_path / "hf")


# --- bad input: a report that names both values and ends in a command -------------------------------------------------


def edit_json(**changed: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        value = {**json.loads(path.read_text()), **changed}
        path.write_text(json.dumps({key: item for key, item in value.items() if item != "absent"}))

    return edit


def edit_shard(change: Callable[[Tensors], object], index: int = 0) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"consolidated.{index:02d}.pth"
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)

    return edit


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


class Bomb:
    """What a hostile .pth does: something is run when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch bomb-went-off",)


def bomb(folder: Path) -> None:
    torch.save({"tok_embeddings.weight": Bomb()}, folder / "consolidated.00.pth")


def zip_bomb(folder: Path) -> None:
    """A directory of 100 MB that takes 100 kB on disk."""
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("consolidated/data.pkl", b"\0" * 100_000_000)


def legacy(folder: Path) -> None:
    torch.save(meta_tensors(), folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)


def shared_storage(folder: Path) -> None:
    """A tensor that claims far more than is stored: one row, told to be all rows."""
    edit_shard(lambda t: t.update({"output.weight": t["output.weight"][:1].expand(312, 96)}))(folder)


def wrong_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(tokenizer_model(320))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BAD_META: dict[str, Any] = {
    # name: (shards, what goes wrong, what the report says)
    "no params.json": (1, drop("params.json"), "params.json is missing"),
    "no tokenizer": (1, drop("tokenizer.model"), "tokenizer.model is missing"),
    "params.json cut off": (1, lambda f: (f / "params.json").write_text('{"dim": 96'), "no JSON"),
    "params.json a list": (1, lambda f: (f / "params.json").write_text("[]"), "a JSON list"),
    "a gap in the numbers": (4, drop("consolidated.01.pth"), "consolidated.01.pth is missing"),
    "the last shard missing": (4, drop("consolidated.03.pth"), "split into 4 files"),
    "half of the shards missing": (
        4,
        lambda f: [drop(f"consolidated.0{n}.pth")(f) for n in (2, 3)],
        "split into 4 files, consolidated.00.pth to consolidated.03.pth; this folder has 2 of them",
    ),
    "no shard at all": (1, drop("consolidated.00.pth"), "consolidated.00.pth is missing"),
    "an extra .pth": (1, lambda f: (f / "optimizer.pth").write_bytes(b"x"), "optimizer.pth does not belong"),
    "a shard twice": (
        1,
        lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.01.pth"),
        "2 shard(s) have 560",
    ),
    "cut off": (1, lambda f: os.truncate(f / "consolidated.00.pth", 200_000), "200000 bytes"),
    "empty": (1, lambda f: os.truncate(f / "consolidated.00.pth", 0), "0 bytes"),
    "no zip": (1, lambda f: (f / "consolidated.00.pth").write_bytes(b"<html>403 Forbidden</html>" * 99), "2574 bytes"),
    "old torch format": (1, legacy, "no torch file of version 1.6 or later"),
    "pickle bomb": (1, bomb, "wants to call posix.system"),
    "zip bomb": (1, zip_bomb, "100000000 bytes, 16777216 are the limit"),
    "rows that are not there": (1, shared_storage, "output.weight is not stored whole"),
    "not tensors": (1, lambda f: torch.save([1, 2], f / "consolidated.00.pth"), "something else than named tensors"),
    "a flipped bit": (2, lambda f: flip(f / "consolidated.01.pth", 100_000), "CRC-32"),
    "a tensor missing": (
        1,
        edit_shard(lambda t: t.pop("layers.1.ffn_norm.weight")),
        "Missing: layers.1.ffn_norm.weight. Unknown: none",
    ),
    "a tensor unknown": (
        1,
        edit_shard(lambda t: t.update({"layers.0.bias": torch.ones(3).half()})),
        "Unknown: layers.0.bias",
    ),
    "a tensor transposed": (
        1,
        edit_shard(
            lambda t: t.update({"layers.2.feed_forward.w2.weight": t["layers.2.feed_forward.w2.weight"].T.contiguous()})
        ),
        "params.json says [96, 280]; the tensor has [280, 96]",
    ),
    "shards of other models": (2, edit_shard(lambda t: t.pop("norm.weight"), 1), "Missing: norm.weight"),
    "norms that differ": (2, edit_shard(lambda t: t["norm.weight"].add_(1), 1), "it must be the same in all shards"),
    "types mixed": (1, edit_shard(lambda t: t.update({"norm.weight": t["norm.weight"].float()})), "is F32"),
    "integers": (
        1,
        edit_shard(lambda t: t.update({"norm.weight": t["norm.weight"].int()})),
        "norm.weight is of the type torch.IntStorage",
    ),
    "another tokenizer": (1, wrong_tokenizer, "tokenizer.model has 320 tokens, the model has 312"),
    "vocab_size in params.json": (
        1,
        lambda f: edit_json(vocab_size=400)(f / "params.json"),
        "has 312 tokens, the model has 400",
    ),
    "too many layers": (
        1,
        lambda f: edit_json(n_layers=10**9)(f / "params.json"),
        "params.json says 1000000000; the tensors have 3",
    ),
    "no layers": (
        1,
        lambda f: [
            edit_shard(lambda t: [t.pop(name) for name in list(t) if name.startswith("layers.")])(f),
            edit_json(n_layers=10**9)(f / "params.json"),
        ],
        "params.json says 1000000000; the tensors have 0",
    ),
    "another dim": (1, lambda f: edit_json(dim=192)(f / "params.json"), "params.json says"),
    "another multiple_of": (
        1,
        lambda f: edit_json(multiple_of=50)(f / "params.json"),
        "gives 300; the tensors of 1 shard(s) have 280",
    ),
    "a multiplier too much": (
        1,
        lambda f: edit_json(ffn_dim_multiplier=1.3)(f / "params.json"),
        "ffn_dim_multiplier 1.3) gives 360",
    ),
    "other key/value heads": (
        1,
        lambda f: edit_json(n_kv_heads=4)(f / "params.json"),
        "says [24, 96]; the tensor has [48, 96]",
    ),
    "heads that do not divide": (1, lambda f: edit_json(n_heads=7)(f / "params.json"), "n_heads 7"),
    "a number as text": (1, lambda f: edit_json(dim="96")(f / "params.json"), "it is '96'"),
    "a size of zero": (1, lambda f: edit_json(n_layers=0)(f / "params.json"), "it is 0"),
    "epsilon is NaN": (1, lambda f: edit_json(norm_eps=float("nan"))(f / "params.json"), "it is nan"),
    "Llama 3.1's positions": (1, lambda f: edit_json(use_scaled_rope=True)(f / "params.json"), "use_scaled_rope"),
    "both forms": (
        1,
        lambda f: [(f / name).write_text("{}") for name in ("config.json", "model.safetensors")],
        "model.safetensors",
    ),
    "neither form": (
        1,
        lambda f: [path.unlink() for path in f.iterdir()] and (f / "cat.jpg").write_text(""),
        "Here is: cat.jpg",
    ),
}


def refused(weights: Path, room: Path) -> reports.Problem:
    with pytest.raises(reports.Problem) as caught:
        build(weights, room)
    assert not room.exists(), "a refused model must leave no room"
    assert caught.value.report().splitlines()[-1].startswith("    "), "a report ends in a command"
    return caught.value


@pytest.mark.parametrize("case", BAD_META)
def test_bad_meta_weights_get_a_report(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    n_shards, spoil, says = BAD_META[case]
    weights = write_model(tmp_path / "meta", n_shards=n_shards)
    spoil(weights)
    assert says in refused(weights, tmp_path / "hf").seen
    assert not (tmp_path / "bomb-went-off").exists()


def test_any_flipped_bit_of_a_weight_is_found_and_its_tensor_named(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "meta", n_shards=2)
    path = weights / "consolidated.01.pth"
    for name, tensor in meta_weights.read_shard(path).items():
        flip(path, tensor.start + tensor.size_bytes - 1)
        assert name in refused(weights, tmp_path / "hf").seen
        flip(path, tensor.start + tensor.size_bytes - 1)
    build(weights, tmp_path / "hf")


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """change: the header -> what is written instead, as text where it is text."""

    def edit(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = change(json.loads(data[8:end]))
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return edit


def as_floats(header: dict[str, Any]) -> dict[str, Any]:
    for name in header.keys() - {"__metadata__"}:
        header[name]["data_offsets"] = [float(at) for at in header[name]["data_offsets"]]
    return header


def named_twice(header: dict[str, Any]) -> str:
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header)[:-1] + "," + json.dumps({name: header[name]})[1:]


BAD_HF: dict[str, Any] = {
    "offsets with a point": (edit_header(as_floats), "which are not whole numbers"),
    "a name twice": (edit_header(named_twice), "twice"),
    "far too many layers": (
        lambda f: edit_json(num_hidden_layers=10**9)(f / "config.json"),
        "num_hidden_layers is 1000000000",
    ),
    "a file missing": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "model-00002-of-"),
    "a file cut off": (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[0], 100_000), "the file has 100000"),
    "a header cut off": (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[0], 60), "its header should have"),
    "an empty file": (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[0], 0), "the file has 0"),
    "a header of nonsense": (
        lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes((8).to_bytes(8, "little") + b"[1,2,3] "),
        "not of safetensors' form",
    ),
    "an index that leaves the folder": (
        lambda f: edit_json(weight_map={"a": "../../etc/x.safetensors"})(f / "model.safetensors.index.json"),
        "'../../etc/x.safetensors'",
    ),
    "an index without a map": (lambda f: edit_json(weight_map=7)(f / "model.safetensors.index.json"), "no weight_map"),
    "no config": (drop("config.json"), "config.json is missing"),
    "another architecture": (
        lambda f: edit_json(architectures=["GPT2LMHeadModel"])(f / "config.json"),
        "GPT2LMHeadModel",
    ),
    "quantized": (lambda f: edit_json(quantization_config={"quant_method": "gptq"})(f / "config.json"), "gptq"),
    "biases": (lambda f: edit_json(attention_bias=True)(f / "config.json"), "k_proj.bias"),
    "another layer count": (lambda f: edit_json(num_hidden_layers=2)(f / "config.json"), "Unknown: model.layers.2"),
    "another size": (
        lambda f: edit_json(intermediate_size=281)(f / "config.json"),
        "says [281, 96]; the tensor has [280, 96]",
    ),
    "unknown rope": (
        lambda f: edit_json(rope_scaling={"type": "longrope", "factor": 2})(f / "config.json"),
        "longrope",
    ),
    "too large a tokenizer": (
        lambda f: edit_tokenizer(f / "tokenizer.json"),
        "tokenizer.json has 313 tokens, the model has 312",
    ),
    "no tokenizer": (
        lambda f: [drop(n)(f) for n in ("tokenizer.json", "tokenizer.model")],
        "tokenizer.model is missing",
    ),
    "only .bin": (
        lambda f: (
            [path.rename(path.with_name(f"pytorch_{path.stem}.bin")) for path in f.glob("*.safetensors")]
            and drop("model.safetensors.index.json")(f)
        ),
        "pytorch_model-00001-of-",
    ),
}


def edit_tokenizer(path: Path) -> None:
    value = json.loads(path.read_text())
    value["model"]["vocab"]["one too many"] = 312
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("case", BAD_HF)
def test_bad_hugging_face_folders_get_a_report(case: str, hf_folder: Path, tmp_path: Path) -> None:
    spoil, says = BAD_HF[case]
    spoil(hf_folder)
    assert says in refused(hf_folder, tmp_path / "hf").seen


def test_a_folder_that_is_not_there_gets_a_report(tmp_path: Path) -> None:
    assert "Here is: none" in refused(tmp_path / "nowhere", tmp_path / "hf").seen


# --- faults -----------------------------------------------------------------------------------------------------------


def run(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run build_hf in its own process, after `code`."""
    script = "from scripts import build_hf, reports\nfrom scripts.weights import safetensors as s\n"
    script += f"import os, errno\n{code}\nreports.run(build_hf.main)"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


BREAK_THIRD_WRITE = """
s.BLOCK_BYTES = 3000
writes, plain = [], s._write_all
def broken(fd, data):
    writes.append(plain(fd, data))
    if len(writes) == 3:
        {}
s._write_all = broken
"""


@pytest.mark.parametrize("blow", ["os.kill(os.getpid(), 9)", "raise OSError(errno.ENOSPC, 'No space left on device')"])
def test_a_pulled_plug_and_a_full_disk_leave_the_old_room_whole(blow: str, tmp_path: Path) -> None:
    weights, room = write_model(tmp_path / "meta"), tmp_path / "hf"
    build(weights, room)
    before = (room / "manifest.json").read_bytes()
    (weights / "params.json").write_text(json.dumps(GROUPED.params(norm_eps=1e-6)))
    words = ("--weights", weights, "--output", room)
    broken = run(BREAK_THIRD_WRITE.format(blow), *words)
    assert broken.returncode != 0 and "Traceback" not in broken.stderr
    assert ("DISK IS FULL" in broken.stderr) == ("ENOSPC" in blow)
    assert (room / "manifest.json").read_bytes() == before and read_manifest(room)
    assert run("", *words).returncode == 0
    build(weights, tmp_path / "elsewhere" / "hf")
    for name in ("config.json", "model.safetensors"):
        assert (room / name).read_bytes() == (tmp_path / "elsewhere" / "hf" / name).read_bytes()


def test_a_report_goes_to_stderr_without_traceback_and_ends_with_status_1(tmp_path: Path) -> None:
    result = run("", "--weights", tmp_path, "--max-position-embeddings=", "--output", tmp_path / "hf")
    assert (result.returncode, result.stdout) == (1, "")
    assert "NO MODEL IN THIS FOLDER" in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.rstrip().splitlines()[-1] == "    make hf MODEL=/path/to/folder"
