"""The rehearsal's strict stand-in for NVIDIA's backend, without Triton: models as we fill them, requests,
and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from project import ROOT
from tritonclient.grpc import model_config_pb2

from scripts import build_model_repo
from scripts.nvidia import contracts

TABLE = json.loads((ROOT / "docker/contracts/backend-rules/rules.json").read_text())
ROWS = json.loads((ROOT / "docker/toolchains.json").read_text())
TEMPLATES = {path.parent.name: path.read_text() for path in build_model_repo.TEMPLATES.glob("*/config.pbtxt")}
KIND = json.loads((ROOT / "docker/engines.json").read_text())["tensorrt"]
# A TOOLCHAIN for each backend; the tag 0.14.0 is in no image and has the files of 24.10 around it
TOOLCHAINS = {row["contract"]["backend"]: version for version, row in ROWS.items()}
TOOLCHAINS.setdefault("v0.14.0", TOOLCHAINS["r24.10"])


def _strict() -> ModuleType:
    path = ROOT / "docker/rehearsal/backends/tensorrtllm/strict.py"
    spec = importlib.util.spec_from_file_location("strict", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["strict"] = module
    spec.loader.exec_module(module)
    return module


strict: Any = _strict()


def model_config(version: str, streaming: bool = True) -> dict[str, Any]:
    """The config.pbtxt that we fill for tensorrt_llm, as the JSON that Triton hands to a backend."""
    toolchain = TOOLCHAINS[version]
    tables = json.loads((ROOT / f"docker/contracts/backend/{version}.json").read_text())
    engine = contracts.table("engine-config", toolchain)
    text = build_model_repo.render(TEMPLATES, tables, engine, KIND, toolchain, streaming)["tensorrt_llm"]
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    config: dict[str, Any] = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    return config


def loaded(
    version: str,
    tmp: Path = ROOT,
    without: str = "",
    decoupled: bool = True,
    world: int = 2,
    build: Mapping[str, Any] = {},
    plugins: Mapping[str, Any] = {},
    variables: Mapping[str, str] = {},
    engine: bool = True,
    change: Callable[[dict[str, Any]], None] = lambda config: None,
    **parameters: str,
) -> Any:
    """What the stand-in makes of our config with these changes; gpt_model_path is a folder that exists."""
    config = model_config(version, decoupled)
    config["parameters"]["gpt_model_path"] = {"string_value": str(tmp)}
    for key, value in parameters.items():
        config["parameters"][key] = {"string_value": value}
    config["parameters"].pop(without, None)
    change(config)
    built = contracts.table("engine-config", TOOLCHAINS[version])
    built["build_config"].update(build)
    built["build_config"]["plugin_config"].update(plugins)
    table = json.loads((ROOT / f"docker/contracts/backend/{version}.json").read_text())["tensorrt_llm"]
    return strict.load(version, config, built if engine else None, table, world, variables)


def fails(version: str, **changes: Any) -> str:
    with pytest.raises(strict.LoadFails) as problem:
        loaded(version, **changes)
    assert str(problem.value).startswith("unexpected error when creating modelInstanceState: ")
    return str(problem.value)


def request(version: str, **changes: Any) -> dict[str, Any]:
    """A request's arrays; None takes one away."""
    values: dict[str, Any] = {
        "input_ids": [[5, 6, 7]],
        "input_lengths": [[3]],
        "request_output_len": [[4]],
        "end_id": [[2]],
        "streaming": [[True]],
    }
    values.update(changes)
    if version == "v1.2.1":
        values = {
            {"min_length": "min_tokens", "random_seed": "seed"}.get(key, key): value for key, value in values.items()
        }
    given = {key: np.array(value) for key, value in values.items() if value is not None}
    return {key: value.astype(np.float32 if value.dtype == np.float64 else value.dtype) for key, value in given.items()}


def served_as(
    version: str, model: Any = None, request_id: str = "", active: Any = (), waiting: int = 0, **changes: Any
) -> Any:
    """What the engine gets of a request."""
    model = loaded(version) if model is None else model
    return strict.read(model, request(version, **changes), request_id, active, waiting)


def refused(version: str, model: Any = None, **changes: Any) -> str:
    with pytest.raises(strict.Fault) as fault:
        served_as(version, model, **changes)
    return str(fault.value)


def stop_refused(version: str, request_id: str, active: Any = ()) -> str:
    with pytest.raises(strict.Fault) as fault:
        strict.check_stop(version, request_id, active)
    return str(fault.value)
