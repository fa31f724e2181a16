"""Reports of make chart: which image it names, and whether one host of the cluster can hold the model."""

from __future__ import annotations

import shlex

from scripts.reports.problem import PathLike, Problem, make

# what runs one model on more than one host
MULTI_NODE = "docs/leaderworkerset.yaml"


def host_cannot_hold(model: str, host: str, reason: str, fewer_ranks: int) -> Problem:
    """reason: a sentence; fewer_ranks: a TP with which the host can hold the model, or 0."""
    if fewer_ranks:
        advice, command = "With fewer ranks one host holds it:", make("chart", TP=fewer_ranks, PP=None)
    else:
        advice, command = (
            "To spread one model over several hosts, see NVIDIA's multi-node recipe (docs/operations.md):",
            f"less {MULTI_NODE}",
        )
    return Problem(
        f"one host cannot hold {model}",
        host,
        f"{reason} All ranks of an engine run in one pod, and a pod runs on one host. More replicas serve more "
        "clients; they do not make room for a larger model.",
        advice,
        command,
    )


def engines_for_another_host(model: str, built_on: str, built_for: str, host: str, capability: str) -> Problem:
    return Problem(
        "the engines do not fit that host",
        host,
        f"The engines of {model} were built on {built_on} for compute capability {built_for}; {host} has "
        f"{capability}. TensorRT engines do not work on another GPU generation.",
        f"Make the image on a machine with the same kind of GPUs as {host}:",
        make("image"),
    )


def release_not_pushed(release: PathLike, version: str) -> Problem:
    return Problem(
        "the release is not pushed",
        release,
        "The chart names an image by the digest that the registry gave it. The release's folder does not say that "
        "it was pushed.",
        "Push it:",
        make("push", VERSION=version or "1.0.0", IMAGE=f"registry.example/llama:{version or '1.0.0'}"),
    )


def no_image_name(image: str) -> Problem:
    return Problem(
        "not the name of an image",
        "IMAGE",
        f"IMAGE is {image[:200]!r}; the chart wants the name under which the cluster finds the image, with or "
        "without a tag.",
        "For instance:",
        f"make chart IMAGE={shlex.quote('registry.example/models/llama')}",
    )
