"""`make bench` with its load generators, against a server that it starts."""

from __future__ import annotations

import json
from pathlib import Path

from project import make
from server import free_ports


def test_make_bench_asks_both_protocols_and_the_engine_and_judges_by_an_older_run(tree: Path, tmp_path: Path) -> None:
    """All is written before an older run, a thousand times as fast, makes it fail."""
    ports = dict(zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "OPENAI_PORT"), free_ports(4)))
    row = {"side": "engine alone", "tp_size": 2, "input_tokens": 8, "output_tokens": 8, "concurrency": 2}
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": [{**row, "tokens_per_second": 1e9}]}))
    done = make(tree, "bench", "POINTS=8:8:2", f"BASELINE={old}", *(f"{name}={port}" for name, port in ports.items()))
    assert done.returncode != 0 and "tokens_per_second" in done.stderr, done.stdout + done.stderr
    out = tree / "build/bench/stories-tp2.json"
    found = json.loads(out.read_text())
    sides = [row["side"] for row in found["rows"]]
    assert sides[0].startswith("Triton (") and sides[1:] == [
        "OpenAI's API (aiperf)",
        "OpenAI's API",
        "engine alone",
        "ceiling",
    ]
    assert found["host"]["versions"]["aiperf"] and "aiperf" not in found["not_run"] and not found["failed"]
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    assert [line["what"][0] for line in found["compared"]] == ["engine alone"] and found["compared"][0]["worse"]
    assert out.with_suffix(".csv").read_text().count("\n") == 6 and "<svg" in out.with_suffix(".html").read_text()
