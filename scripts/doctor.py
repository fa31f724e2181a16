"""Runs every check of every script before anything is made: what this machine has and lacks for the journey.

Cheap checks come first. [✓] fine, [!] worth knowing, [✗] the journey will stop there, with the same report. It says
"Ready." or exits 1. It needs only the standard library, so that it runs before anything is installed.
It fetches and changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Sequence

from scripts import build_engines, plan, reports, serve
from scripts.making import container
from scripts.nvidia import contracts, gpus, memory
from scripts.room import MANIFEST, human_bytes, human_gpu_bytes
from scripts.serving import host, launch, toolbox
from scripts.settings import OPERATING, flag
from scripts.tokenizer import sentencepiece
from scripts.weights import files
from scripts.weights.folder import check_folder
from scripts.weights.shape import LlamaShape, read_json

MARKS = {"fine": "✓", "note": "!", "stop": "✗"}
SCRIPTS = Path(__file__).parent
# .venv takes 1.3 GB with the CPU wheel of torch, 5 GB with the CUDA one and NVIDIA's libraries; pip unpacks beside it.
PACKAGES_BYTES = 3_000_000_000
# Files up to this size are compared with Meta's checklist.chk; md5 of gigabytes takes minutes, so the user does that.
HASHED_BYTES = 100_000_000
LOOK_UP_SECONDS = 30


@dataclass(frozen=True)
class Finding:
    """The result of one check. mark: a key of MARKS; problem: the report, if the journey would stop."""

    name: str
    mark: str
    text: str
    problem: str | None = None


@dataclass(frozen=True)
class Case:
    """The user's choice, and the GPUs, which are looked up once; unseen: why that failed."""

    choice: plan.Choice
    host: Sequence[gpus.Gpu] = ()
    unseen: reports.Problem | None = None

    @property
    def python(self) -> Path:
        return Path(self.choice["INTERPRETER"] or ".venv/bin/python")

    @property
    def toolchain(self) -> str | None:
        """The TensorRT-LLM that the user names, else the one for this GPU; None if neither is known."""
        return self.choice["TOOLCHAIN"] or (plan.toolchain_for(self.host[0]) if self.host else None)

    def rows(self) -> dict[str, plan.Row]:
        """What each room takes, whether it fits on the GPUs or not."""
        journey = plan.journey_of(self.choice, plan.model_of(self.choice), [])
        return {row.room: row for row in plan.rows(journey)}


Check = Callable[[Case], str]


def checked(name: str, check: Check, case: Case) -> Finding:
    """Run one check. A Problem is a finding; so is a check that crashes: it never ends the doctor."""
    try:
        text = check(case)
    except reports.NotYet as problem:
        return Finding(name, "note", f"{problem.title}; {problem.command} makes it known")
    except reports.Problem as problem:
        title = problem.title.lower() if problem.title.isupper() else problem.title
        return Finding(name, "stop", title, problem.report())
    except Exception as error:
        return Finding(name, "note", f"this check itself failed: {type(error).__name__}: {error}")
    mark, _, rest = text.partition(" ")
    return Finding(name, mark, rest)


# --- for both engines ---


def check_settings(case: Case) -> str:
    """Every setting is one that make can take."""
    plan.refuse(case.choice)
    engine = f"TensorRT-LLM {case.toolchain or '(the GPU decides)'}" if case.choice.tensorrt else "the torch engine"
    rehearsal = "; a rehearsal: the findings are about stand-ins" if case.choice["REHEARSAL"] else ""
    unary = ", no streaming: one response per request" if case.choice["STREAMING"] == "off" else ""
    return f"fine {case.choice['MODEL']} by {engine}, TP {case.choice['TP']}{unary}{rehearsal}"


def check_make(case: Case) -> str:
    """GNU make 4 or later: 3.82 has no $(file ...)."""
    said = subprocess.run(["make", "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    version = re.match(r"GNU Make (\d+)\.", said)
    if version and int(version[1]) >= 4:
        return f"fine {said.splitlines()[0]}"
    return f"note {said.splitlines()[0] if said else 'no make'}: GNU Make 4.0 or later is needed"


def check_weights(case: Case) -> str:
    """The weights are there, and each file has the size that the model's shape or its own header requires."""
    folder, source = case.choice.weights, case.choice["SOURCE"]
    if not folder.is_dir():
        secret = source.startswith("meta:") and not (os.environ.get("META_URL") or os.environ.get("META_URL_FILE"))
        if source and not secret:
            return f"note not here yet; make fetches them from {source}"
        raise reports.settings.weights_not_there("MODEL" if "/" in case.choice["MODEL"] else "WEIGHTS", folder, source)
    check_folder(folder)
    names = sorted(path.name for path in folder.iterdir())
    if files.in_metas_form(names):
        form, seen = "Meta's form", check_meta_files(folder, plan.model_of(case.choice).shape)
    elif "config.json" in names:
        form, seen = "Hugging Face's form", check_hf_files(folder)
    elif any(name.endswith(".gguf") for name in names):
        form, seen = "a GGUF file", "read when it is converted"
    else:
        raise plan.no_model(folder)
    return f"fine {form}, {human_bytes(files.weights_bytes(folder))}, in {reports.shown(folder)}: {seen}"


def check_meta_files(folder: Path, shape: LlamaShape) -> str:
    """consolidated.NN.pth: the count and sizes that the shape requires; small files are compared with checklist.chk."""
    sentencepiece.path_of(folder)
    paths = [folder / name for name in files.weights_among((path.name for path in folder.iterdir()), ".pth")]
    for index in range(max(1, len(paths))):
        name = files.shard(index)
        if folder / name not in paths:
            raise reports.weights.weights_file_missing(folder, name, [path.name for path in paths])
    sizes = [path.stat().st_size for path in paths]
    item_bytes = memory.ITEM_BYTES[plan.dtype_of(folder, shape)]
    total = memory.parameters(shape) * item_bytes
    expected_shards = round(total / max(sizes)) if max(sizes) else len(paths)
    if expected_shards > len(paths):
        raise reports.weights.shards_missing(folder, len(paths), expected_shards)
    replicated = (2 * shape.n_layers + 1) * shape.hidden_size * item_bytes  # the norms are whole in every shard
    for path, size in zip(paths, sizes):
        least = (total - replicated) // len(paths) + replicated
        if size < least:
            raise reports.weights.weights_unreadable(path, f"it has {size} bytes, but its tensors alone take {least}")
    return f"{len(paths)} whole shard(s); {check_checklist(folder)}"


def check_checklist(folder: Path) -> str:
    """Compares small files with Meta's md5 sums."""
    checklist = folder / files.CHECKLISTS[0]
    if not checklist.is_file():
        return "no checklist.chk"
    agreeing, left = 0, 0
    for line in checklist.read_text().splitlines():
        expected, _, name = line.partition(" ")
        path = folder / Path(name.strip(" *")).name
        if not path.is_file():
            raise reports.weights.weights_file_missing(folder, path.name, sorted(p.name for p in folder.iterdir()))
        if path.stat().st_size > HASHED_BYTES:
            left += 1
            continue
        actual = hashlib.md5(path.read_bytes()).hexdigest()
        if actual != expected:
            raise reports.weights.checksum_differs(path, expected, actual)
        agreeing += 1
    command = f", {left} large left to: cd {reports.shown(folder)} && md5sum -c checklist.chk" if left else ""
    return f"checklist.chk agrees with {agreeing} file(s){command}"


def check_hf_files(folder: Path) -> str:
    """The .safetensors of config.json's model: all that the index names,
    each with the size that its header requires."""
    if not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin")):
        return "weights in .bin files, whose checksums are compared when they are converted"
    index = folder / files.INDEX
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [files.SINGLE]
    for name in names:
        if not (folder / name).is_file():
            raise reports.weights.weights_file_missing(folder, name, sorted(path.name for path in folder.iterdir()))
        size, expected = (folder / name).stat().st_size, safetensors_bytes(folder / name)
        if size != expected:
            raise reports.weights.weights_unreadable(
                folder / name, f"it has {size} bytes, but its header says {expected}"
            )
    return f"{len(names)} whole file(s)"


def safetensors_bytes(path: Path) -> int:
    """The size of a .safetensors file by its header: 8 bytes, the header, and the data up to the last offset."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, memory.MIB * 100)))
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        return 8 + int(length) + max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise reports.weights.weights_unreadable(path, f"no header of safetensors ({error})") from None


def served_with(case: Case) -> launch.Settings:
    """What `make serve` would be asked."""
    choice = case.choice
    return serve.settings_from(argparse.Namespace(
        root=Path("."), log=None, startup_seconds=0.0, host=choice["HOST"],
        http_port=choice["HTTP_PORT"], grpc_port=choice["GRPC_PORT"], metrics_port=choice["METRICS_PORT"],
        openai_port=choice["OPENAI_PORT"], api_key_file=choice["API_KEY_FILE"],
        **{flag(name)[2:].replace("-", "_"): choice[name] for name in OPERATING},
    ))  # fmt: skip


def check_ports(case: Case) -> str:
    """Every port is free."""
    settings = served_with(case)
    host.check_ports(settings)
    return f"fine ports {', '.join(map(str, settings.ports.values()))} on {settings.host} are free"


def check_operating(case: Case) -> str:
    """Keys of the endpoint's clients, and where traces go."""
    settings = served_with(case)
    host.check_operating(settings)
    return f"fine keys from {settings.api_key_file or 'no file'}; traces are {settings.operating.traces}"


def check_memory(case: Case) -> str:
    """Host memory, compared with the room that needs most. An estimate that was never measured stops nothing."""
    available = build_engines.free_memory_bytes()
    rows = case.rows()
    needs = {"conversion": memory.CONVERSION_BYTES}
    needs.update({name: rows[name].host_memory_bytes or 0 for name in ("engines", "serve")})
    if not case.choice.tensorrt and case.host:
        needs["serve"] = memory.CONVERSION_BYTES  # the weights go to the GPUs tensor by tensor
    said = ", ".join(f"{name} {human_bytes(size)}" for name, size in needs.items() if size)
    short = [name for name, size in needs.items() if size > available]
    return f"{'note' if short else 'fine'} {human_bytes(available)} of memory available; at most needed by {said}" + (
        f": short for {', '.join(short)}" if short else ""
    )


def check_disk(case: Case) -> str:
    """Disk space for the rooms that are not made yet, and for the packages if they are not installed."""
    free = shutil.disk_usage("build" if Path("build").is_dir() else ".").free  # build/ may be a link
    rows = case.rows()
    folders = {"config": Path(case.choice["CONFIG"] or "build/config")}
    if case.choice["QUANT"]:  # other users of the room hf (make hf, make verified) are named by the user
        folders["hf"] = Path(case.choice["HF"] or "build/hf")
    for name in ("checkpoint", "engines", "model_repo"):
        folders[name] = Path(case.choice["VARIANT"] or "build") / name
    missing = [name for name, folder in folders.items() if not (folder / MANIFEST).is_file()]
    rooms = sum(rows[name].disk_bytes or 0 for name in missing)
    packages = 0 if case.choice.tensorrt or case.python.is_file() else PACKAGES_BYTES
    if free < rooms:
        raise reports.planning.disk_too_small(Path.cwd(), free, rooms, missing)
    said = f"{human_bytes(free)} of disk free here; the rooms to be made take {human_bytes(rooms)}"
    said += f", the packages {human_bytes(packages)}" if packages else ""
    return f"{'fine' if free >= rooms + packages else 'note'} {said}"


def check_fit(case: Case) -> str:
    """Whether MODEL, TP, DTYPE and the limits fit the GPUs' memory and abilities."""
    if case.unseen:
        return "note the GPUs are not known, see above"
    journey = plan.journey_of(case.choice, plan.model_of(case.choice), case.host)
    if not journey.fit and case.choice.tensorrt:
        return "note without a GPU there is nothing to compare with; for instance: " + reports.make(
            "plan", ASSUME_GPU="2x A100-80GB"
        )
    if not journey.fit:
        return f"fine {journey.engine.world_size} rank(s) on the CPU"
    verdict = " ".join(plan.verdict(journey, journey.fit)[: 1 if journey.fit.verdict == "fits" else None])
    return f"{'fine' if journey.fit.verdict == 'fits' else 'note'} {' '.join(verdict.split())}"


# --- ENGINE=torch ---


def check_system(case: Case) -> str:
    """The system, its C library and an interpreter, with the answer of scripts/make_venv.sh."""
    if case.python.is_file():
        command = [str(case.python), "-V"]
        version = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
        return f"fine {platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}, {version} at {reports.shown(case.python)}"
    if shutil.which(str(case.python)):
        return f"fine {platform.system()} {platform.machine()}, {case.python} on PATH"
    if "PYTHON" in case.choice.refused:
        raise reports.packages.interpreter_missing(case.choice["PYTHON"])
    command = ["bash", str(SCRIPTS / "make_venv.sh"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise reports.Reported(done.stderr)
    return f"note {done.stdout.strip()}; {reports.shown(case.python)} is not made yet, the first make installs it"


def check_shared_memory(case: Case) -> str:
    """/dev/shm, which Triton's processes and MPI's ranks use to talk to each other."""
    host.check_shared_memory(world_size=case.choice.number("TP") or 1)
    stat = os.statvfs("/dev/shm")
    return f"fine {human_bytes(stat.f_bavail * stat.f_frsize)} of shared memory"


def check_server(case: Case) -> str:
    """mpirun and tritonserver are there, if the packages are."""
    if not case.python.is_file():
        return "note mpirun and tritonserver come with the packages"
    toolbox.check_mpirun()
    with tempfile.TemporaryDirectory() as folder:
        server = toolbox.find_toolbox(Path(folder)).tritonserver
    return f"fine mpirun; {server.name} with a Python backend for {platform.python_version()}"


def check_gpus_wanted(case: Case) -> str:
    """NVIDIA's GPUs, if there are any; the torch engine also runs without."""
    if case.unseen:
        return f"note {case.unseen.title}: {case.unseen.seen}"
    return (
        f"fine {seen(case)}" if case.host else "note no GPU that torch can use: it will compute on the CPU, in float32"
    )


# --- ENGINE=tensorrt ---


def check_host(case: Case) -> str:
    """The host's system only: everything else is in the container."""
    system = f"{platform.system()} {platform.machine()}"
    return f"fine {system}" if system == "Linux x86_64" else f"note {system}: NVIDIA's images here are for Linux x86_64"


def check_gpus_needed(case: Case) -> str:
    """The GPUs, their memory and compute capability."""
    if case.unseen:
        raise case.unseen
    if not case.host:
        raise reports.nvidia.no_gpu("ENGINE=tensorrt")
    return f"fine {seen(case)}"


def seen(case: Case) -> str:
    kinds = {(gpu.name, human_gpu_bytes(gpu.memory_bytes), gpu.compute_capability) for gpu in case.host}
    each = "; ".join(f"{name}: {size}, compute capability {capability}" for name, size, capability in sorted(kinds))
    assumed = " (assumed)" if case.choice["ASSUME_GPU"] else " (a rehearsal)" if case.choice["REHEARSAL"] else ""
    return f"{plan.described(case.host)}{assumed}; {each}"


def check_driver(case: Case) -> str:
    """Whether the driver is new enough for the container's CUDA."""
    if not case.toolchain or not case.host:
        return "note without a GPU or a TOOLCHAIN there is nothing to compare"
    row = contracts.toolchain(case.toolchain)
    driver, needed, own = case.host[0].driver, str(row["driver_min"]), str(row["driver"])
    if driver is None:
        return f"note the driver of assumed GPUs is not known; TensorRT-LLM {case.toolchain} needs {needed} or later"
    if numbers(driver) < numbers(needed):
        raise reports.planning.driver_too_old(driver, needed, case.toolchain)
    if numbers(driver) < numbers(own):
        return (
            f"note driver {driver} is older than CUDA {row['cuda']}'s own, {own}: the container brings libraries "
            "that run it anyway, on data-center GPUs only"
        )
    return f"fine driver {driver}, {needed} or later is needed"


def numbers(version: str) -> tuple[int, ...]:
    """'535.183.06' -> (535, 183, 6), for comparisons."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def check_links(case: Case) -> str:
    """How the ranks' GPUs reach each other: it decides the speed, and how the engines are built."""
    ranks = (case.choice.number("TP") or 1) * (case.choice.number("PP") or 1)
    if ranks > 1 and len(case.host) < 2:
        return f"note {ranks} ranks, and fewer than two GPUs to look at"
    if ranks < 2:
        return "fine one rank reaches itself"
    assumed = bool(case.choice["ASSUME_GPU"])
    links = gpus.assumed_links(list(case.host)) if assumed else gpus.links_here(min(ranks, len(case.host)))
    if links.nvlink:
        return "fine NVLink between all of them"
    if links.peer_access:
        return "fine they read each other's memory over PCIe; custom all-reduce is for NVLink, so the engines use NCCL"
    if links.peer_access is None:
        return "note it is not known whether they read each other's memory; engines will be built for NCCL"
    return "note they cannot read each other's memory: NCCL goes through the host, which is slower; engines will be built for it"


def check_docker(case: Case) -> str:
    """docker, NVIDIA's runtime and the image, with the answer of scripts/toolchain.sh. An image is looked up,
    never pulled."""
    version = case.toolchain or contracts.versions()[-1]
    script = ["bash", str(SCRIPTS / "toolchain.sh")]
    image = container.image_of(contracts.toolchain(version))
    command = [*script, "check", image, "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        problem = reports.Reported(done.stderr)
        problem.title = problem.title.lower()
        if "image is not here" in problem.title:
            problem.title += f"; {looked_up(image)}"
        raise problem
    return f"fine docker with NVIDIA's runtime; {image} is here"


def looked_up(image: str) -> str:
    """Whether the registry has an image."""
    command = ["docker", "manifest", "inspect", image]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_UP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"the registry did not answer within {LOOK_UP_SECONDS} s"
    if done.returncode == 0:
        return "the registry has it, it can be pulled"
    return f"the registry says: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}"


CHECKS: dict[str, dict[str, Check]] = {
    "torch": {
        "settings": check_settings,
        "make": check_make,
        "system": check_system,
        "weights": check_weights,
        "ports": check_ports,
        "operating": check_operating,
        "shared memory": check_shared_memory,
        "memory": check_memory,
        "disk": check_disk,
        "server": check_server,
        "gpus": check_gpus_wanted,
        "fit": check_fit,
    },
    "tensorrt": {
        "settings": check_settings,
        "make": check_make,
        "system": check_host,
        "weights": check_weights,
        "ports": check_ports,
        "operating": check_operating,
        "memory": check_memory,
        "disk": check_disk,
        "gpus": check_gpus_needed,
        "driver": check_driver,
        "links": check_links,
        "fit": check_fit,
        "docker": check_docker,
    },
}


def case_of(choice: plan.Choice) -> Case:
    """The choice, with this machine's GPUs or those that it names."""
    try:
        return Case(choice, plan.gpus_of(choice))
    except reports.Problem as problem:
        return Case(choice, (), problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per finding")
    as_json = parser.parse_args().json
    case = case_of(plan.chosen(os.environ))
    findings: list[Finding] = []
    for name, check in CHECKS["tensorrt" if case.choice.tensorrt else "torch"].items():
        findings.append(checked(name, check, case))
        if as_json:
            print(json.dumps(asdict(findings[-1]), ensure_ascii=False), flush=True)
        else:
            print(f"[{MARKS[findings[-1].mark]}] {name:<14} {findings[-1].text}", flush=True)
        if name == "settings" and findings[-1].mark == "stop":
            break  # the other checks need the choice, which is not known
    stops = [finding for finding in findings if finding.mark == "stop"]
    if not as_json:
        for problem in dict.fromkeys(finding.problem for finding in stops):  # two checks may find the same problem
            print(f"\n{problem}", file=sys.stderr)
        print("\nReady." if not stops else f"\nNot ready: {', '.join(finding.name for finding in stops)}.")
    return 1 if stops else 0


if __name__ == "__main__":
    reports.run(main)
