"""QUANT: each kind gives a command line that the version of NVIDIA's tool takes, and its output is checked. The tools
are stand-ins at their place in TensorRT-LLM's repository; the flag tables judge the command lines."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from synthetic import GROUPED, write_model

from scripts import build_config, build_hf, reports, room
from scripts import settings as make_settings
from scripts.nvidia import contracts, memory, quantize, quants

VERSIONS = contracts.versions()
ALGOS = {"int8_wo": "W8A16", "sq": "W8A8_SQ_PER_CHANNEL", "int4_awq": "W4A16_AWQ", "fp8": "FP8"}

TOOL = """
import json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from scripts.nvidia import contracts
asked = vars(contracts.flag_parser("tool", contracts.flags({tool!r}, {version!r})).parse_args(sys.argv[1:]))
output, tp, pp = Path(asked["output_dir"]), asked["tp_size"], asked["pp_size"]
for rank in range(tp * pp):
    (output / f"rank{{rank}}.safetensors").write_bytes(b"%d" % rank * 100)
(output / "extra.json").write_text("{{}}")
config = {{"dtype": asked["dtype"], "quantization": {{"quant_algo": {algo!r}}},
          "mapping": {{"world_size": tp * pp, "tp_size": tp, "pp_size": pp}}}}
(output / "config.json").write_text(json.dumps(config))
"""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    build_hf.build_hf(build_config.Settings(write_model(folder / "meta", GROUPED), folder / "hf"))
    return folder / "hf"


H100 = "NVIDIA H100 80GB HBM3, 81559, 9.0, 550.54.15"


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH, with an H100 in it."""
    (tmp_path / "programs").mkdir()
    stand_ins.nvidia_smi(tmp_path / "programs", [H100])
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
    for name in ("ROOM_ARGS", "ROOM_NEEDS", "BAKE_SETTINGS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "programs"


def settings(hf: Path, folder: Path, quant: str, version: str = "0.14.0", **changed: Any) -> quantize.Settings:
    asked: dict[str, Any] = {"dtype": "float16", "tp_size": 2, "pp_size": 1, **changed}
    return quantize.Settings(
        hf, folder / "checkpoint", quant, trtllm_version=version, examples=folder / "TensorRT-LLM", **asked
    )


def put_tool(folder: Path, quant: str, version: str, text: str = TOOL, algo: str = "") -> None:
    tool = quants.TABLE[quant].tool
    script = folder / "TensorRT-LLM" / contracts.toolchain(version)["examples"][tool]
    script.parent.mkdir(parents=True)
    root = str(Path(__file__).resolve().parents[2])
    script.write_text(text.format(root=root, tool=tool, version=version, algo=algo or ALGOS[quant]))


def test_every_command_line_is_taken_by_the_tools_own_parser() -> None:
    for quant, version, dtype, (tp, pp) in itertools.product(
        ALGOS, VERSIONS, ("float16", "bfloat16"), ((1, 1), (8, 1), (2, 2))
    ):
        tool = quants.TABLE[quant].tool
        flags = contracts.flags(tool, version)
        asked = settings(Path("hf"), Path("."), quant, version, dtype=dtype, tp_size=tp, pp_size=pp)
        words = quantize.argv(asked, flags, "tool.py", "hf", "checkpoint")
        assert words[:2] == [sys.executable, "tool.py"]
        understood = vars(contracts.flag_parser(tool, flags).parse_args(words[2:]))
        assert (understood["model_dir"], understood["output_dir"]) == ("hf", "checkpoint")
        assert (understood["dtype"], understood["tp_size"], understood["pp_size"]) == (dtype, tp, pp)


def test_each_kind_is_asked_for_as_nvidias_readme_does() -> None:
    def words(quant: str, version: str) -> str:
        flags = contracts.flags(quants.TABLE[quant].tool, version)
        return " ".join(
            quantize.argv(settings(Path("hf"), Path("."), quant, version), flags, "tool.py", "hf", "out")[2:]
        )

    same = "--model_dir hf --output_dir out --dtype float16 --tp_size 2 --pp_size 1"
    for version in VERSIONS:
        assert words("int8_wo", version) == f"{same} --use_weight_only --weight_only_precision int8"
        assert words("sq", version) == f"{same} --smoothquant 0.5 --per_token --per_channel"
        assert words("int4_awq", version) == f"{same} --qformat int4_awq --awq_block_size 128 --calib_size 32"
        assert words("fp8", version) == f"{same} --qformat fp8 --calib_size 512"


@pytest.mark.parametrize("quant", ALGOS)
def test_the_room_is_what_the_tool_wrote_and_how_it_was_asked(hf: Path, tmp_path: Path, quant: str) -> None:
    put_tool(tmp_path, quant, "0.14.0")
    quantize.build_quantized(settings(hf, tmp_path, quant, pp_size=3))
    manifest = room.read_manifest(tmp_path / "checkpoint")
    assert sorted(manifest["files"]) == ["config.json", *(f"rank{rank}.safetensors" for rank in range(6))]
    assert (manifest["facts"]["quant"], manifest["facts"]["tp_size"], manifest["facts"]["pp_size"]) == (quant, 2, 3)
    assert str(tmp_path) not in json.dumps(manifest) and "--pp_size" in manifest["facts"]["argv"]
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {*manifest["files"], "args", "args.sha256", "made_from.json", "manifest.json"}


def refused(hf: Path, tmp_path: Path, quant: str = "fp8") -> reports.Problem:
    with pytest.raises(reports.Problem) as caught:
        quantize.build_quantized(settings(hf, tmp_path, quant))
    assert not (tmp_path / "checkpoint").exists()
    return caught.value


def test_the_words_of_the_setting_are_the_kinds_that_there_are() -> None:
    assert tuple(quants.TABLE) == tuple(memory.QUANT_BYTES) == make_settings.QUANTS and set(ALGOS) == set(quants.TABLE)
    for word, kind in quants.TABLE.items():
        assert quants.algo_of(word) == kind.algo and quants.quant_of(ALGOS[word]) == word
    assert quants.algo_of("") is None and quants.quant_of("") == ""


@pytest.mark.parametrize("quant", ALGOS)
def test_a_quantizer_that_no_image_has_is_refused_by_name_before_anything_runs(
    hf: Path, tmp_path: Path, quant: str
) -> None:
    """0.8.0's quantize.py imports ammo (backend-rules: quantization); its convert_checkpoint.py does not."""
    put_tool(tmp_path, quant, "0.8.0")
    asked = settings(hf, tmp_path, quant, "0.8.0")
    if quants.TABLE[quant].tool == "convert":
        quantize.build_quantized(asked)
        return
    with pytest.raises(reports.Problem) as caught:
        quantize.build_quantized(asked)
    assert "nvidia-ammo" in caught.value.seen and caught.value.command == "make checkpoint TOOLCHAIN=0.14.0"
    assert not (tmp_path / "checkpoint").exists()


def test_without_the_examples_the_report_fetches_them(hf: Path, tmp_path: Path) -> None:
    problem = refused(hf, tmp_path)
    assert str(tmp_path) in problem.command and "0.14.0.dev2024100100" in problem.advice
    # no tag has the tools of image 24.10: it was built from this commit (docker/toolchains.json)
    assert " 48686bca3a34c6d323086e540c1c5245ac8eaef5 " in problem.command


def test_a_gpu_that_could_not_run_the_engines_is_refused_before_the_hours_of_measuring(
    hf: Path, tmp_path: Path, programs: Path
) -> None:
    put_tool(tmp_path, "fp8", "0.14.0")
    stand_ins.nvidia_smi(programs, ["NVIDIA A100-SXM4-80GB, 81920, 8.0, 550.54.15"])
    problem = refused(hf, tmp_path)
    assert "FP8 needs compute capability 8.9" in problem.seen and "8.0" in problem.seen and "QUANT=" in problem.command
    stand_ins.nvidia_smi(programs, [])
    assert refused(hf, tmp_path).title == "no GPU"


def test_a_tool_that_fails_is_quoted(hf: Path, tmp_path: Path) -> None:
    put_tool(tmp_path, "fp8", "0.14.0", "import sys; sys.exit('no module named modelopt')")
    problem = refused(hf, tmp_path)
    assert "status 1" in problem.seen and "no module named modelopt" in problem.seen
    assert (tmp_path / "checkpoint.partial/quantizing/log").is_file()


def test_a_tool_that_quantizes_otherwise_than_asked_is_noticed(hf: Path, tmp_path: Path) -> None:
    put_tool(tmp_path, "int4_awq", "0.14.0", algo="W4A8_AWQ")
    problem = refused(hf, tmp_path, "int4_awq")
    assert "W4A16_AWQ" in problem.seen and "W4A8_AWQ" in problem.seen


def test_a_tool_that_writes_too_few_ranks_is_noticed(hf: Path, tmp_path: Path) -> None:
    put_tool(tmp_path, "fp8", "0.14.0", TOOL.replace("range(tp * pp)", "range(1)"))
    assert "rank1.safetensors" in refused(hf, tmp_path).seen


@pytest.mark.parametrize("changed", [{"quant": "int3"}, {"dtype": "float32"}])
def test_what_no_tool_does_is_refused_at_once(hf: Path, tmp_path: Path, changed: dict[str, str]) -> None:
    with pytest.raises(reports.Problem) as caught:
        settings(hf, tmp_path, **{"quant": "fp8", **changed})
    assert next(iter(changed.values())) in caught.value.seen and caught.value.command.startswith("make checkpoint")


def test_the_checkpoint_script_leaves_quantizing_to_the_tools(hf: Path, tmp_path: Path) -> None:
    put_tool(tmp_path, "int8_wo", "0.8.0")
    command = [sys.executable, "-m", "scripts.build_checkpoint", "--model", str(hf), "--tp-size", "2", "--dtype="]
    command += ["--quant", "int8_wo"]
    command += ["--trtllm-version", "0.8.0", "--examples", str(tmp_path / "TensorRT-LLM"), "--output"]
    command += [str(tmp_path / "room")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "room/config.json").read_bytes())["dtype"] == "float16"  # the source's own
