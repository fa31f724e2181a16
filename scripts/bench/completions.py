"""Streams over an OpenAI-compatible /v1/completions, the same for every server: ours and the peers.

python3 -m scripts.bench.completions URL MODEL OUT 128:128:32 ...    two rounds of each load, the second one counts

Prompts are random token ids, different in every request, so that no server can reuse a prefix. It needs only the
standard library. Several processes share the streams,
because one process cannot read as fast as a server writes 256 streams.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from scripts import reports

TIMEOUT_SECONDS = 300
STREAMS_PER_PROCESS = 32
# ids of ordinary tokens in every vocabulary that is measured here
ORDINARY = (1000, 30000)


def ask(
    url: str,
    model: str,
    input_tokens: int,
    output_tokens: int,
    concurrency: int,
    rounds: int,
    seed: int,
    vocab_size: int,
) -> list[dict[str, Any]]:
    """`concurrency` streams that each ask `rounds` times; every request in the form of ranks.request_times.
    A Problem if one is refused."""
    processes = min(os.cpu_count() or 1, -(-concurrency // STREAMS_PER_PROCESS))
    shares = [concurrency // processes + (n < concurrency % processes) for n in range(processes)]
    work = [
        (url, model, input_tokens, output_tokens, share, rounds, 1000 * seed + n, vocab_size)
        for n, share in enumerate(shares)
    ]
    if processes == 1:
        return _process(work[0])
    # a fork would copy the memory of the measuring process
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [one for many in pool.map(_process, work) for one in many]


def _process(arguments: tuple[str, str, int, int, int, int, int, int]) -> list[dict[str, Any]]:
    return asyncio.run(_streams(*arguments))


async def _streams(
    url: str, model: str, input_tokens: int, output_tokens: int, streams: int, rounds: int, seed: int, vocab_size: int
) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    low, high = ORDINARY if vocab_size >= ORDINARY[1] else (3, vocab_size)

    def body() -> bytes:
        return json.dumps({
            "model": model, "prompt": [chance.randrange(low, high) for _ in range(input_tokens)], "max_tokens": output_tokens,
            "min_tokens": output_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip

    async def stream(bodies: Sequence[bytes]) -> list[dict[str, Any]]:
        return [await asyncio.wait_for(_one(url, one), TIMEOUT_SECONDS) for one in bodies]

    bodies = [[body() for _ in range(rounds)] for _ in range(streams)]
    return [one for many in await asyncio.gather(*map(stream, bodies)) for one in many]


async def _one(url: str, body: bytes) -> dict[str, Any]:
    """One request: when it began, when each piece arrived, and how many tokens each piece had."""
    parts = urlsplit(url)
    began = perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise reports.serving.request_refused((status + await reader.read(2000)).decode(errors="replace")[:300])
        arrivals, tokens = list[float](), 0
        # A piece is one line; the lengths of HTTP's chunks are separate lines between them.
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            if b'"completion_tokens"' in line:
                event = json.loads(line[6:])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                if not event.get("choices"):
                    continue
            arrivals.append(perf_counter())
    finally:
        writer.close()
    return times(began, arrivals, tokens)


def times(began: float, arrivals: Sequence[float], tokens: int) -> dict[str, Any]:
    """A request in the form of ranks.request_times: a piece has one token,
    or several if the client is slower than the engine."""
    if not arrivals or not tokens:
        raise reports.serving.request_refused(
            f"the answer ended after {len(arrivals)} pieces without its number of tokens"
        )
    counts = [1] * min(len(arrivals), tokens)
    counts[-1] += tokens - len(counts)
    return {"began": began, "arrivals": list(arrivals[: len(counts) - 1]) + [arrivals[-1]], "tokens": counts}


def measure(url: str, model: str, points: Sequence[str], vocab_size: int = ORDINARY[1]) -> list[Mapping[str, Any]]:
    """Runs each load 'input:output:streams' twice; the second round counts."""
    from scripts.bench.load import summary

    rows: list[Mapping[str, Any]] = []
    for point in points:
        given, wanted, streams = map(int, point.split(":"))
        for seed in (1, 2):
            found = ask(url, model, given, wanted, streams, 1 + (seed > 1), seed, vocab_size)
        rows.append({"input_tokens": given, "output_tokens": wanted, "concurrency": streams, **summary(found)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    url, model, out, *points = sys.argv[1:]
    Path(out).write_text(json.dumps(measure(url, model, points), indent=1) + "\n")


if __name__ == "__main__":
    reports.run(main)
