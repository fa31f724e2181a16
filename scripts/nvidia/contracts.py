"""The contract tables under docker/: what each TensorRT-LLM version's files and tensors look like."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Mapping, Sequence, Union, cast

from scripts import reports
from scripts.making import ingredients

# The value for a flag: on or off, a number, a word; None: leave it out. And the flags of a version's table, by name.
Wish = Union[bool, int, str, None]
Flags = Mapping[str, Mapping[str, Any]]

DOCKER = Path(__file__).parents[2] / "docker"
# Types of flags that are enumerations upstream: KVCacheTypeFromString in cpp/include/tensorrt_llm/runtime/modelConfig.h
ENUMS = {"KVCacheType": ["continuous", "paged", "disabled"]}


def versions() -> list[str]:
    """The TensorRT-LLM versions that TOOLCHAIN may name."""
    return list(json.loads((DOCKER / "toolchains.json").read_text()))


def toolchain(trtllm_version: str) -> dict[str, Any]:
    """The row of a version in docker/toolchains.json."""
    toolchains = json.loads((DOCKER / "toolchains.json").read_text())
    if trtllm_version not in toolchains:
        known = ", ".join(toolchains)
        raise reports.settings.bad_setting("TOOLCHAIN", trtllm_version, f"one of {known}", reports.make("help"))
    ingredients.note_row("docker/toolchains.json", trtllm_version)
    return cast("dict[str, Any]", toolchains[trtllm_version])


def reported(trtllm_version: str) -> str:
    """`tensorrt_llm.__version__` in the image of a TOOLCHAIN; engines built there carry it as their version.

    Image 24.10 holds a development version that is five weeks older than the release that it is named after
    (docker/README.md).
    """
    return str(toolchain(trtllm_version)["trtllm"])


def table(kind: str, trtllm_version: str) -> dict[str, Any]:
    """One table of docker/contracts for a version: kind is the folder, for instance 'backend' or 'engine-config'."""
    path = DOCKER / "contracts" / kind / f"{toolchain(trtllm_version)['contract'][kind]}.json"
    if not path.is_file():
        raise reports.nvidia.no_contract_table(trtllm_version, kind, path)
    ingredients.note_path(path)
    return cast("dict[str, Any]", json.loads(path.read_text()))


def sent_without_value(trtllm_version: str) -> list[str]:
    """The outputs of tensorrt_llm that this version sends, as zeros, even if no input asks for their value."""
    path = DOCKER / "contracts" / "backend-rules" / "rules.json"
    ingredients.note_path(path)
    without_value = json.loads(path.read_text())["without_value"]
    backend = toolchain(trtllm_version)["contract"]["backend"]
    if backend not in without_value:
        raise reports.nvidia.no_contract_table(trtllm_version, "backend-rules", path)
    return cast("list[str]", without_value[backend])


def flags(kind: str, trtllm_version: str) -> dict[str, dict[str, Any]]:
    """The flags of one of NVIDIA's programs ('trtllm-build', 'convert', 'quantize'), by name: type, choices,
    default, nargs, aliases."""
    return {flag["flag"]: flag for flag in cast("list[dict[str, Any]]", table(kind, trtllm_version))}


def spell(flag: Mapping[str, Any], wish: Wish) -> list[str]:
    """One flag as this version expects it: a bare switch, the words enable and disable, a number,
    or one of its choices."""
    if wish is None:
        return []
    if flag["type"].startswith("flag"):
        return [flag["flag"]] if wish else []
    word = ("enable" if wish else "disable") if isinstance(wish, bool) else str(wish)
    if flag["choices"] and word not in flag["choices"]:
        raise ValueError(f"{flag['flag']} takes {', '.join(flag['choices'])}, not {word}")
    return [flag["flag"], word]


def flag_parser(program: str, flags: Flags) -> argparse.ArgumentParser:
    """A parser that takes what NVIDIA's program takes by the table (names, types, choices, arity) and refuses all else.

    It stands for programs that cannot run here: tests give it every command line,
    and the rehearsal's stand-ins parse with it.
    """
    types: dict[str, Any] = {"int": int, "float": float}
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    for name, flag in flags.items():
        names: Sequence[str] = [name, *flag.get("aliases", [])]
        if flag["type"].startswith("flag"):
            parser.add_argument(*names, action="store_true")
        else:
            nargs = int(flag["nargs"]) if str(flag.get("nargs")).isdigit() else flag.get("nargs")
            choices = flag["choices"] or ENUMS.get(flag["type"])
            parser.add_argument(
                *names, type=types.get(flag["type"], str), nargs=nargs, choices=choices, default=flag["default"],
                required=flag.get("required", False),
            )  # fmt: skip
    return parser
