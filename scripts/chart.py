"""The chart's values for a baked image, from its passport: `make chart MODEL=...`, and what a pod asks of its host.

Reads   the rooms image and engines, or with VERSION a release of dist/ and what its push noted; IMAGE and NODE from the
        environment
Writes  values.yaml, for helm and docker/chart
Needs   nothing but the standard library

NODE names one host of the cluster, NODE="8x H100-80GB". A model that such a host cannot hold is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from scripts import limits, plan, reports, room
from scripts.nvidia import gpus, quants, trtllm_build
from scripts.nvidia import memory as memory_model
from scripts.weights.shape import possible_tp_sizes, shape_of_checkpoint

CHART = "docker/chart"
GIB = 1 << 30
# GPUs of the largest known host (HGX, DGX)
GPUS_PER_HOST = 8
# /dev/shm: a limit; only what is used takes memory (docker/compose.yaml, docker/compose.gpu.yaml)
SHARED_BYTES_PER_GPU = 1 << 30
# CPUs for Triton, text models and endpoint; a rank always works or spins, so it needs its own
PROGRAM_CORES, RANK_CORES = 2, 1
# Add a pod when this share of the engine's slots is taken
FULL = 0.8
# registry, which may have a port; name; tag; digest
WORD = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
IMAGE_NAME = re.compile(
    rf"((?:{WORD}(?::\d+)?/)?{WORD}(?:/{WORD})*)(?::[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?(?:@(sha256:[0-9a-f]{{64}}))?"
)


@dataclass(frozen=True)
class Settings:
    """What to write values for. release: a folder of dist/, or None: the room image; node: one host of the cluster,
    or empty."""

    root: Path
    output: Path
    release: Path | None
    image: str
    node: str


# --- core ---


def engine_of(config: Mapping[str, Any]) -> memory_model.Engine:
    """The engines' config.json -> the input of the memory model."""
    model, built = config["pretrained_config"], limits.limits_of(config)
    algo = (model.get("quantization") or {}).get("quant_algo") or ""
    return memory_model.Engine(
        shape=shape_of_checkpoint(model),
        dtype=model["dtype"],
        tp_size=model["mapping"]["tp_size"],
        pp_size=model["mapping"].get("pp_size", 1),
        quant=quants.quant_of(algo),
        max_batch_size=built.max_batch_size,
        max_input_len=built.max_input_len,
        max_seq_len=built.max_seq_len,
        # no limit: then a step may take every request's whole prompt
        max_num_tokens=built.max_num_tokens or built.max_batch_size * built.max_input_len,
    )


def on_gpus(passport: Mapping[str, Any]) -> bool:
    """Whether the image computes on GPUs: TensorRT engines, or PyTorch's CUDA build (TARGET=cuda)."""
    target = passport["rooms"]["wheels"]["manifest"]["arguments"].get("target", "cpu")
    return bool(passport["engine"]["kind"] == "tensorrt" or target == "cuda")


def gpu_label(name: str) -> str:
    """nvidia-smi's name of a GPU as NVIDIA's GPU feature discovery labels nodes: 'NVIDIA-H100-80GB-HBM3'."""
    return re.sub(r"\s+", "-", name.strip())


def gpu_bytes(passport: Mapping[str, Any], engine: memory_model.Engine) -> int:
    """The least memory of a GPU for one request of max_seq_len, by the memory model's upper bounds."""
    fit = fit_on(passport, engine, 0)
    return fit.weights_bytes + fit.activation_bytes[1] + fit.other_bytes[1] + fit.max_seq_len * fit.kv_bytes_per_token


def fit_on(passport: Mapping[str, Any], engine: memory_model.Engine, memory_bytes: int) -> memory_model.Fit:
    if passport["engine"]["kind"] == "tensorrt":
        return memory_model.fit(engine, memory_bytes, trtllm_build.TOKENS_PER_BLOCK)
    return memory_model.torch_fit(engine, memory_bytes)


def host_of(node: str) -> list[gpus.Gpu]:
    """'8x H100-80GB' -> eight of them; [] if none is named. A Problem for a GPU that is not known."""
    try:
        return gpus.assumed(node) if node else []
    except reports.Problem as problem:
        problem.seen = problem.seen.replace("ASSUME_GPU", "NODE")
        problem.command = reports.make("chart", NODE="8x H100-80GB")
        raise


def check_host(passport: Mapping[str, Any], engine: memory_model.Engine, node: str, host: Sequence[gpus.Gpu]) -> None:
    """A Problem if one host cannot hold the model, or its GPUs cannot run these engines.
    Images for CPUs ask for no GPU."""
    if not on_gpus(passport):
        return
    model, count = passport["model"], len(host) or GPUS_PER_HOST
    said = plan.described(host) if host else f"{GPUS_PER_HOST} GPUs, the most that a host is known to have"

    def holds(tp_size: int) -> bool:
        other = dataclasses.replace(engine, tp_size=tp_size, pp_size=1)
        return tp_size <= count and (not host or fit_on(passport, other, host[0].memory_bytes).verdict == "fits")

    fewer = max(
        (size for size in possible_tp_sizes(engine.shape) if size < engine.world_size and holds(size)), default=0
    )
    if engine.world_size > count:
        split = f"TP {engine.tp_size}" + (f" x PP {engine.pp_size}" if engine.pp_size > 1 else "")
        reason = f"{model} was built with {engine.world_size} ranks ({split}), each needs a GPU; a host has {count} ({said})."
        raise reports.charts.host_cannot_hold(model, node or "docker/gpus.json", reason, fewer)
    if not host:
        return
    built = passport["engine"]["gpu"]
    if built and built["compute_capability"] != host[0].compute_capability:
        raise reports.charts.engines_for_another_host(
            model, built["name"], built["compute_capability"], host[0].name, host[0].compute_capability
        )
    fit = fit_on(passport, engine, min(gpu.memory_bytes for gpu in host))
    if fit.verdict == "no":
        reason = (
            f"A rank of {model} takes {room.human_bytes(gpu_bytes(passport, engine))} of its GPU for a single "
            f"request of {engine.max_seq_len} tokens; a {host[0].name} has {room.human_bytes(fit.gpu_bytes)}."
        )
        raise reports.charts.host_cannot_hold(model, node, reason, fewer)


def values(
    passport: Mapping[str, Any], engine: memory_model.Engine, repository: str, digest: str, per_host: int
) -> dict[str, Any]:
    """The values of docker/chart/values.yaml that follow from the image. Sizes are whole GiB,
    as Kubernetes writes them."""
    ranks, gpu = engine.world_size, on_gpus(passport)
    shared_bytes = SHARED_BYTES_PER_GPU * (ranks if passport["engine"]["kind"] == "tensorrt" else 1)
    # as in make plan
    planned_bytes = memory_model.serve_bytes(engine, gpu) + memory_model.program_bytes(ranks, gpu)
    memory = f"{math.ceil((planned_bytes + shared_bytes) / GIB)}Gi"
    cores = str(PROGRAM_CORES + ranks * RANK_CORES)
    places = engine.max_batch_size
    built = passport["engine"]["gpu"]
    return {
        "image": {"repository": repository, "digest": digest},
        "model": passport["model"],
        "worldSize": ranks,
        "gpu": {
            "count": ranks if gpu else 0,
            "perHost": per_host,
            "products": [gpu_label(built["name"])] if gpu and built else [],
            "computeCapability": built["compute_capability"] if gpu and built else "",
            "memoryMiB": 0 if built or not gpu else gpu_bytes(passport, engine) >> 20,
        },
        "resources": {"requests": {"cpu": cores, "memory": memory}, "limits": {"memory": memory}},
        "sharedMemory": f"{shared_bytes // GIB}Gi",
        "autoscaling": {"waitingPerPod": max(1, places // 2), "runningPerPod": max(1, int(places * FULL))},
    }


def as_yaml(found: Mapping[str, Any], head: Sequence[str]) -> str:
    """YAML of mappings; a list or a word is written as JSON, which is YAML too."""

    def lines(value: Mapping[str, Any], indent: str) -> list[str]:
        written = []
        for key, item in value.items():
            if isinstance(item, dict):
                written += [f"{indent}{key}:", *lines(item, indent + "  ")]
            else:
                written.append(f"{indent}{key}: {json.dumps(item, ensure_ascii=False)}")
        return written

    return "\n".join([*(f"# {line}" for line in head), *lines(found, "")]) + "\n"


def named(image: str, digest: str) -> tuple[str, str]:
    """(repository, digest) of an image's name: its own digest if it has one, else `digest`; a tag is left out."""
    match = IMAGE_NAME.fullmatch(image)
    if not match:
        raise reports.charts.no_image_name(image)
    return match[1], match[2] or digest


def release_name(model: str) -> str:
    """A name that helm and Kubernetes take: letters, digits and dashes, 53 of them at most."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:53].strip("-") or "model"


# --- shell ---


def which_image(settings: Settings) -> tuple[dict[str, Any], str, str]:
    """(passport, repository, digest) of the room image, or of a release in a registry."""
    if settings.release is None:
        folder = settings.root / "image"
        room.read_manifest(folder)
        layers = json.loads((folder / "layers.json").read_bytes())
        passport = json.loads((folder / "passport.json").read_bytes())
        return (passport, *named(settings.image or layers["tag"], layers["manifest"]))
    noted = settings.release.with_name(f"{settings.release.name}.pushed.json")
    if not noted.is_file() or not (settings.release / "passport.json").is_file():
        raise reports.charts.release_not_pushed(settings.release, settings.release.name.rpartition("-")[2])
    pushed = json.loads(noted.read_bytes())
    passport = json.loads((settings.release / "passport.json").read_bytes())
    return (passport, *named(settings.image or pushed["image"], pushed["digest"]))


def engines_config(root: Path, passport: Mapping[str, Any]) -> dict[str, Any]:
    """The engines' config.json; a Problem if the image was baked from other engines."""
    folder, described = root / "engines", passport["rooms"]["engines"]
    room.read_manifest(folder)
    if room.manifest_sha256(folder) != described["manifest_sha256"]:
        raise reports.rooms.room_damaged(folder, room.MANIFEST, "what the image's passport says", "another room")
    return dict(json.loads((folder / "config.json").read_bytes()))


def write_values(settings: Settings) -> None:
    passport, repository, digest = which_image(settings)
    engine = engine_of(engines_config(settings.root, passport))
    host = host_of(settings.node)
    check_host(passport, engine, settings.node, host)
    found = values(passport, engine, repository, digest, len(host) or GPUS_PER_HOST)
    head = [
        f"{passport['model']}, {passport['engine']['kind']} engines, {engine.world_size} ranks; git "
        f"{passport['revision'] or 'unknown'}.",
        "make chart wrote this file. Keep what you change in a file of yours, and give that to helm after this one.",
    ]
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    partial = settings.output.with_name(settings.output.name + ".partial")
    room.write_synced(partial, as_yaml(found, head).encode())
    os.replace(partial, settings.output)
    memory = found["resources"]["requests"]["memory"]
    room.say(
        "chart",
        f"{reports.shown(settings.output)}: {repository}@{digest[:19]}, {found['gpu']['count']} GPUs, "
        f"{found['resources']['requests']['cpu']} cores, {memory}",
    )
    if settings.release is None and "@" not in settings.image:
        room.say(
            "chart",
            "the digest is the archive's; a registry that compresses layers gives another: make push, then VERSION=",
        )
    name = release_name(passport["model"])
    print(f"\n  helm upgrade --install {name} {CHART} --values {reports.shown(settings.output)}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--release", type=Path)
    args = parser.parse_args()
    image, node = (os.environ.get(name, "").strip() for name in ("IMAGE", "NODE"))
    write_values(Settings(args.root, args.output, args.release, image, node))


if __name__ == "__main__":
    reports.run(main)
