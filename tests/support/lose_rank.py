"""One rank of the torch engine in a run that loses a rank in the middle of a request; rank 0 says what it noticed.

mpirun -n 2 sh -c '"$0" "$@" || true' python lose_rank.py ENGINE_DIR FOLDER HOW, with HOW one of kill, stop,
break, leader. The shell stands for the tritonserver above each rank: mpirun sees no rank fail and ends nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from drive_engine import Answer
from engine import Engine, Refused, open_engine

LONG = 3900  # steps enough to be running when the rank is lost


def main(engine_dir: str, folder: str, how: str) -> None:
    pids = Path(folder) / "pid"
    if os.environ["OMPI_COMM_WORLD_RANK"] != "0":
        pids.write_text(str(os.getpid()))
    engine = open_engine(Path(engine_dir))
    if not isinstance(engine, Engine):
        engine.follow()
        return
    answer = Answer(engine, prompt=[5, 6, 7], max_new_tokens=LONG)
    answer.next_piece()
    if how == "leader":
        os._exit(0)
    follower = int(pids.read_text())
    if how == "break":
        vars(engine._model)["launch"] = None  # calling it raises
    else:
        os.kill(follower, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    said = [answer.wait().error]
    try:
        Answer(engine, prompt=[5, 6, 7], max_new_tokens=1)
    except Refused as refusal:
        said.append(str(refusal))
    (Path(folder) / "said.json").write_text(json.dumps(said))
    if how == "stop":
        os.kill(follower, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
