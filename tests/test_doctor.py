"""make doctor: every check once where all is well and once where it is not, and the page as a user sees it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from project import ROOT, make
from server import free_ports
from stand_ins import nvidia_smi, on_path

from scripts import build_engines, doctor, plan, reports
from scripts.nvidia import contracts, gpus
from scripts.serving import host, toolbox

OLDEST, LAST_FOR_VOLTA, *_, NEWEST = contracts.versions()
V100S, A100S = "4x V100-SXM2-16GB", "2x A100-80GB"
STORIES = str(ROOT / "models/stories")


def case(gpu: str = "", **changed: str) -> doctor.Case:
    """The bundled model by the torch engine, or what is changed; gpu: as ASSUME_GPU names it."""
    http_port, grpc_port, metrics_port, openai_port = free_ports(4)
    settings = {
        "MODEL": "stories", "WEIGHTS": STORIES, "CONTEXT": "512", "ENGINE": "torch", "TP": "2", "DTYPE": "float16", "MAX_BATCH_SIZE": "16",
        "TOOLCHAIN": "", "HOST": "127.0.0.1", "HTTP_PORT": str(http_port), "GRPC_PORT": str(grpc_port), "METRICS_PORT": str(metrics_port),
        "OPENAI_PORT": str(openai_port), "INTERPRETER": sys.executable, "ASSUME_GPU": gpu, **changed,
    }  # fmt: skip
    return doctor.case_of(plan.Choice(settings))


def tensorrt(gpu: str = V100S, **changed: str) -> doctor.Case:
    preset = {"MODEL": "llama-2-7b", "WEIGHTS": "weights/llama-2-7b", "CONTEXT": "4096", "MAX_BATCH_SIZE": "8"}
    return case(gpu, **{"ENGINE": "tensorrt", **preset, **changed})


def found(name: str, asked: doctor.Case) -> doctor.Finding:
    return doctor.checked(name, doctor.CHECKS["tensorrt" if asked.choice.tensorrt else "torch"][name], asked)


def is_fine(name: str, asked: doctor.Case, *said: str) -> None:
    finding = found(name, asked)
    assert finding.mark == "fine" and all(word in finding.text for word in said), finding


def is_noted(name: str, asked: doctor.Case, *said: str) -> None:
    finding = found(name, asked)
    assert finding.mark == "note" and all(word in finding.text for word in said), finding
    assert "itself failed" not in finding.text


def stops(name: str, asked: doctor.Case, *said: str) -> None:
    """A finding with the report that the journey would stop with; a report ends in a command."""
    finding = found(name, asked)
    assert finding.mark == "stop" and finding.problem, finding
    joined = " ".join(finding.problem.split())  # a long path wraps the lines
    assert all(word in joined for word in said), finding.problem
    assert finding.problem.rstrip().splitlines()[-1].startswith("    "), finding.problem


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


# --- for both engines ---


def test_settings() -> None:
    is_fine("settings", case(), "stories by the torch engine, TP 2")
    is_fine("settings", case(STREAMING="off"), "TP 2, no streaming")
    is_fine("settings", tensorrt(), f"TensorRT-LLM {LAST_FOR_VOLTA}")
    is_fine("settings", tensorrt(A100S), f"TensorRT-LLM {NEWEST}")
    slip = case(TP="two")
    refused = doctor.Case(plan.Choice(slip.choice.settings, ["TP"]))
    stops("settings", refused, "TP is 'two'")


def test_make(programs: Path) -> None:
    is_fine("make", case(), "GNU Make 4")
    on_path(programs, "make", "echo 'GNU Make 3.82'\n")
    is_noted("make", case(), "3.82", "4.0 or later")


def test_system(programs: Path, tmp_path: Path) -> None:
    is_fine("system", case(), "Linux x86_64", "Python 3.")
    is_fine("system", tensorrt(), "Linux x86_64")
    fresh = case(INTERPRETER=str(tmp_path / ".venv/bin/python"))
    on_path(programs, "python3.12", f'exec "{sys.executable}" "$@"\n')
    finding = found("system", fresh)
    if finding.mark == "stop":  # this interpreter has no shared libpython, for instance
        pytest.skip(f"no venv could be made here: {finding.text}")
    is_noted("system", fresh, "the first make installs it")
    on_path(programs, "getconf", "echo glibc 2.31\n")
    stops("system", fresh, "THE C LIBRARY IS TOO OLD", "2.31", "2.35")
    assert not (tmp_path / ".venv").exists()


def test_ports() -> None:
    is_fine("ports", case(), "are free")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        stops("ports", case(HTTP_PORT=str(port)), f"HTTP_PORT is {port}")
        stops("ports", case(OPENAI_PORT=str(port)), f"OPENAI_PORT is {port}")


def test_keys_and_the_collector_of_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    is_fine("operating", case(), "no file", "traces are off")
    is_fine("operating", tensorrt(TRACES="on"), "traces are on")
    stops("operating", case(API_KEY_FILE=str(tmp_path / "keys")), "NO API KEY", "No such file")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")
    is_fine("operating", case())
    stops("operating", case(TRACES="on"), "OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")
    stops("ports", case(OPENAI_HOST="192.0.2.1"), "OPENAI_HOST is '192.0.2.1'")


def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    is_fine("shared memory", case(TP="1"))
    monkeypatch.setattr(host, "SHARED_MEMORY_BYTES_PER_RANK", 1 << 50)
    stops("shared memory", case(), "/dev/shm")


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_engines, "free_memory_bytes", lambda: 24 * 10**9)
    is_fine("memory", case(), "24.0 GB")
    is_fine("memory", tensorrt(), "engines 23.6 GB")  # 3 x 6.87 + 3
    is_noted("memory", tensorrt(MODEL="llama-2-13b"), "engines 42.5 GB", "short for engines")  # 3 x 13.18 + 3


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    free = namedtuple("free", "free")
    rooms = tensorrt(VARIANT="variant", HF="hf", CONFIG="config")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(28 * 10**9))
    is_fine("disk", rooms, "take 27.5 GB")  # 13.7 + 13.7
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(27 * 10**9))
    stops("disk", rooms, "27.0 GB", "27.5 GB", "make plan")
    (tmp_path / "variant/checkpoint").mkdir(parents=True)
    (tmp_path / "variant/checkpoint/manifest.json").write_text("{}")  # what is made already takes nothing more
    is_fine("disk", rooms, "take 13.7 GB")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(10**9))
    is_noted("disk", case(INTERPRETER="/nowhere/python"), "packages 3.0 GB")


def test_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    is_fine("fit", tensorrt(), "6 requests of MAX_SEQ_LEN 4096")
    is_noted("fit", tensorrt(MODEL="llama-2-13b"), "Tight", "TP=4")
    stops("fit", tensorrt(TP="1"), "DOES NOT FIT", "12.6 GiB", "TP=2")
    stops("fit", tensorrt(TOOLCHAIN=NEWEST), "7.0", NEWEST)
    stops("fit", tensorrt(TP="8"), "8 ranks", "4 (4x V100-SXM2-16GB)")
    stops("fit", tensorrt(DTYPE="bfloat16"), "bfloat16")
    monkeypatch.setattr(gpus, "here", list)
    is_fine("fit", case(), "2 rank(s) on the CPU")
    is_noted("fit", tensorrt(""), "ASSUME_GPU")


# --- weights ---


def meta_folder(folder: Path, shards: int = 1) -> Path:
    """The bundled model's params.json and tokenizer,
    with `shards` files of the length that its weights take (two bytes a number)."""
    folder.mkdir()
    for name in ("params.json", "tokenizer.model"):
        shutil.copy2(Path(STORIES) / name, folder / name)
    # 4737792 numbers, 11 norms of 256 of them in every shard; and what torch's zip adds
    size = 2 * ((4_737_792 - 11 * 256) // shards + 11 * 256) + 5000
    for index in range(shards):
        (folder / f"consolidated.{index:02d}.pth").write_bytes(bytes(size))
    return folder


def test_weights_of_meta(tmp_path: Path) -> None:
    is_fine("weights", case(), "Meta's form", "1 whole shard(s)")
    stops("weights", tensorrt(), "weights/llama-2-7b")
    folder = meta_folder(tmp_path / "two", 2)
    asked = case(MODEL=str(folder), WEIGHTS=str(folder))
    is_fine("weights", asked, "2 whole shard(s)", "no checklist.chk")
    os.truncate(folder / "consolidated.01.pth", 4_000_000)
    stops("weights", asked, "4000000 bytes", "consolidated.01.pth")
    (folder / "consolidated.01.pth").unlink()
    stops("weights", asked, "split into 2 files", "this folder has 1 of them")
    (folder / "consolidated.00.pth").rename(folder / "consolidated.01.pth")
    stops("weights", asked, "consolidated.00.pth is missing")
    (folder / "tokenizer.model").unlink()
    stops("weights", asked, "TOKENIZER.MODEL")
    (folder / "params.json").unlink()
    stops("weights", asked, "NO MODEL IN THIS FOLDER")


def test_weights_against_metas_checklist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = meta_folder(tmp_path / "model")
    asked = case(MODEL=str(folder), WEIGHTS=str(folder))
    sums = [
        f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}"
        for name in ("consolidated.00.pth", "params.json")
    ]
    (folder / "checklist.chk").write_text("\n".join(sums) + "\n")
    is_fine("weights", asked, "checklist.chk agrees with 2 file(s)")
    monkeypatch.setattr(doctor, "HASHED_BYTES", 1_000_000)
    is_fine("weights", asked, "agrees with 1 file(s), 1 large left to: cd ", "md5sum -c checklist.chk")
    (folder / "params.json").write_text((folder / "params.json").read_text() + " ")
    stops("weights", asked, "PARAMS.JSON IS DAMAGED", sums[1].split()[0], "md5sum -c")


def test_weights_of_hugging_face(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    asked = case(MODEL=str(folder), WEIGHTS=str(folder))
    stops("weights", asked, "model.safetensors is missing")
    header = json.dumps({"x": {"dtype": "F16", "shape": [50], "data_offsets": [0, 100]}}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(100)
    (folder / "model.safetensors").write_bytes(whole)
    is_fine("weights", asked, "Hugging Face's form", "1 whole file(s)")
    (folder / "model.safetensors").write_bytes(whole[:-1])
    stops("weights", asked, f"{len(whole) - 1} bytes", f"{len(whole)}")
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    stops("weights", asked, "no header of safetensors")


def test_weights_in_a_gguf_file_are_noted_until_the_room_config_knows_their_shape(tmp_path: Path) -> None:
    folder, room = tmp_path / "model", tmp_path / "config"
    folder.mkdir()
    asked = case(MODEL=str(folder), WEIGHTS=str(folder), CONFIG=str(room), CONTEXT="")
    for name in ("weights", "memory", "fit"):
        stops(name, asked, "NO MODEL IN THIS FOLDER", "Here is: none")
    assert len({found(name, asked).problem for name in ("weights", "memory", "fit")}) == 1  # it is printed once
    (folder / "model.gguf").write_bytes(bytes(1_000_000))
    is_fine("weights", asked, "a GGUF file", "1.0 MB")
    for name in ("memory", "disk", "fit"):
        is_noted(name, asked, "the model's shape is not known yet; make config", "makes it known")
    room.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 77, "max_position_embeddings": 512, "torch_dtype": "float32",
    }  # fmt: skip
    for file, content in {"config.json": config, "manifest.json": {}, "args": {}}.items():
        (room / file).write_text(json.dumps(content))
    for name in ("memory", "fit"):
        assert "not known yet" not in found(name, asked).text and found(name, asked).mark == "fine"


# --- ENGINE=torch ---


def test_server(monkeypatch: pytest.MonkeyPatch) -> None:
    is_fine("server", case(), "tritonserver")
    is_noted("server", case(INTERPRETER="/nowhere/python"), "come with the packages")

    def missing() -> None:
        raise reports.serving.program_missing("mpirun")

    monkeypatch.setattr(toolbox, "check_mpirun", missing)
    stops("server", case(), "NO MPIRUN")


def test_gpus_that_the_torch_engine_may_use(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_fine("gpus", case("1x L4"), "1x L4 (assumed)")
    monkeypatch.setattr(plan, "cpu_torch", lambda: False)
    monkeypatch.setattr(gpus, "here", list)
    is_noted("gpus", case(), "on the CPU")


# --- ENGINE=tensorrt ---


def test_gpus_that_tensorrt_needs(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_fine("gpus", tensorrt(), "4x V100-SXM2-16GB (assumed)", "15.8 GiB", "7.0")
    nvidia_smi(programs, ["Tesla V100-SXM2-16GB, 16160, 7.0, 535.183.06"] * 4)
    is_fine("gpus", tensorrt(""), "4x Tesla V100-SXM2-16GB")
    on_path(programs, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9\n")
    broken = tensorrt("")
    stops("gpus", broken, "NVIDIA-SMI DOES NOT ANSWER", "NVIDIA-SMI has failed")
    is_noted("fit", broken, "see above")
    monkeypatch.setattr(gpus, "here", list)
    stops("gpus", tensorrt(""), "NO GPU")


@pytest.mark.parametrize(
    ("version", "driver", "mark"),
    [
        (LAST_FOR_VOLTA, "560.35.03", "fine"),
        (LAST_FOR_VOLTA, "535.183.06", "note"),
        (LAST_FOR_VOLTA, "470.1", "stop"),
        (NEWEST, "575.57", "stop"),
        (NEWEST, "590.48.01", "fine"),
    ],
)
def test_driver(version: str, driver: str, mark: str) -> None:
    host = [gpus.Gpu("A100-80GB", 81920 << 20, "8.0", driver)] * 2
    finding = found("driver", doctor.Case(tensorrt(A100S, TOOLCHAIN=version).choice, host))
    row = contracts.toolchain(version)
    assert finding.mark == mark and driver in (finding.problem or finding.text), finding
    assert row["driver_min"] in (finding.problem or finding.text) or row["driver"] in finding.text


def test_driver_of_assumed_gpus_is_not_known() -> None:
    is_noted("driver", tensorrt(), "assumed")


@pytest.mark.parametrize(
    ("links", "peers", "mark", "said"),
    [
        ("NV2", "OK", "fine", "NVLink"),
        ("PIX", "OK", "fine", "over PCIe"),
        ("SYS", "NS", "note", "cannot read each other's memory"),
    ],
)
def test_links(programs: Path, links: str, peers: str, mark: str, said: str) -> None:
    nvidia_smi(programs, ["Tesla V100-SXM2-16GB, 16160, 7.0, 535.183.06"] * 2, links, peers)
    finding = found("links", tensorrt(""))
    assert finding.mark == mark and said in finding.text


def test_links_of_assumed_gpus() -> None:
    is_fine("links", tensorrt(), "NVLink")
    is_noted("links", tensorrt("2x L4"), "not known")
    is_noted("links", tensorrt("1x L4"), "2 ranks")
    is_fine("links", tensorrt("1x L4", TP="1"))


DOCKER = """
printf '%s ' "$@" >>"$LOG"; echo >>"$LOG"
case "$1 $2" in
    "info "*) [ -z "$NO_DAEMON" ] || { echo "Cannot connect to the Docker daemon" >&2; exit 1; }; echo "$RUNTIMES " ;;
    "image inspect") [ "$IMAGES" = all ] || exit 1; echo sha256:1 ;;
    "manifest inspect") [ -z "$GONE" ] || { echo "manifest unknown" >&2; exit 1; }; echo '{}' ;;
esac
"""


@pytest.fixture
def docker(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker with NVIDIA's runtime and every image; returns the log of what it was asked."""
    log = programs / "log"
    on_path(programs, "docker", DOCKER)
    for name, value in {
        "LOG": str(log),
        "RUNTIMES": "runc nvidia",
        "IMAGES": "all",
        "GONE": "",
        "NO_DAEMON": "",
    }.items():
        monkeypatch.setenv(name, value)
    return log


def test_docker_and_the_image(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = contracts.toolchain(LAST_FOR_VOLTA)["image"]
    is_fine("docker", tensorrt(), image)
    monkeypatch.setenv("IMAGES", "none")
    stops("docker", tensorrt(), image, "docker pull")
    assert "it can be pulled" in found("docker", tensorrt()).text
    monkeypatch.setenv("GONE", "1")
    assert "manifest unknown" in found("docker", tensorrt()).text
    monkeypatch.setenv("NO_DAEMON", "1")
    stops("docker", tensorrt(), "DOCKER DOES NOT ANSWER", "Cannot connect")
    asked = {line.split()[0] for line in docker.read_text().splitlines()}
    assert asked == {"info", "image", "manifest"}  # looked up, never pulled nor run


def test_docker_without_nvidias_runtime(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("nvidia-container-cli") or shutil.which("nvidia-ctk"):
        pytest.skip("this machine has NVIDIA's container toolkit")
    monkeypatch.setenv("RUNTIMES", "runc")
    stops("docker", tensorrt(), "NO NVIDIA RUNTIME", "runc")


def test_no_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    for program in ("grep", "sed", "tr", "cat"):
        (tmp_path / program).symlink_to(shutil.which(program) or f"/bin/{program}")
    monkeypatch.setenv("PATH", str(tmp_path))
    stops("docker", tensorrt(), "NO DOCKER")


# --- the doctor itself ---


def test_a_check_that_crashes_is_a_finding() -> None:
    def crash(asked: doctor.Case) -> str:
        raise ZeroDivisionError("a bug of ours")

    finding = doctor.checked("any", crash, case())
    assert (finding.mark, finding.problem) == ("note", None) and "a bug of ours" in finding.text


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: doctor.Case, *words: str
) -> tuple[int, str, str]:
    """What `make doctor` runs, in this process."""
    chosen = "\n".join(f"{name}={value}" for name, value in asked.choice.settings.items())
    monkeypatch.setenv("CHOSEN", chosen)
    monkeypatch.setenv("REFUSED_NAMES", " ".join(asked.choice.refused))
    monkeypatch.setattr(sys, "argv", ["doctor", *words])
    status = doctor.main()
    said = capsys.readouterr()
    return status, said.out, said.err


def test_ready_and_not_ready(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, docker: Path, tmp_path: Path
) -> None:
    status, out, err = run(capsys, monkeypatch, case())
    assert status == 0 and out.endswith("\nReady.\n") and err == ""
    assert [line[4:].split("  ")[0] for line in out.splitlines()[:-2]] == list(doctor.CHECKS["torch"])

    # two checks meet the same problem, for instance a model that is nowhere: it is told once
    status, out, err = run(capsys, monkeypatch, tensorrt(TP="1", MAX_SEQ_LEN="4096"))
    assert status == 1 and "[✗] weights" in out and "[✗] fit" in out
    assert out.rstrip().splitlines()[-1].startswith("Not ready: weights")
    assert err.count("DOES NOT FIT") == 1 and "Traceback" not in err

    _, out, err = run(capsys, monkeypatch, case(TP="3"))
    assert "[✗] memory" in out and "[✗] fit" in out and err.count("3 RANKS CANNOT SHARE THIS MODEL") == 1

    status, out, err = run(capsys, monkeypatch, case(), "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["name"] for line in lines] == list(doctor.CHECKS["torch"])
    assert {line["mark"] for line in lines} <= {"fine", "note"}


def test_a_setting_that_cannot_be_ends_the_doctor_with_one_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = doctor.Case(plan.Choice({**case().choice.settings, "TP": "two"}, ["TP"]))
    status, out, err = run(capsys, monkeypatch, asked)
    assert status == 1 and out.splitlines() == ["[✗] settings       TP cannot be two", "", "Not ready: settings."]
    assert err.count("-- TP CANNOT BE TWO -") == 1


def test_doctor_as_a_user_types_it_for_a_gguf_file(own_tree: Path) -> None:
    folder = own_tree / "weights/small"
    folder.mkdir(parents=True)
    (folder / "small.gguf").write_bytes(bytes(1_000_000))
    done = make(own_tree, "doctor", f"MODEL={folder}", f"ASSUME_GPU={A100S}")
    assert re.search(rf"^\[!\] fit .* not known yet; make config .*MODEL={folder} .*known$", done.stdout, re.MULTILINE)
    assert "NO SUCH FOLDER" not in done.stderr and "itself failed" not in done.stdout


def test_doctor_as_a_user_types_it(own_tree: Path, programs: Path) -> None:
    """Before anything is installed, for GPUs that are not here; it writes nothing."""
    before = sorted(own_tree.rglob("*"))
    on_path(programs, "nvidia-smi", "exit 9\n")
    words = ["MODEL=llama-2-70b", "ENGINE=tensorrt", "TP=4", f"ASSUME_GPU={V100S}"]
    done = subprocess.run(
        ["make", "doctor", *words], cwd=own_tree, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "[✗] fit" in done.stdout and "-- LLAMA-2-70B DOES NOT FIT -" in done.stderr
    assert "itself failed" not in done.stdout
    assert sorted(own_tree.rglob("*")) == before
