"""Asks a running server and streams the answer to the terminal without wrapping it;
the prompt is in the variable PROMPT."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import sys
import urllib.error
import urllib.request
from typing import Any

import numpy as np

from scripts import reports, settings
from scripts.serving import launch
from scripts.serving.pulse import LOOPBACK

# gRPC has its own variable and option for proxies
NO_PROXY = [("grpc.enable_http_proxy", 0)]


def ask(address: str, prompt: str, max_tokens: int, timeout_seconds: float = 600) -> None:
    """Stream the answer of the model `ensemble` to standard output; a Problem if there is none."""
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    answers: queue.Queue[Any] = queue.Queue()
    printed = False
    with triton.InferenceServerClient(address, channel_args=NO_PROXY) as client:
        try:
            if not client.is_server_ready(client_timeout=10):
                raise reports.serving.server_not_there(address, "it is there but not ready")
            inputs = []
            for name, datatype, value in (
                ("text_input", "BYTES", np.array([[prompt.encode("utf-8", "surrogateescape")]], dtype=object)),
                ("max_tokens", "INT32", np.array([[max_tokens]], dtype=np.int32)),
                ("stream", "BOOL", np.array([[streams(client)]])),
            ):
                inputs.append(triton.InferInput(name, list(value.shape), datatype))
                inputs[-1].set_data_from_numpy(value)
            client.start_stream(lambda result, error: answers.put(error or result), stream_timeout=timeout_seconds)
            client.async_stream_infer("ensemble", inputs, enable_empty_final_response=True)
            while True:
                answer = answers.get(timeout=timeout_seconds)
                if isinstance(answer, InferenceServerException):
                    raise answer
                text = answer.as_numpy("text_output")
                if text is not None:
                    sys.stdout.write(b"".join(text.reshape(-1)).decode("utf-8"))
                    sys.stdout.flush()
                    printed = True
                final = answer.get_response().parameters.get("triton_final_response")
                if final is not None and final.bool_param:
                    break
            client.stop_stream()
        except InferenceServerException as error:
            client.stop_stream(cancel_requests=True)
            if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
                if printed:
                    raise reports.serving.answer_cut_off(address, error.message() or "") from None
                raise reports.serving.server_not_there(address, (error.message() or "").split("\n")[0]) from None
            raise reports.serving.request_refused(error.message() or str(error)) from None
    sys.stdout.write("\n")


def streams(client: Any) -> bool:
    """Whether the server streams; with STREAMING=off each request has one response. client: tritonclient's,
    over gRPC."""
    return bool(client.get_model_config("ensemble").config.model_transaction_policy.decoupled)


def ask_over_http(url: str, prompt: str, max_tokens: int, timeout_seconds: float = 600) -> None:
    """The same without tritonclient, which NVIDIA's containers lack: server-sent events of Triton's generate_stream.
    url: http://HOST:PORT."""
    model = f"{url}/v2/models/ensemble"
    try:
        with LOOPBACK.open(f"{model}/config", timeout=10) as config:
            decoupled = json.load(config).get("model_transaction_policy", {}).get("decoupled", False)
        asked = {"text_input": prompt, "max_tokens": max_tokens, "stream": decoupled}
        body = json.dumps(asked).encode("utf-8", "surrogateescape")
        request = urllib.request.Request(f"{model}/generate_stream", data=body)
        with LOOPBACK.open(request, timeout=timeout_seconds) as events:
            for event in events:
                if event.startswith(b"data:"):
                    answer = json.loads(event[5:])
                    if "error" in answer:
                        raise reports.serving.request_refused(answer["error"])
                    sys.stdout.write(answer["text_output"])
                    sys.stdout.flush()
    except urllib.error.HTTPError as error:
        raise reports.serving.request_refused(error.read().decode("utf-8", "replace")) from None
    except OSError as error:
        raise reports.serving.server_not_there(url, str(error)) from None
    sys.stdout.write("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    for name in ("HTTP_PORT", "GRPC_PORT", "MAX_TOKENS"):
        parser.add_argument(settings.flag(name), default=settings.BY_NAME[name].default)
    args = parser.parse_args()
    host = launch.reached_at(args.host)
    try:
        max_tokens = int(args.max_tokens)
    except ValueError:
        raise reports.settings.bad_setting(
            "MAX_TOKENS",
            args.max_tokens,
            "a whole number",
            reports.make("ask", MAX_TOKENS=settings.BY_NAME["MAX_TOKENS"].default),
        ) from None
    prompt = os.environ.get("PROMPT", settings.BY_NAME["PROMPT"].default)
    if importlib.util.find_spec("tritonclient"):
        ask(f"{host}:{args.grpc_port}", prompt, max_tokens)
    else:
        ask_over_http(f"http://{host}:{args.http_port}", prompt, max_tokens)


if __name__ == "__main__":
    reports.run(main)
