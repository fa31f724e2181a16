"""A flag that is set from a signal handler, whatever moment the signal comes in."""

from __future__ import annotations

import subprocess
import sys
import threading

from project import ROOT

from scripts.serving.flag import Flag

# Between any two lines of wait() a signal comes, and its handler sets the flag.
IN_EVERY_MOMENT = """
import sys, threading
from scripts.serving.flag import Flag

flag, moments, busy = {kind}, 0, False

def each_line(frame, event, argument):
    global moments, busy
    if not busy and "wait" in frame.f_code.co_name:
        busy, moments = True, moments + 1
        flag.set()
        busy = False
    return each_line

sys.settrace(each_line)
flag.wait(5)
sys.settrace(None)
print(flag.is_set(), moments > 2)
"""


def in_every_moment(kind: str) -> str:
    code = IN_EVERY_MOMENT.format(kind=kind)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, timeout=60, check=True)
    return done.stdout.decode().strip()


def test_it_may_be_set_in_every_moment_of_a_wait() -> None:
    assert in_every_moment("Flag()") == "True True"


def test_all_who_wait_are_told_and_it_may_be_set_any_number_of_times() -> None:
    flag = Flag()
    assert not flag.wait(0) and not flag.is_set()
    told: list[bool] = []
    waiting = [threading.Thread(target=lambda: told.append(flag.wait(60))) for _ in range(3)]
    for thread in waiting:
        thread.start()
    for _ in range(100_000):  # more than its pipe holds
        flag.set()
    for thread in waiting:
        thread.join(60)
    assert told == [True] * 3 and flag.wait(60) and flag.is_set()
