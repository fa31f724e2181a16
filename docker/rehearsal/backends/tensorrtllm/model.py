"""The Triton backend `tensorrtllm` of a rehearsal: the torch engine in the place of TensorRT-LLM's C++ backend.

Triton loads a Python file as a backend of the folder's name, so the very configs of the version are served. The
rehearsal's rankN.engine holds the rank's checkpoint, which the torch engine wants to see as rankN.safetensors. What
NVIDIA's backend of the version refuses is refused (strict.py), with the code that it uses for everything: INTERNAL.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[4]
ENGINE = PROJECT / "model_repo_template" / "tensorrt_llm" / "1"
sys.path += [str(ENGINE), str(PROJECT), str(Path(__file__).resolve().parent)]

import importlib.util  # noqa: E402

import strict  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from contract import Refused, understood  # noqa: E402

from scripts.nvidia import contracts  # noqa: E402

spec = importlib.util.spec_from_file_location("torch_engine_model", ENGINE / "model.py")
assert spec is not None and spec.loader is not None
torch_engine_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(torch_engine_model)

TOOLCHAIN = os.environ["REHEARSAL_TRTLLM"]


class TritonPythonModel(torch_engine_model.TritonPythonModel):  # type: ignore[misc,name-defined]
    """The torch engine's model, over a folder that shows it the engines as it knows them."""

    def initialize(self, args: dict[str, str]) -> None:
        print("rehearsal: the torch engine stands in for TensorRT-LLM", flush=True)
        version = contracts.toolchain(TOOLCHAIN)["contract"]["backend"]
        config = json.loads(args["model_config"])
        path = Path(config.get("parameters", {}).get("gpt_model_path", {}).get("string_value", "")).resolve()
        found = path / "config.json"
        engine = json.loads(found.read_bytes()) if found.is_file() else None
        world = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
        table = contracts.table("backend", TOOLCHAIN)["tensorrt_llm"]
        try:
            self._strict = strict.load(version, config, engine, table, world, os.environ)
        except strict.LoadFails as problem:
            raise pb_utils.TritonModelException(str(problem)) from None
        with tempfile.TemporaryDirectory() as folder:
            for file in path.iterdir():
                name = f"{file.stem}.safetensors" if file.suffix == ".engine" else file.name
                (Path(folder) / name).symlink_to(file)
            config["parameters"]["gpt_model_path"]["string_value"] = folder
            super().initialize({**args, "model_config": json.dumps(config)})
        self._exclude_input = self._strict.exclude_input
        self._without_value = set(contracts.sent_without_value(TOOLCHAIN))
        if not isinstance(self._engine, torch_engine_model.Engine):
            self._thread.join()  # ranks above 0 never finish loading; rank 0's end is theirs

    def _refusal(self, why: str) -> Any:
        """Whatever the torch engine finds by itself is an error of the engine."""
        return pb_utils.TritonError(why, pb_utils.TritonError.INTERNAL)

    def _active(self) -> list[Any]:
        with self._ready:
            return [strict.identity(self._strict.version, reply.request_id) for reply in self._live]

    def _understood(self, request: Any, inputs: dict[str, Any]) -> Any:
        try:
            given = strict.read(self._strict, inputs, request.request_id(), self._active(), self._engine.waiting)
            return understood(given, self._exclude_input)
        except strict.Fault as fault:
            raise Refused(str(fault)) from None

    def _stop(self, request_id: str, engine: Any) -> None:
        version = self._strict.version
        try:
            strict.check_stop(version, request_id, self._active())
        except strict.Fault as fault:
            raise Refused(str(fault)) from None
        meant = strict.identity(version, request_id)
        with self._ready:
            found = [reply for reply in self._live if strict.identity(version, reply.request_id) == meant]
        for reply in found[-1:]:  # with an id twice, the later
            engine.cancel(reply.request)

    def _send(self, reply: Any, pieces: list[Any]) -> None:
        try:
            strict.check_outputs(self._strict.version, reply.wanted)
        except strict.Fault as fault:
            with self._ready:
                if reply in self._live:
                    self._live.remove(reply)
            reply.sender.send(
                pb_utils.InferenceResponse(error=self._refusal(str(fault))), flags=torch_engine_model.FINAL
            )
            self._engine.cancel(reply.request)
            return
        super()._send(reply, pieces)

    def _arrays(self, reply: Any, pieces: list[Any]) -> dict[str, Any]:
        arrays = super()._arrays(reply, pieces)
        return strict.without_value(self._strict.version, arrays, reply.asked.log_probs, len(reply.asked.prompt))
