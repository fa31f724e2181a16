"""Runs the readers of a stranger's files in a child process with bounded time and memory."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Callable

from scripts import reports

# CPU time. Llama 3's 280,147 merges take some 5 s, 100 GB of weights' headers less.
SECONDS = 300
# More than this process has already: a tokenizer.json of 64 MB, the largest that is read, takes 2 GB
MEMORY_BYTES = 6 << 30
# the child's status when its memory is full; none of our reports ends with it
NO_MEMORY = 77
PR_SET_PDEATHSIG = 1  # prctl(2)


def bounded(
    work: Callable[[], int | None], where: Path, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES
) -> int:
    """Run `work` in a child, as a script's main: its Problem is reported there. Returns the child's exit status; raises
    a Problem if the child broke a bound or crashed.

    where: what is read, for that report. Address space is not bounded, because files are mapped; memory that is written
    to is (RLIMIT_DATA).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child(work, parent, seconds, memory_bytes)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            raise reports.weights.reading_unbounded(where, f"it took more than {seconds} s of CPU time")
        raise reports.weights.reading_unbounded(where, f"the reader was ended by {signal.Signals(number).name}")
    if os.WEXITSTATUS(status) == NO_MEMORY:
        raise reports.weights.reading_unbounded(where, f"it took more than {memory_bytes >> 30} GiB of memory")
    return os.WEXITSTATUS(status)


def _child(work: Callable[[], int | None], parent: int, seconds: int, memory_bytes: int) -> None:
    """Never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        _lower(resource.RLIMIT_CPU, seconds)
        _lower(resource.RLIMIT_DATA, _data_bytes() + memory_bytes)
        _lower(resource.RLIMIT_CORE, 0)
        reports.run(work)
    except MemoryError:
        status = NO_MEMORY
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            pass
        os._exit(status)


def _lower(which: int, limit: int) -> None:
    hard = resource.getrlimit(which)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(which, (limit, hard))


def _data_bytes() -> int:
    """How much of the memory that RLIMIT_DATA counts this process has."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmData"].split()[0]) << 10
