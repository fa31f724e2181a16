"""ENGINE=tensorrt on the host: the version table, docker's command lines, refusals.
A fake docker on PATH notes its arguments.

The host of these tests has make, bash, coreutils, grep, sed, find, docker and some python3 on its PATH,
and no package of ours.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from project import ROOT
from server import Served, free_ports
from stand_ins import nvidia_smi, on_path
from tritonclient.grpc import model_config_pb2

from scripts import ask, build_model_repo, build_wheels, plan, reports, settings
from scripts.making import choice, journey, toolchain
from scripts.nvidia import contracts, gpus
from scripts.serving import supervisor

TABLE: dict[str, dict[str, Any]] = json.loads((ROOT / "docker/toolchains.json").read_text())
OLDEST, LAST_FOR_VOLTA, *_, NEWEST = TABLE
DIGEST = "sha256:" + "5f" * 32
V100 = "Tesla V100-SXM2-16GB, 7.0"
PROGRAMS = (
    "make bash awk cat cmp cut dirname env find grep head id mkdir mv paste printf rm sed sleep sort tail tee tr wc"
)

# Keeps each call as one line of NUL-separated words. A room becomes whole as the script in the container would make it.
DOCKER = r"""
{ for word in "$@"; do printf '%s\0' "$word"; done; echo; } >>"$DOCKER_LOG"
case "$1 ${2:-}" in
    "info "*) [ -z "${NO_DAEMON:-}" ] || { echo "Cannot connect to the Docker daemon." >&2; exit 1; }; echo "${RUNTIMES:-runc nvidia }" ;;
    "image inspect") [[ " ${IMAGES:-all} " == *" all "* || " $IMAGES " == *" ${*: -1} "* ]] || exit 1; echo "${*: -1}" ;;
    "build "*) while [ "$1" != --iidfile ]; do shift; done; printf %s "${BUILT:-sha256:built}" >"$2" ;;
    "buildx imagetools") [[ " ${GONE:-} " != *" $4 "* ]] || { echo "ERROR: $4: not found" >&2; exit 1; }; echo "$DIGEST" ;;
    "run "*)
        room=${*: -1}
        case "$*" in
            *scripts.build_*)
                mkdir -p "$room" && printf %s "$ROOM_ARGS" >"$room/args" && echo '{}' | tee "$room/made_from.json" >"$room/manifest.json" ;;
            *scripts.serve*)
                [ -n "${FIFO:-}" ] || exit 0
                trap 'kill $!; echo ended >>"$DOCKER_LOG"; exit 0' TERM
                echo up >"$FIFO"
                sleep 60 & wait ;;
        esac ;;
esac
"""


SERVE = ("serve", "MODEL=llama-2-7b", "ENGINE=tensorrt")


class Host:
    """A machine with a copy of the project, its own PATH, and a docker that keeps what it is told."""

    def __init__(self, tree: Path, folder: Path, docker: bool = True, gpus: list[str] | None = None) -> None:
        self.tree, self.folder, self.log = tree, folder, folder / "docker.log"
        folder.mkdir()
        for program in PROGRAMS.split():
            (folder / program).symlink_to(shutil.which(program) or f"/usr/bin/{program}")
        # the interpreter's own place tells it where its library is, so no link
        on_path(folder, "python3", f'exec {getattr(sys, "_base_executable", sys.executable)} "$@"\n')
        if docker:
            on_path(folder, "docker", DOCKER)
        if gpus:
            nvidia_smi(folder, gpus)

    def environment(self, **variables: str) -> dict[str, str]:
        return {"PATH": str(self.folder), "HOME": "/", "DOCKER_LOG": str(self.log), "DIGEST": DIGEST, **variables}

    def make(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment(**variables)
        return subprocess.run(
            ["make", *words], cwd=self.tree, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def calls(self) -> list[list[str]]:
        """What docker was told, call by call."""
        if not self.log.exists():
            return []
        return [line.split("\0")[:-1] for line in self.log.read_text().splitlines()]

    def runs(self) -> list[list[str]]:
        return [call for call in self.calls() if call[:1] == ["run"]]

    def reported(self, title: str, *words: str, **variables: str) -> str:
        """Type make, which must report under this title before docker runs anything; returns the report."""
        done = self.make(*words, **variables)
        assert done.returncode != 0
        assert f"-- {title} -" in done.stderr, done.stdout + done.stderr
        assert self.runs() == []
        return done.stderr


@pytest.fixture
def host(own_tree: Path, tmp_path: Path) -> Host:
    (own_tree / "weights/llama-2-7b").mkdir(parents=True)
    return Host(own_tree, tmp_path / "bin", gpus=[V100] * 4)


def ports_typed(ports: list[int]) -> list[str]:
    return [f"{name}_PORT={port}" for name, port in zip(("HTTP", "GRPC", "METRICS", "OPENAI"), ports)]


def one(words: list[str], flag: str) -> list[str]:
    """Every value of a flag."""
    return [value for name, value in zip(words, words[1:]) if name == flag]


def advised(report: str) -> list[list[str]]:
    """The commands that a report ends in, their words sorted:
    make does not keep the order in which settings were typed."""
    return [sorted(line.split()) for line in report.splitlines() if line.startswith("    ")]


def room_of(words: list[str]) -> str:
    module = one(words, "-m")[0]
    return module.replace("scripts.build_", "").replace("scripts.", "")


# --- the table ---


def test_a_row_is_a_line_and_bash_reads_the_cells_that_python_reads() -> None:
    lines = (ROOT / "docker/toolchains.json").read_text().splitlines()
    assert len(lines) == len(TABLE) + 2
    for version, row in TABLE.items():
        # the string that the image reports: the version that the user types, or a development version of it
        assert re.fullmatch(rf"{re.escape(version)}(\.dev\d+)?", row["trtllm"])
        for name, value in row.items():
            if isinstance(value, dict):
                continue
            command = ["scripts/toolchain.sh", "cell", version, name]
            read = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            expected = "" if value is None else " ".join(value) if isinstance(value, list) else str(value)
            assert read == (expected.lower() if isinstance(value, bool) else expected), (version, name)


def test_every_row_has_every_cell_and_says_what_is_inferred() -> None:
    cells = set(TABLE[OLDEST])
    for version, row in TABLE.items():
        assert set(row) == cells
        assert set(row["inferred"]) <= cells, version
        assert all(row["inferred"].values()), version
        assert re.fullmatch(r"nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-trtllm-python-py3", row["image"])
        assert row["digest"] is None or re.fullmatch(r"sha256:[0-9a-f]{64}", row["digest"])
        assert row["wheel_in_image"] == (row["packages"] is None)
        for kind in ("backend", "checkpoint-config", "engine-config", "trtllm-build", "convert", "quantize", "runtime"):
            assert contracts.table(kind, version)


def test_a_version_without_a_table_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "docker/contracts", tmp_path / "contracts")
    row = {**TABLE[NEWEST], "contract": {**TABLE[NEWEST]["contract"], "backend": "v9.9.9"}}
    (tmp_path / "toolchains.json").write_text(json.dumps({**TABLE, "9.9.9": row}))
    monkeypatch.setattr(contracts, "DOCKER", tmp_path)
    with pytest.raises(reports.Problem, match="no backend table for TensorRT-LLM 9.9.9") as of_table:
        contracts.table("backend", "9.9.9")
    assert of_table.value.where == str(tmp_path / "contracts/backend/v9.9.9.json")
    with pytest.raises(reports.Problem, match="no backend-rules table for TensorRT-LLM 9.9.9") as of_rules:
        contracts.sent_without_value("9.9.9")
    assert of_rules.value.where == str(tmp_path / "contracts/backend-rules/rules.json")
    assert contracts.sent_without_value(NEWEST) == []


def test_the_tables_of_a_row_are_those_of_the_version_that_its_image_reports() -> None:
    """Where a row takes a table of another version, it or the table says so."""
    sources = json.loads((ROOT / "docker/contracts/sources.json").read_text())
    for version, row in TABLE.items():
        branch = "r" + re.findall(r":(\d\d\.\d\d)-", row["image"])[0]
        for kind, name in row["contract"].items():
            told = sources[f"{kind}/{name}.json"].get("stands_in_for") == version or kind in row["inferred"].get(
                "contract", ""
            )
            assert name in (f"v{row['trtllm']}", branch) or told, (version, kind, name)
        assert row["examples"]["revision"] == f"v{row['trtllm']}" or re.fullmatch(
            r"[0-9a-f]{40}", row["examples"]["revision"]
        )


def test_image_24_10_is_a_month_older_than_the_release_whose_name_it_goes_by() -> None:
    """What tells it from the tag v0.14.0 (backend-rules: images): a flag more, two tensors and a hole fewer, no
    automatic quantization."""
    row = contracts.table("backend", LAST_FOR_VOLTA)["tensorrt_llm"]
    release = json.loads((ROOT / "docker/contracts/backend/v0.14.0.json").read_text())["tensorrt_llm"]

    def names(model: dict[str, Any], part: str) -> set[str]:
        return {tensor["name"] for tensor in model[part]}

    assert names(release, "inputs") - names(row, "inputs") == {"num_return_sequences"}
    assert names(release, "outputs") - names(row, "outputs") == {"sequence_index"}
    flags = {flag["flag"] for flag in json.loads((ROOT / "docker/contracts/trtllm-build/v0.14.0.json").read_text())}
    assert set(contracts.flags("trtllm-build", LAST_FOR_VOLTA)) - flags == {"--builder_opt"}
    assert "--autoq_format" not in contracts.flags("quantize", LAST_FOR_VOLTA)
    assert "trace" not in contracts.flags("trtllm-build", LAST_FOR_VOLTA)["--log_level"]["choices"]
    assert not {"--max_seq_length", "--seed"} & set(contracts.flags("quantize", OLDEST))


def test_the_page_says_what_the_table_says() -> None:
    page = (ROOT / "docker/README.md").read_text()
    for version, row in TABLE.items():
        cells = [
            cell.strip()
            for cell in re.findall(rf"^\| {re.escape(version)} \|(.*)\|$", page, re.MULTILINE)[0].split("|")
        ]
        python = row["python"].rpartition(".")[0]
        assert cells[0] == f"`{row['image'].split(':')[1]}`"
        assert cells[2:6] == [row["tensorrt"], row["cuda"], python, row["driver_min"]]
        assert not row["image_gb"] or cells[1] == f"{row['image_gb']} GB"


def test_no_version_is_named_outside_of_the_tables() -> None:
    """In code; comments and docstrings say where a rule comes from."""
    named = re.compile("|".join(rf"(?<![\d.]){re.escape(version)}(?![\d.])" for version in TABLE))
    found = []
    for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("model_repo_template/*/1/*.py")]:
        tree = ast.parse(path.read_text())
        docstrings = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
                found += [f"{path.name}:{node.lineno}"] * bool(named.search(node.value))
    others = [ROOT / "Makefile", ROOT / "docker/Dockerfile", *ROOT.glob("scripts/*.sh"), *ROOT.glob("models/*.mk")]
    for path in others:
        lines = path.read_text().splitlines()
        found += [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if named.search(line.split("#")[0])]
    assert found == []


# --- which version ---


@pytest.mark.parametrize(
    ("gpu", "version"),
    [
        ("4x V100-SXM2-16GB", LAST_FOR_VOLTA),
        ("2x A100-80GB", NEWEST),
        ("2x H100-80GB", NEWEST),
        ("8x H200-141GB", NEWEST),
        ("l40s", NEWEST),
    ],
)
def test_the_gpu_decides(gpu: str, version: str) -> None:
    assert toolchain.choose(gpu, "", os.defpath, asked=True) == (version, "")
    assert plan.toolchain_for(gpus.assumed(gpu)[0]) == version


def test_a_gpu_that_no_version_runs_on_is_refused_by_name(host: Host) -> None:
    nvidia_smi(host.folder, ["Tesla T4, 7.5"])
    report = host.reported("NO TENSORRT-LLM FOR THIS GPU", "serve", "MODEL=llama-2-7b", "ENGINE=tensorrt")
    assert "1x Tesla T4 has compute capability 7.5" in report
    assert f"{NEWEST}: 8.0 8.6" in report
    assert advised(report)[-1] == sorted(["make", "serve", "MODEL=llama-2-7b", "ENGINE=torch", "TOOLCHAIN="])


@pytest.mark.parametrize("name", ["4x V100-SXM2", "GeForce"])
def test_an_assumed_gpu_must_be_one_that_is_known(host: Host, name: str) -> None:
    """V100-SXM2 is two of them."""
    report = host.reported("NO SUCH GPU", "-n", "serve", "ENGINE=tensorrt", f"ASSUME_GPU={name}")
    assert "V100-SXM2-16GB, V100-SXM2-32GB" in " ".join(report.split()) and name in report


def test_gpus_of_two_kinds_do_not_decide(host: Host) -> None:
    nvidia_smi(host.folder, [V100, "NVIDIA A100-SXM4-80GB, 8.0"])
    assert "7.0" in host.reported("GPUS OF MORE THAN ONE KIND", "serve", "ENGINE=tensorrt")


def test_a_driver_that_does_not_answer_is_reported_with_its_words(host: Host) -> None:
    on_path(host.folder, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9\n")
    assert "NVIDIA-SMI has failed" in host.reported("THE DRIVER DOES NOT ANSWER", "engines", "ENGINE=tensorrt")


def test_the_torch_engine_takes_the_first_row_and_asks_no_gpu(host: Host) -> None:
    on_path(host.folder, "nvidia-smi", f"touch {host.folder}/asked\n")
    assert f"build/stories/torch-{OLDEST}-tp2-float16" in host.make("-n", "serve").stdout
    assert not (host.folder / "asked").exists()


# --- the journey, shown ---


@pytest.mark.parametrize("model", ["llama-2-7b", "llama-2-13b-chat", "llama-2-70b"])
@pytest.mark.parametrize(
    ("gpu", "tp"), [("4x V100-SXM2-16GB", "4"), ("2x A100-80GB", "2"), ("2x H100-80GB", "2"), ("8x H200-141GB", "8")]
)
def test_make_n_shows_the_journey_on_a_laptop_and_writes_nothing(
    tree: Path, tmp_path: Path, model: str, gpu: str, tp: str
) -> None:
    laptop = Host(tree, tmp_path / "bin", docker=False)
    before = sorted(tree.glob("build/**"))  # other tests share the tree
    done = laptop.make("-n", "serve", f"MODEL={model}", "ENGINE=tensorrt", f"ASSUME_GPU={gpu}", f"TP={tp}")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(tree.glob("build/**")) == before
    version = LAST_FOR_VOLTA if "V100" in gpu else NEWEST
    variant = f"build/{model}/tensorrt-{version}-tp{tp}-float16"
    lines = [line.split() for line in done.stdout.replace("\\\n", " ").splitlines()]
    # the weights, which this laptop has not, come on the host: a room in the container has no network
    completed = next(at for at, line in enumerate(lines) if line[:2] == ["docker", "build"])
    assert lines[completed - 1][-2:] == ["check", TABLE[version]["image"]]
    del lines[completed - 1 : completed + 1]
    on_host, steps = ([line for line in lines if ("docker" in line) == where] for where in (False, True))
    assert lines == [*on_host, *steps] and "scripts.fetch_weights" in on_host[-1]
    assert [room_of(step) for step in steps] == ["config", "checkpoint", "engines", "model_repo", "serve"]
    for step in steps:
        room = room_of(step)
        assert ('"$(cat' if room == "serve" else TABLE[version]["image"]) in step
        assert one(step, "--volume") == [f"'{tree}:{tree}'"]
        assert one(step, "--gpus") == (["all"] if room in ("engines", "serve") else [])
        assert one(step, "--network") == ([] if room == "serve" else ["none"])
        if room not in ("config", "serve"):
            assert one(step, "--trtllm-version") == [version]
            assert one(step, "--output") == [f"{variant}/{room}"]
    assert one(steps[1], "--tp-size") == [tp]
    assert one(steps[4], "--publish") == [f"127.0.0.1:{port}:{port}" for port in settings.PORTS.values()]


def test_the_endpoint_is_published_where_openai_host_says_and_its_files_are_mounted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """OPENAI_HOST is not an address of the container; a secret's value is on no command line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    words = {
        "MODEL": "llama-2-7b", "ENGINE": "tensorrt", "TOOLCHAIN": NEWEST, "OPENAI_HOST": "10.0.0.1", "LOG": "json",
        "API_KEY_FILE": str(tmp_path / "keys"),
    }  # fmt: skip
    (tmp_path / "keys").write_text("key\n")
    for traces in ("off", "on"):
        values = choice.values_of({**words, "TRACES": traces})
        found = journey.variables(choice.Typed(["serve"], words, asked=True), values, [])
        run = found["in_serve"].replace("$(BREAK)", "").split()
        assert one(run, "--publish") == [
            "127.0.0.1:8000:8000", "127.0.0.1:8001:8001", "127.0.0.1:8002:8002", "10.0.0.1:9000:9000",
        ]  # fmt: skip
        assert "--openai-host" not in found["LISTEN"] and "--log-form json" in found["LISTEN"]
        keys = words["API_KEY_FILE"]
        assert f"'{keys}:{keys}:ro'" in one(run, "--volume")
        assert ("OTEL_EXPORTER_OTLP_HEADERS" in one(run, "--env")) == (traces == "on")
        assert not any("secret" in word for word in run) and str(tmp_path) not in found["in_engines"]


@pytest.mark.parametrize("has_urllib3", [True, False])
def test_weights_need_any_python3_of_the_host_and_no_packages_of_ours(host: Host, has_urllib3: bool) -> None:
    real = getattr(sys, "_base_executable", sys.executable)
    status = 0 if has_urllib3 else 1
    on_path(host.folder, "python3", f'[[ "$*" != *urllib3* ]] || exit {status}\nexec {real} "$@"\n')
    shown = host.make("-n", "weights", "MODEL=llama-2-7b", "ENGINE=tensorrt").stdout.splitlines()
    program = "python3" if has_urllib3 else ".venv/bin/python"
    assert shown[-1].startswith(f"{program} -m scripts.fetch_weights "), shown
    assert any("make_venv.sh" in line for line in shown) != has_urllib3


def test_make_n_without_a_gpu_says_what_is_missing(tree: Path, tmp_path: Path) -> None:
    laptop = Host(tree, tmp_path / "bin")
    report = laptop.reported("WHICH GPU?", "-n", "serve", "MODEL=llama-2-7b", "ENGINE=tensorrt")
    assert advised(report)[0] == sorted(["make", "plan", *SERVE[1:], "ASSUME_GPU='4x", "V100-SXM2-16GB'"])


@pytest.mark.parametrize("word", ["help", "clean"])
def test_words_that_need_no_toolchain_ask_no_gpu(tree: Path, tmp_path: Path, word: str) -> None:
    done = Host(tree, tmp_path / "bin", docker=False).make(word, "ENGINE=tensorrt")
    assert (done.returncode, done.stderr) == (0, "")


# --- the journey, typed to docker ---


def test_the_journey_runs_on_a_host_with_any_python_and_a_second_make_only_serves(host: Host) -> None:
    ports = free_ports(4)
    words = ["serve", "MODEL=llama-2-7b", "ENGINE=tensorrt", "HOST=0.0.0.0", *ports_typed(ports)]
    done = host.make(*words)
    assert done.returncode == 0, done.stderr
    assert f"toolchain   TensorRT-LLM {LAST_FOR_VOLTA} for 4x Tesla V100-SXM2-16GB, 7.0" in done.stdout
    runs = host.runs()
    assert [room_of(run) for run in runs] == ["config", "checkpoint", "engines", "model_repo", "serve"]
    for run in runs:
        assert {"--rm", "--init"} <= set(run)
        assert one(run, "--user") == [f"{os.getuid()}:{os.getgid()}"]
        assert one(run, "--pull") == ["never"]
        assert one(run, "--workdir") == [str(host.tree)]
        assert {"HOME=/tmp", "ROOM_ARGS", "ROOM_NEEDS", "BAKE_SETTINGS"} <= set(one(run, "--env"))
        gpu = room_of(run) in ("engines", "serve")
        assert [one(run, "--ulimit"), one(run, "--shm-size")] == (
            [["memlock=-1", "stack=67108864:1073741824"], ["8g"]] if gpu else [[], []]
        )
    assert one(runs[-1], "--publish") == [f"0.0.0.0:{port}:{port}" for port in ports]
    assert one(runs[-1], "--shown-host") == ["0.0.0.0"]
    host.log.unlink()
    assert host.make(*words).returncode == 0
    assert [room_of(run) for run in host.runs()] == ["serve"]
    assert host.make("-q", "model_repo", *words[1:]).returncode == 0


def test_a_room_knows_the_image_that_made_it(host: Host) -> None:
    """A pinned digest is another question: what a tag held may have been something else."""
    words = ["checkpoint", "MODEL=llama-2-7b", "ENGINE=tensorrt", f"TOOLCHAIN={NEWEST}"]
    assert host.make(*words).returncode == 0
    checkpoint = host.tree / f"build/llama-2-7b/tensorrt-{NEWEST}-tp2-float16/checkpoint"
    assert f"image={TABLE[NEWEST]['image']} " in (checkpoint / "args").read_text()
    host.log.unlink()
    assert host.make("pin").returncode == 0
    assert host.make(*words).returncode == 0
    assert [room_of(run) for run in host.runs()] == ["checkpoint"]
    assert f"image=nvcr.io/nvidia/tritonserver@{DIGEST} " in (checkpoint / "args").read_text()


def test_an_image_without_the_wheel_is_completed_once(host: Host) -> None:
    words = ["engines", "MODEL=llama-2-7b", "ENGINE=tensorrt", f"TOOLCHAIN={OLDEST}"]
    done = host.make(*words, BUILT="sha256:built")
    assert (done.returncode, done.stderr) == (0, "")
    builds = [call for call in host.calls() if call[0] == "build"]
    assert len(builds) == 1
    assert one(builds[0], "--target") == ["toolchain"]
    assert one(builds[0], "--build-arg") == [f"BASE={TABLE[OLDEST]['image']}", f"PACKAGES={TABLE[OLDEST]['packages']}"]
    assert all("sha256:built" in run and TABLE[OLDEST]["image"] not in run for run in host.runs())
    host.log.unlink()
    assert host.make(*words, "TP=4", BUILT="sha256:built").returncode == 0
    assert [call for call in host.calls() if call[0] == "build"] == []


@pytest.mark.parametrize("version", TABLE)
def test_every_image_is_completed_once_with_what_serving_needs(host: Host, version: str) -> None:
    """No image of NVIDIA's has a gRPC client and an ASGI server (images.json: packages).
    Rooms are made without them."""
    nvidia_smi(host.folder, [V100 if "7.0" in TABLE[version]["architectures"] else "NVIDIA A100-SXM4-80GB, 8.0"] * 4)
    words = ["serve", "MODEL=llama-2-7b", "ENGINE=tensorrt", f"TOOLCHAIN={version}", *ports_typed(free_ports(4))]
    done = host.make(*words, BUILT="sha256:served")
    assert (done.returncode, done.stderr) == (0, "")
    *_, build = [call for call in host.calls() if call[0] == "build"]
    row, lacking = TABLE[version], TABLE[version]["packages"]
    assert one(build, "--target") == ["serving"] and build[-1] == "requirements"
    completed = f"trtllm-bake-toolchain:{version}" if lacking else row["image"]
    assert one(build, "--build-arg") == [f"BASE={completed}"]
    *rooms, serve = host.runs()
    assert "sha256:served" in serve
    assert lacking or all(row["image"] in run for run in rooms)
    host.log.unlink()
    assert host.make(*words).returncode == 0
    assert [call for call in host.calls() if call[0] == "build"] == []


@pytest.mark.parametrize("lock", ["openai-3.10.txt", "openai.txt"])
def test_what_serving_needs_is_locked_for_every_python_and_replaces_nothing_of_nvidias(lock: str) -> None:
    text = (ROOT / "requirements" / lock).read_text()
    locked = re.findall(r"^([a-z0-9-]+)==[0-9][0-9a-z.]* \\\n    --hash=sha256:", text, re.MULTILINE)
    assert len(locked) == text.count("==")
    names = [line for line in (ROOT / "requirements/openai.in").read_text().splitlines() if re.match("[a-z]", line)]
    assert sorted(locked) == sorted(names) and {"tritonclient", "grpcio"} <= set(names)
    assert not {"torch", "numpy", "transformers", "tensorrt", "mpi4py", "safetensors"} & set(names)


def test_every_toolchains_python_has_a_lock() -> None:
    pythons = {row["python"].rpartition(".")[0] for row in TABLE.values()}
    found = {python: build_wheels.lock_file("openai", python).name for python in pythons}
    assert found == {"3.10": "openai-3.10.txt", "3.12": "openai.txt"}


def test_what_completes_the_image_is_pinned_and_keeps_its_tensorrt() -> None:
    for row in TABLE.values():
        if row["packages"]:
            lines = (ROOT / "requirements" / row["packages"]).read_text().splitlines()
            pins = dict(line.split("==") for line in lines if not line.startswith("#"))
            assert pins["tensorrt_llm"] == row["trtllm"]
            assert pins["tensorrt"].split(".")[:3] == row["tensorrt"].split(".")[:3]
            assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())


def test_weights_outside_are_mounted_where_they_are_and_read_only(host: Host, tmp_path: Path) -> None:
    """As a Hugging Face cache has them: links to blobs in another folder. And Meta's tokenizer, one level up."""
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").touch()
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    (snapshot.parent / "tokenizer.model").touch()
    link = tmp_path / "linked"
    link.symlink_to(snapshot)
    done = host.make("hf", "MODEL=llama-2-7b", f"WEIGHTS={link}", "ENGINE=tensorrt")
    assert done.returncode == 0, done.stderr
    outside = {path: f"{path}:{path}:ro" for path in (link, snapshot, blobs, snapshot.parent / "tokenizer.model")}
    assert set(one(host.runs()[0], "--volume")) == {f"{host.tree}:{host.tree}", *outside.values()}


def test_a_build_folder_on_another_disk_is_mounted_too(host: Host, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (host.tree / "build").symlink_to(tmp_path / "disk")
    assert host.make("hf", "MODEL=llama-2-7b", "ENGINE=tensorrt").returncode == 0
    assert f"{tmp_path}/disk:{tmp_path}/disk" in one(host.runs()[0], "--volume")


def test_ask_reaches_the_server_over_the_hosts_network(host: Host) -> None:
    assert host.make("ask", "ENGINE=tensorrt", "PROMPT=it's $HOME").returncode == 0
    (run,) = host.runs()
    assert (one(run, "--network"), one(run, "--gpus"), room_of(run)) == (["host"], [], "ask")
    assert "PROMPT" in one(run, "--env")


@pytest.mark.timeout(60)
def test_sigterm_reaches_the_server_through_docker(host: Host, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = ["make", *SERVE, *ports_typed(free_ports(4))]
    environment = host.environment(FIFO=str(fifo))
    with subprocess.Popen(command, cwd=host.tree, env=environment, stdout=subprocess.DEVNULL) as make:
        with open(fifo) as up:  # until docker runs
            assert up.read() == "up\n"
        (child,) = Path(f"/proc/{make.pid}/task/{make.pid}/children").read_text().split()
        assert b"scripts.serve" in Path(f"/proc/{child}/cmdline").read_bytes()  # docker itself, no shell before it
        os.kill(int(child), signal.SIGTERM)
        assert make.wait(20) == 0
    assert host.log.read_text().endswith("ended\n")


# --- what is missing is reported before anything starts ---


def test_no_docker(host: Host) -> None:
    (host.folder / "docker").unlink()
    assert advised(host.reported("NO DOCKER", *SERVE)) == [sorted(["make", *SERVE])]


def test_a_docker_that_does_not_answer(host: Host) -> None:
    assert "Cannot connect to the Docker daemon." in host.reported("DOCKER DOES NOT ANSWER", *SERVE, NO_DAEMON="1")


def test_no_nvidia_runtime_stops_only_what_needs_a_gpu(host: Host) -> None:
    assert host.make("checkpoint", *SERVE[1:], RUNTIMES="runc ").returncode == 0
    host.log.unlink()
    assert "nvidia-ctk runtime configure" in host.reported("DOCKER HAS NO NVIDIA RUNTIME", *SERVE, RUNTIMES="runc ")


def test_an_image_that_is_not_here_is_not_fetched_behind_your_back(host: Host) -> None:
    image = TABLE[LAST_FOR_VOLTA]["image"]
    report = host.reported("NVIDIA'S IMAGE IS NOT HERE", *SERVE, IMAGES="none")
    assert f"{TABLE[LAST_FOR_VOLTA]['image_gb']} GB" in report
    assert advised(report) == [sorted(["docker", "pull", image, "&&", "make", *SERVE])]


def test_a_completed_image_that_docker_lost(host: Host) -> None:
    words = [*SERVE, f"TOOLCHAIN={OLDEST}"]
    assert host.make("hf", *words[1:], BUILT="sha256:built").returncode == 0
    host.log.unlink()
    report = host.reported("THE TOOLCHAIN IMAGE IS GONE", *words, IMAGES=TABLE[OLDEST]["image"])
    assert advised(report) == [sorted(["rm", "build/*.iid", "&&", "make", *words])]


def test_a_port_in_use(host: Host) -> None:
    assert host.make("model_repo", *SERVE[1:]).returncode == 0
    host.log.unlink()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        report = host.reported(
            f"PORT {port} CANNOT BE USED", *SERVE, f"GRPC_PORT={port}", f"HTTP_PORT={free_ports(1)[0]}"
        )
    assert "Nothing was loaded" in report


def test_nothing_is_built_for_an_assumed_gpu(host: Host) -> None:
    report = host.reported("ASSUME_GPU CANNOT BE 4X V100-SXM2-16GB", *SERVE, "ASSUME_GPU=4x V100-SXM2-16GB")
    assert advised(report) == [sorted(["make", "plan", *SERVE[1:], "ASSUME_GPU='4x", "V100-SXM2-16GB'"])]


def test_a_host_without_python_is_told_so(host: Host) -> None:
    (host.folder / "python3").unlink()
    done = host.make(*SERVE)
    assert done.returncode != 0 and "-- NO PYTHON -" in done.stderr and "apt-get install python3" in done.stderr
    assert host.make("help").returncode == 0


def test_what_the_gpus_decided_is_kept_until_they_or_the_table_change(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = host.folder / "asked"
    smi = (host.folder / "nvidia-smi").read_text().replace("#!/bin/bash", f"#!/bin/bash\necho x >>{asked}", 1)
    (host.folder / "nvidia-smi").write_text(smi)
    for _ in range(2):
        assert host.make("config", *SERVE[1:]).returncode == 0
    assert asked.read_text() == "x\n"
    with (host.tree / "docker/toolchains.json").open("a") as table:
        table.write("\n")
    assert host.make("config", *SERVE[1:]).returncode == 0
    assert asked.read_text() == "x\nx\n"


# --- pins ---


def test_pin_writes_the_digests_and_changes_nothing_else(host: Host) -> None:
    table = host.tree / "docker/toolchains.json"
    rows = json.loads(table.read_text())
    done = host.make("pin")
    assert done.returncode == 0, done.stderr
    for version, row in rows.items():
        assert re.search(rf"pin +{re.escape(version)} +{row['image']}: not pinned -> {DIGEST}", done.stdout)
    assert [call for call in host.calls() if call[0] == "buildx"] == [
        ["buildx", "imagetools", "inspect", row["image"], "--format", "{{.Manifest.Digest}}"] for row in rows.values()
    ]
    assert json.loads(table.read_text()) == {version: {**row, "digest": DIGEST} for version, row in rows.items()}
    assert len(table.read_text().splitlines()) == len(rows) + 2
    before = table.stat().st_mtime_ns
    assert f"{DIGEST} -> {DIGEST}" in host.make("pin").stdout
    assert table.stat().st_mtime_ns == before  # or every room would be made again
    shown = host.make("-n", "hf", "ENGINE=tensorrt", f"TOOLCHAIN={NEWEST}").stdout
    assert f"nvcr.io/nvidia/tritonserver@{DIGEST}" in shown


def test_a_tag_that_is_gone_is_named_and_the_others_are_pinned(host: Host) -> None:
    gone = TABLE[OLDEST]["image"]
    on_path(host.folder, "docker", DOCKER.replace('"image inspect")', '"image none")'))
    done = host.make("pin", GONE=gone)
    assert done.returncode != 0
    assert "NOT EVERY TAG COULD BE PINNED" in done.stderr
    assert f"    docker buildx imagetools inspect {gone}\n" in done.stderr
    table = json.loads((host.tree / "docker/toolchains.json").read_text())
    assert [row["digest"] for row in table.values()] == [None, *[DIGEST] * (len(TABLE) - 1)]


def test_pin_without_docker(host: Host) -> None:
    (host.folder / "docker").unlink()
    assert host.make("pin").returncode != 0
    assert "-- NO DOCKER -" in host.make("pin").stderr


# --- what NVIDIA's containers lack ---


def without_tritonclient(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tritonclient" else find(name, *more)
    )


def test_nothing_is_served_without_a_grpc_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NVIDIA's image before docker/serving.Dockerfile completes it."""
    without_tritonclient(monkeypatch)
    with pytest.raises(reports.Problem, match="no package tritonclient") as caught:
        supervisor.check_grpc_client()
    assert "requirements/openai.txt" in caught.value.command


def test_configs_are_parsed_alike_without_tritonclient(monkeypatch: pytest.MonkeyPatch) -> None:
    described = model_config_pb2.DESCRIPTOR.serialized_pb
    assert (ROOT / "docker/contracts/model_config.binpb").read_bytes() == described
    without_tritonclient(monkeypatch)
    ours = build_model_repo.model_config_type()
    assert ours is not model_config_pb2.ModelConfig
    text = """name: "tensorrt_llm" max_batch_size: 8 model_transaction_policy { decoupled: true }
        parameters { key: "a" value { string_value: "b" } }"""
    config = text_format.Parse(text, ours())
    assert config.SerializeToString(deterministic=True) == text_format.Parse(
        text, model_config_pb2.ModelConfig()
    ).SerializeToString(deterministic=True)
    with pytest.raises(text_format.ParseError):
        text_format.Parse("max_batch_size: ${hole}", ours())


def test_ask_streams_over_http_without_tritonclient(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_tritonclient(monkeypatch)
    monkeypatch.setenv("PROMPT", "Once upon a time")
    monkeypatch.setattr("sys.argv", ["ask", "--http-port", str(served.http_port), "--max-tokens", "20"])
    ask.main()
    text = ", in a small village surrounded by a beautiful forest, there lived a little girl named Lily. She\n"
    assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.argv", ["ask", "--http-port", str(served.http_port), "--max-tokens", "99999"])
    with pytest.raises(reports.Problem, match="the server refused the request"):
        ask.main()
    monkeypatch.setattr("sys.argv", ["ask", "--http-port", str(free_ports(1)[0])])
    with pytest.raises(reports.Problem, match="no server answers"):
        ask.main()
