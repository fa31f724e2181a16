"""Stand-ins for what needs a GPU, first on PATH: nvidia-smi prints what it is told, trtllm-build takes what its version's table takes.

The engines that the stand-in writes hold the rank's checkpoint bytes; its config.json is the version's golden file with what it was
asked. Anything its parser does not know ends it as the real one ends: status 2, and argparse's words.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

ROOT = Path(__file__).resolve().parent.parent


def on_path(folder: Path, name: str, script: str) -> None:
    """A program of that name in `folder`, a bash script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/bash\n" + script)
    (folder / name).chmod(0o755)


def nvidia_smi(folder: Path, gpus: List[str], links: Optional[str] = "NV1", peers: str = "OK") -> None:
    """gpus: lines as --query-gpu prints them; links, peers: every cell of both matrices."""
    names = [f"GPU{i}" for i in range(len(gpus))]

    def matrix(cell: Optional[str]) -> str:
        rows = ["\t".join([name, *("X" if name == other else str(cell) for other in names)]) for name in names]
        return "\n".join(["\t" + "\t".join(names), *rows])

    texts = {"query": "\n".join(gpus), "-m": matrix(links), "-p2p": matrix(peers)}
    for key, text in texts.items():
        (folder / f"smi{key}").write_text(text + "\n")
    on_path(folder, "nvidia-smi", f'case "$1" in topo) cat "{folder}/smi$2";; *) cat "{folder}/smiquery";; esac\n')


def trtllm_build(folder: Path, version: str, script: str = "") -> None:
    """script: bash that runs instead, when given; its argv and the folder it ran in are kept beside it."""
    run = script or f'exec "{sys.executable}" "{ROOT}/tests/stand_ins.py" {version} "$@"'
    on_path(folder, "trtllm-build", f'printf "%s\\n" "$@" > "{folder}/argv"; pwd > "{folder}/cwd"\n{run}\n')


def build(version: str, argv: List[str]) -> None:
    """What trtllm-build does, but for the engine."""
    sys.path.insert(0, str(ROOT))
    from scripts import build_engines, contracts

    asked = vars(contracts.flag_parser("trtllm-build", contracts.flags("trtllm-build", version)).parse_args(argv))
    checkpoint, output = Path(asked["checkpoint_dir"]), Path(asked["output_dir"])
    source = json.loads((checkpoint / "config.json").read_bytes())
    max_seq_len = asked.get("max_seq_len") or asked["max_input_len"] + asked["max_output_len"]
    limits = {
        "max_seq_len": max_seq_len,
        **{key: asked[key] for key in ("max_batch_size", "max_input_len", "max_num_tokens")},
    }
    golden = contracts.table("engine-config", version)
    config = build_engines.engine_config(golden, version, source, limits)
    words = {"enable": True, "disable": False}
    plugins: Dict[str, Any] = config["build_config"]["plugin_config"]
    for name in plugins.keys() & asked.keys():
        off = None if name.endswith("_plugin") else False
        plugins[name] = off if asked[name] in ("disable", None) else words.get(asked[name], asked[name])
    for name in ("input_timing_cache", "output_timing_cache"):
        if name in config["build_config"]:
            config["build_config"][name] = asked[name]
    for rank in range(source["mapping"]["world_size"]):
        print(f"[TRT-LLM] [I] Serializing engine to {output}/rank{rank}.engine...", flush=True)
        os.link(checkpoint / f"rank{rank}.safetensors", output / f"rank{rank}.engine")
    if asked.get("output_timing_cache"):
        cache = Path(asked["output_timing_cache"])
        cache.write_text((cache.read_text() if cache.exists() else "") + "measured\n")
    (output / "config.json").write_text(json.dumps(config, indent=4))
    print("[TRT-LLM] [I] Total time of building all engines: 00:00:01")


if __name__ == "__main__":
    build(sys.argv[1], sys.argv[2:])
