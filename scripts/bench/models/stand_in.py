"""The model tensorrt_llm of `make bench-text`: no weights, a clock. Every running request gets one token per step,
its prompt's in turn.

Steps are due at fixed times, like a GPU's: other work on the machine delays a step only if it takes the CPU away. The
file `pace` in the model's version folder has the microseconds of a step, and whether a response carries one token (as
NVIDIA's backend sends them) or all that are ready (as the torch engine does).
It is read whenever the engine has been idle.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
ZEROS = {
    "cum_log_probs": np.zeros((1, 1), np.float32),
    "context_logits": np.zeros((1, 1, 1), np.float32),
    "generation_logits": np.zeros((1, 1, 1, 1), np.float32),
}


class Running:
    """A request, the tokens that it will get, and those that it has got but that were not sent."""

    def __init__(self, request: Any) -> None:
        inputs = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        self.wanted = set(request.requested_output_names())
        self.sender = request.get_response_sender()
        self.streaming = bool(inputs["streaming"][0]) if "streaming" in inputs else False
        self.stopped = "stop" in inputs and bool(inputs["stop"][0])
        prompt = [token for token in inputs["input_ids"].tolist() if token > 2]
        count = 0 if self.stopped else int(inputs["request_output_len"][0])
        self.coming = [prompt[n % len(prompt)] for n in reversed(range(count))] if prompt else []
        self.ready: list[int] = []

    def take(self, at_once: bool) -> list[int]:
        """The tokens of the next response."""
        if not self.streaming and self.coming:
            return []
        n = 1 if self.streaming and not at_once else len(self.ready)
        taken, self.ready = self.ready[:n], self.ready[n:]
        return taken

    def send(self, tokens: list[int], is_last: bool) -> None:
        values = {
            **ZEROS,
            "output_ids": np.array([[tokens]], np.int32),
            "sequence_length": np.array([[len(tokens)]], np.int32),
            "output_log_probs": np.zeros((1, 1, len(tokens)), np.float32),
        }
        tensors = [pb_utils.Tensor(name, value) for name, value in values.items() if name in self.wanted]
        self.sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if is_last else 0)


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        self.pace = Path(args["model_repository"]) / args["model_version"] / "pace"
        self.live: list[Running] = []
        self.changed = threading.Condition()
        self.closing = False
        self.at_once = True
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._step, self._send)]
        for thread in self.threads:
            thread.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            running = Running(request)
            if not running.coming:
                running.sender.send(flags=FINAL)
                continue
            with self.changed:
                self.live.append(running)
                self.changed.notify_all()

    def finalize(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def _step(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.live or self.closing)
                if self.closing:
                    return
            microseconds, mode = self.pace.read_text().split()
            self.at_once = mode == "ready"
            due = time.monotonic()
            while self.live and not self.closing:
                due = max(due + int(microseconds) / 1e6, time.monotonic() - 0.1)
                time.sleep(max(0.0, due - time.monotonic()))
                with self.changed:
                    for running in self.live:
                        if running.coming:
                            running.ready.append(running.coming.pop())
                    self.changed.notify_all()

    def _send(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or any(self._can_send(one) for one in self.live))
                if self.closing:
                    return
                batch = []
                for running in [one for one in self.live if self._can_send(one)]:
                    tokens = running.take(self.at_once)
                    batch.append((running, tokens, not running.coming and not running.ready))
                ended = {id(running) for running, _, is_last in batch if is_last}
                self.live = [one for one in self.live if id(one) not in ended]
            for running, tokens, is_last in batch:
                running.send(tokens, is_last)

    @staticmethod
    def _can_send(running: Running) -> bool:
        return bool(running.ready) and (running.streaming or not running.coming)
