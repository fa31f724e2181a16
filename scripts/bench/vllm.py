"""vLLM as a peer of `make bench PEERS=on`: served from its own environment (VLLM_PYTHON),
asked by the generator that asks us."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.weights.hugging_face import REPEATED

# Loading, compiling and capturing
START_SECONDS = 300
# It contacts no other server; each of its workers starts from nothing, as CUDA wants it.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


class NotRun(Exception):
    """Why vLLM could not be measured here."""


def version(python: str) -> str:
    """vLLM's version in that environment. Raises NotRun."""
    command = [python, "-c", "import importlib.metadata as m; print(m.version('vllm'))"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise NotRun(f"{python}: {problem}") from None
    if done.returncode:
        raise NotRun(f"{python} has no vllm")
    return done.stdout.strip()


def command(
    python: str, model: Path, name: str, dtype: str, tp_size: int, limits: Mapping[str, int], port: int, dummy: bool
) -> list[str]:
    """vLLM's command, with the limits of our engine and without reuse of prefixes, because our prompts share none.
    dummy: with its own random weights."""
    return [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name, "--dtype", dtype,
        "--tensor-parallel-size", f"{tp_size}", "--max-model-len", f"{limits['max_seq_len']}", "--max-num-seqs",
        f"{limits['max_batch_size']}", "--host", "127.0.0.1", "--port", f"{port}", "--no-enable-prefix-caching",
        *(["--load-format", "dummy"] if dummy else []),
    ]  # fmt: skip


def folder_of(config: Path, weights: Path, folder: Path) -> bool:
    """Fills `folder` with links to config.json and tokenizer (the room config) and to the weights;
    whether there were any."""
    folder.mkdir()
    for path in sorted(config.iterdir()):
        if path.name not in ("manifest.json", "args"):
            (folder / path.name).symlink_to(path.absolute())
    # only we can read a model whose layers repeat each other
    found = (
        []
        if (weights / REPEATED).is_file()
        else [*weights.glob("*.safetensors"), *weights.glob("*.safetensors.index.json")]
    )
    for path in found:
        (folder / path.name).symlink_to(path.absolute())
    return bool(found)


@contextmanager
def served(
    python: str,
    config: Path,
    weights: Path,
    name: str,
    dtype: str,
    tp_size: int,
    limits: Mapping[str, int],
    folder: Path,
) -> Iterator[str]:
    """The URL of a running vLLM; it and all its processes end afterwards. Raises NotRun with its last lines."""
    real = folder_of(config, weights, folder / "vllm-model")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = command(python, folder / "vllm-model", name, dtype, tp_size, limits, port, dummy=not real)
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])
    with (folder / "vllm.log").open("w+") as log:
        server = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT, "PATH": path}, start_new_session=True
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            if (why := _wait(server, url)) is not None:
                log.seek(0)
                raise NotRun(f"{why}: " + " | ".join(_last(log.read().splitlines())))
            yield url
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(server.pid, number)
                    server.wait(20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def _wait(server: subprocess.Popen[bytes], url: str) -> str | None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            return f"it ended with status {server.returncode}"
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5):
                return None
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return f"it was not ready after {START_SECONDS} s"


def _last(lines: Sequence[str]) -> list[str]:
    told = [line for line in lines if "Error" in line] or list(lines)
    return [line[-200:] for line in told[-3:]]
