"""Reports of the image: building, showing, verifying, pushing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Mapping, Sequence

from scripts.reports.problem import PathLike, Problem, indented, make, shown


def no_builder(seen: Mapping[str, str]) -> Problem:
    listed = "; ".join(f"{name}: {answer}" for name, answer in seen.items())
    return Problem(
        "no program that builds images",
        "docker, buildah",
        f"make image needs docker with a running daemon, or buildah. Here: {listed}.",
        "Start or install one of them, for instance:",
        "sudo apt-get install docker.io && sudo systemctl start docker && " + make("image"),
    )


def builder_failed(name: str, words: Sequence[str], status: int, last: Sequence[str]) -> Problem:
    return Problem(
        f"{name} stopped",
        " ".join(words),
        f"{' '.join(words)} ended with status {status}. Its last lines:\n\n{indented(last)}\n\n"
        "Earlier images are unchanged.",
        "Correct the cause, then type:",
        make("image"),
    )


def no_space_for_image(name: str, words: Sequence[str], last: Sequence[str]) -> Problem:
    return Problem(
        f"no space left for {name}",
        " ".join(words),
        f"{' '.join(words)} says:\n\n{indented(last[-3:])}\n\nNo image was changed, and nothing half-built is kept.",
        "Find what takes the space, free some, and continue:",
        f"{name} images; df -h; {make('image')}",
    )


def no_space_to_bake(folder: PathLike, free_bytes: int, needed_bytes: int) -> Problem:
    return Problem(
        "not enough space to bake",
        folder,
        f"{free_bytes / 1e9:.1f} GB are free there; baking needs {needed_bytes / 1e9:.1f} GB, because two copies of "
        "the image exist for a moment. Nothing was built.",
        "Free some space, and continue:",
        f"df -h {shlex.quote(shown(folder))}; {make('image')}",
    )


def no_mmdebstrap() -> Problem:
    return Problem(
        "no mmdebstrap",
        "PATH",
        "With ENGINE=torch, mmdebstrap makes the image's base from Debian packages; it is not on PATH. BASE_IMAGE "
        "can also name any image that has CPython 3.11 or 3.12 (with libpython) and glibc 2.35 or later.",
        "Install it, or name a base:",
        "sudo apt-get install mmdebstrap && "
        + make("image")
        + "\nmake image BASE_IMAGE=python:3.11-slim-bookworm@sha256:...",
    )


def base_not_made(status: int, last: Sequence[str]) -> Problem:
    return Problem(
        "mmdebstrap stopped",
        "Debian packages",
        f"The base could not be made; mmdebstrap ended with status {status}:\n\n{indented(last)}",
        "Check that a Debian mirror is reachable and that the package debian-archive-keyring is installed, then type:",
        make("image"),
    )


def base_not_here(image: str, builder: str) -> Problem:
    return Problem(
        "the base image is not here",
        image,
        f"{builder} has no image {image}. It may be large, so make does not fetch it by itself.",
        "Fetch it, and continue:",
        f"{builder} pull {shlex.quote(image)} && {make('image')}",
    )


def base_changed(image: str, expected: str, actual: str) -> Problem:
    return Problem(
        "the base image changed",
        image,
        f"Its last layer was {expected[:19]} when the room `base` was made; now it is {actual[:19]}. The tag was "
        "moved.",
        "Name the image by its digest, which always means the same image. Or make the room again:",
        f"rm -r build/ground-* && {make('image')}",
    )


def base_of_another_version(image: str, expected: str, actual: str) -> Problem:
    """actual: empty if the image does not name its version."""
    has = f"has {actual}" if actual else "does not name its version"
    return Problem(
        "the base has another TensorRT-LLM",
        image,
        f"The engines were built by TensorRT-LLM {expected}; {image} {has}. An engine runs only on the version "
        "that built it.",
        "Leave BASE_IMAGE unset, or build the engines with that image's version:",
        make("image"),
    )


def wheels_not_fetched(target: str, last: Sequence[str]) -> Problem:
    cpu = target == "cpu" and any("torch" in line for line in last)
    return Problem(
        "packages for the image could not be fetched",
        "requirements/",
        f"pip says:\n\n{indented(last)}"
        + ("\n\nPlain PyPI has only PyTorch's CUDA build; the CPU one is on PyTorch's own index." if cpu else ""),
        "Give pip that index, or bake the CUDA build:"
        if cpu
        else "Check the network and pip's settings (index, proxy), then type:",
        f"PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu {make('image')}\n{make('image', TARGET='cuda')}"
        if cpu
        else make("image"),
    )


def rank_file_missing(room: PathLike, rank: int, world_size: int) -> Problem:
    return Problem(
        f"no engine for rank {rank}",
        room,
        f"The engines have {world_size} ranks; the manifest lists no file of rank {rank}.",
        "Make them again:",
        f"rm -r {shown(room)} && {make('engines')}",
    )


def no_image_archive(path: PathLike, reason: str) -> Problem:
    return Problem(
        "not an image's archive",
        path,
        f"It was not written by `docker save` or `make release`: {reason}.",
        "Write it again:",
        make("release", VERSION="x.y.z"),
    )


def layers_do_not_match(path: PathLike, actual: int, instructions: Sequence[str]) -> Problem:
    return Problem(
        "the layers differ from the Dockerfile",
        path,
        f"docker/Dockerfile adds {len(instructions)} layers to its base; the builder added {actual}.",
        "Build it without the cache:",
        make("image", NO_CACHE=1),
    )


def layer_damaged(path: PathLike, number: int, expected: str, actual: str) -> Problem:
    return Problem(
        f"layer {number} is damaged",
        path,
        f"The image's configuration says {expected[:19]}; the layer's content is {actual[:19]}.",
        "Build it again:",
        make("image", NO_CACHE=1),
    )


def image_gone(tag: str, iid: str, builder: str) -> Problem:
    return Problem(
        "the image is gone",
        tag,
        f"make baked {tag} as {iid[:19]}, but {builder} no longer has that image.",
        "Bake it again (the same rooms give the same image):",
        f"rm -r build/*/*/image && {make('image')}",
    )


def which_image() -> Problem:
    return Problem(
        "which image?",
        "IMAGE",
        "IMAGE is empty. Give a name that docker or buildah knows, or the path of an archive.",
        "For instance:",
        "make verify-image IMAGE=dist/stories-1.0.0/image.oci.tar",
    )


def no_such_image(image: str, builder: str) -> Problem:
    return Problem(
        "no such image",
        image,
        f"{builder} has no image {image}, and no file has that name.",
        "See the images:",
        f"{builder} images",
    )


def image_not_what_it_says(image: str, failed: Sequence[str]) -> Problem:
    return Problem(
        "the image is not what its passport says",
        image,
        f"The passport in an image lists what the image was made of. {len(failed)} of its values are not those of this "
        f"image:\n\n{indented(failed)}",
        "Do not serve it. Bake it again:",
        make("image", NO_CACHE=1),
    )


def memory_too_small(available_bytes: int, needed_bytes: int) -> Problem:
    return Problem(
        "not enough memory",
        "/proc/meminfo",
        f"{available_bytes / 1e9:.1f} GB are available; the weights alone take {needed_bytes / 1e9:.1f} GB.",
        "Free some memory, use a larger machine, or give the container more:",
        f"docker run --memory {needed_bytes // 10**9 * 2 + 1}g ... {os.environ.get('BAKED_IMAGE', 'IMAGE')}",
    )


def which_license() -> Problem:
    return Problem(
        "the model's licence is not known",
        "LICENSE",
        "A release contains the model, so LICENSE must name its terms: llama2, or an SPDX name. A preset names "
        "the licence of its model. If MODEL is a folder, you must name the licence yourself.",
        "For instance:",
        make("release", LICENSE="llama2"),
    )


def license_files_missing(license: str, folder: PathLike, missing: Sequence[str]) -> Problem:
    return Problem(
        "the model's licence is not with it",
        folder,
        f"LICENSE is {license}. A model with this licence must be shipped with {' and '.join(missing)}. "
        f"{shown(folder)} and its parent folder do not have {'it' if len(missing) == 1 else 'them'}.",
        "Meta's download puts them above the models' folders. Copy them, and continue:",
        f"cp LICENSE USE_POLICY.md {shlex.quote(shown(folder))}/ && {make('release')}",
    )


def base_not_pinned(seen: Sequence[str]) -> Problem:
    return Problem(
        "the base is not pinned",
        "docker/base.txt",
        f"A release needs a base that can be rebuilt. Here:\n\n{indented(seen)}",
        "Pin the current packages and commit, or name an image by digest (BASE_IMAGE=name@sha256:...):",
        "make lock-base && git add docker/base.txt",
    )


def release_exists(folder: PathLike) -> Problem:
    return Problem(
        "this version is already released",
        folder,
        f"{shown(folder)} exists for another image. A version always names the same image.",
        "Use the next version, or remove that folder:",
        make("release", VERSION="x.y.z"),
    )


def not_signed(key: PathLike, reason: str) -> Problem:
    return Problem(
        "could not sign",
        key,
        f"openssl says: {reason}. The key must be an EC P-256 private key in PEM form, as `cosign import-key-pair` "
        "accepts; COSIGN_PASSWORD holds its password, if it has one.",
        "Make one, and continue:",
        "openssl ecparam -genkey -name prime256v1 -noout -out key.pem && " + make("release"),
    )


def push_failed(image: str, last: Sequence[str]) -> Problem:
    said = " ".join(last).lower()
    if "unauthorized" in said or "denied" in said or "authentication required" in said or "no basic auth" in said:
        advice, command = (
            "The registry rejected the login, or this account may not push there. Log in and push again:",
            f"docker login {image.partition('/')[0]}",
        )
    elif "no such host" in said or "connection refused" in said or "timeout" in said or "deadline" in said:
        advice, command = (
            "The registry does not answer. Check its name and the network, and push again:",
            make("push", IMAGE=image),
        )
    else:
        advice, command = "Correct the cause, and push again:", make("push", IMAGE=image)
    return Problem("the push failed", image, f"The builder says:\n\n{indented(last)}", advice, command)


def push_what(image: str, dist: PathLike) -> Problem:
    return Problem(
        "nothing to push",
        dist,
        f"make push sends the archive of a release, and IMAGE must include a registry. {shown(dist)} "
        f"{'exists' if Path(dist).is_dir() else 'does not exist'}; IMAGE is {image!r}.",
        "Release first, then push:",
        "make release VERSION=1.0.0 && make push VERSION=1.0.0 IMAGE=registry.example/llama:1.0.0",
    )
