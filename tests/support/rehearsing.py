"""The accuracy gate over the engines of a rehearsal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def verify(tree: Path, version: str, gpus: str, engines: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """The gate with three prompts, in the environment that the rehearsal's container has."""
    few = output.with_name("few.txt")
    few.write_text("Once upon a time\nThe little dog\n옛날 옛적에\n")
    rooms = ["--engines", str(engines), "--hf", "build/stories/hf", "--output", str(output), "--prompts", str(few)]
    parts = [str(tree / "docker/rehearsal" / part) for part in ("container", "host")]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([*parts, os.environ["PATH"]]),
        "PYTHONPATH": parts[0],
        "REHEARSAL_GPUS": gpus,
        "REHEARSAL_TRTLLM": version,
    }
    command = [sys.executable, "-m", "scripts.build_verified", *rooms]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False)
