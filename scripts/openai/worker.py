"""One worker: a loop that answers on the shared port. Several share the port,
each with its own socket (SO_REUSEPORT)."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import sys
from typing import Any

import uvicorn
import uvloop

from scripts.openai import passing
from scripts.openai.app import Endpoint
from scripts.openai.front import Front, Fronts
from scripts.openai.shares import Shares

log = logging.getLogger("openai")

# Descriptors that no connection gets: the engine's, the readers', the log's, and some to refuse with
KEPT_BACK = 128
MAX_CONNECTIONS = 8192
BEAT_SECONDS = 1.0
# Requests that are cut off are told so; this is the time for sending it
FLUSH_SECONDS = 1


def most_connections() -> int:
    """How many connections this process may have, with descriptors kept back for itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(16, min(MAX_CONNECTIONS, hard - KEPT_BACK if hard != resource.RLIM_INFINITY else MAX_CONNECTIONS))


async def beat(shares: Shares) -> None:
    """Say that the loop runs."""
    while True:
        shares.beats[shares.worker] += 1
        await asyncio.sleep(BEAT_SECONDS)


class Server(uvicorn.Server):
    """uvicorn's server, which tells requests that it will cut them off."""

    def __init__(self, endpoint: Endpoint, drain_seconds: int, **config: Any) -> None:
        super().__init__(uvicorn.Config(endpoint, timeout_graceful_shutdown=drain_seconds + FLUSH_SECONDS, **config))
        self.endpoint, self.drain_seconds = endpoint, drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.drain_seconds, self.endpoint.cut)
        await super().shutdown(sockets)


async def run(server: uvicorn.Server, shares: Shares, listener: socket.socket) -> None:
    beating = asyncio.ensure_future(beat(shares))
    try:
        await server.serve(sockets=[listener])
    finally:
        beating.cancel()


def serve(endpoint: Endpoint, number: int, listener: socket.socket, drain_seconds: int) -> int:
    """The life of a worker, until SIGTERM: then running requests finish. Returns the exit status."""
    endpoint.shares.worker = number
    Front.fronts = Fronts(most_connections())
    endpoint.keys.adopt()
    if endpoint.metrics is not None:
        endpoint.metrics.counts.worker = number
        passing.here = endpoint.metrics.counts
    if endpoint.options.traces is not None:
        try:
            endpoint.traces = endpoint.options.traces()
        except Exception:  # the SDK refuses settings that serving/collector.py accepted: serve without traces
            log.exception("no traces")
    server = Server(
        endpoint, drain_seconds, http=Front, loop="uvloop", ws="none", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, date_header=False, backlog=1024,
    )  # fmt: skip
    # uvicorn drains on SIGTERM and then raises it again, for the handler that was there before
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        uvloop.run(run(server, endpoint.shares, listener))
    except SystemExit:
        pass
    if endpoint.traces is not None:
        endpoint.traces.end()
    return 0 if server.started else 1
