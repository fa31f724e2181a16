"""`make bench-serve`: how the served model behaves, as ratios from one run on this machine.

ready         seconds from `serve` to the first token through all ranks, with all rooms made before
nothing to do seconds of a `make model_repo` that finds nothing to do
streams       wall time of 8 streams at once against one alone, over gRPC, the same tokens each
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

from scripts import reports, serve
from scripts.serving import launch
from scripts.serving.started import started

PROMPT = "Once upon a time"


def stream(address: str, max_tokens: int) -> float:
    """Seconds until the last token of one streamed answer of exactly `max_tokens` tokens."""
    from tritonclient.utils import InferenceServerException

    from scripts.serving import triton_client as triton

    with closing(triton.Stream(address, 600)) as stream:
        asked = {"text_input": triton.texts(PROMPT), "max_tokens": triton.ints(max_tokens), "end_id": triton.ints(-1)}
        streams = triton.yes(stream.streams)
        began = time.monotonic()
        try:
            stream.send("ensemble", **asked, stream=streams)
            for _ in stream.until_final():
                pass
        except InferenceServerException as error:
            raise reports.serving.request_refused(str(error)) from None
        return time.monotonic() - began


def together(address: str, count: int, max_tokens: int) -> float:
    """Wall seconds of `count` streams started at once."""
    threads = [threading.Thread(target=stream, args=(address, max_tokens)) for _ in range(count)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - began


def measure(settings: launch.Settings, streams: int, max_tokens: int) -> dict[str, float]:
    """Serve, measure, end."""
    with started(settings) as serving:
        ready = serving.seconds
        address = f"{settings.host}:{settings.grpc_port}"
        stream(address, max_tokens)  # warm
        alone = min(together(address, 1, max_tokens) for _ in range(3))
        at_once = min(together(address, streams, max_tokens) for _ in range(3))
    return {
        "ready_seconds": ready,
        "one_stream_seconds": alone,
        f"{streams}_streams_seconds": at_once,
        "ratio": at_once / alone,
    }


def idle_make_seconds() -> float:
    """The best of three runs of make with nothing to do."""
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run(
            ["make", "model_repo", *os.environ.get("BAKE_SETTINGS", "").split()], check=True, capture_output=True
        )
        seconds.append(time.monotonic() - began)
    return min(seconds)


def main() -> None:
    parser = serve.settings_parser()
    parser.description = __doc__
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    result: dict[str, object] = {
        "machine": machine(),
        "python": platform.python_version(),
    }
    result["idle_make_seconds"] = round(idle_make_seconds(), 2)
    result.update(
        {key: round(value, 2) for key, value in measure(serve.settings_from(args), args.streams, args.tokens).items()}
    )
    Path("build").mkdir(exist_ok=True)
    (Path("build") / "bench-serve.json").write_text(json.dumps(result, indent=2) + "\n")
    for key, value in result.items():
        print(f"{key:<20} {value}")


def machine() -> str:
    """Cores and CPU, for the results."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores, {found[1] if found else platform.machine()}"


if __name__ == "__main__":
    reports.run(main)
