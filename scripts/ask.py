"""Asks a running server and streams the answer to the terminal without wrapping it;
the prompt is in the variable PROMPT."""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from scripts import reports, settings
from scripts.serving import launch
from scripts.serving.pulse import LOOPBACK

UNREACHED = ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.UNIMPLEMENTED")


def ask(address: str, prompt: str, max_tokens: int, timeout_seconds: float = 600) -> None:
    """Stream the answer of the model `ensemble` to standard output; a Problem if there is none.

    If the server closes the connection before the first token (gRPC's GOAWAY: a server that ends, or one after a load
    balancer), a second connection asks again. After the first token it does not: the answer would start over.
    """
    from tritonclient.utils import InferenceServerException

    for is_last in (False, True):
        printed = False

        def show(text: str) -> None:
            nonlocal printed
            sys.stdout.write(text)
            sys.stdout.flush()
            printed = True

        try:
            _stream(address, prompt, max_tokens, timeout_seconds, show)
            break
        except InferenceServerException as error:
            if printed:
                raise reports.serving.answer_cut_off(address, error.message() or str(error)) from None
            if error.status() == "StatusCode.UNAVAILABLE" and not is_last:
                continue
            # UNIMPLEMENTED: something listens there that is not Triton
            if error.status() in UNREACHED:
                raise reports.serving.server_not_there(address, (error.message() or "").split("\n")[0]) from None
            raise reports.serving.request_refused(error.message() or str(error)) from None
    sys.stdout.write("\n")


def _stream(address: str, prompt: str, max_tokens: int, timeout_seconds: float, show: Callable[[str], None]) -> None:
    """Ask over one connection, and `show` each text of the answer as it comes. Raises tritonclient's
    InferenceServerException."""
    from scripts.serving import triton_client as triton

    whole = False
    stream = triton.Stream(address, timeout_seconds)
    try:
        if not stream.client.is_server_ready(client_timeout=10):
            raise reports.serving.server_not_there(address, "it is there but not ready")
        asked = {"text_input": triton.texts(prompt), "max_tokens": triton.ints(max_tokens)}
        stream.send("ensemble", **asked, stream=triton.yes(stream.streams))
        for answer in stream.until_final():
            text = answer.as_numpy("text_output")
            if text is not None:
                show(b"".join(text.reshape(-1)).decode("utf-8"))
        whole = True
    finally:
        stream.close(cancel=not whole)


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
    """Its lines as they come. Raises IncompleteRead where the body is cut off;
    iterating over it would end as over a whole one."""
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
