"""Whether a port answers."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Mapping

# A server asks itself over loopback, whatever http_proxy says: a proxy would see its prompts,
# and the server never become ready.
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SILENT_SECONDS = 8.0
# how long an answer to "are you alive" may take
ALIVE_SECONDS = 3.5


class Pulse:
    """Whether a port answers. A port is silent if it missed two questions in a row and SILENT_SECONDS passed. A machine
    that was frozen (a snapshot, a closed laptop) loses one question and much time,
    although nothing is wrong with it."""

    def __init__(self) -> None:
        self.heard()

    def heard(self) -> None:
        self.last, self.missed = time.monotonic(), 0

    def ask(self, url: str) -> None:
        if http_ok(url, None, ALIVE_SECONDS):
            self.heard()
        else:
            self.missed += 1

    @property
    def silent(self) -> bool:
        return self.missed > 1 and time.monotonic() - self.last > SILENT_SECONDS


def http_ok(url: str, body: Mapping[str, object] | None, timeout_seconds: float) -> bool:
    """Whether the answer to a request has status 200 and no error inside (Triton sends some errors with status 200)."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with LOOPBACK.open(urllib.request.Request(url, data=data), timeout=timeout_seconds) as answer:
            content = answer.read()
            return answer.status == 200 and (body is None or "error" not in json.loads(content))
    except (OSError, ValueError, urllib.error.URLError):
        return False
