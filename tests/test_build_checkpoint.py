"""The room checkpoint: rank files byte for byte as TensorRT-LLM v0.8.0's converter writes them,
for every possible split."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import GROUPED, PADDED, PLAIN, Dims, Tensors, write_model

from scripts import build_checkpoint, build_config, build_hf, reports
from scripts.nvidia import contracts
from scripts.room import read_manifest
from scripts.weights import cast, split
from scripts.weights import safetensors as safetensors_file
from scripts.weights import shape as shapes
from scripts.weights.shape import LlamaShape

ROOT = Path(__file__).resolve().parents[1]
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 kB, so that these small tensors go by several blocks, as large ones do."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 3000)


def hf_room(folder: Path, dims: Dims = GROUPED, dtype: str = "float16") -> Path:
    build_hf.build_hf(build_config.Settings(write_model(folder / "meta", dims, TYPES[dtype]), folder / "hf"))
    return folder / "hf"


def build(hf: Path, room: Path, tp_size: int, dtype: Any = None, version: str = "0.8.0") -> Path:
    build_checkpoint.build_checkpoint(build_checkpoint.Settings(hf, room, tp_size, version, dtype))
    return room


def upstream_rank(hf: Tensors, dims: Dims, tp_size: int, rank: int, dtype: torch.dtype) -> Tensors:
    """The rules of v0.8.0's convert_checkpoint.py, restated with whole tensors."""
    hf = {name: tensor.to(dtype) for name, tensor in hf.items()}

    def cut(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(tp_size, dim)[rank].contiguous()

    def key_value(tensor: torch.Tensor) -> torch.Tensor:
        if tp_size > dims.n_kv_heads:
            heads = tensor.view(dims.n_kv_heads, dims.head_size, dims.dim).repeat_interleave(
                tp_size // dims.n_kv_heads, 0
            )
            tensor = heads.reshape(-1, dims.dim)
        return cut(tensor, 0)

    head = hf["lm_head.weight"]
    head = torch.nn.functional.pad(head, (0, 0, 0, -len(head) % tp_size))
    ours = {
        "transformer.vocab_embedding.weight": hf["model.embed_tokens.weight"],
        "transformer.ln_f.weight": hf["model.norm.weight"],
        "lm_head.weight": cut(head, 0),
    }
    for layer in range(dims.n_layers):
        here, there = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        q, k, v = (hf[f"{there}self_attn.{name}_proj.weight"] for name in "qkv")
        ours[here + "attention.qkv.weight"] = torch.cat([cut(q, 0), key_value(k), key_value(v)])
        ours[here + "attention.dense.weight"] = cut(hf[there + "self_attn.o_proj.weight"], 1)
        ours[here + "mlp.fc.weight"] = cut(hf[there + "mlp.gate_proj.weight"], 0)
        ours[here + "mlp.gate.weight"] = cut(hf[there + "mlp.up_proj.weight"], 0)
        ours[here + "mlp.proj.weight"] = cut(hf[there + "mlp.down_proj.weight"], 1)
        ours[here + "input_layernorm.weight"] = hf[there + "input_layernorm.weight"]
        ours[here + "post_layernorm.weight"] = hf[there + "post_attention_layernorm.weight"]
    return ours


def assert_as_upstream(room: Path, hf: Path, dims: Dims, tp_size: int, dtype: str, scratch: Path) -> None:
    source = safetensors.torch.load_file(hf / "model.safetensors")
    for rank in range(tp_size):
        safetensors.torch.save_file(upstream_rank(source, dims, tp_size, rank, TYPES[dtype]), scratch / "expected")
        assert (room / f"rank{rank}.safetensors").read_bytes() == (scratch / "expected").read_bytes(), f"rank {rank}"


# Key/value heads shared out, repeated 2 and 8 times, one per head; vocabularies padded; 11 layers:
# layers.10 lies before layers.2
MANY_LAYERS = Dims(n_layers=11)
SPLITS = [
    (GROUPED, 1),
    (GROUPED, 2),
    (GROUPED, 4),
    (GROUPED, 8),
    (Dims(n_kv_heads=2), 4),
    (Dims(n_kv_heads=1), 8),
    (PLAIN, 8),
]
SPLITS += [(PADDED, 2), (PADDED, 4), (PADDED, 8), (Dims(n_kv_heads=4, vocab_size=307), 8), (MANY_LAYERS, 2)]


@pytest.mark.parametrize(
    ("dims", "tp_size"), SPLITS, ids=lambda value: str(value) if isinstance(value, int) else f"kv{value.n_kv_heads}"
)
def test_rank_files_are_upstreams_byte_for_byte(dims: Dims, tp_size: int, tmp_path: Path) -> None:
    hf = hf_room(tmp_path, dims)
    assert_as_upstream(build(hf, tmp_path / "checkpoint", tp_size), hf, dims, tp_size, "float16", tmp_path)


def test_pipeline_stages_hold_the_same_tensors_as_the_ranks_of_one_stage(tmp_path: Path) -> None:
    """TP=2, PP=3: rank = stage * 2 + place; a stage counts its layers from 0,
    the ends of the model are on the ends of the pipe."""
    hf = hf_room(tmp_path)
    whole, staged = build(hf, tmp_path / "whole", 2), tmp_path / "staged"
    build_checkpoint.build_checkpoint(build_checkpoint.Settings(hf, staged, 2, "0.8.0", pp_size=3))
    assert sorted(path.name for path in staged.glob("rank*")) == [f"rank{rank}.safetensors" for rank in range(6)]
    mapping = json.loads((staged / "config.json").read_text())["mapping"]
    assert (mapping["world_size"], mapping["tp_size"], mapping["pp_size"]) == (6, 2, 3)
    for rank in range(6):
        stage, place = divmod(rank, 2)
        expected = {}
        for name, tensor in safetensors.torch.load_file(whole / f"rank{place}.safetensors").items():
            if name.startswith(f"transformer.layers.{stage}."):
                expected[name.replace(f"layers.{stage}.", "layers.0.")] = tensor
            elif (name == "transformer.vocab_embedding.weight" and stage == 0) or (
                name in ("lm_head.weight", "transformer.ln_f.weight") and stage == 2
            ):
                expected[name] = tensor
        found = safetensors.torch.load_file(staged / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys() and len(expected) == {0: 8, 1: 7, 2: 9}[stage]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_stages_that_cannot_share_the_layers_are_refused_with_one_that_can(tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as caught:
        build_checkpoint.build_checkpoint(
            build_checkpoint.Settings(hf_room(tmp_path), tmp_path / "c", 1, "0.8.0", pp_size=2)
        )
    assert "PP is 2" in caught.value.seen and "3 layers" in caught.value.seen and "PP=1" in caught.value.command


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_every_type_becomes_every_type_as_upstream_rounds(source: str, target: str, tmp_path: Path) -> None:
    dims = Dims(n_kv_heads=2, vocab_size=307, n_layers=1)
    hf = hf_room(tmp_path, dims, source)
    assert_as_upstream(build(hf, tmp_path / "checkpoint", 4, target), hf, dims, 4, target, tmp_path)


def test_without_a_type_the_sources_own_is_kept(tmp_path: Path) -> None:
    hf = hf_room(tmp_path, dtype="bfloat16")
    room = build(hf, tmp_path / "checkpoint", 2)
    assert_as_upstream(room, hf, GROUPED, 2, "bfloat16", tmp_path)
    assert json.loads((room / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_each_16_bit_pattern_and_the_borders_of_rounding_are_cast_as_torch_casts(source: str, target: str) -> None:
    if source == "float32":
        high = np.arange(1 << 16, dtype=np.uint32) << 16
        low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        raw = (high[:, None] | low).reshape(-1)
        tensor = torch.from_numpy(raw.view(np.float32))
    else:
        raw = np.arange(1 << 16, dtype=np.uint16)
        tensor = torch.from_numpy(raw.view(np.int16)).view(TYPES[source])
    tensor = tensor.to(TYPES[target])
    expected = tensor.view(torch.int32 if target == "float32" else torch.int16).numpy()
    number = ~tensor.isnan().numpy()
    ours = cast.cast(raw, safetensors_file.DTYPES[source], safetensors_file.DTYPES[target])
    assert np.array_equal(ours.view(expected.dtype)[number], expected[number])


# --- round trips: the ranks joined are the unsplit tensor -------------------------------------------------------------

SHAPES = st.builds(
    lambda head, kv, group, layers, intermediate, vocab: LlamaShape(2 * head * kv * group, intermediate, layers, kv * group, kv, vocab),
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 2), st.integers(1, 40), st.integers(1, 50),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(shape=SHAPES, tp_size=st.integers(1, 12))
def test_the_ranks_joined_are_the_unsplit_tensors(shape: LlamaShape, tp_size: int) -> None:
    if shapes.why_impossible(shape, tp_size):
        assert tp_size not in shapes.possible_tp_sizes(shape)
        return
    hf = {name: np.arange(math.prod(size)).reshape(size) + 1 for name, size in shape.hf_tensors().items()}

    def made(rank: int) -> dict[str, Any]:
        tensors = {}
        for name, tensor in split.rank_tensors(shape, tp_size, rank).items():
            parts: list[Any] = []
            for cut in tensor.cuts:
                part = hf[cut.source][slice(*cut.rows)][..., slice(*(cut.columns or (None, None)))]
                below_and_right = [(0, cut.zero_rows), (0, cut.zero_columns)][: part.ndim]
                parts.append(np.pad(part, below_and_right))
            tensors[name] = np.concatenate(parts)
            assert tensors[name].shape == tensor.shape
        return tensors

    ranks = [made(rank) for rank in range(tp_size)]
    q_rows = shape.hidden_size // tp_size
    repeats = max(1, tp_size // shape.n_kv_heads)
    for layer in range(shape.n_layers):
        ours, theirs = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        qkv = [rank[ours + "attention.qkv.weight"] for rank in ranks]
        kv_rows = (len(qkv[0]) - q_rows) // 2
        joined = {
            "self_attn.q_proj": np.concatenate([part[:q_rows] for part in qkv]),
            "self_attn.k_proj": np.concatenate([part[q_rows : q_rows + kv_rows] for part in qkv[::repeats]]),
            "self_attn.v_proj": np.concatenate([part[q_rows + kv_rows :] for part in qkv[::repeats]]),
            "self_attn.o_proj": np.concatenate([rank[ours + "attention.dense.weight"] for rank in ranks], 1),
            "mlp.gate_proj": np.concatenate([rank[ours + "mlp.fc.weight"] for rank in ranks]),
            "mlp.up_proj": np.concatenate([rank[ours + "mlp.gate.weight"] for rank in ranks]),
            "mlp.down_proj": np.concatenate([rank[ours + "mlp.proj.weight"] for rank in ranks], 1),
        }
        for name, tensor in joined.items():
            assert np.array_equal(tensor, hf[f"{theirs}{name}.weight"]), name
        assert all(np.array_equal(qkv[rank][q_rows:], qkv[rank - rank % repeats][q_rows:]) for rank in range(tp_size))
    head = np.concatenate([rank["lm_head.weight"] for rank in ranks])
    assert np.array_equal(head[: shape.vocab_size], hf["lm_head.weight"])
    assert not head[shape.vocab_size :].any() and len(head) == -(-shape.vocab_size // tp_size) * tp_size


# --- tables: what is known of the real models -------------------------------------------------------------------------


RANK_TENSORS = json.loads((contracts.DOCKER / "contracts" / "rank-tensors" / "v0.8.0.json").read_text())


@pytest.mark.parametrize("expected", RANK_TENSORS, ids=lambda table: str(table["model"]))
def test_the_plan_for_the_real_models_is_upstreams_table(expected: dict[str, Any]) -> None:
    shape = LlamaShape(
        expected["hidden"],
        expected["intermediate"],
        expected["layers"],
        expected["heads"],
        expected["kv_heads"],
        expected["vocab"],
    )
    names = dict(expected["global_tensors"])
    for layer in range(expected["layers"]):
        per_layer = expected["per_layer_tensors_under_transformer_layers_N"]
        names.update({f"transformer.layers.{layer}.{name}": size for name, size in per_layer.items()})
    for rank in range(expected["tp"]):
        plan = split.rank_tensors(shape, expected["tp"], rank)
        assert {name: list(tensor.shape) for name, tensor in plan.items()} == names
        assert len(plan) == expected["tensor_count"]
        assert sum(2 * math.prod(tensor.shape) for tensor in plan.values()) == expected["payload_bytes_fp16"]


@pytest.mark.parametrize("version", contracts.versions())
def test_config_has_the_keys_of_the_version_in_order_with_this_models_values(version: str, tmp_path: Path) -> None:
    hf = hf_room(tmp_path, PADDED)
    config = json.loads((build(hf, tmp_path / "checkpoint", 4, "float32", version) / "config.json").read_text())
    golden = contracts.table("checkpoint-config", version)
    assert list(config) == list(golden) and list(config["mapping"]) == list(golden["mapping"])
    assert {key: value for key, value in config.items() if value != golden[key]} == {
        key: value
        for key, value in {
            "dtype": "float32", "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 96,
            "intermediate_size": 280, "vocab_size": 313, "norm_epsilon": 1e-4, "head_size": 6, "rotary_embedding_dim": 6,
            "mapping": config["mapping"],
        }.items()
        if key in golden
    }  # fmt: skip
    assert {key: value for key, value in config["mapping"].items() if value != golden["mapping"][key]} == {
        key: 4 for key in ("world_size", "tp_size", "moe_tp_size") if key in golden["mapping"]
    }


def test_rope_settings_reach_the_config(tmp_path: Path) -> None:
    hf = hf_room(tmp_path)
    edit_config(hf, rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0})
    config = json.loads((build(hf, tmp_path / "old", 1) / "config.json").read_text())
    assert (config["rotary_base"], config["rotary_scaling"]) == (1e6, {"type": "linear", "factor": 2.0})
    edit_config(hf, rope_theta=None, rope_scaling=None, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    config = json.loads((build(hf, tmp_path / "new", 1) / "config.json").read_text())
    assert (config["rotary_base"], config["rotary_scaling"]) == (5e5, None)


# --- sources in Hugging Face's form ----------------------------------------------------------------------------------


def edit_config(hf: Path, **changed: Any) -> None:
    """Change config.json of a room as if it had been made so."""
    edit(hf, "config.json", json.dumps({**json.loads((hf / "config.json").read_text()), **changed}).encode())


def edit_tensors(hf: Path, tensors: Tensors) -> None:
    edit(hf, "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))


def edit(hf: Path, name: str, data: bytes) -> None:
    (hf / name).unlink()  # and not written over: tensors that were loaded are maps of the old file
    (hf / name).write_bytes(data)
    manifest = json.loads((hf / "manifest.json").read_text())
    manifest["files"][name]["size_bytes"] = len(data)
    (hf / "manifest.json").write_text(json.dumps(manifest))


def test_tied_embeddings_are_written_twice_as_upstream_does(tmp_path: Path) -> None:
    hf = hf_room(tmp_path)
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    del tensors["lm_head.weight"]
    edit_tensors(hf, tensors)
    edit_config(hf, tie_word_embeddings=True)
    room = build(hf, tmp_path / "checkpoint", 2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for rank in range(2):
        written = safetensors.torch.load_file(room / f"rank{rank}.safetensors")
        expected = upstream_rank(tensors, GROUPED, 2, rank, torch.float16)
        assert torch.equal(written["lm_head.weight"], expected["lm_head.weight"])


def test_a_source_of_mixed_types_becomes_the_type_that_its_config_names(tmp_path: Path) -> None:
    hf = hf_room(tmp_path)
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    edit_tensors(hf, tensors)
    assert_as_upstream(build(hf, tmp_path / "checkpoint", 2), hf, GROUPED, 2, "float16", tmp_path)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(hf: Path, room: Path, tp_size: int, dtype: Any = None, version: str = "0.8.0") -> reports.Problem:
    with pytest.raises(reports.Problem) as caught:
        build(hf, room, tp_size, dtype, version)
    assert not room.exists()
    return caught.value


@pytest.mark.parametrize(
    ("dims", "tp_size", "says", "fitting"),
    [
        (GROUPED, 3, "TP is 3, the number of heads is 16", 2),
        (GROUPED, 16, "TP is 16, the feed-forward size is 280", 8),
        (Dims(n_heads=12, n_kv_heads=6), 4, "TP is 4, the number of key/value heads is 6", 2),
    ],
)
def test_an_impossible_split_names_both_values_and_one_that_works(
    dims: Dims, tp_size: int, says: str, fitting: int, tmp_path: Path
) -> None:
    hf = hf_room(tmp_path, dims)
    problem = refused(hf, tmp_path / "checkpoint", tp_size)
    assert says in problem.seen and f"TP={fitting}" in problem.command
    build(hf, tmp_path / "checkpoint", fitting)


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", "70144"), ("float32", "65520")])
def test_values_too_large_for_the_type_are_counted_and_named(dtype: str, largest: str, tmp_path: Path) -> None:
    hf = hf_room(tmp_path, dtype=dtype)
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][100:103, 5] = -float(largest)
    tensors["model.layers.1.mlp.up_proj.weight"][7, 7] = 65504 if dtype == "float32" else 65280  # these still fit
    edit_tensors(hf, tensors)
    problem = refused(hf, tmp_path / "checkpoint", 2, "float16")
    assert (
        "3 of the 26880 values of model.layers.1.mlp.up_proj.weight are too large for float16: the largest is "
        f"{largest}" in problem.seen
    )
    assert "DTYPE=bfloat16" in problem.command


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_nan_and_infinity_in_the_source_are_counted_and_named(value: float, dtype: Any, tmp_path: Path) -> None:
    hf = hf_room(tmp_path)
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4:6] = value
    edit_tensors(hf, tensors)
    problem = refused(hf, tmp_path / "checkpoint", 2, dtype)
    assert "2 of the 9216 values of model.layers.2.self_attn.o_proj.weight are NaN or infinite" in problem.seen


@pytest.mark.parametrize(("dtype", "bits"), [("float32", [0x7FFFFFFF, -1]), ("float16", [0x7FFF, -1])])
def test_a_nan_whose_bits_are_all_set_does_not_become_zero(dtype: str, bits: list[int], tmp_path: Path) -> None:
    """Rounding it to bfloat16 carries through the whole exponent."""
    hf = hf_room(tmp_path, dtype=dtype)
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    numbers = torch.int32 if dtype == "float32" else torch.int16
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4:6] = torch.tensor(bits, dtype=numbers).view(
        getattr(torch, dtype)
    )
    edit_tensors(hf, tensors)
    problem = refused(hf, tmp_path / "checkpoint", 2, "bfloat16")
    assert problem.title == "weights are not numbers"
    assert "2 of the 9216 values of model.layers.2.self_attn.o_proj.weight are NaN or infinite" in problem.seen


def test_a_value_too_large_for_bfloat16_is_not_advised_to_become_bfloat16(tmp_path: Path) -> None:
    hf = hf_room(tmp_path, dtype="float32")
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4] = 3.4e38
    edit_tensors(hf, tensors)
    problem = refused(hf, tmp_path / "checkpoint", 2, "bfloat16")
    assert "too large for bfloat16" in problem.seen and "DTYPE=float32" in problem.command


def test_other_bad_requests_get_a_report(tmp_path: Path) -> None:
    hf = hf_room(tmp_path)
    room = tmp_path / "checkpoint"
    assert "0.7.0" in refused(hf, room, 2, version="0.7.0").seen
    assert "'int8'" in refused(hf, room, 2, "int8").seen
    assert "TP is '0'" in refused(hf, room, 0).seen
    assert "hf has no manifest.json" in refused(tmp_path / "nowhere" / "hf", room, 2).seen
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    edit_config(hf, rope_scaling={"rope_type": "llama3", **numbers})
    assert "TensorRT-LLM 0.8.0 does not have" in refused(hf, room, 2).seen
    (hf / "model.safetensors").unlink()
    assert "no such file" in refused(hf, room, 2).seen


# --- faults -----------------------------------------------------------------------------------------------------------


def run(code: str, hf: Path, room: Path) -> subprocess.CompletedProcess[str]:
    """Run build_checkpoint at TP=4 in its own process, after `code`."""
    imports = "import os, sys, errno\nfrom scripts import build_checkpoint, reports\n"
    imports += "from scripts.weights import safetensors as s\ns.SYNC_BYTES = 200_000"
    script = f"{imports}\n{code}\nreports.run(build_checkpoint.main)"
    words = ["--model", str(hf), "--tp-size", "4", "--dtype=", "--trtllm-version", "0.8.0", "--output", str(room)]
    return subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize("how", ["another file", "shorter", "in place", "gone"])
def test_weights_that_change_while_they_are_read_make_no_checkpoint(
    how: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "SYNC_BYTES", 20_000)
    folder = write_model(tmp_path / "meta")
    if form == "hf":
        build_hf.build_hf(build_config.Settings(folder, tmp_path / "hf"))
        folder = tmp_path / "hf"
    build_config.build_config(build_config.Settings(folder, tmp_path / "config"))
    asked = build_checkpoint.Settings(tmp_path / "config", tmp_path / "checkpoint", 2, "0.8.0", weights=folder)
    path = folder / ("model.safetensors" if form == "hf" else "consolidated.00.pth")
    rows, reads = safetensors_file.StoredTensor.rows, []

    def change() -> None:
        other = path.with_suffix(".other")
        other.write_bytes(path.read_bytes() if how != "shorter" else path.read_bytes()[:100_000])
        if how == "gone":
            path.unlink()
        elif how == "in place":
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(bytes(1000))
        else:
            os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
            os.replace(other, path)

    def change_in_the_middle(tensor: Any, *span: int) -> Any:
        reads.append(1)
        if len(reads) == 150:
            change()
        return rows(tensor, *span)

    monkeypatch.setattr(safetensors_file.StoredTensor, "rows", change_in_the_middle)
    with pytest.raises(reports.Problem, match="weights changed while they were read") as caught:
        build_checkpoint.build_checkpoint(asked)
    assert path.name in caught.value.where and caught.value.command == "make checkpoint"
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "checkpoint.partial/finished.json").exists(), "nothing may be kept of two models"


# in the middle of the third rank file, when it is noted that something is on the disk
BREAK_IN_RANK_2 = """
import threading
from scripts import room
s.BLOCK_BYTES = 3000
plain, plain_note, noted = s._write_all, room.Filling.note, threading.Event()
def note(filling, begun):
    plain_note(filling, begun)
    if begun:
        noted.set()
room.Filling.note = note
def broken(fd, data):
    plain(fd, data)
    path = os.readlink(f"/proc/self/fd/{{fd}}")
    if path.endswith("rank2.safetensors") and os.path.getsize(path) > 150_000 and noted.wait(60):
        {}
s._write_all = broken
"""


TELL_WHAT_IS_READ = """
import atexit
plain, read = s.StoredTensor.rows, set()
def rows(tensor, *words):
    read.add(tensor.name)
    return plain(tensor, *words)
s.StoredTensor.rows = rows
atexit.register(lambda: print("read", *read))
"""


@pytest.mark.parametrize("blow", ["os.kill(os.getpid(), 9)", "raise OSError(errno.ENOSPC, 'No space left on device')"])
def test_after_a_pulled_plug_or_a_full_disk_what_was_on_the_disk_is_kept_and_the_bytes_are_the_same(
    blow: str, tmp_path: Path
) -> None:
    hf, room = hf_room(tmp_path), tmp_path / "checkpoint"
    broken = run(BREAK_IN_RANK_2.format(blow), hf, room)
    assert broken.returncode != 0 and not room.exists() and "Traceback" not in broken.stderr
    assert ("DISK IS FULL" in broken.stderr) == ("ENOSPC" in blow)
    begun = json.loads((tmp_path / "checkpoint.partial/finished.json").read_text())["begun"]
    assert sorted(begun) == [f"rank{rank}.safetensors" for rank in range(4)]
    again = run(TELL_WHAT_IS_READ, hf, room)
    assert again.returncode == 0, again.stderr
    [kept] = re.findall(r"(\d+) of 24 tensors of .* were written before; kept", again.stdout)
    assert int(kept) == len(begun["rank0.safetensors"]) > 1
    assert "lm_head.weight" not in re.findall(r"^read (.*)", again.stdout, re.MULTILINE)[0].split()
    assert_as_upstream(room, hf, GROUPED, 4, "float16", tmp_path)
    undisturbed = build(hf, tmp_path / "undisturbed" / "checkpoint", 4)
    assert read_manifest(room) == read_manifest(undisturbed)


def test_what_was_kept_is_not_trusted_unread(tmp_path: Path) -> None:
    """A bit that flips between two tries: the files are begun again, and are what they should be."""
    hf, room = hf_room(tmp_path), tmp_path / "checkpoint"
    run(BREAK_IN_RANK_2.format("os.kill(os.getpid(), 9)"), hf, room)
    path = tmp_path / "checkpoint.partial/rank1.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    again = run("", hf, room)
    assert again.returncode == 0 and "; kept" not in again.stdout
    assert_as_upstream(room, hf, GROUPED, 4, "float16", tmp_path)


def test_no_tensor_is_ever_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written at once is a block (here 3 kB at most), in both rooms,
    whatever is done to the rows on the way."""
    sizes: dict[str, list[int]] = {}
    plain = safetensors_file._write_all

    def recorded(fd: int, data: Any) -> None:
        sizes.setdefault(os.readlink(f"/proc/self/fd/{fd}"), []).append(len(data))
        plain(fd, data)

    monkeypatch.setattr(safetensors_file, "_write_all", recorded)
    build_hf.build_hf(build_config.Settings(write_model(tmp_path / "meta", n_shards=4), tmp_path / "hf"))
    build(tmp_path / "hf", tmp_path / "checkpoint", 4, "float32")
    assert len(sizes) == 5
    for file, (_header, *blocks) in sizes.items():
        assert max(blocks) <= 3000 * (2 if "rank" in file else 1)  # float16 read, float32 written


def test_without_a_change_of_type_torch_is_not_loaded(tmp_path: Path) -> None:
    """It takes 1.5 seconds, more than converting a small model."""
    code = "import atexit\natexit.register(lambda: print('torch' in sys.modules))"
    result = run(code, hf_room(tmp_path), tmp_path / "checkpoint")
    assert result.stdout.splitlines()[-1] == "False", result.stderr


def test_others_may_read_the_files_and_no_metadata_is_written(tmp_path: Path) -> None:
    room = build(hf_room(tmp_path), tmp_path / "checkpoint", 2)
    for rank in range(2):
        path = room / f"rank{rank}.safetensors"
        assert path.stat().st_mode & 0o777 == 0o644
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        assert "__metadata__" not in header
    assert os.listdir(room.parent).count("checkpoint.partial") == 0
