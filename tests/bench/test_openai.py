"""`make bench-openai` against the test's own endpoint: the model's name, and no numbers from failed requests."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import reports
from scripts.bench import openai as bench
from scripts.serving import launch


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Serves the model `another`; refuses every second answer where it is told to."""

    bodies: list[bytes] = []
    keys: list[str] = []
    refuses = False

    def reply(self, status: int, body: bytes) -> None:
        self.keys.append(self.headers.get("Authorization", ""))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"data": [{"id": "another"}]}).encode())

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        refused = self.refuses and len(self.bodies) % 2 == 0
        self.reply(429 if refused else 200, b"the queue is full" if refused else b'data: {"completion_tokens":3}')

    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[launch.Settings]:
    monkeypatch.setattr(Endpoint, "bodies", [])
    monkeypatch.setattr(Endpoint, "keys", [])
    (tmp_path / "keys").write_text("first\nsecond\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        yield launch.Settings(
            tmp_path / "rooms" / "variant", "127.0.0.1", 1, 2, 3, openai_port=port, api_key_file=str(tmp_path / "keys")
        )
        server.shutdown()


def test_the_endpoint_is_asked_what_it_serves(settings: launch.Settings) -> None:
    """A folder given as MODEL has another name than its rooms."""
    model = bench.served_name(settings)
    found = bench.together(functools.partial(bench.over_openai, model=model), settings, [1, 2], 3, 4)
    assert found["tokens_per_second"] > 0 and {json.loads(body)["model"] for body in Endpoint.bodies} == {"another"}
    assert set(Endpoint.keys) == {"Bearer first"}


def test_answers_with_a_schema_are_asked_beside_answers_without(settings: launch.Settings) -> None:
    found = bench.guided(settings, [1, 2], 3, count=2, rounds=3, model="another", server=os.getpid())
    bodies = [json.loads(body) for body in Endpoint.bodies]
    guided = [body for body in bodies if body.get("guided_json") == bench.GUIDE]
    plain = [body for body in bodies if body.get("ignore_eos")]
    assert len(guided) == 2 * (1 + 3) and len(plain) == 2 * 3 and len(bodies) == 14
    assert found["guided / plain, tokens_per_second, least"] <= found["guided / plain, tokens_per_second"]
    assert {"guided / plain, tokens for a second of CPU", "plain tokens_per_second, 2 at once"} <= set(found)


def test_failed_requests_give_a_report_and_no_numbers(
    settings: launch.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "refuses", True)
    with pytest.raises(reports.Problem) as caught:
        bench.together(functools.partial(bench.over_openai, model="another"), settings, [1, 2], 3, 4)
    assert "the queue is full" in caught.value.seen
