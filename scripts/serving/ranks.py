"""The running ranks: one mpirun, its processes and their output."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Mapping, Sequence

from scripts import reports
from scripts.serving import processes
from scripts.serving.output import Output

PROJECT = Path(__file__).parents[2]
# How long a stopped process (SIGSTOP, a debugger, a frozen disk) or a silent HTTP port counts as answering.
STOPPED_SECONDS = 3.0
LOG_LINES = 15
# What the kernel calls a rank's server and the process of one of its models (the Python backend's; 15 letters are kept)
SERVER, MODEL = "tritonserver", "triton_python_b"
# The tables that tritonserver prints at its start say nothing about a failure.
TABLE_LINE = re.compile(r"\s*[|+]")
# How mpirun names the rank that ended first
ENDED_FIRST = re.compile(r"Process name: \[.*@\d+,(\d+)\]|[Pp]rocess rank (\d+) with PID")
# ... and how long it may take until it does so
NAMED_SECONDS = 1.0
TAG = re.compile(r"\[\d+,(\d+)\]<std(?:out|err)>: ?")
# What Triton's core writes when it was told to end and every model is unloaded. A text model is unloaded when its last
# answer is said. (Before that the core writes "All models are stopped", while streams over gRPC still run:
# it does not count them.)
MODELS_DONE = "Found 0 live models"
# From then on an answer is on its way to its client; tritonserver exits, unless a client holds a stream open
UNLOAD_SECONDS = 3.0
# What Triton's Python backend writes when a model's process has not said for a second that it lives. It then frees what
# that process still reads, which ends by a signal. (Triton 2.51, StubLauncher::ReceiveMessageFromStub; seen on a
# machine with a load of 30)
GAVE_UP = re.compile(r"Stub process '[^']*' is not healthy|Failed to obtain the health mutex")
# How long the last lines of a rank that has ended may take through mpirun
LAST_WORDS_SECONDS = 3.0
# What the torch engine writes when another rank no longer answers it (model_repo_template/tensorrt_llm/1/ranks.py)
LOST_RANK = re.compile(r"rank (\d+) (?:is silent|has ended)")
# It writes this when its GPU cannot hold the engine (gpu_llama.py beside it)
OUT_OF_MEMORY = re.compile(r"(out of GPU memory: .*?or raise TP|out of GPU memory: .*?or lower MAX_BATCH_SIZE)")
# and this when there are fewer GPUs than ranks, or CUDA_VISIBLE_DEVICES hides some (ranks.py beside it)
NO_OWN_GPU = re.compile(r"rank (\d+) needs its own GPU; this host has (\d+)")


class Ranks:
    """One mpirun and everything below it, in its own session: signals meant for us do not reach it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], root: Path, run_dir: Path, log: Output
    ) -> None:
        self.command, self.environment, self.root, self.run_dir, self.log = command, environment, root, run_dir, log
        self._start()

    def _start(self) -> None:
        self.mpirun = subprocess.Popen(
            self.command, cwd=self.root, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        self.session = self.mpirun.pid
        self.guard = self._guard()
        self.last_lines: dict[int, deque[str]] = {}
        self.lost_rank: int | None = None
        self.out_of_memory: tuple[int, str] | None = None
        self.gpus_seen: int | None = None
        self.model_given_up = False
        self.ended_first: int | None = None
        self.gone_since: float | None = None
        self.models_done_at: float | None = None
        self.expected: dict[tuple[int, int], processes.Process] = {}
        self.stopped_since: dict[tuple[int, int], float] = {}
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def start_again(self) -> None:
        """End what is left of a start that failed, and start again in the same folder."""
        self.guard.kill()  # told of the end, it would take the folder away
        self.end()
        self._start()

    def hear_out(self) -> None:
        """After a failure: wait a moment for what mpirun still passes on.
        A server's last lines say more than its end does."""
        try:
            self.mpirun.wait(LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            return
        self.reader.join(timeout=NAMED_SECONDS)

    @property
    def model_lost(self) -> bool:
        """Whether a start failed because a model's process was lost: Triton thought that it was dead,
        or waits for ever because it is dead."""
        return self.model_given_up or (self.gone_since is not None and self.mpirun.poll() is None)

    def _read(self) -> None:
        """Sort the ranks' output: mpirun marks each line with its rank."""
        assert self.mpirun.stdout is not None
        for line in self.mpirun.stdout:
            parts = TAG.split(line.rstrip("\n"))
            tagged = [(-1, parts[0])] + [(int(rank), text) for rank, text in zip(parts[1::2], parts[2::2])]
            for rank, text in tagged:
                if not text.strip():
                    continue
                if not TABLE_LINE.match(text):
                    self.last_lines.setdefault(rank, deque(maxlen=LOG_LINES)).append(text)
                if short := OUT_OF_MEMORY.search(text):
                    self.out_of_memory = (rank, short[1])
                if fewer := NO_OWN_GPU.search(text):
                    self.gpus_seen = int(fewer[2])
                if lost := LOST_RANK.search(text):
                    self.lost_rank = int(lost[1])
                if rank < 0 and self.ended_first is None and (first := ENDED_FIRST.search(text)):
                    self.ended_first = int(first[1] or first[2])
                if rank == 0 and MODELS_DONE in text:
                    self.models_done_at = self.models_done_at or time.monotonic()
                self.model_given_up |= GAVE_UP.search(text) is not None
                self.log.line(f"rank {rank}: {text}" if rank >= 0 else text)

    def _guard(self) -> subprocess.Popen[bytes]:
        """The process that ends the ranks when this one dies."""
        command = [sys.executable, "-m", "scripts.serving.processes", str(self.session), str(self.run_dir)]
        return subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, start_new_session=True)

    def keep_guard(self) -> None:
        """Start the guard again if it was killed, as the kernel does when memory runs out."""
        if self.guard.poll() is not None:
            self.guard = self._guard()

    def tail(self, rank: int) -> list[str]:
        """The last lines of a rank; if there are none, those of mpirun."""
        return list(self.last_lines.get(rank) or self.last_lines.get(-1) or [])

    def lasting(self, current: Mapping[tuple[int, int], processes.Process]) -> dict[tuple[int, int], processes.Process]:
        """The current processes that last as long as their rank: its server, and those of its models.

        mpirun started each server. It is not known by its name alone: what tritonserver starts (a model's process, a
        look at the machine) has its name until it becomes another program,
        and may be seen before its parent has the name itself.
        """
        of_ranks = {key: p for key, p in current.items() if p.rank is not None}
        servers = {key: p for key, p in of_ranks.items() if p.name == SERVER and p.parent == self.mpirun.pid}
        pids = {p.pid for p in servers.values()}
        return {**servers, **{key: p for key, p in of_ranks.items() if p.name == MODEL and p.parent in pids}}

    def failure(self, ending: bool = False) -> tuple[int, str] | None:
        """(rank, what happened) as soon as a process of a rank is gone or has been stopped for STOPPED_SECONDS.

        ending: rank 0's processes may go.
        """
        now, current = time.monotonic(), processes.of_session(self.session)
        self.expected.update(self.lasting(current))
        gone = [p for key, p in self.expected.items() if key not in current and not (ending and p.rank == 0)]
        if gone:
            self.gone_since = self.gone_since or now
            # When one rank ends, the others follow within moments: a peer or mpirun says which was the first.
            first = self.lost_rank if self.ended_first is None else self.ended_first
            if first is None and now - self.gone_since < NAMED_SECONDS:
                return None
            process = min(gone, key=lambda p: (p.rank != first, p.rank == 0))
            if first is not None and process.rank != first:  # the first one was gone before we saw it
                return first, "it ended"
            return process.rank or 0, f"its process {process.name} (pid {process.pid}) ended"
        self.gone_since = None
        self.stopped_since = {key: since for key, since in self.stopped_since.items() if key in current}
        for key, process in current.items():
            if process.state not in "tT":
                self.stopped_since.pop(key, None)
            elif now - self.stopped_since.setdefault(key, now) >= STOPPED_SECONDS:
                return process.rank or 0, f"its process {process.name} (pid {process.pid}) is stopped"
        if self.lost_rank is not None and not ending:
            return self.lost_rank, "it no longer answers the other ranks"
        if self.mpirun.poll() is not None and not ending:
            self.reader.join(timeout=NAMED_SECONDS)  # mpirun's last lines name the rank
            return self.ended_first or 0, f"mpirun ended with status {self.mpirun.returncode}"
        return None

    def settled_failure(self) -> tuple[int, str] | None:
        """Like failure(), but waits until it is known which rank ended first."""
        while (failure := self.failure()) is None and self.gone_since is not None:
            time.sleep(0.05)
        return failure

    def drain(self, timeout_seconds: float) -> bool:
        """Let rank 0 finish its requests; True if none was cut off. A Problem if a rank fails meanwhile.

        On SIGTERM tritonserver refuses new work, finishes the running requests, unloads its models and exits. It never
        exits while a client holds an idle gRPC stream open (Triton 2.51), so we do not wait for its exit.
        """
        lasting = self.lasting(processes.of_session(self.session)).values()
        servers = [p for p in lasting if p.rank == 0 and p.name == SERVER]
        for server in servers:
            processes.send(server, signal.SIGTERM)
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if not {server.identity for server in servers} & set(processes.of_session(self.session)):
                return True
            if self.models_done_at is not None and time.monotonic() - self.models_done_at > UNLOAD_SECONDS:
                return True
            if failure := self.failure(ending=True):
                raise reports.serving.rank_failed(*failure, "while ending", self.tail(failure[0]))
            time.sleep(0.05)
        return False

    def end(self) -> None:
        """End everything at once and leave nothing behind."""
        processes.end_session(self.session, timeout_seconds=5)
        self.mpirun.wait()
        self.guard.communicate()
        processes.remove_shared_memory(self.run_dir.name)
        self.reader.join(timeout=2)
