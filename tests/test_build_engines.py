"""The room engines: for the torch engine config.json key for key as each version writes it; for tensorrt trtllm-build's
command line, what counts as done, and the report of each failure. trtllm-build and nvidia-smi are stand-ins
(tests/support/stand_ins.py)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from synthetic import GROUPED, write_model

from scripts import build_checkpoint, build_config, build_engines, build_hf, reports, room
from scripts.nvidia import contracts, gpus

VERSIONS = contracts.versions()
V100 = "Tesla V100-SXM2-16GB, 16160, 7.0, 535.104.05"
A100 = "NVIDIA A100-SXM4-80GB, 81920, 8.0, 550.54.15"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as a checkpoint of every version, TP=2; its dimensions all differ."""
    folder = tmp_path_factory.mktemp("checkpoints")
    build_hf.build_hf(build_config.Settings(write_model(folder / "meta", GROUPED), folder / "hf"))
    for version in VERSIONS:
        build_checkpoint.build_checkpoint(build_checkpoint.Settings(folder / "hf", folder / version, 2, version))
    return folder


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ROOM_ARGS", raising=False)
    monkeypatch.delenv("ROOM_NEEDS", raising=False)
    (tmp_path / "programs").mkdir()
    return tmp_path / "programs"


def build(checkpoint: Path, output: Path, version: str, engine: str = "tensorrt", **changed: Any) -> dict[str, Any]:
    asked = {"max_batch_size": 3, "max_input_len": 24, "max_seq_len": 56, **changed}
    build_engines.build_engines(build_engines.Settings(checkpoint, output, engine, version, **asked))
    return room.read_manifest(output)


def argv(programs: Path) -> list[str]:
    return (programs / "argv").read_text().splitlines()


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


# --- limits ---


@pytest.mark.parametrize("engine, taken", [("tensorrt", False), ("torch", True)])
def test_a_step_holds_a_whole_prompt_while_chunked_context_is_off(engine: str, taken: bool) -> None:
    """enable_chunked_context is false in every model repository that we fill;
    the torch engine cuts prompts by itself."""
    asked: dict[str, Any] = {"max_batch_size": 2, "max_input_len": 24, "max_seq_len": 56, "max_num_tokens": 23}
    settings = build_engines.Settings(Path(), Path(), engine, "0.14.0", **asked)
    if taken:
        assert build_engines.limits(settings, 64)["max_num_tokens"] == 23
        return
    with pytest.raises(reports.Problem) as caught:
        build_engines.limits(settings, 64)
    assert "MAX_NUM_TOKENS is 23; MAX_INPUT_LEN is 24" in caught.value.seen
    assert caught.value.command == "make engines MAX_NUM_TOKENS=24"


# --- torch ---


def keys(value: Any, path: str = "") -> list[str]:
    """Every key of nested mappings, in order, by its path."""
    if not isinstance(value, dict):
        return [path]
    return [path, *(found for key, inner in value.items() for found in keys(inner, f"{path}.{key}"))]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_torch_engines_config_has_every_key_of_that_version(
    checkpoints: Path, tmp_path: Path, version: str
) -> None:
    build(checkpoints / version, tmp_path / "engines", version, engine="torch")
    config = json.loads((tmp_path / "engines/config.json").read_bytes())
    golden = contracts.table("engine-config", version)
    assert keys(config) == keys(golden)
    assert config["version"] == contracts.reported(version)
    network, limits = config["pretrained_config"], config["build_config"]
    assert (network["hidden_size"], network["num_hidden_layers"]) == (GROUPED.dim, GROUPED.n_layers)
    assert (network["num_key_value_heads"], network["vocab_size"]) == (GROUPED.n_kv_heads, GROUPED.vocab_size)
    assert network["mapping"]["tp_size"] == network["mapping"]["world_size"] == 2
    assert (limits["max_batch_size"], limits["max_input_len"], limits["max_num_tokens"]) == (3, 24, 72)
    assert limits.get("max_seq_len", limits["max_input_len"] + limits.get("max_output_len", 0)) == 56
    # what is of no model and no limit is the version's own
    changed = {key for key in golden["build_config"] if config["build_config"][key] != golden["build_config"][key]}
    assert changed <= {
        "max_batch_size",
        "max_input_len",
        "max_seq_len",
        "max_output_len",
        "max_num_tokens",
        "opt_num_tokens",
    }


def test_the_torch_engine_serves_the_checkpoints_own_files(checkpoints: Path, tmp_path: Path) -> None:
    manifest = build(checkpoints / "0.8.0", tmp_path / "engines", "0.8.0", engine="torch")
    for rank in range(2):
        file = f"rank{rank}.safetensors"
        assert os.path.samefile(tmp_path / "engines" / file, checkpoints / "0.8.0" / file)
    facts = {"engine": "torch", "world_size": 2, "trtllm_version": "0.8.0", "trtllm_reported": "0.8.0"}
    assert manifest["facts"] == facts


def test_the_torch_engine_has_no_pipeline_stages(checkpoints: Path, tmp_path: Path) -> None:
    staged = build_checkpoint.Settings(checkpoints / "hf", tmp_path / "checkpoint", 1, "0.8.0", pp_size=3)
    build_checkpoint.build_checkpoint(staged)
    with pytest.raises(reports.Problem, match="PP cannot be 3"):
        build(tmp_path / "checkpoint", tmp_path / "engines", "0.8.0", engine="torch")


# --- tensorrt ---


def test_pipeline_stages_make_one_engine_for_each_rank(checkpoints: Path, tmp_path: Path, programs: Path) -> None:
    staged = build_checkpoint.Settings(checkpoints / "hf", tmp_path / "checkpoint", 2, "0.14.0", pp_size=3)
    build_checkpoint.build_checkpoint(staged)
    stand_ins.nvidia_smi(programs, [V100])
    stand_ins.trtllm_build(programs, "0.14.0")
    manifest = build(tmp_path / "checkpoint", tmp_path / "engines", "0.14.0")
    assert len([name for name in manifest["files"] if name.endswith(".engine")]) == manifest["facts"]["world_size"] == 6
    assert (manifest["facts"]["tp_size"], manifest["facts"]["pp_size"]) == (2, 3)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_room_is_what_trtllm_build_wrote_and_how(
    checkpoints: Path, tmp_path: Path, programs: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = V100 if "7.0" in contracts.toolchain(version)["architectures"] else A100
    stand_ins.nvidia_smi(programs, [gpu, gpu])
    stand_ins.trtllm_build(programs, version)
    manifest = build(checkpoints / version, tmp_path / "engines", version)
    assert sorted(manifest["files"]) == ["config.json", "rank0.engine", "rank1.engine"]
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == sorted(
        ["args", "args.sha256", "config.json", "made_from.json", "manifest.json", "rank0.engine", "rank1.engine"]
    )
    facts = manifest["facts"]
    assert (facts["engine"], facts["world_size"], facts["trtllm_version"]) == ("tensorrt", 2, version)
    assert (facts["tp_size"], facts["pp_size"], facts["quant_algo"]) == (2, 1, None)
    name, _, capability, driver = gpu.split(", ")
    assert (facts["gpu"]["name"], facts["gpu"]["compute_capability"], facts["gpu"]["driver"]) == (
        name,
        capability,
        driver,
    )
    assert facts["peer_access"] is True and facts["nvlink"] is True
    # what ran is what the passport says, but for the paths
    ran = argv(programs)
    assert after(ran, "--checkpoint_dir") == str(checkpoints / version)
    recorded = [str(checkpoints / version) if word == "checkpoint" else word for word in facts["argv"][1:]]
    assert [word if word != "engines" else after(ran, "--output_dir") for word in recorded] == ran
    for file in (tmp_path / "engines").glob("*.json"):
        assert str(tmp_path) not in file.read_text() and str(checkpoints) not in file.read_text()
    assert "rank 1 is built" in capsys.readouterr().out


def test_custom_all_reduce_stands_or_falls_with_the_way_between_gpus(
    checkpoints: Path, tmp_path: Path, programs: Path
) -> None:
    stand_ins.trtllm_build(programs, "0.8.0")
    for links, peers, count, wanted in (
        ("NV2", "OK", 2, "enable"),
        ("NV2", "CNS", 2, "disable"),
        ("PHB", "OK", 2, "disable"),
        ("NV2", "OK", 1, "disable"),  # two ranks, one GPU: how they will reach each other is not known
    ):
        stand_ins.nvidia_smi(programs, [V100] * count, links, peers)
        facts = build(checkpoints / "0.8.0", tmp_path / "engines", "0.8.0")["facts"]
        assert after(argv(programs), "--use_custom_all_reduce") == wanted
        assert facts["custom_all_reduce"] is (wanted == "enable")
        shutil.rmtree(tmp_path / "engines")


def test_kernel_times_are_kept_for_the_next_build_of_the_same_gpu(
    checkpoints: Path, tmp_path: Path, programs: Path
) -> None:
    stand_ins.trtllm_build(programs, "0.14.0")
    caches = tmp_path / "timing-cache"
    stand_ins.nvidia_smi(programs, [V100])
    first = build(checkpoints / "0.14.0", tmp_path / "a", "0.14.0", timing_cache=caches)
    second = build(checkpoints / "0.14.0", tmp_path / "b", "0.14.0", timing_cache=caches)
    file = caches / "0.14.0-sm7.0-Tesla-V100-SXM2-16GB.cache"
    assert file.read_text() == "rehearsed\n" * 2
    assert second["facts"]["timing_cache_sha256"] == room.sha256_of(file).sha256
    assert first["facts"]["timing_cache_sha256"] != second["facts"]["timing_cache_sha256"]
    stand_ins.nvidia_smi(programs, [A100])
    build(checkpoints / "0.14.0", tmp_path / "c", "0.14.0", timing_cache=caches)
    assert len(list(caches.iterdir())) == 2


def test_a_version_whose_cache_is_dead_gets_none(checkpoints: Path, tmp_path: Path, programs: Path) -> None:
    stand_ins.nvidia_smi(programs, [V100])
    stand_ins.trtllm_build(programs, "0.8.0")
    manifest = build(checkpoints / "0.8.0", tmp_path / "engines", "0.8.0", timing_cache=tmp_path / "caches")
    assert manifest["facts"]["timing_cache_sha256"] is None and not (tmp_path / "caches").exists()


def refused(checkpoint: Path, output: Path, version: str) -> reports.Problem:
    with pytest.raises(reports.Problem) as caught:
        build(checkpoint, output, version)
    assert not output.exists()
    return caught.value


def test_without_a_gpu_nothing_starts(checkpoints: Path, tmp_path: Path, programs: Path) -> None:
    stand_ins.nvidia_smi(programs, [])
    stand_ins.trtllm_build(programs, "0.8.0")
    assert "nvidia-smi lists none" in refused(checkpoints / "0.8.0", tmp_path / "engines", "0.8.0").seen
    assert not (programs / "argv").exists()


def test_a_v100_is_refused_where_its_kernels_are_gone(checkpoints: Path, tmp_path: Path, programs: Path) -> None:
    stand_ins.nvidia_smi(programs, [V100])
    stand_ins.trtllm_build(programs, "1.2.1")
    problem = refused(checkpoints / "1.2.1", tmp_path / "engines", "1.2.1")
    assert "7.0" in problem.seen and "TOOLCHAIN=0.14.0" in problem.command
    assert not (programs / "argv").exists()


def test_engines_that_could_never_start_are_not_built(checkpoints: Path, tmp_path: Path, programs: Path) -> None:
    stand_ins.trtllm_build(programs, "0.14.0")
    stand_ins.nvidia_smi(programs, [V100.replace("16160", "500")])  # 524 MB: CUDA and NCCL alone take more
    problem = refused(checkpoints / "0.14.0", tmp_path / "engines", "0.14.0")
    assert "has 0.5 GiB" in problem.seen and "56 tokens" in problem.seen and problem.command == "make plan"
    assert not (programs / "argv").exists()
    seventy_b = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "dtype": "float16",
        "mapping": {"tp_size": 4, "pp_size": 1},
    }
    sizes = {"max_batch_size": 8, "max_input_len": 2048, "max_seq_len": 4096, "max_num_tokens": 8192}
    # 138 GB in four: 34.7 GB a rank; as INT4 a quarter of that
    for name, rank_bytes, verdict in (
        ("V100-SXM2-32GB", 34_700_000_000, "no"),
        ("A100-80GB", 34_700_000_000, "fits"),
        ("V100-SXM2-32GB", 9_400_000_000, "fits"),
    ):
        assert build_engines.fit_of(seventy_b, sizes, rank_bytes, gpus.assumed(name)[0]).verdict == verdict


def test_outside_the_container_the_missing_program_is_named(
    checkpoints: Path, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins.nvidia_smi(programs, [A100])
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert refused(checkpoints / "1.2.1", tmp_path / "engines", "1.2.1").title == "no trtllm-build"


def test_another_tensorrt_llm_than_asked_for_is_refused_before_building(
    checkpoints: Path, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"tensorrt_llm": "0.12.0.dev2024080600", "tensorrt": "10.3.0"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    stand_ins.nvidia_smi(programs, [V100])
    stand_ins.trtllm_build(programs, "0.14.0")
    problem = refused(checkpoints / "0.14.0", tmp_path / "engines", "0.14.0")
    assert "0.12.0.dev2024080600" in problem.seen and "0.14.0.dev2024100100" in problem.seen
    versions["tensorrt_llm"] = "0.14.0"  # the release is another version than image 24.10 reports, with other flags
    assert "0.14.0.dev2024100100" in refused(checkpoints / "0.14.0", tmp_path / "engines", "0.14.0").seen
    versions["tensorrt_llm"] = "0.14.0.dev2024100100"
    assert build(checkpoints / "0.14.0", tmp_path / "engines", "0.14.0")["tools"]["tensorrt"] == "10.3.0"


@pytest.mark.parametrize(
    "script, seen",
    [
        (
            "echo starting; echo '[TRT] [E] Error Code 2: OutOfMemory'; exit 1",
            "not enough memory for building with these limits",
        ),
        ("kill -9 $$", "killed by signal 9"),
        ("exit 0", "config.json should be written"),
        ('cd "$4"; : > config.json; : > rank0.engine; : > rank1.engine', "none, or an empty one"),
    ],
)
def test_a_build_that_fails_leaves_a_report_its_log_and_the_old_room(
    checkpoints: Path, tmp_path: Path, programs: Path, script: str, seen: str
) -> None:
    stand_ins.nvidia_smi(programs, [V100])
    stand_ins.trtllm_build(programs, "0.14.0")
    engines = tmp_path / "engines"
    before = build(checkpoints / "0.14.0", engines, "0.14.0")
    stand_ins.trtllm_build(programs, "0.14.0", script)
    with pytest.raises(reports.Problem) as caught:
        build(checkpoints / "0.14.0", engines, "0.14.0", max_batch_size=5)
    assert seen in " ".join(caught.value.report().split())
    assert room.read_manifest(engines) == before
    assert (tmp_path / "engines.partial/building/trtllm-build.log").is_file()
    # and the next try begins afresh
    stand_ins.trtllm_build(programs, "0.14.0")
    build(checkpoints / "0.14.0", engines, "0.14.0", max_batch_size=5)


def test_engines_with_other_limits_than_asked_are_not_taken(checkpoints: Path, tmp_path: Path, programs: Path) -> None:
    stand_ins.nvidia_smi(programs, [V100])
    stand_ins.trtllm_build(programs, "0.14.0")
    stand = (programs / "trtllm-build").read_text()
    (programs / "trtllm-build").write_text(stand.replace('"$@"\n', '"${@/#24/23}"\n').replace("exec", ""))
    problem = refused(checkpoints / "0.14.0", tmp_path / "engines", "0.14.0")
    assert "max_input_len should be 24; trtllm-build wrote 23" in problem.seen


@pytest.mark.parametrize(
    "limit, used", [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]
)
def test_a_container_that_may_use_less_memory_than_the_host_builds_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str
) -> None:
    monkeypatch.setattr(build_engines, "CGROUP", tmp_path)
    host = build_engines.free_memory_bytes()
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("5000000\n")
    (tmp_path / used).write_text("1000000\n")
    assert build_engines.free_memory_bytes() == 4_000_000 < host
    (tmp_path / limit).write_text("max\n")
    assert build_engines.free_memory_bytes() > 4_000_000
