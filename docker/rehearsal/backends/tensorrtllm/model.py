"""The Triton backend `tensorrtllm` of a rehearsal: the torch engine in the place of TensorRT-LLM's C++ backend.

Triton loads a Python file as a backend of the folder's name, so the very configs of the version are served. The rehearsal's
rankN.engine holds the rank's checkpoint, which the torch engine wants to see as rankN.safetensors.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Dict

ENGINE = Path(__file__).resolve().parents[4] / "model_repo_template" / "tensorrt_llm" / "1"
sys.path.append(str(ENGINE))

import importlib.util  # noqa: E402

spec = importlib.util.spec_from_file_location("torch_engine_model", ENGINE / "model.py")
assert spec is not None and spec.loader is not None
torch_engine_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(torch_engine_model)


class TritonPythonModel(torch_engine_model.TritonPythonModel):  # type: ignore[misc,name-defined]
    """The torch engine's model, over a folder that shows it the engines as it knows them."""

    def initialize(self, args: Dict[str, str]) -> None:
        print("rehearsal: the torch engine stands in for TensorRT-LLM", flush=True)
        config = json.loads(args["model_config"])
        engines = Path(config["parameters"]["gpt_model_path"]["string_value"]).resolve()
        with tempfile.TemporaryDirectory() as folder:
            for file in engines.iterdir():
                name = f"{file.stem}.safetensors" if file.suffix == ".engine" else file.name
                (Path(folder) / name).symlink_to(file)
            config["parameters"]["gpt_model_path"]["string_value"] = folder
            super().initialize({**args, "model_config": json.dumps(config)})
