"""The log of the endpoint's processes: it never waits, never raises, and one client cannot fill it."""

from __future__ import annotations

import contextvars
import logging
import os
import time

# Whose request is being worked on; empty if there is none
client_of_request: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")
# Lines of one client, and of all, in a period; and how many clients are counted separately
LINES, ALL_LINES, SECONDS, CLIENTS = 20, 200, 60.0, 1000
# Lines of LOG=json, one for each request: as many in a period, of one client and of all, for each worker
REQUEST_LINES, ALL_REQUEST_LINES = 3000, 6000
# A write of at most so much into a pipe is whole or not at all (pipe(7))
MAX_LINE_BYTES = 4000


class Bounded(logging.Handler):
    """Writes lines to a non-blocking file descriptor; lines that do not fit are left out and counted."""

    def __init__(self, descriptor: int = 2, lines: int = LINES, all_lines: int = ALL_LINES) -> None:
        super().__init__()
        self.descriptor, self.most, self.most_of_all = descriptor, lines, all_lines
        self.began, self.lines_of_all, self.left_out = time.monotonic(), 0, 0
        self.lines: dict[str, int] = {}
        os.set_blocking(descriptor, False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            now, client = time.monotonic(), client_of_request.get()
            if now - self.began > SECONDS or len(self.lines) > CLIENTS:
                if self.left_out:
                    self._write(f"WARNING {self.left_out} more lines were left out")
                self.began, self.lines, self.lines_of_all, self.left_out = now, {}, 0, 0
            count = self.lines.get(client, 0)
            if count >= self.most or self.lines_of_all >= self.most_of_all:
                self.left_out += 1
                return
            self.lines[client] = count + 1
            self.lines_of_all += 1
            self._write(self.format(record))
        except Exception:  # the server goes on without its log
            self.left_out += 1

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        os.write(self.descriptor, data[:MAX_LINE_BYTES] + b"\n")


# LOG=json writes here
requests = logging.getLogger("openai.requests")
requests.propagate = False


def open_log(with_requests: bool = False) -> None:
    """Set up the log of this process and its children. with_requests: also a line for each request."""
    logging.raiseExceptions = False
    handler = Bounded()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    requests.disabled = not with_requests
    requests.handlers = [Bounded(lines=REQUEST_LINES, all_lines=ALL_REQUEST_LINES)] if with_requests else []
