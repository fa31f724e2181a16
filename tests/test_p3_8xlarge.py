"""docs/p3.8xlarge.md and README.ko.md name the same commands,
and every contract table accepts what make prints for 4x V100."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from project import ROOT, make

from scripts.nvidia import contracts, quantize

V100S = "ASSUME_GPU=4x V100-SXM2-16GB"
ON_VOLTA = [version for version in contracts.versions() if "7.0" in contracts.toolchain(version)["architectures"]]
MODEL = ("MODEL=llama-2-7b", "TP=2", "ENGINE=tensorrt")
ROOMS = ("config", "hf", "checkpoint", "engines", "verified", "model_repo", "serve", "ask", "demo", "fsck")


@pytest.fixture(scope="module")
def stand_in() -> ModuleType:
    """The rehearsal's docker: it knows the flags that the Makefile may use, and what the Dockerfile has."""
    loader = importlib.machinery.SourceFileLoader("rehearsal_docker", str(ROOT / "docker/rehearsal/host/docker"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def printed(tree: Path, *words: str) -> list[list[str]]:
    """The commands that `make -n` shows, word by word."""
    done = make(tree, "-n", *words, V100S)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    commands: list[list[str]] = [[]]
    for line in done.stdout.replace("\\\n", " ").splitlines():
        for word in shlex.split(line):
            commands = [*commands, []] if word == "&&" else [*commands[:-1], [*commands[-1], word]]
        commands.append([])
    return [command[1:] if command[:1] == ["exec"] else command for command in commands if command]


@pytest.mark.parametrize("word", ROOMS)
@pytest.mark.parametrize("version", ON_VOLTA)
def test_docker_takes_every_command_that_make_prints(
    tree: Path, stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch, word: str, version: str
) -> None:
    monkeypatch.chdir(tree)
    row = contracts.toolchain(version)
    runs = builds = 0
    for command in printed(tree, word, *MODEL, f"TOOLCHAIN={version}"):
        if command[:2] == ["docker", "build"]:
            asked = stand_in.build_asked(command[2:])
            completed = f"trtllm-bake-toolchain:{version}" if row["packages"] and builds else row["image"]
            assert f"BASE={completed}" in asked.build_arg
            builds += 1
        elif command[:2] == ["docker", "run"]:
            asked = stand_in.run_parser().parse_args(command[2:])
            file = tree / (asked.command[2].replace(".", "/") + ".py")
            assert asked.command[:2] == ["python3", "-m"] and file.is_file()
            gpu = asked.command[2].rpartition(".")[2] in ("build_engines", "build_verified", "serve", "demo")
            assert asked.gpus == ("all" if gpu else None), command
            runs += 1
    assert runs and builds == (word in ("serve", "demo")) + bool(row["packages"])


@pytest.mark.parametrize("version", ["", *ON_VOLTA])
def test_trtllm_build_takes_the_command_that_plan_prints(tree: Path, version: str) -> None:
    done = make(tree, "plan", *MODEL, V100S, "JSON=1", f"TOOLCHAIN={version}")
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    toolchain = version or ON_VOLTA[-1]
    assert plan["toolchain"] == toolchain
    program, *words = plan["programs"]["engines"]
    asked = vars(contracts.flag_parser(program, contracts.flags(program, toolchain)).parse_args(words))
    assert (asked["max_batch_size"], asked["max_input_len"], asked["max_num_tokens"]) == (8, 2048, 8192)
    assert asked["max_num_tokens"] >= asked["max_input_len"]  # chunked context is off
    assert asked["gpt_attention_plugin"] == "float16" and asked["use_paged_context_fmha"] == "disable"
    assert plan["fit"]["verdict"] == "fits"


@pytest.mark.parametrize("version", ON_VOLTA)
def test_the_quantizers_take_what_a_v100_can_run(version: str) -> None:
    """Only int8_wo, among the kinds of QUANT, has kernels for Volta (scripts/nvidia/trtllm_build.py, NEEDS)."""
    settings = quantize.Settings(Path("hf"), Path("out"), "int8_wo", "float16", 2, 1, version, Path("examples"))
    flags = contracts.flags("convert", version)
    command = quantize.argv(settings, flags, "convert_checkpoint.py", "hf", "out")
    assert command[0] == sys.executable
    assert contracts.flag_parser("convert", flags).parse_args(command[2:]).weight_only_precision == "int8"


# --- the page ---


def typed(text: str) -> list[str]:
    """Every make command of a README, without settings that name a place or a text,
    for instance 'make config MODEL=llama-2-7b'."""
    found = []
    for line in re.findall(r"^    (?:META_URL_FILE=\S+ )?(make .*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        kept = [word for word in words if not word.startswith(("PROMPT=", "MAX_TOKENS=", "ASSUME_GPU="))]
        found.append(" ".join(f'{word.split("=")[0]}="{word.split("=")[1]}"' if " " in word else word for word in kept))
    return found


# commands of the first minutes, of the torch engine and of measuring: this reader does not need them
ELSEWHERE = {"make serve", "make test", "make synthetic"}


def test_the_page_has_every_command_of_the_readme_and_no_other() -> None:
    page = re.findall(r"^\| `(make [^`]+)` \|", (ROOT / "docs/p3.8xlarge.md").read_text(), re.MULTILINE)
    readme = {command for command in typed((ROOT / "README.ko.md").read_text()) if not command.startswith("make bench")}
    assert set(page) == (readme - ELSEWHERE) | {"make fsck"}
    assert len(page) == len(set(page))


def test_what_the_page_names_is_there_and_is_what_the_row_says() -> None:
    page = (ROOT / "docs/p3.8xlarge.md").read_text()
    row = contracts.toolchain(ON_VOLTA[-1])
    assert row["trtllm"] in page and row["image"].rpartition("/")[2] in page
    for path in re.findall(r"`((?:docker|scripts|requirements|tests|models)/[\w./-]+)`", page):
        assert (ROOT / path).exists(), path
    for kind, name in row["contract"].items():
        named = re.findall(rf"docker/contracts/{kind}/([\w.-]+)\.json", page)
        assert named in ([name], []), (kind, named)
    assert {"backend", "trtllm-build", "engine-config", "runtime"} <= set(
        re.findall(r"docker/contracts/([\w-]+)/", page)
    )
