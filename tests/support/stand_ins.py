"""Stand-ins for programs that need a GPU, first on PATH: nvidia-smi prints given lines,
trtllm-build is the rehearsal's."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def on_path(folder: Path, name: str, script: str) -> None:
    """A program of that name in `folder`, a bash script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/bash\n" + script)
    (folder / name).chmod(0o755)


def nvidia_smi(folder: Path, gpus: list[str], links: str | None = "NV1", peers: str = "OK") -> None:
    """gpus: lines as --query-gpu prints them; links, peers: every cell of both matrices."""
    names = [f"GPU{i}" for i in range(len(gpus))]

    def matrix(cell: str | None) -> str:
        rows = ["\t".join([name, *("X" if name == other else str(cell) for other in names)]) for name in names]
        return "\n".join(["\t" + "\t".join(names), *rows])

    texts = {"query": "\n".join(gpus), "-m": matrix(links), "-p2p": matrix(peers)}
    for key, text in texts.items():
        (folder / f"smi{key}").write_text(text + "\n")
    on_path(folder, "nvidia-smi", f'case "$1" in topo) cat "{folder}/smi$2";; *) cat "{folder}/smiquery";; esac\n')


def trtllm_build(folder: Path, version: str, script: str = "") -> None:
    """script: bash that runs instead, when given; its argv and the folder it ran in are kept beside it."""
    rehearsed = ROOT / "docker/rehearsal/container/trtllm-build"
    run = script or f'REHEARSAL_TRTLLM={version} exec "{sys.executable}" "{rehearsed}" "$@"'
    on_path(folder, "trtllm-build", f'printf "%s\\n" "$@" > "{folder}/argv"; pwd > "{folder}/cwd"\n{run}\n')
