"""Runs every check of every script before anything is made: what this machine has and lacks for the journey.

Cheap checks first. [✓] fine, [!] worth knowing, [✗] the journey will stop there, with the report it would stop with. Says "Ready."
or exits 1. Needs nothing but the standard library, so that it runs before anything is installed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional

from scripts import errors, serve
from scripts.room import human_bytes

MARKS = {"fine": "✓", "note": "!", "stop": "✗"}
# .venv with the CPU wheel of torch is 1.3 GB, with the CUDA one and NVIDIA's libraries 5 GB; pip unpacks beside it.
PACKAGES_BYTES = 3_000_000_000
# What hf, checkpoint (linked again as engines) take together: each once the weights' size.
ROOMS_PER_WEIGHTS = 2


@dataclass(frozen=True)
class Finding:
    """What one check found. mark: a key of MARKS; problem: the report, where the journey would stop."""

    name: str
    mark: str
    text: str
    problem: Optional[str] = None


@dataclass(frozen=True)
class Choice:
    """What the user asked make for."""

    weights: Path
    python: Path
    host: str
    http_port: str
    grpc_port: str
    metrics_port: str


def checked(name: str, check: Callable[[Choice], str], choice: Choice) -> Finding:
    """Run one check. A Problem is a finding; a check that crashes is one too, never the end of the doctor."""
    try:
        text = check(choice)
    except errors.Problem as problem:
        return Finding(name, "stop", problem.title, problem.report())
    except Exception as error:
        return Finding(name, "note", f"this check itself failed: {type(error).__name__}: {error}")
    mark, _, rest = text.partition(" ")
    return Finding(name, mark, rest)


def check_system(choice: Choice) -> str:
    """The system, its C library and an interpreter: what scripts/make_venv.sh would say."""
    if choice.python.is_file():
        version = subprocess.run(
            [choice.python, "-V"], capture_output=True, text=True, timeout=30, check=False
        ).stdout.strip()
        return f"fine {platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}, {version} at {errors.shown(choice.python)}"
    script = Path(__file__).with_name("make_venv.sh")
    done = subprocess.run(["bash", str(script), "--check"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise errors.Reported(done.stderr)
    return f"note {done.stdout.strip() or 'fit'}; {errors.shown(choice.python)} is not made yet, the first make installs it"


def check_make(choice: Choice) -> str:
    """GNU make 4 or later: 3.82 has no $(file ...)."""
    first = subprocess.run(["make", "--version"], capture_output=True, text=True, timeout=30, check=False).stdout.split(
        "\n"
    )[0]
    return f"fine {first}" if first >= "GNU Make 4" else f"note {first or 'no make'}: GNU Make 4.0 or later is needed"


def check_memory(choice: Choice) -> str:
    """Conversion streams (under 1 GiB); the torch engine on a CPU holds the model in float32, every rank its part."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    needed = 3_000_000_000 + 2 * _size_of(choice.weights)
    mark = "fine" if available >= needed else "note"
    return f"{mark} {human_bytes(available)} of memory available; serving on the CPU takes about {human_bytes(needed)}"


def check_disk(choice: Choice) -> str:
    """Room for the rooms, and for the packages while there are none."""
    free = shutil.disk_usage(".").free
    needed = ROOMS_PER_WEIGHTS * _size_of(choice.weights) + (0 if choice.python.is_file() else PACKAGES_BYTES)
    mark = "fine" if free >= needed else "note"
    return f"{mark} {human_bytes(free)} of disk free here; all rooms take about {human_bytes(needed)}"


def check_weights(choice: Choice) -> str:
    """The weights are where WEIGHTS says."""
    names = {path.name for path in choice.weights.iterdir()} if choice.weights.is_dir() else set()
    if not names & {"params.json", "config.json"}:
        raise errors.weights_unknown_form(choice.weights, sorted(names))
    form = "Meta's form" if "params.json" in names else "Hugging Face's form"
    return f"fine weights in {form}, {human_bytes(_size_of(choice.weights))}, in {errors.shown(choice.weights)}"


def check_ports(choice: Choice) -> str:
    """The three ports are free."""
    settings = serve.settings_from(argparse.Namespace(
        root=Path("."), log=None, startup_seconds=0.0, host=choice.host,
        http_port=choice.http_port, grpc_port=choice.grpc_port, metrics_port=choice.metrics_port,
    ))  # fmt: skip
    serve.check_ports(settings)
    return f"fine ports {choice.http_port}, {choice.grpc_port}, {choice.metrics_port} on {choice.host} are free"


def check_shared_memory(choice: Choice) -> str:
    """/dev/shm, through which Triton's processes and MPI's ranks talk."""
    serve.check_shared_memory(world_size=2)
    stat = os.statvfs("/dev/shm")
    return f"fine {human_bytes(stat.f_bavail * stat.f_frsize)} of shared memory"


def check_server(choice: Choice) -> str:
    """mpirun and tritonserver are there, where the packages are."""
    if not choice.python.is_file():
        return "note mpirun and tritonserver come with the packages"
    serve.check_mpirun()
    with tempfile.TemporaryDirectory() as folder:
        return f"fine mpirun; {serve.find_toolbox(Path(folder)).tritonserver.name} with a Python backend for {platform.python_version()}"


def check_gpus(choice: Choice) -> str:
    """NVIDIA's GPUs, when there are any; the torch engine runs without."""
    if not shutil.which("nvidia-smi"):
        return "note no nvidia-smi: the torch engine will compute on the CPU, in float32"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return f"note nvidia-smi failed: {(done.stderr or done.stdout).strip().splitlines()[0]}"
    return "fine " + "; ".join(done.stdout.strip().splitlines())


CHECKS: Dict[str, Callable[[Choice], str]] = {
    "system": check_system,
    "make": check_make,
    "weights": check_weights,
    "ports": check_ports,
    "shared memory": check_shared_memory,
    "memory": check_memory,
    "disk": check_disk,
    "server": check_server,
    "gpus": check_gpus,
}


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True)
    for flag in ("--host", "--http-port", "--grpc-port", "--metrics-port"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--json", action="store_true", help="one JSON object per finding")
    args = vars(parser.parse_args())
    as_json = args.pop("json")
    choice = Choice(**args)
    findings: List[Finding] = []
    for name, check in CHECKS.items():
        findings.append(checked(name, check, choice))
        if as_json:
            print(json.dumps(asdict(findings[-1]), ensure_ascii=False), flush=True)
        else:
            print(f"[{MARKS[findings[-1].mark]}] {name:<14} {findings[-1].text}", flush=True)
    stops = [finding for finding in findings if finding.mark == "stop"]
    if not as_json:
        for finding in stops:
            print(f"\n{finding.problem}", file=sys.stderr)
        print("\nReady." if not stops else f"\nNot ready: {', '.join(finding.name for finding in stops)}.")
    return 1 if stops else 0


if __name__ == "__main__":
    errors.run(main)
