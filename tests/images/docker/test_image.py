"""The baked image through a real docker: it serves, a second build is equal, it knows what it is,
and its refusals are clear."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from baking import PLANTED, Baked, Container, bake, committed, docker
from project import ROOT, copy_of_project, make
from server import free_ports
from triton_requests import STORY
from waiting import until

from scripts import settings
from scripts.images import archive as image_archive

pytestmark = pytest.mark.timeout(1500)
Run = Callable[..., Container]
LOCKED_DOWN = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "512"]
TORCH_LIMIT_BYTES = 1_200_000_000


def ask(port: int, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/models/ensemble/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.loads(answer.read()))


def refused(baked: Baked, *flags: str, command: tuple[str, ...] = ()) -> str:
    """The report of a container that does not start: status 1, no traceback, nothing loaded."""
    name = f"bake-test-{os.getpid()}"
    try:
        done = docker("run", "--name", name, *flags, baked.tag, *command, check=False, timeout=120)
    finally:
        docker("rm", "--force", "--volumes", name, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "loading:" not in done.stdout
    return done.stderr


# --- baked ---


def test_make_image_says_how_to_run_it(baked: Baked) -> None:
    ports = "--publish 127.0.0.1:8000-8002:8000-8002 --publish 127.0.0.1:9000:9000"
    assert f"docker run --rm --stop-timeout 40 {ports} {baked.tag}" in baked.printed
    assert (baked.variant / "image/image.iid").read_text() == baked.iid
    assert docker("image", "inspect", "--format", "{{.Id}}", baked.tag).stdout.strip() == baked.iid


def test_a_second_make_bakes_nothing(baked: Baked) -> None:
    done = make(baked.tree, "image")
    assert done.returncode == 0 and "->" not in done.stdout and baked.iid in done.stdout, done.stdout + done.stderr


def test_the_same_rooms_give_the_same_digest(baked: Baked, tmp_path: Path) -> None:
    """Another clean tree, everything from nothing, and another builder where there is one."""
    builder = "buildah" if shutil.which("buildah") else "docker"
    again = bake(committed(copy_of_project(tmp_path / "tree")), "NO_CACHE=1", f"BUILDER={builder}")
    ours, theirs = (json.loads((each.variant / "image/layers.json").read_text()) for each in (baked, again))
    assert theirs["layers"] == ours["layers"], builder
    assert (again.iid, theirs["manifest"]) == (baked.iid, ours["manifest"]), builder


def test_layers_are_told_with_bytes_and_reasons(baked: Baked) -> None:
    done = make(baked.tree, "size", "JSON=1")
    described = json.loads(done.stdout)
    assert all(layer["why"] and layer["size_bytes"] for layer in described["layers"])
    ranks = [layer["size_bytes"] for layer in described["layers"] if layer["instruction"].startswith("COPY rank")]
    files = sorted(baked.variant.glob("engines/rank*.safetensors"))
    # a layer for each rank, and in it the rank's file and tar's own blocks alone
    assert [size - file.stat().st_size for size, file in zip(ranks, files)] == [
        size - files[0].stat().st_size for size in ranks
    ]
    assert len(ranks) == 2 and ranks[0] - files[0].stat().st_size < 4096
    assert described["base_bytes"] + described["added_bytes"] <= TORCH_LIMIT_BYTES, described
    assert "why" not in make(baked.tree, "size").stderr


def test_nothing_is_in_it_that_a_server_does_not_need(baked: Baked, tmp_path: Path) -> None:
    """No weights, no secret, no compiler, no pip, no test, no CUDA, no setuid program of ours,
    no file that others may write."""
    docker("save", "--output", str(tmp_path / "image.tar"), baked.tag)
    names: list[str] = []
    with image_archive.Archive(tmp_path / "image.tar") as archive:
        base_layers = len(archive.diff_ids) - 8
        for number in range(len(archive.diff_ids)):
            for tar, member in archive.entries(number):
                names.append(member.name)
                if number >= base_layers:
                    assert (member.uid, member.gid, member.mtime) == (0, 0, 0), member.name
                    assert member.issym() or not member.mode & 0o6022, f"{member.name} {member.mode:o}"
                if member.isreg() and (number >= base_layers or member.size < 1 << 20):
                    assert PLANTED.encode() not in tar.extractfile(member).read(), member.name  # type: ignore[union-attr]
        assert PLANTED not in json.dumps(archive.config)
    weights = ["model.safetensors", "consolidated", ".00.pth", "/args"]
    tools = ["/pip/", "bin/gcc", "bin/cc", "bin/x86_64-linux-gnu-", "/.cache/", "/torch/test/", "/torch/include/"]
    for unwanted in [*weights, *tools, "libcublas", "libcudnn", "libtorch_cuda", "nvidia_cu"]:
        assert not [name for name in names if unwanted in f"/{name}"], unwanted
    assert not [name for name in names if "/tests/" in name]


# --- serving ---


def test_it_serves_read_only_as_any_user_with_no_network_but_its_own(baked: Baked, run: Run) -> None:
    http, grpc, metrics, openai = free_ports(4)
    inside = zip((http, grpc, metrics, openai), settings.PORTS.values())
    publish = [f"--publish=127.0.0.1:{port}:{number}" for port, number in inside]
    container = run(*LOCKED_DOWN, *publish, "--user", "4321:4321", "--health-interval", "1s")
    container.wait_until_ready()
    assert ask(http, text_input="Once upon a time", max_tokens=48)["text_output"].startswith(STORY)
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=30) as answer:
        assert b"nv_inference_request_success" in answer.read()
    asked = json.dumps({"model": "stories", "prompt": "Once upon a time", "max_tokens": 48, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{openai}/v1/completions", asked, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.loads(answer.read())["choices"][0]["text"].startswith(STORY)
    until(lambda: container.health == "healthy", "healthy")
    assert container.python("import os; print(os.getuid())").strip() == "4321"
    docker("stop", "--time", "40", container.name)
    assert container.inspect()["State"]["ExitCode"] == 0 and "serve       ended" in container.logs


def test_process_1_is_the_launcher_and_no_shell_is_between(baked: Baked, run: Run) -> None:
    config = json.loads(docker("image", "inspect", baked.tag).stdout)[0]["Config"]
    assert config["Entrypoint"] == ["/opt/venv/bin/python", "-m", "scripts.images.entry"] and config["Cmd"] == ["serve"]
    assert config["User"] == "10001:10001" and config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "/opt/venv/bin/python", "-m", "scripts.images.entry", "health"]


def test_health_turns_when_ranks_are_stopped(baked: Baked, run: Run) -> None:
    """The supervisor ends everything when a rank is stopped; here it is stopped first,
    so that docker alone can tell."""
    container = run("--health-interval", "1s", "--health-retries", "1", "--health-start-period", "0s")
    container.wait_until_ready()
    until(lambda: container.health == "healthy", "healthy")
    supervisor = container.inspect()["State"]["Pid"]
    # from the host's side: process 1 cannot be stopped from inside its own namespace
    stop = f"import os, signal; os.kill({supervisor}, signal.SIGSTOP)"
    docker("run", "--rm", "--pid", "host", "--user", "0", "--entrypoint", "/opt/venv/bin/python", baked.tag, "-c", stop)
    container.python(SIGNAL_RANK_1.format(signal="SIGSTOP"))
    until(lambda: container.health == "unhealthy", "unhealthy")
    checks = container.inspect()["State"]["Health"]["Log"]
    assert checks[-1]["ExitCode"] == 1 and "no token within" in checks[-1]["Output"]
    docker("kill", container.name)


SIGNAL_RANK_1 = """
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        environment, name = open(f"/proc/{{pid}}/environ").read(), open(f"/proc/{{pid}}/comm").read()
    except OSError:
        continue
    if "OMPI_COMM_WORLD_RANK=1" in environment and name.startswith(("tritonserver", "triton_python")):
        os.kill(int(pid), signal.{signal})
"""


def test_a_killed_rank_ends_the_container_and_is_named(baked: Baked, run: Run) -> None:
    container = run()
    container.wait_until_ready()
    container.python(SIGNAL_RANK_1.format(signal="SIGKILL"))
    assert container.wait() == 1
    report = container.logs
    assert "RANK 1 FAILED WHILE SERVING" in report and f"docker run {'IMAGE'}" in report and "Traceback" not in report


def test_sigterm_while_loading_ends_it_well(baked: Baked, run: Run) -> None:
    container = run()
    until(lambda: "starting 2 ranks" in container.logs, "loading")
    docker("stop", "--time", "40", container.name)
    assert container.inspect()["State"]["ExitCode"] == 0, container.logs


def test_dockers_64_mb_of_shared_memory_are_enough_and_less_is_named(baked: Baked) -> None:
    report = refused(baked, "--shm-size", "16m")
    assert "/DEV/SHM IS TOO SMALL" in report
    assert report.strip().splitlines()[-1].strip() == "docker run --shm-size 1g IMAGE"


def test_a_tmp_that_cannot_be_written_is_named(baked: Baked, tmp_path: Path) -> None:
    report = refused(baked, "--volume", f"{tmp_path}:/tmp:ro")
    assert "/TMP CANNOT BE WRITTEN" in report and "--tmpfs /tmp" in report.strip().splitlines()[-1]


def test_a_taken_port_is_named_with_a_free_one(baked: Baked) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        others = free_ports(2)
        variables = {"HOST": "127.0.0.1", "HTTP_PORT": port, "GRPC_PORT": others[0], "METRICS_PORT": others[1]}
        report = refused(baked, "--network", "host", *(f"--env={name}={value}" for name, value in variables.items()))
    assert f"PORT {port} CANNOT BE USED" in report
    assert report.strip().splitlines()[-1].strip().startswith("docker run --env HTTP_PORT=")


# --- it knows what it is made of ---


def test_the_passport_is_printed_and_labelled(baked: Baked) -> None:
    about = json.loads(docker("run", "--rm", "--network", "none", "--read-only", baked.tag, "passport").stdout)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=baked.tree, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert about["revision"] == head and about["engine"]["tp_size"] == 2
    assert about["weights"]["consolidated.00.pth"]["sha256"].startswith("ad12b003adec")
    assert {"base", "wheels", "checkpoint", "engines", "verified", "model_repo"} <= set(about["rooms"])
    assert about["accuracy"]["passed"] is True
    labels = json.loads(docker("image", "inspect", baked.tag).stdout)[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == head and labels["trtllm-bake.tp_size"] == "2"


def test_doctor_says_whether_this_host_will_do(baked: Baked) -> None:
    done = docker("run", "--rm", "--network", "none", "--read-only", baked.tag, "doctor")
    assert done.stdout.strip().splitlines()[-1] == "Ready." and "✗" not in done.stdout
    done = docker("run", "--rm", "--shm-size", "16m", baked.tag, "doctor", check=False)
    assert done.returncode == 1 and "[✗] shared memory" in done.stdout and "Ready" not in done.stdout


def test_verify_image_recomputes_it(baked: Baked) -> None:
    done = make(baked.tree, "verify-image", f"IMAGE={baked.tag}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout and done.stdout.count("[✓]") == 6, done.stdout


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("/srv/engines/rank1.safetensors", "srv/engines/rank1.safetensors: sha256"),
        ("/srv/passport.json", "label trtllm-bake.passport.sha256"),
        ("/opt/trtllm-bake/scripts/serve.py", "opt/trtllm-bake/scripts/serve.py: differs from revision"),
    ],
)
def test_verify_image_names_what_was_changed(baked: Baked, run: Run, tmp_path: Path, file: str, said: str) -> None:
    made = f"bake-test:{Path(file).stem.lower()}"
    (tmp_path / "Dockerfile").write_text(f"FROM {baked.tag}\nUSER 0\nCOPY changed {file}\n")
    name = docker("create", baked.tag).stdout.strip()
    docker("cp", f"{name}:{file}", str(tmp_path / "changed"))
    docker("rm", "--volumes", name)
    data = (tmp_path / "changed").read_bytes()
    (tmp_path / "changed").write_bytes(
        data[:-3] + b" " + data[-3:] if file.endswith(".json") else data[:-1] + bytes([data[-1] ^ 1])
    )
    docker("build", "--tag", made, str(tmp_path))
    try:
        done = make(baked.tree, "verify-image", f"IMAGE={made}")
        assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr, (
            done.stdout + done.stderr
        )
    finally:
        docker("image", "rm", "--force", made)


def test_an_image_that_nobody_has_is_reported(baked: Baked) -> None:
    assert "WHICH IMAGE?" in make(baked.tree, "verify-image").stderr
    assert "NO SUCH IMAGE" in make(baked.tree, "verify-image", "IMAGE=bake-test/none:1").stderr
    done = make(baked.tree, "verify-image", "IMAGE=Makefile")
    assert "NOT AN IMAGE'S ARCHIVE" in done.stderr and "Traceback" not in done.stderr


# --- what does not get into an image ---


@pytest.fixture
def rooms(baked: Baked, tmp_path: Path) -> Path:
    """A tree with all rooms but the image, to be broken."""
    tree = tmp_path / "tree"
    shutil.copytree(baked.tree, tree, symlinks=True)
    shutil.rmtree(tree / "build/stories/torch-0.8.0-tp2-float16/image")
    return tree


def refuses(tree: Path, title: str, *words: str, **environment: str) -> str:
    tags = sorted(docker("images", "--quiet", "--no-trunc").stdout.split())
    done = make(tree, "image", *words, timeout=600, **environment)
    assert done.returncode != 0 and title in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert sorted(docker("images", "--quiet", "--no-trunc").stdout.split()) == tags
    assert not (tree / "build/stories/torch-0.8.0-tp2-float16/image").exists()
    return done.stderr


def test_a_room_that_was_changed_after_its_manifest_is_refused(rooms: Path) -> None:
    file = rooms / "build/stories/torch-0.8.0-tp2-float16/engines/rank1.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()  # a hard link: the checkpoint's file stays as it is
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "rank1.safetensors" in refuses(rooms, "ENGINES WAS CHANGED AFTER IT WAS MADE")


def test_a_missing_rank_file_is_refused(rooms: Path) -> None:
    (rooms / "build/stories/torch-0.8.0-tp2-float16/engines/rank1.safetensors").unlink()
    assert "no such file" in refuses(rooms, "ENGINES WAS CHANGED AFTER IT WAS MADE")


def test_a_base_that_is_not_here_is_not_fetched(rooms: Path) -> None:
    report = refuses(rooms, "THE BASE IMAGE IS NOT HERE", "BASE_IMAGE=bake-test.invalid/python:3.11")
    assert "docker pull bake-test.invalid/python:3.11" in report


def test_a_full_disk_is_told_and_leaves_nothing(rooms: Path) -> None:
    """A file may have 300 MB: docker cannot write the image."""
    command = ["bash", "-c", f"ulimit -f 300000; make PYTHON={shutil.which('python3')} image"]
    command[2] = f"ulimit -f 300000; make image PYTHON='{os.sys.executable}'"  # type: ignore[attr-defined]
    done = subprocess.run(command, cwd=rooms, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "NO SPACE LEFT" in done.stderr or "DISK IS FULL" in done.stderr, done.stdout + done.stderr
    assert not (rooms / "build/stories/torch-0.8.0-tp2-float16/image").exists()
    assert not list((rooms / "build/stories/torch-0.8.0-tp2-float16/image.partial").glob("*.tar"))


# --- docker/compose.yaml ---


@pytest.fixture
def compose(baked: Baked) -> Iterator[Callable[..., str]]:
    """docker compose with docker/compose.yaml on free ports; taken down afterwards. `compose.ports` are the ports."""
    program = next((words for words in (["docker", "compose"], ["docker-compose"]) if shutil.which(words[0]) and
                    subprocess.run([*words, "version"], capture_output=True, check=False).returncode == 0), None)  # fmt: skip
    if program is None:
        pytest.skip("docker compose is not installed")
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "OPENAI_PORT", "PROMETHEUS_PORT")
    ports = dict(zip(names, map(str, free_ports(len(names)))))
    settings = {**ports, "IMAGE": baked.tag, "COMPOSE_PROJECT_NAME": f"baketest{os.getpid()}"}

    def say(*words: str, **more: str) -> str:
        command = [*program, "--file", str(ROOT / "docker/compose.yaml"), *words]
        done = subprocess.run(
            command, env={**os.environ, **settings, **more}, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    say.ports = ports  # type: ignore[attr-defined]
    yield say
    say("--profile", "metrics", "down", "--volumes")


def test_compose_brings_it_up_healthy_and_down(compose: Any) -> None:
    compose("up", "--detach")
    [name] = compose("ps", "--quiet").split()
    container = Container(name)
    container.wait_until_ready()
    answer = ask(int(compose.ports["HTTP_PORT"]), text_input="Once upon a time", max_tokens=8)
    assert answer["text_output"].startswith(STORY[:20])
    assert container.inspect()["State"]["Health"]["Status"] in ("starting", "healthy")
    compose("stop")
    assert container.inspect()["State"]["ExitCode"] == 0


def test_compose_brings_a_prometheus_that_has_the_servers_metrics(baked: Baked, compose: Any, tmp_path: Path) -> None:
    """Prometheus is Debian's program in our own image: its makers' image cannot be had without a registry."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("the program prometheus is not installed")
    shutil.copy2(program, tmp_path / "prometheus")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {baked.tag}\nCOPY prometheus /bin/prometheus\nHEALTHCHECK NONE\nENTRYPOINT []\n"
        'CMD ["/bin/prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/tmp/prometheus"]\n'
    )
    image = f"baketest-prometheus:{os.getpid()}"
    docker("build", "--tag", image, str(tmp_path))
    try:
        compose("--profile", "metrics", "up", "--detach", PROMETHEUS_IMAGE=image)
        [name] = compose("ps", "--quiet", "server").split()
        Container(name).wait_until_ready()
        ask(int(compose.ports["HTTP_PORT"]), text_input="Once upon a time", max_tokens=8)

        def scraped() -> object:
            query = 'nv_inference_request_success{model="ensemble"}'
            url = f"http://127.0.0.1:{compose.ports['PROMETHEUS_PORT']}/api/v1/query?query={urllib.parse.quote(query)}"
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return [
                        found["value"][1] for found in json.load(answer)["data"]["result"] if int(found["value"][1])
                    ]
            except OSError:
                return None

        until(scraped, "Prometheus does not have the server's metrics")
        url = f"http://127.0.0.1:{compose.ports['PROMETHEUS_PORT']}/api/v1/rules"
        with urllib.request.urlopen(url, timeout=10) as answer:
            rules = [rule["name"] for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
        assert {"BakeDown", "BakeNotReady", "BakeQueueGrowing"} <= set(rules)
    finally:
        compose("--profile", "metrics", "down", "--volumes", PROMETHEUS_IMAGE=image)
        docker("rmi", "--force", image, check=False)
