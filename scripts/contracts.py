"""The contract tables under docker/: what each TensorRT-LLM version's files and tensors look like."""

import json
from pathlib import Path
from typing import Any, Dict, List, cast

from scripts import errors

DOCKER = Path(__file__).parent.parent / "docker"


def versions() -> List[str]:
    """The TensorRT-LLM versions that TOOLCHAIN may name."""
    return list(json.loads((DOCKER / "toolchains.json").read_text()))


def table(kind: str, trtllm_version: str) -> Dict[str, Any]:
    """One table of docker/contracts for a version: kind is the folder, for instance 'backend' or 'engine-config'."""
    toolchains = json.loads((DOCKER / "toolchains.json").read_text())
    if trtllm_version not in toolchains:
        known = ", ".join(toolchains)
        raise errors.bad_setting("TOOLCHAIN", trtllm_version, f"one of {known}", errors.make("help"))
    path = DOCKER / "contracts" / kind / f"{toolchains[trtllm_version]['contract'][kind]}.json"
    if not path.is_file():
        raise errors.no_contract_table(trtllm_version, kind, path)
    return cast(Dict[str, Any], json.loads(path.read_text()))
