"""A server for the page's tests: the real page and its policy, taken from a running endpoint,
and answers that the test writes itself.

It plays what no model can be made to say at the right time: hostile text, a stream that breaks off,
a pause before a token.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECONDS = 60


class Asked:
    """One request for an answer, held open until the test has written it. body: its JSON; key: its Authorization,
    or ""."""

    def __init__(self, body: dict[str, Any], key: str) -> None:
        self.body, self.key = body, key
        self.parts: queue.Queue[Any] = queue.Queue()
        # the client went before the answer was whole
        self.left = threading.Event()

    @property
    def said(self) -> Any:
        """What the model is asked to answer: the roles and texts of a conversation, or the prompt."""
        messages = self.body.get("messages")
        return self.body["prompt"] if messages is None else [(one["role"], one["content"]) for one in messages]

    def send(self, text: str) -> None:
        """One streamed piece."""
        self.parts.put(("piece", text))

    def end(self, text: str = "", reason: str = "stop") -> None:
        """The last piece, why it is the last, the usage and [DONE]."""
        if text:
            self.send(text)
        self.parts.put(("end", reason))

    def fail(self, message: str) -> None:
        """An error in the middle of a stream, in OpenAI's shape."""
        self.parts.put(("error", message))

    def refuse(self, status: int, message: str = "no") -> None:
        """A status instead of a stream."""
        self.parts.put((status, message))

    def break_off(self) -> None:
        """The connection ends, without a word."""
        self.parts.put(("break", ""))


class Play:
    """Listens on a free port. page: address of a running endpoint; asked: requests, in the order in which they came."""

    def __init__(self, page: str, chat: bool = True, model: str = "played", port: int = 0) -> None:
        self.page = page
        self.chat, self.model = chat, model
        self.health: dict[str, Any] = {"status": "ok", "requests": 0, "slots": 4}
        self.health_status = 200
        self.asked: queue.Queue[Asked] = queue.Queue()
        self.connections: list[socket.socket] = []
        play = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def setup(self) -> None:
                super().setup()
                play.connections.append(self.connection)

            def do_GET(self) -> None:
                play._get(self)

            def do_POST(self) -> None:
                play._post(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def next(self) -> Asked:
        """The next request for an answer."""
        return self.asked.get(timeout=SECONDS)

    def close(self) -> None:
        """The server stops listening, and what was open is cut."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # its other end is gone

    def _get(self, to: BaseHTTPRequestHandler) -> None:
        if to.path == "/":
            with urllib.request.urlopen(self.page, timeout=SECONDS) as real:
                policy = real.headers["Content-Security-Policy"]
                _whole(to, 200, real.read(), real.headers["Content-Type"], policy)
        elif to.path == "/v1/models":
            model = {"id": self.model, "object": "model", "created": 1, "owned_by": "tests"}
            model = {**model, "max_model_len": 2048, "has_chat_template": self.chat}
            _whole(to, 200, json.dumps({"object": "list", "data": [model]}).encode())
        elif to.path == "/health":
            _whole(to, self.health_status, json.dumps(self.health).encode())
        else:
            _whole(to, 404, b"{}")

    def _post(self, to: BaseHTTPRequestHandler) -> None:
        body = json.loads(to.rfile.read(int(to.headers["Content-Length"])))
        asked = Asked(body, to.headers.get("Authorization", ""))
        self.asked.put(asked)
        kind, value = asked.parts.get(timeout=SECONDS)
        if isinstance(kind, int):
            error = {"message": value, "type": "x", "param": None, "code": None}
            _whole(to, kind, json.dumps({"error": error}).encode())
            return
        to.send_response(200)
        to.send_header("Content-Type", "text/event-stream")
        to.send_header("Connection", "close")
        to.end_headers()
        to.close_connection = True
        count = 0
        try:
            while kind == "piece":
                count += 1
                _event(to, _choice(asked.body, value, None))
                kind, value = asked.parts.get(timeout=SECONDS)
            if kind == "end":
                _event(to, _choice(asked.body, "", value))
                usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
                _event(to, {"choices": [], "usage": usage})
                to.wfile.write(b"data: [DONE]\n\n")
            elif kind == "error":
                _event(to, {"error": {"message": value}})
        except OSError:
            asked.left.set()


def _choice(body: dict[str, Any], text: str, reason: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"delta": {"content": text} if text else {}} if "messages" in body else {"text": text}
    return {"choices": [{"index": 0, **said, "finish_reason": reason}]}


def _event(to: BaseHTTPRequestHandler, what: dict[str, Any]) -> None:
    to.wfile.write(b"data: " + json.dumps(what, ensure_ascii=False).encode() + b"\n\n")
    to.wfile.flush()


def _whole(
    to: BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "application/json", policy: str = ""
) -> None:
    to.send_response(status)
    to.send_header("Content-Type", kind)
    to.send_header("Content-Length", str(len(body)))
    if policy:
        to.send_header("Content-Security-Policy", policy)
    to.end_headers()
    to.wfile.write(body)
