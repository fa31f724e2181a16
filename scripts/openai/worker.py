"""One worker: a loop that answers on the shared port. Several share the port, each with a socket of its own (SO_REUSEPORT)."""

import asyncio
import logging
import resource
import signal
import socket
import sys

import uvicorn
import uvloop

from scripts.openai.app import Endpoint
from scripts.openai.front import Front, Fronts
from scripts.openai.shares import Shares

log = logging.getLogger("openai")

# Descriptors that no connection gets: the engine's, the readers', the log's, and some to refuse with
KEPT_BACK = 128
MAX_CONNECTIONS = 8192
BEAT_SECONDS = 1.0


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
    config = uvicorn.Config(
        endpoint, http=Front, loop="uvloop", ws="none", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, date_header=False, backlog=1024, timeout_graceful_shutdown=drain_seconds,
    )  # fmt: skip
    server = uvicorn.Server(config)
    # uvicorn drains on SIGTERM and then raises it again, for whoever was there before it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        uvloop.run(run(server, endpoint.shares, listener))
    except SystemExit:
        pass
    return 0 if server.started else 1
