"""What builds, keeps and runs images: docker (any version, BuildKit or not) or buildah. One Dockerfile,
one canonical result.

docker also runs images. buildah builds without a daemon and without root;
load its image from the archive of `make release`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Mapping, Sequence

from scripts import reports

QUESTION_SECONDS = 120
LAST_LINES = 20
NO_SPACE = re.compile(r"no space left on device|disk quota exceeded|file too large", re.IGNORECASE)


class Builder:
    """docker or buildah. If a method fails, it raises a Problem with the last lines of the program."""

    name = ""

    def has(self, image: str) -> bool:
        """Whether it has an image with that name or id."""
        raise NotImplementedError

    def build(
        self, context: Path, arguments: Mapping[str, str], labels: Mapping[str, str], tag: str, no_cache: bool
    ) -> None:
        """Build the stage `server` of context/Dockerfile under a name. It needs no network:
        all files are in the context."""
        raise NotImplementedError

    def make_base(self, rootfs: Path, tag: str) -> None:
        """A base image of one layer, from the tar of a root file system."""
        raise NotImplementedError

    def save(self, image: str, archive: Path) -> None:
        """Write an image as a docker archive."""
        raise NotImplementedError

    def load(self, archive: Path, tag: str) -> None:
        """Load the image of an archive."""
        raise NotImplementedError

    def ask(self, image: str, command: Sequence[str]) -> str:
        """The output of a program in an image, without network."""
        raise NotImplementedError

    def layers(self, image: str) -> list[str]:
        """The diff_ids of an image."""
        raise NotImplementedError

    def digest(self, image: str) -> str | None:
        """Its digest in a registry; None if it did not come from a registry."""
        raise NotImplementedError

    def remove(self, tag: str) -> None:
        """Remove a name; and the image if that was its last name."""
        raise NotImplementedError

    def tag(self, image: str, name: str) -> None:
        """Give an image a further name."""
        raise NotImplementedError

    def push(self, image: str) -> str:
        """Send it to the registry in its name; returns the digest of the manifest there."""
        raise NotImplementedError

    def _push(self, *words: str) -> str:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            raise reports.images.push_failed(words[2], (done.stderr or done.stdout).strip().splitlines()[-LAST_LINES:])
        return done.stdout

    def _run(self, *words: str, quiet: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """Output of a command. quiet: show it only if the command fails;
        else it is also shown while the command runs."""
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        assert child.stdout is not None
        lines: list[str] = []
        try:
            for line in child.stdout:
                lines.append(line.rstrip())
                if not quiet:
                    print(f"{'image':<11} {line.rstrip()}", flush=True)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
        if status:
            last = [line for line in lines if line.strip()][-LAST_LINES:]
            if any(NO_SPACE.search(line) for line in last):
                raise reports.images.no_space_for_image(self.name, words[:2], last)
            raise reports.images.builder_failed(self.name, words[:2], status, last)
        return "\n".join(lines)

    def _asked(self, *words: str) -> Any | None:
        """The JSON that a query prints; None if its status says no."""
        done = subprocess.run(words, capture_output=True, text=True, timeout=QUESTION_SECONDS, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None


class Docker(Builder):
    """docker's daemon, with BuildKit if the client has it; the classic builder takes this Dockerfile as well."""

    name = "docker"

    def has(self, image: str) -> bool:
        return self._asked("docker", "image", "inspect", image) is not None

    def build(
        self, context: Path, arguments: Mapping[str, str], labels: Mapping[str, str], tag: str, no_cache: bool
    ) -> None:
        words = ["docker", "build", "--network", "none", "--target", "server", "--tag", tag]
        words += ["--no-cache"] if no_cache else []
        words += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        words += [f"--label={name}={value}" for name, value in labels.items()]
        self._run(*words, str(context), environment=self._buildkit())

    @staticmethod
    def _buildkit() -> dict[str, str]:
        """Up to 20.10 the client has BuildKit, which a variable turns on;
        later clients have it as the plugin buildx or not at all."""
        said = subprocess.run(
            ["docker", "buildx", "version"], capture_output=True, timeout=QUESTION_SECONDS, check=False
        )
        client = subprocess.run(
            ["docker", "version", "--format", "{{.Client.Version}}"], capture_output=True, text=True, timeout=QUESTION_SECONDS, check=False,
        ).stdout  # fmt: skip
        old = re.match(r"(\d+)\.", client)
        has = said.returncode == 0 or (old is not None and int(old[1]) < 23)
        return {"DOCKER_BUILDKIT": "1" if has else "0", "BUILDKIT_PROGRESS": "plain"}

    def make_base(self, rootfs: Path, tag: str) -> None:
        self._run("docker", "import", str(rootfs), tag)

    def save(self, image: str, archive: Path) -> None:
        self._run("docker", "save", "--output", str(archive), image)

    def load(self, archive: Path, tag: str) -> None:
        self._run("docker", "load", "--quiet", "--input", str(archive))

    def ask(self, image: str, command: Sequence[str]) -> str:
        return self._run(
            "docker", "run", "--rm", "--network", "none", "--pull", "never", "--entrypoint", command[0], image, *command[1:]
        )  # fmt: skip

    def layers(self, image: str) -> list[str]:
        [described] = json.loads(self._run("docker", "image", "inspect", image))
        return list(described["RootFS"]["Layers"])

    def digest(self, image: str) -> str | None:
        [described] = json.loads(self._run("docker", "image", "inspect", image))
        return next((str(name).partition("@")[2] for name in described.get("RepoDigests") or []), None)

    def remove(self, tag: str) -> None:
        self._run("docker", "image", "rm", "--force", tag)

    def tag(self, image: str, name: str) -> None:
        self._run("docker", "tag", image, name)

    def push(self, image: str) -> str:
        found = re.search(r"digest: (sha256:[0-9a-f]{64})", self._push("docker", "push", image))
        return found[1] if found else "by an unknown digest"


class Buildah(Builder):
    """buildah, with its own storage. It writes docker's image format,
    because OCI's drops HEALTHCHECK (buildah 1.28)."""

    name = "buildah"

    def has(self, image: str) -> bool:
        return self._asked("buildah", "inspect", "--type", "image", image) is not None

    def build(
        self, context: Path, arguments: Mapping[str, str], labels: Mapping[str, str], tag: str, no_cache: bool
    ) -> None:
        # one layer per instruction, as docker makes them; `--isolation chroot` needs neither user namespaces nor runc,
        # and does not isolate the network (the Dockerfile uses none: pip gets --no-index)
        words = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker"]
        words += ["--layers", *(["--no-cache"] if no_cache else []), "--target", "server", "--tag", tag]
        words += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        words += [f"--label={name}={value}" for name, value in labels.items()]
        self._run(*words, str(context))

    def make_base(self, rootfs: Path, tag: str) -> None:
        container = self._run("buildah", "from", "scratch").splitlines()[-1]
        try:
            self._run("buildah", "add", container, str(rootfs), "/")
            self._run("buildah", "commit", "--format", "docker", container, tag)
        finally:
            self._run("buildah", "rm", container)

    def save(self, image: str, archive: Path) -> None:
        self._run("buildah", "push", image, f"docker-archive:{archive}")

    def load(self, archive: Path, tag: str) -> None:
        found = self._run("buildah", "pull", f"docker-archive:{archive}").splitlines()[-1]
        self._run("buildah", "tag", found, tag)

    def ask(self, image: str, command: Sequence[str]) -> str:
        container = self._run("buildah", "from", "--pull-never", image).splitlines()[-1]
        try:
            return self._run("buildah", "run", "--isolation", "chroot", container, "--", *command)
        finally:
            self._run("buildah", "rm", container)

    def layers(self, image: str) -> list[str]:
        described = json.loads(self._run("buildah", "inspect", "--type", "image", image))
        return list(described["Docker"]["rootfs"]["diff_ids"])

    def digest(self, image: str) -> str | None:
        described = json.loads(self._run("buildah", "inspect", "--type", "image", image))
        return str(described["FromImageDigest"]) or None

    def remove(self, tag: str) -> None:
        self._run("buildah", "rmi", "--force", tag)

    def tag(self, image: str, name: str) -> None:
        self._run("buildah", "tag", image, name)

    def push(self, image: str) -> str:
        with tempfile.NamedTemporaryFile("r") as digest:
            self._push("buildah", "push", image, f"--digestfile={digest.name}")
            return digest.read().strip()


def kept(builder: Builder, described: Mapping[str, Any]) -> str:
    """The builder's reference to an image that we baked (layers.json): its id, which cannot move to another image; or
    its name, if the builder's ids are other numbers (docker with containerd's image store)."""
    for name in (described["iid"], described["tag"]):
        if builder.has(name):
            return str(name)
    raise reports.images.image_gone(described["tag"], described["iid"], builder.name)


BUILDERS = {"docker": Docker, "buildah": Buildah}


def find_builder(asked: str) -> Builder:
    """The builder that BUILDER= names, else docker if its daemon answers, else buildah."""
    seen = {}
    for name in [asked] if asked else list(BUILDERS):
        if not shutil.which(name):
            seen[name] = "not on PATH"
            continue
        question = {"docker": ["docker", "version", "--format", "{{.Server.Version}}"], "buildah": ["buildah", "info"]}[
            name
        ]
        done = subprocess.run(question, capture_output=True, text=True, timeout=QUESTION_SECONDS, check=False)
        if done.returncode == 0:
            return BUILDERS[name]()
        seen[name] = (
            (done.stderr or done.stdout).strip().splitlines()[-1][:200]
            if (done.stderr or done.stdout).strip()
            else "no answer"
        )
    raise reports.images.no_builder(seen)
