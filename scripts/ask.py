"""Asks a running server and streams the answer to the terminal without wrapping it;
the prompt is in the variable PROMPT."""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import queue
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from scripts import reports, settings
from scripts.serving import launch
from scripts.serving.pulse import LOOPBACK

# gRPC has its own variable and option for proxies
NO_PROXY = [("grpc.enable_http_proxy", 0)]


def ask(address: str, prompt: str, max_tokens: int, timeout_seconds: float = 600) -> None:
    """Stream the answer of the model `ensemble` to standard output; a Problem when there is none.

    A connection that the server closes before the first token is opened once more: nothing of the answer was said. (gRPC's GOAWAY: a
    server that ends, or one behind a load balancer.) After the first token the answer is not asked for again, it would begin anew.
    """
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    for is_last in (False, True):
        printed = False

        def show(text: str) -> None:
            nonlocal printed
            sys.stdout.write(text)
            sys.stdout.flush()
            printed = True

        with triton.InferenceServerClient(address, channel_args=NO_PROXY) as client:
            try:
                if not client.is_server_ready(client_timeout=10):
                    raise reports.serving.server_not_there(address, "it is there but not ready")
                _stream(client, prompt, max_tokens, timeout_seconds, show)
                break
            except InferenceServerException as error:
                client.stop_stream(cancel_requests=True)
                if printed:
                    raise reports.serving.answer_cut_off(address, error.message() or str(error)) from None
                if error.status() == "StatusCode.UNAVAILABLE" and not is_last:
                    continue
                if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
                    raise reports.serving.server_not_there(address, (error.message() or "").split("\n")[0]) from None
                raise reports.serving.request_refused(error.message() or str(error)) from None
    sys.stdout.write("\n")


def _stream(client: Any, prompt: str, max_tokens: int, timeout_seconds: float, show: Callable[[str], None]) -> None:
    """Ask, and `show` each text of the answer as it comes. Raises tritonclient's InferenceServerException."""
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    answers: queue.Queue[Any] = queue.Queue()
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
            show(b"".join(text.reshape(-1)).decode("utf-8"))
        final = answer.get_response().parameters.get("triton_final_response")
        if final is not None and final.bool_param:
            break
    client.stop_stream()


def streams(client: Any) -> bool:
    """Whether the server streams; with STREAMING=off each request has one response. client: tritonclient's,
    over gRPC."""
    return bool(client.get_model_config("ensemble").config.model_transaction_policy.decoupled)


def ask_over_http(url: str, prompt: str, max_tokens: int, timeout_seconds: float = 600) -> None:
    """The same without tritonclient, which NVIDIA's containers lack: server-sent events of Triton's generate_stream.
    url: http://HOST:PORT."""
    model = f"{url}/v2/models/ensemble"
    printed = False
    try:
        with LOOPBACK.open(f"{model}/config", timeout=10) as config:
            decoupled = json.load(config).get("model_transaction_policy", {}).get("decoupled", False)
        asked = {"text_input": prompt, "max_tokens": max_tokens, "stream": decoupled}
        body = json.dumps(asked).encode("utf-8", "surrogateescape")
        request = urllib.request.Request(f"{model}/generate_stream", data=body)
        with LOOPBACK.open(request, timeout=timeout_seconds) as events:
            for event in _lines(events):
                if event.startswith(b"data:"):
                    answer = json.loads(event[5:])
                    if "error" in answer and printed:
                        raise reports.serving.answer_cut_off(url, answer["error"])
                    if "error" in answer:
                        raise reports.serving.request_refused(answer["error"])
                    sys.stdout.write(answer["text_output"])
                    sys.stdout.flush()
                    printed = True
    except urllib.error.HTTPError as error:
        raise reports.serving.request_refused(error.read().decode("utf-8", "replace")) from None
    except (OSError, http.client.HTTPException) as error:
        if printed:
            raise reports.serving.answer_cut_off(url, str(error) or type(error).__name__) from None
        raise reports.serving.server_not_there(url, str(error)) from None
    sys.stdout.write("\n")


def _lines(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """Its lines as they come. Raises IncompleteRead where the body is cut off; iterating over it would end as over a whole one."""
    rest = b""
    while data := answer.read1():
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


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
