"""`make soak`: strangers and honest clients on the OpenAI-compatible endpoint for a long time, every answer checked.

There are valid requests in every form, whose text is known from a quiet server; invalid ones, whose status is known;
and clients that leave, read slowly, never read, or send half a head, a body without end, or no HTTP. Honest clients
come from 127.0.0.1, the others from 127.0.0.2. Memory, descriptors and the engine's slots are sampled every few
seconds. They must not grow: at the end, when all clients have left, they must be what they were after the first minute.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import reports, room, serve
from scripts.serving import launch, processes
from scripts.serving.started import started

STRANGER = "127.0.0.2"
PROMPTS = ["Once upon a time", "One day", "The little dog", "Lily and Tom"]
# How much more memory, and how many descriptors,
# all processes of the endpoint may have at the end than after the warm-up
MEMORY_BYTES, DESCRIPTORS = 64 << 20, 8
LOOK_SECONDS = 5.0
# An answer of an honest client that takes longer is a failure, however busy the machine is
ANSWER_SECONDS = 120.0


@dataclass
class Seen:
    """What all clients saw. wrong: the first few wrong answers."""

    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    wrongs: int = 0
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, seconds: float | None = None) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1
            if seconds is not None and len(self.seconds) < 1_000_000:
                self.seconds.append(seconds)

    def must(self, condition: bool, what: str) -> None:
        if not condition:
            with self.lock:
                self.wrongs += 1
                if len(self.wrong) < 20:
                    self.wrong.append(what[:300])


class Clients:
    """All kinds of clients of one server. Each kind is a method that makes one visit."""

    def __init__(self, settings: launch.Settings, seen: Seen) -> None:
        self.settings, self.seen = settings, seen
        self.name = json.loads(self._ask("GET", "/v1/models")[2])["data"][0]["id"]
        self.expected: dict[str, str] = {}

    def learn(self) -> None:
        """Get the right answers from the idle server."""
        for prompt in PROMPTS:
            status, _, body = self._ask("POST", "/v1/completions", self._body(prompt))
            if status != 200:
                raise reports.serving.request_refused(body.decode(errors="replace"))
            self.expected[prompt] = json.loads(body)["choices"][0]["text"]

    def _body(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {"model": self.name, "prompt": prompt, "max_tokens": 24, "temperature": 0, **more}

    def _ask(
        self, method: str, path: str, body: object = None, source: str = "127.0.0.1", **headers: str
    ) -> tuple[int, Any, bytes]:
        link = http.client.HTTPConnection(
            self.settings.reached_at, self.settings.openai_port, timeout=ANSWER_SECONDS, source_address=(source, 0)
        )
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body)
            link.request(method, path, data, {"Content-Type": "application/json", **headers})
            answer = link.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            link.close()

    def _raw(self, data: bytes, seconds: float, receive_buffer: int = 0) -> socket.socket:
        link = socket.socket()
        link.settimeout(seconds)
        if receive_buffer:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        link.bind((STRANGER, 0))
        link.connect((self.settings.reached_at, self.settings.openai_port or 0))
        link.sendall(data)
        return link

    def _request(self, body: object, path: str = "/v1/completions") -> bytes:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def _answered(self, kind: str, began: float, status: int, headers: Any, body: bytes) -> bool:
        """Whether there is an answer to check; a 429 with Retry-After is allowed."""
        if status == 429:
            self.seen.count(f"{kind}: 429")
            self.seen.must(headers["Retry-After"] is not None, f"{kind}: 429 without Retry-After")
            time.sleep(0.5)
            return False
        self.seen.count(kind, time.monotonic() - began)
        self.seen.must(status == 200, f"{kind}: status {status} {body[:200]!r}")
        return status == 200

    # --- honest ---

    def whole(self, chance: random.Random) -> None:
        prompt, n, began = chance.choice(PROMPTS), chance.choice((1, 1, 2)), time.monotonic()
        said = self._ask("POST", "/v1/completions", self._body(prompt, n=n))
        if self._answered("whole", began, *said):
            texts = [choice["text"] for choice in json.loads(said[2])["choices"]]
            self.seen.must(texts == [self.expected[prompt]] * n, f"whole: {texts}")

    def streamed(self, chance: random.Random) -> None:
        prompt, began = chance.choice(PROMPTS), time.monotonic()
        asked = self._body(prompt, stream=True, stream_options={"include_usage": True})
        said = self._ask("POST", "/v1/completions", asked)
        if self._answered("streamed", began, *said):
            text, usage = text_of(said[2])
            self.seen.must(text == self.expected[prompt] and usage == 24, f"streamed: {text!r}, {usage} tokens")

    def stopped(self, chance: random.Random) -> None:
        prompt, began = chance.choice(PROMPTS), time.monotonic()
        stop = self.expected[prompt][len(self.expected[prompt]) // 2 :][:4]
        said = self._ask("POST", "/v1/completions", self._body(prompt, stop=[stop], stream=True))
        if self._answered("stopped", began, *said):
            expected = self.expected[prompt].partition(stop)[0]
            self.seen.must(text_of(said[2])[0] == expected, f"stopped at {stop!r}: {text_of(said[2])[0]!r}")

    def seeded(self, chance: random.Random) -> None:
        asked = self._body(chance.choice(PROMPTS), temperature=1, seed=7)
        texts = []
        for _ in range(2):
            began = time.monotonic()
            said = self._ask("POST", "/v1/completions", asked)
            if not self._answered("seeded", began, *said):
                return
            texts.append(json.loads(said[2])["choices"][0]["text"])
        self.seen.must(texts[0] == texts[1], f"seeded: {texts}")

    def invalid(self, chance: random.Random) -> None:
        cases: list[tuple[dict[str, Any], int]] = [
            ({"n": 0}, 400),
            ({"model": "other"}, 404),
            ({"zz": 1}, 400),
            ({"max_tokens": 10**6}, 400),
            ({"prompt": [-1]}, 400),
            ({"stop": ["x"] * 17}, 400),
            ({"logit_bias": {"x": 1}}, 400),
            ({"prompt": "x" * 2_000_000}, 413),
        ]
        wrong, status = chance.choice(cases)
        got, headers, body = self._ask("POST", "/v1/completions", {**self._body("x"), **wrong})
        self.seen.count("invalid")
        self.seen.must(got in (status, 429) or (status == 413 and got == 400), f"invalid {str(wrong)[:40]}: {got}")
        self.seen.must("error" in json.loads(body), f"invalid: {body[:100]!r}")

    # --- strangers ---

    def leaves(self, chance: random.Random) -> None:
        link = self._raw(self._request(self._body("Once", max_tokens=400, stream=True, n=2)), 30)
        link.recv(1000)
        link.close()
        self.seen.count("leaves")

    def slow(self, chance: random.Random) -> None:
        link = self._raw(self._request(self._body("Once upon a time", stream=True)), ANSWER_SECONDS, 2048)
        said = b""
        while b"[DONE]" not in said and (piece := link.recv(300)):
            said += piece
            time.sleep(0.2)
        link.close()
        self.seen.count("slow")
        self.seen.must(b"[DONE]" in said or b" 429 " in said[:20], f"slow: cut off after {len(said)} bytes")

    def unread(self, chance: random.Random) -> None:
        link = self._raw(self._request(self._body("Once", max_tokens=400, stream=True, n=8)), 30, 2048)
        time.sleep(chance.uniform(5, 90))
        link.close()
        self.seen.count("unread")

    def held(self, chance: random.Random) -> None:
        """Sends half of a request; the server must close the connection."""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        half = chance.choice([b"", b"GET / HTTP/1.1\r\nHost", head + b"Content-Length: 9000\r\n\r\n{", b"\r\n"])
        link = self._raw(half, 60)
        try:
            while link.recv(1000):
                pass
        except ConnectionError:
            pass
        except OSError:
            self.seen.must(False, f"held: {half[:30]!r} was open for 60 s")
        link.close()
        self.seen.count("held")

    def flood(self, chance: random.Random) -> None:
        """Sends too much of something; the server must refuse it or close the connection."""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        trailers = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 100_000
        ahead = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 5000
        keys = b'{"model":"x",' + b",".join(b'"%x":1' % n for n in range(20_000)) + b"}"
        unknown = head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(keys) + keys
        try:
            link = self._raw(chance.choice([trailers, ahead, unknown, b"FOO BAR\r\n\r\n", b"\0" * 100_000]), 60)
            while link.recv(65536):
                pass
            link.close()
        except ConnectionError:
            pass
        self.seen.count("flood")


def text_of(events: bytes) -> tuple[str, int]:
    """The text of a streamed answer, and its number of tokens if usage was requested."""
    chunks = [json.loads(event[6:]) for event in events.split(b"\n\n") if event.startswith(b"data: {")]
    usage = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]), usage[-1] if usage else 0


def looked(settings: launch.Settings, endpoint: int) -> dict[str, float]:
    """Memory, descriptors and processes of the endpoint, and requests in the engine, now."""
    memory = descriptors = count = 0
    for process in processes.of_session(endpoint).values():
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup")
            lines = (rollup if rollup.exists() else Path(f"/proc/{process.pid}/status")).read_text().splitlines()
            memory += next(int(line.split()[1]) for line in lines if line.startswith(("Pss:", "VmRSS:"))) * 1024
            descriptors += len(os.listdir(f"/proc/{process.pid}/fd"))
            count += 1
        except (OSError, StopIteration):  # it has just ended
            continue
    with urllib.request.urlopen(f"http://{settings.reached_at}:{settings.metrics_port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    active = [
        line for line in lines if line.startswith("nv_trt_llm_request_metrics") and 'request_type="active"' in line
    ]
    slots = float(active[0].rsplit(" ", 1)[-1]) if active else 0.0
    return {"memory_bytes": memory, "descriptors": descriptors, "processes": count, "active": slots}


# How many clients of each kind visit at the same time
KINDS: dict[str, int] = {
    "whole": 4, "streamed": 6, "stopped": 2, "seeded": 1, "invalid": 2, "leaves": 2, "slow": 2, "unread": 2, "held": 3, "flood": 1,
}  # fmt: skip


def measure(settings: launch.Settings, seconds: float) -> dict[str, Any]:
    """Serve, visit for some seconds, end. Returns figures, with everything that went wrong under `wrong`."""
    seen, stop = Seen(), threading.Event()
    with started(settings) as serving:
        endpoint = serving.endpoint_pid
        if endpoint is None:
            raise reports.serving.server_not_there("the OpenAI-compatible endpoint", "its process is not there")
        clients = Clients(settings, seen)
        clients.learn()

        def visits(kind: str, visit: Callable[[random.Random], None], seed: int) -> None:
            chance = random.Random(seed)
            while not stop.is_set():
                try:
                    visit(chance)
                except Exception as error:
                    seen.must(False, f"{kind}: {type(error).__name__} {error}")
                    stop.wait(1)

        threads = [
            threading.Thread(target=visits, args=(kind, getattr(clients, kind), 100 * n + m), daemon=True)
            for n, (kind, count) in enumerate(KINDS.items())
            for m in range(count)
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        looks: list[dict[str, float]] = []

        def awaited() -> str:
            return f"{seconds:.0f} s to pass ({sum(seen.counts.values())} visits, {seen.wrongs} wrong answers)"

        with room.waiting("soak", awaited):
            while time.monotonic() - began < seconds and serving.process.poll() is None:
                time.sleep(min(LOOK_SECONDS, seconds / 10))
                looks.append(looked(settings, endpoint))
        stop.set()
        for thread in threads:
            thread.join(ANSWER_SECONDS)
        until = time.monotonic() + 90
        while (last := looked(settings, endpoint))["active"] and time.monotonic() < until:
            time.sleep(1)
        time.sleep(2)
        last = looked(settings, endpoint)
        seen.must(serving.process.poll() is None, "the server ended")
        text = clients._ask("POST", "/v1/completions", clients._body(PROMPTS[0]))
        seen.must(text[0] == 200, f"afterwards an honest request got {text[0]}")
    # in a short run the first quarter is the warm-up
    warm = looks[min(len(looks) // 4, int(60 / LOOK_SECONDS)) :] or looks
    first, late = warm[: max(1, len(warm) // 4)], warm[-max(1, len(warm) // 4) :]
    memory = [statistics.median(look["memory_bytes"] for look in some) for some in (first, late)]
    seen.must(memory[1] - memory[0] < MEMORY_BYTES, f"memory grew from {memory[0]:.0f} to {memory[1]:.0f} bytes")
    most = max(look["descriptors"] for look in first)
    seen.must(last["descriptors"] <= most + DESCRIPTORS, f"{last['descriptors']:.0f} descriptors at the end")
    seen.must(last["active"] == 0, f"{last['active']:.0f} slots of the engine are taken at the end")
    times = sorted(seen.seconds) or [0.0]
    return {
        "seconds": round(time.monotonic() - began), "visits": dict(sorted(seen.counts.items())), "wrong_answers": seen.wrongs,
        "answer_seconds_p50": round(statistics.median(times), 3), "answer_seconds_p99": round(times[int(0.99 * (len(times) - 1))], 3),
        "memory_mb_early": round(memory[0] / 1e6, 1), "memory_mb_late": round(memory[1] / 1e6, 1),
        "memory_mb_after": round(last["memory_bytes"] / 1e6, 1), "descriptors_most": round(max(look["descriptors"] for look in looks)),
        "descriptors_after": round(last["descriptors"]), "active_after": round(last["active"]), "wrong": seen.wrong,
    }  # fmt: skip


def main() -> None:
    parser = serve.settings_parser()
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    result = measure(serve.settings_from(args), args.seconds)
    Path("build").mkdir(exist_ok=True)
    (Path("build") / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            if key == "visits":
                print("".join(f"visits, {kind:<28} {count}\n" for kind, count in value.items()), end="")
            elif key != "wrong":
                print(f"{key:<36} {value}")
    if result["wrong"]:
        raise reports.bench.soak_not_clean(result["wrong_answers"], result["wrong"])


if __name__ == "__main__":
    reports.run(main)
