"""Output never stops the server: a full disk, a closed pipe, a reader that reads nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project import ROOT

from scripts.serving import output
from scripts.serving.output import Output, open_log


def test_lines_are_written_in_order_and_a_second_server_takes_another_file(tmp_path: Path) -> None:
    log = open_log(tmp_path / "serve.log", 8000)
    second = open_log(tmp_path / "serve.log", 8000)
    for n in range(1000):
        log.line(f"line {n}")
    log.close()
    second.close()
    assert (tmp_path / "serve.log").read_text().splitlines() == [f"line {n}" for n in range(1000)]
    assert second.path == tmp_path / "serve-8000.log"


def test_a_full_disk_costs_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Output, "_open", lambda self, path: os.open(path, os.O_WRONLY))
    log = Output(Path("/dev/full"))
    for n in range(100):
        log.line(f"line {n}")
    log.close()
    assert log.left_out and not log.thread.is_alive()


def test_a_line_that_a_full_disk_tore_does_not_run_into_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads LOG=json reads line by line."""
    room = [7, 0, 0, 1000]

    def write(descriptor: int, data: bytes, real: Any = os.write) -> int:
        fits = room.pop(0)
        if not fits:
            raise OSError("No space left on device")
        return int(real(descriptor, data[:fits]))

    log = open_log(tmp_path / "serve.log", 8000)
    monkeypatch.setattr(os, "write", write)
    for text in ("first line", "second line", "third line"):
        log.line(text)
    log.close()
    monkeypatch.undo()
    assert (tmp_path / "serve.log").read_text() == "first l\n2 lines were left out\nthird line\n"


def test_a_log_begins_again_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MAX_LOG_BYTES", 1000)
    log = open_log(tmp_path / "serve.log", 8000)
    for n in range(500):
        log.line(f"line {n}")
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["serve.log", "serve.log.1"]
    assert all((tmp_path / name).stat().st_size <= 1000 for name in files)
    assert (tmp_path / "serve.log").read_text().endswith("line 499\n")


STUCK = """
import os, sys
from scripts.serving.output import Output, never_fail_to_print
never_fail_to_print()
out = Output()
for n in range(30_000):
    out.line("x" * 100)
assert sys.argv[1] == "closed" or out.left_out, "a pipe and a queue do not hold as much"
print("y", flush=True) if sys.argv[1] == "closed" else None
sys.stderr.write("went on\\n")
out.close(0.1)
os._exit(0)
"""


@pytest.mark.parametrize("pipe", ["closed", "stuck"])
def test_a_pipe_that_nobody_reads_holds_nothing(pipe: str) -> None:
    receiving, sending = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, pipe], cwd=ROOT, stdout=sending, stderr=subprocess.PIPE, text=True
    )
    os.close(sending)
    if pipe == "closed":
        os.close(receiving)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "went on\n")
