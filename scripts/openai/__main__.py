"""`python -m scripts.openai`: the endpoint as a process, started and watched by scripts/serve.py. SIGTERM lets running requests finish.

Reads   engines/config.json and model_repo/ under --root: the tokenizer, the chat template, the text code, what tensorrt_llm declares
Needs   the packages of requirements/openai.txt
"""

import argparse
import ctypes
import http
import importlib.util
import json
import logging
import os
import resource
import signal
import sys
import uuid
from pathlib import Path
from typing import Any, List, Optional

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from scripts import reports
from scripts.openai.app import ApiError, Endpoint, application
from scripts.openai.chat_template import ChatTemplate, template_of
from scripts.openai.engine import Engine, read_limits

TOKENIZER = "model_repo/preprocessing/1/tokenizer"
TEXT = "model_repo/tensorrt_llm_bls/1/text.py"
# prctl(2)
PR_SET_PDEATHSIG = 1
# How long a client may take for the head of a request
HEAD_SECONDS = 10
# and how large it may be
MAX_HEAD_BYTES = 64 << 10


def text_code(root: Path) -> Any:
    """The room's own text.py: the endpoint and Triton's text models tokenize alike because they run the same file."""
    sys.dont_write_bytecode = True  # a room is never written into
    spec = importlib.util.spec_from_file_location("text", root / TEXT)
    if spec is None or spec.loader is None:
        raise reports.rooms.room_missing(root / "model_repo")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def end_ids(folder: Path) -> List[int]:
    """Every token that ends an answer, where the model's generation_config.json names several."""
    file = folder / "generation_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return [named] if isinstance(named, int) else list(named or [])


def keys_of(path: str) -> List[str]:
    """API keys: one a line of a file, and the variable BAKE_API_KEY. Never from the command line, where every user sees them."""
    keys = [os.environ.pop("BAKE_API_KEY", "")]
    if path:
        keys += Path(path).read_text(encoding="utf-8-sig").split("\n")
    return [key.strip() for key in keys if key.strip()]


def endpoint_of(root: Path, name: str, grpc_address: str, keys: List[str]) -> Endpoint:
    """Everything read and checked, before a port is opened."""
    module = text_code(root)
    folder = root / TOKENIZER
    text = module.Text(folder)
    template = template_of(folder)
    config = (root / "model_repo/tensorrt_llm/config.pbtxt").read_text(encoding="utf-8")
    ends = {*end_ids(folder), *([] if text.end_id is None else [text.end_id])}
    engine = Engine(grpc_address, config, read_limits(root / "engines"), text.end_id)
    chat = None if template is None else ChatTemplate(template, folder, text)
    return Endpoint(name, engine, text, module.StopStrings, chat, sorted(ends), keys)


def end_with_parent(parent: int) -> None:
    """However the supervisor ends, we do not stay."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


class Hostile(Exception):
    """Raised while a request is parsed: nothing more of the connection is read."""


class Connection(HttpToolsProtocol):
    """One of uvicorn's that bounds what uvicorn does not: the time and the size of a request's head, and requests sent ahead.

    uvicorn counts only the time between requests, and keeps every request that is sent before the last one is answered; no client of
    OpenAI's sends any ahead.
    """

    _head_bytes: Optional[int] = 0  # None: the head is whole

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waits_for_head()

    def _waits_for_head(self) -> None:
        self._head_bytes = 0
        self._head_deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        self._head_deadline.cancel()
        self._waits_for_head()
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            raise Hostile
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_deadline.cancel()
        self._head_bytes = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of bytes that are no HTTP, in OpenAI's shape; nothing into the middle of an answer."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(ApiError(status, message).body).encode()
            head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nx-request-id: req-{uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self._head_deadline.cancel()
        super().connection_lost(exc)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--grpc", required=True, help="Triton's address, host:port")
    parser.add_argument("--name", required=True, help="the model's id for clients")
    parser.add_argument("--api-key-file", default="")
    parser.add_argument("--drain-seconds", type=int, default=20)
    parser.add_argument("--parent", type=int, help="end when this process ends")
    args = parser.parse_args()
    if args.parent:
        end_with_parent(args.parent)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is a file
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    endpoint = endpoint_of(args.root, args.name, args.grpc, keys_of(args.api_key_file))
    server = uvicorn.Server(
        uvicorn.Config(
            application(endpoint), host=args.host, port=args.port, http=Connection, loop="uvloop", ws="none", log_config=None,
            access_log=False, log_level="warning", proxy_headers=False, server_header=False, backlog=1024,
            timeout_graceful_shutdown=args.drain_seconds,
        )
    )  # fmt: skip
    # uvicorn drains on SIGTERM and then raises it again, for whoever was there before it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    reports.run(main)
