"""The output of the supervisor and the servers: writing never raises and never waits,
and a file never grows without limit."""

from __future__ import annotations

import fcntl
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from scripts import reports

# A log that reaches this size is renamed to NAME.1 and begun again, so the logs take twice this size at most
MAX_LOG_BYTES = 128 << 20
# How many lines may wait for a slow disk or a stopped terminal; further lines are left out
MAX_WAITING = 10_000


class Output:
    """Lines for a file or for standard output, written by its own thread.

    A full disk, a closed pipe and a reader that stopped cost the lines, not the server.
    """

    def __init__(self, path: Path | None = None) -> None:
        """path: None is standard output. Raises BlockingIOError if another server has the file."""
        self.path = path
        self.descriptor = os.dup(1) if path is None else self._open(path)
        self.size = 0
        self.left_out = 0
        # a line of which the disk took a part
        self.torn = False
        self.lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    @staticmethod
    def _open(path: Path) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
        except BlockingIOError:
            os.close(descriptor)
            raise
        return descriptor

    def line(self, text: str) -> None:
        try:
            self.lines.put_nowait(text + "\n")
        except queue.Full:
            self.left_out += 1

    def close(self, seconds: float = 2.0) -> None:
        """Wait so long for the last lines to be written."""
        try:
            self.lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self.thread.join(seconds)

    def _write(self) -> None:
        while (text := self.lines.get()) is not None:
            if left_out := self.left_out:
                text = f"{left_out} lines were left out\n{text}"
            data = ("\n" * self.torn + text).encode("utf-8", "backslashreplace")
            whole = len(data)
            try:
                if self.path is not None and self.size + len(data) > MAX_LOG_BYTES:
                    self._begin_again(self.path)
                while data:
                    written = os.write(self.descriptor, data)
                    self.size += written
                    data = data[written:]
                self.torn = False
                self.left_out -= left_out
            except OSError:  # a full disk, a closed pipe
                self.left_out += 1
                self.torn = self.torn or len(data) < whole

    def _begin_again(self, path: Path) -> None:
        os.replace(path, path.with_name(path.name + ".1"))
        before, self.descriptor = self.descriptor, self._open(path)
        os.close(before)
        self.size = 0


def open_log(log: Path | None, http_port: int) -> Output:
    """The servers' output. A second server of the same rooms takes a file that is named after its port."""
    if log is None:
        return Output()
    for candidate in (log, log.with_name(f"{log.stem}-{http_port}{log.suffix}")):
        try:
            return Output(candidate)
        except BlockingIOError:
            continue
    raise reports.serving.log_in_use(log)


class Unfailing:
    """Standard output whose reader may leave; then printed text is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            # Python would try to write the rest of the buffer at the end, and turn a good exit status into a bad one
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def never_fail_to_print() -> None:
    """From now on printing in this process never raises."""
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
