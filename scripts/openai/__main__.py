"""`python -m scripts.openai`: the endpoint, started and watched by scripts/serve.py.

On SIGUSR1 it announces its end and goes on serving. On SIGTERM running requests finish, and no others begin.

This process reads and checks everything, opens the port, and forks workers, which answer (worker.py), and readers,
which do the work that clients can make expensive (reader.py). It talks to no client itself, so it always has time to
say that it lives, and to replace a child that has ended.

Reads   engines/config.json and model_repo/ under --root: the tokenizer, the chat template, the text code, what
        tensorrt_llm declares
Needs   the packages of requirements/openai.txt
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts import reports
from scripts.openai import reader, worker
from scripts.openai.app import Endpoint, Options, capacity_of
from scripts.openai.chat_template import ChatTemplate, template_of
from scripts.openai.description import description
from scripts.openai.desk import Desk
from scripts.openai.engine import Engine, read_limits
from scripts.openai.keys import Keys
from scripts.openai.log import open_log
from scripts.openai.metrics import Counts, Page
from scripts.openai.reader import Reader
from scripts.openai.shares import Shares

log = logging.getLogger("openai")

TOKENIZER = "model_repo/preprocessing/1/tokenizer"
TEXT = "model_repo/tensorrt_llm_bls/1/text.py"
GUIDES = "model_repo/tensorrt_llm/1/guides.py"
# prctl(2)
PR_SET_PDEATHSIG = 1
# A token takes a worker 30 to 59 microseconds (docs/endpoint.md); the engine needs cores too
CORES_PER_WORKER, MAX_WORKERS = 4, 8
# One client's expensive request must not occupy all readers of a worker
READERS_PER_WORKER = 2
# A worker whose loop has not run for so long is ended, because its clients wait in vain. No machine is that busy.
STUCK_SECONDS = 60.0
# If so many workers end within a minute, another start does not help
MAX_DEATHS = 5
BEAT_SECONDS = 1.0


def text_code(root: Path) -> Any:
    """The room's own text.py: the endpoint and Triton's text models tokenize alike because they run the same file."""
    sys.dont_write_bytecode = True  # nothing may be written into a room
    spec = importlib.util.spec_from_file_location("text", root / TEXT)
    if spec is None or spec.loader is None:
        raise reports.rooms.room_missing(root / "model_repo")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_of(listed: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(filter(None, listed.split(",")))


def guide_check(root: Path) -> Callable[[str, str], str | None] | None:
    """The torch engine's own check of a guide; None if the room has another engine, which checks for itself."""
    file = root / GUIDES
    if not file.is_file():
        return None
    spec = importlib.util.spec_from_file_location("guides", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guides"] = module  # dataclasses and the like look there
    spec.loader.exec_module(module)
    check: Callable[[str, str], str | None] = module.why_not
    return check


def workers_of(asked: str) -> int:
    """How many workers there are: as the setting says, else by the cores that this process may use."""
    if asked:
        return int(asked)
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // CORES_PER_WORKER))


def listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """A socket for each worker, all on one port: the kernel spreads connections over them (socket(7), SO_REUSEPORT)."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = []
    for _ in range(count):
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if count > 1:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        listener.bind(address)
        listener.listen(1024)
        listener.setblocking(False)
        found.append(listener)
    return found


@dataclass
class Child:
    """A forked process. worker: its own number if it is a worker, else that of the worker that it reads for."""

    worker: int
    is_reader: bool
    beats: int = 0
    heard: float = 0.0


class Parent:
    """The children, and everything that they need."""

    def __init__(
        self, endpoint: Endpoint, reader_of: Reader, listening: list[socket.socket], folder: Path, drain: int
    ) -> None:
        self.endpoint, self.reader, self.listening, self.folder, self.drain = (
            endpoint,
            reader_of,
            listening,
            folder,
            drain,
        )
        self.children: dict[int, Child] = {}
        self.deaths: list[float] = []
        self.ending, self.status = False, 0

    def desk(self, number: int) -> str:
        return str(self.folder / f"desk-{number}")

    def fork(self, child: Child) -> None:
        """Fork another child. Only the parent returns from here."""
        me = os.getpid()
        pid = os.fork()
        if pid:
            child.heard = time.monotonic()
            child.beats = self.endpoint.shares.beats[child.worker]
            self.children[pid] = child
            return
        status = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == me:
                status = self._live(child, me)
        except BaseException:
            log.exception("a process of the endpoint failed")
        finally:
            os._exit(status)

    def _live(self, child: Child, me: int) -> int:
        for number, listener in enumerate(self.listening):
            if child.is_reader or number != child.worker:
                listener.close()
        if child.is_reader:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
            reader.serve(self.reader, self.desk(child.worker), me)
        self.endpoint.desk = Desk(self.desk(child.worker))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        return worker.serve(self.endpoint, child.worker, self.listening[child.worker], self.drain)

    def run(self, say_alive: Callable[[], None]) -> int:
        """Until SIGTERM and the end of the last worker. Returns the exit status."""
        for number in range(len(self.listening)):
            self.fork(Child(number, is_reader=False))
            for _ in range(READERS_PER_WORKER):
                self.fork(Child(number, is_reader=True))
        while not self.ending or any(not child.is_reader for child in self.children.values()):
            say_alive()
            told = signal.sigtimedwait(WATCHED, BEAT_SECONDS)
            if told is not None and told.si_signo == signal.SIGUSR1:
                self.endpoint.shares.end()
            if told is not None and told.si_signo in (signal.SIGTERM, signal.SIGINT):
                self._end()
            self._reap()
            self._look()
            if len(self.deaths) > MAX_DEATHS:
                log.error("%d workers ended within a minute", len(self.deaths))
                return 1
        return self.status

    def _end(self) -> None:
        """Take no new connections; workers finish their requests."""
        self.ending = True
        self.endpoint.shares.end()
        for listener in self.listening:
            listener.close()
        for pid, child in self.children.items():
            if not child.is_reader:
                os.kill(pid, signal.SIGTERM)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            child = self.children.pop(pid, None)
            if child is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            if not child.is_reader:
                self.endpoint.shares.forget(child.worker)
                if self.ending:
                    self.status = self.status or (1 if code else 0)
                    continue
                log.error("worker %d (pid %d) ended with status %d; another takes its place", child.worker, pid, code)
                self.deaths = [at for at in self.deaths if time.monotonic() - at < 60] + [time.monotonic()]
            elif code:
                log.warning("a reader (pid %d) was ended by the work of one request, status %d", pid, code)
            # at the end a reader is replaced only while its worker is there: without one it ends at once, for ever
            if not self.ending or self._has_worker(child.worker):
                self.fork(Child(child.worker, child.is_reader))

    def _has_worker(self, number: int) -> bool:
        return any(child.worker == number and not child.is_reader for child in self.children.values())

    def _look(self) -> None:
        """End a worker whose loop does not run."""
        now = time.monotonic()
        for pid, child in self.children.items():
            beats = self.endpoint.shares.beats[child.worker]
            if child.is_reader or beats != child.beats:
                child.beats, child.heard = beats, now
            elif now - child.heard > STUCK_SECONDS:
                log.error("worker %d (pid %d) has not run for %.0f s and is ended", child.worker, pid, STUCK_SECONDS)
                os.kill(pid, signal.SIGKILL)


# what the parent waits for
WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD}


def end_with_parent(parent: int) -> None:
    """End with the supervisor, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def parent_of(args: argparse.Namespace, folder: Path) -> Parent:
    """Read and check everything, then open the port."""
    module = text_code(args.root)
    tokenizer = args.root / TOKENIZER
    text = module.Text(tokenizer)
    template = template_of(tokenizer)
    config = (args.root / "model_repo/tensorrt_llm/config.pbtxt").read_text(encoding="utf-8")
    workers = workers_of(args.workers)
    shares = Shares(workers)
    engine = Engine(args.grpc, config, read_limits(args.root / "engines"), text.end_ids, shares)
    chat = None if template is None else ChatTemplate(template, tokenizer, text)
    described = json.dumps(description()).encode()
    options = Options(names_of(args.model_aliases), names_of(args.cors_origins))
    slots = engine.limits.max_batch_size
    metrics = None
    if args.metrics == "on":
        metrics = Page(Counts(workers), args.name, lambda: shares.load, slots, args.triton_metrics)
    # never from the command line, which every user can see
    keys = Keys(args.api_key_file, os.environ.pop("BAKE_API_KEY", ""))
    if args.traces == "on":
        # imported here, so that workers share its memory, and servers without it never load it
        from scripts.openai.tracing import Traces

        options = replace(options, traces=Traces)
    endpoint = Endpoint(
        args.name, engine, text, module.StopStrings, chat is not None, shares, Desk(""), text.end_ids, keys, described, options,
        metrics,
    )  # fmt: skip
    reads = Reader(args.name, engine, text, chat, capacity_of(slots), options.aliases, guide_check(args.root))
    return Parent(endpoint, reads, listeners(args.host, args.port, workers), folder, args.drain_seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--grpc", required=True, help="Triton's address, host:port")
    parser.add_argument("--name", required=True, help="the model's id for clients")
    parser.add_argument("--api-key-file", default="")
    parser.add_argument(
        "--workers", default="", help="worker processes (default: one for every four cores, at most eight)"
    )
    parser.add_argument(
        "--drain-seconds", type=int, default=20, help="how long running requests may take after SIGTERM"
    )
    parser.add_argument("--metrics", default="on", choices=("on", "off"), help="whether there is a page /metrics")
    parser.add_argument("--traces", default="off", choices=("on", "off"), help="whether each request has a trace")
    parser.add_argument(
        "--triton-metrics", default="", help="the address of Triton's metrics, host:port (default: not asked)"
    )
    parser.add_argument(
        "--log-form", default="text", choices=("text", "json"), help="json: also a line for each request"
    )
    parser.add_argument("--model-aliases", default="", help="more names of the model, with commas between them")
    parser.add_argument(
        "--cors-origins", default="", help="origins whose pages may ask, with commas; any: all (default: none)"
    )
    parser.add_argument("--parent", type=int, help="end when this process ends")
    parser.add_argument("--folder", type=Path, help="where workers and readers meet (default: a temporary one)")
    parser.add_argument("--alive", type=int, help="a descriptor that a byte is written to every second")
    args = parser.parse_args()
    if args.parent:
        end_with_parent(args.parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    # a process that forks must have no threads, and the tokenizer would start some
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    open_log(args.log_form == "json")
    if args.alive is not None:
        os.set_blocking(args.alive, False)

    def say_alive() -> None:
        if args.alive is not None:
            try:
                os.write(args.alive, b".")
            except (
                OSError
            ):  # the pipe is full because the supervisor is stopped; or the supervisor has ended, and we end too
                pass

    meeting = tempfile.TemporaryDirectory(prefix="bake-openai-") if args.folder is None else nullcontext(args.folder)
    with meeting as folder:
        parent = parent_of(args, Path(folder))
        log.info("%d workers, %d readers for each", len(parent.listening), READERS_PER_WORKER)
        gc.collect()
        gc.freeze()  # memory that children share must stay shared
        return parent.run(say_alive)


if __name__ == "__main__":
    reports.run(main)
