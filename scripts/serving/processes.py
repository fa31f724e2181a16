"""The processes of a running server, as the kernel reports them: which run, which are stopped, which to end.

As a program this is the supervisor's guard: it waits until the supervisor's end of a pipe closes, for whatever reason,
and ends what is left. (mpirun was seen to leave its ranks behind after a SIGTERM alone.)
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

PROC = Path("/proc")
# prctl(2)
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Process:
    """One process. (pid, started) identifies it: pids are used again. rank: its MPI rank, None if it has none."""

    pid: int
    started: int
    parent: int
    session: int
    state: str
    name: str
    rank: int | None

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.started


def of_session(session: int, dead: bool = False) -> dict[tuple[int, int], Process]:
    """Every process of a session (what was started by one setsid and its children), by identity; dead: zombies too."""
    found = (_read(int(name), session) for name in os.listdir(PROC) if name.isdigit())
    return {p.identity: p for p in found if p is not None and (dead or p.state not in "ZX")}


def end_session(session: int, timeout_seconds: float) -> set[int]:
    """Kill every process of a session and reap them; returns the pids that are left after the timeout (none, unless the
    kernel holds them). Orphans can be reaped only if we adopted them: see adopt_orphans."""
    deadline = time.monotonic() + timeout_seconds
    while left := of_session(session, dead=True):
        for process in left.values():
            send(process, signal.SIGKILL)
        reap_orphans()
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return {process.pid for process in left.values()}


def send(process: Process, number: signal.Signals) -> None:
    """Signal a process, if it is still the same one."""
    try:
        if (again := _read(process.pid, process.session)) and again.identity == process.identity:
            os.kill(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent dies, like process 1 of a container,
    so that none stays as a zombie."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans() -> None:
    """Reap every child that has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def run_logged(
    command: Sequence[str], log: Path, heard: Callable[[str], None], last: int = 200
) -> tuple[int, list[str]]:
    """Run a program to its end in the folder of `log`. Its output goes to `log` and, line by line, to `heard`. Returns
    (status, last lines)."""
    lines: deque[str] = deque(maxlen=last)
    with open(log, "w", encoding="utf-8") as kept:
        child = subprocess.Popen(
            command, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        try:
            assert child.stdout is not None
            for line in child.stdout:
                kept.write(line)
                kept.flush()
                heard(line)
                if line.strip():
                    lines.append(line.rstrip())
            return child.wait(), list(lines)
        finally:
            child.kill()
            child.wait()


def _read(pid: int, session: int) -> Process | None:
    """/proc/PID/stat (proc(5)) and the rank that mpirun wrote into the environment. None if it is of another session:
    the supervisor asks ten times a second, and a host may have thousands."""
    try:
        with open(f"{PROC}/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read().decode(errors="replace")
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        fields = stat[stat.rindex(")") + 2 :].split()
        if int(fields[3]) != session:
            return None
    except (OSError, ValueError):
        return None
    try:
        with open(f"{PROC}/{pid}/environ", "rb") as file:
            environment = file.read().split(b"\0")
    except OSError:  # a zombie has none any more
        environment = []
    ranks: list[bytes] = [entry[21:] for entry in environment if entry.startswith(b"OMPI_COMM_WORLD_RANK=")]
    rank = int(ranks[0]) if ranks and ranks[0].isdigit() else None
    return Process(pid, int(fields[19]), int(fields[1]), int(fields[3]), fields[0], name, rank)


def remove_shared_memory(run: str) -> None:
    """Remove the Python backend's shared memory of a run that has ended: Triton 2.51 leaves some behind,
    even after a good exit."""
    for file in Path("/dev/shm").glob(f"{run}-*"):
        file.unlink(missing_ok=True)


def guard(session: int, folder: str) -> None:
    """Wait for the end of standard input, then end a session and remove its folder for temporary files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.read()
    end_session(session, timeout_seconds=5)
    shutil.rmtree(folder, ignore_errors=True)
    remove_shared_memory(Path(folder).name)


if __name__ == "__main__":
    guard(int(sys.argv[1]), sys.argv[2])
