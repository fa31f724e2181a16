"""How a script runs with ENGINE=tensorrt: the words in front of `-m`, which start NVIDIA's container.

Every path is the same inside and outside. A room has no network.
NVIDIA's entrypoint only prints a banner and checks what we check.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from scripts import settings
from scripts.nvidia import quants
from scripts.serving import collector
from scripts.weights import files

PASSED_ON = ("ROOM_ARGS", "ROOM_NEEDS", "BAKE_SETTINGS", "BAKE_GOAL", "PROMPT", "BAKE_API_KEY")
# as NVIDIA starts it (README of tensorrtllm_backend); shared memory: 1 GB for each of 8 ranks;
# only what is used takes memory
GPUS = "--gpus all --shm-size 8g --ulimit memlock=-1 --ulimit stack=67108864:1073741824"
GPU_JOBS = ("engines", "verified", "serve", "demo")
JOBS = ("config", "hf", "checkpoint", "engines", "verified", "model_repo", "serve", "demo", "ask", "fsck", "wheels")


class Container(NamedTuple):
    """The image that a version runs in. lacks: the list of packages that NVIDIA's image lacks; iid:
    the file with the completed image's id.

    serving: the same for serve and demo, which need packages that NVIDIA's images lack. Rooms do not need them, and a
    baked image brings them.
    """

    image: str
    lacks: str
    iid: str
    serving: str

    def words(self, job: str) -> str:
        """The image as docker's argument, in a recipe."""
        if job in ("serve", "demo"):
            return f'"$$(cat {self.serving})"'
        return f'"$$(cat {self.iid})"' if self.iid else self.image

    @property
    def made_in(self) -> str:
        """The image's name in a room's question."""
        packages = hashlib.sha256(Path(self.lacks).read_bytes()).hexdigest()[:12] if self.lacks else ""
        return f"image={self.image}" + (f"+{packages}" if packages else "")


def image_of(row: Mapping[str, object]) -> str:
    """NVIDIA's image: by digest once `make pin` has written it, before that by tag."""
    tag, digest = str(row["image"]), row["digest"]
    return f"{tag.rpartition(':')[0]}@{digest}" if digest else tag


def container_of(version: str, row: Mapping[str, object], rehearsal: bool) -> Container:
    lacks = f"requirements/{row['packages']}" if row["packages"] else ""
    name = f"{version}{'-rehearsal' if rehearsal else ''}.iid"
    return Container(image_of(row), lacks, f"build/toolchain-{name}" if lacks else "", f"build/serving-{name}")


def mounts(weights: str, to_fetch: bool = False, single: Sequence[str] = ()) -> list[str]:
    """docker's flags for folders outside of the project. to_fetch: the weights will be there when docker runs.
    single: other files that are read, mounted one by one, since their folder may be one that the image has, like /etc.

    Weights, the targets of their links, and a build/ that is a link may lie elsewhere. Each is mounted at its place on
    the host: a room may hold a link to the weights, which must mean the same inside and outside of the container.
    """
    places = {(os.path.realpath("build"), "")}
    if os.path.exists(weights):
        real = os.path.realpath(weights)
        places.add((real, ":ro"))
        if weights.startswith("/"):
            places.add((weights, ":ro"))
        for path in Path(weights).iterdir():
            if path.is_file() and not path.name.startswith("."):
                places.add((os.path.dirname(os.path.realpath(path)), ":ro"))
        above = files.tokenizers_of(Path(weights))[1]
        if above.is_file():
            places.add((str(above), ":ro"))
    elif to_fetch:
        places.add((os.path.abspath(weights), ":ro"))
    places.update((os.path.abspath(file), ":ro") for file in single)
    here = os.getcwd() + "/"
    outside = [(place, mode) for place, mode in sorted(places) if not (place + "/").startswith(here)]
    return [f"--volume '{place}:{place}{mode}'" for place, mode in outside]


def network(job: str, values: Mapping[str, str]) -> list[str]:
    """docker's flags for the network. Rooms have none, except wheels, which fetches packages by hash, and quantization,
    which fetches texts to measure on (scripts/nvidia/quantize.py)."""
    if job == "ask":
        return ["--network host"]
    if job == "serve":
        hosts = dict.fromkeys(settings.PORTS, values["HOST"])
        hosts["OPENAI_PORT"] = values["OPENAI_HOST"] or values["HOST"]
        shown = {port: f"[{host}]" if ":" in host else host for port, host in hosts.items()}
        return [" ".join(f"--publish {shown[port]}:{values[port]}:{values[port]}" for port in settings.PORTS)]
    if job == "wheels" or (job == "checkpoint" and values["QUANT"] and quants.TABLE[values["QUANT"]].measured):
        return []
    return ["--network none"]


def runs(container: Container, values: Mapping[str, str], jobs: Sequence[str] = JOBS) -> dict[str, str]:
    """job -> the words in front of `-m`, for a recipe; $(BREAK) goes on in the next line."""
    found = {}
    for job in jobs:
        gpu = job in GPU_JOBS or (job == "checkpoint" and bool(values["QUANT"]))
        check = f"scripts/toolchain.sh check {container.words(job)}{' gpu' if gpu else ''}"
        ports = " ".join(values[port] for port in settings.PORTS)
        steps = (
            [check, f"&& scripts/toolchain.sh free {values['HOST']} {ports}", "&& exec"]
            if job == "serve"
            else [check, "&&"]
        )
        start = "docker run --rm --init --pull never --entrypoint '' --user \"$$(id -u):$$(id -g)\""
        to_fetch = bool(values["SOURCE"]) and job in ("config", "hf", "checkpoint")
        traced = [
            name for name in collector.NAMES if values["TRACES"] == "on" and job == "serve" and name in os.environ
        ]
        single = [os.environ[name] for name in traced if name in collector.FILES and os.environ[name]]
        single += [values["API_KEY_FILE"]] if job == "serve" and values["API_KEY_FILE"] else []
        outside = mounts(values["WEIGHTS"], to_fetch, single)
        here = " ".join(["--workdir '$(CURDIR)' --volume '$(CURDIR):$(CURDIR)'", *outside])
        known = " ".join(
            [
                "--env HOME=/tmp --env USER=bake --env PYTHONDONTWRITEBYTECODE=1",
                *(f"--env {name}" for name in (*PASSED_ON, *traced)),
            ]
        )
        lines = [*steps[:-1], f"{steps[-1]} {start}", here, known, *network(job, values)]
        found[job] = " $(BREAK)".join([*lines, *([GPUS] if gpu else []), container.words(job), "python3"])
    return found
