"""The supervisor: ready means ready, a fault of one rank ends all ranks and is named, SIGTERM lets requests finish,
no process stays."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from project import make
from server import Pid, Served, alive, end_tree_of, free_ports, processes_below, serve
from triton_requests import Stream
from waiting import until

from scripts import reports
from scripts.serving import pulse
from scripts.serving.launch import Settings, mpirun_command, server_environment
from scripts.serving.ranks import NO_OWN_GPU, OUT_OF_MEMORY
from scripts.serving.toolbox import Toolbox, find_toolbox, open_mpi_major
from scripts.serving.triton_client import ints, is_final, texts, yes

LONG: dict[str, Any] = {"text_input": "Once upon a time", "max_tokens": 400, "end_id": -1}


@pytest.fixture
def server(tree: Path) -> Iterator[Served]:
    """A server of the test's own, to be broken."""
    running = serve(tree)
    below = processes_below(running.process.pid)
    yield running
    end_tree_of(running.process)
    for pid in below:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def process_of(running: Served, rank: int, model: str = "") -> Pid:
    """The pid of a rank's tritonserver, or of the Python process of one of its models."""
    for pid, name in processes_below(running.process.pid).items():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        of_rank = f"OMPI_COMM_WORLD_RANK={rank}".encode() in environment
        if of_rank and (f"/{model}/" in command and "stub" in command if model else name == "tritonserver"):
            return pid
    raise AssertionError(f"no process of rank {rank} {model}")


@pytest.mark.parametrize(
    ("rank", "model", "number", "seen"),
    [
        (1, "", signal.SIGKILL, "ended"),
        (1, "tensorrt_llm", signal.SIGKILL, "ended"),
        (0, "tensorrt_llm", signal.SIGKILL, "ended"),
        (1, "tensorrt_llm", signal.SIGSTOP, "stopped|no longer answers"),
        (0, "", signal.SIGSTOP, "stopped"),
    ],
)
def test_a_rank_that_dies_or_stops_ends_everything_and_is_named(
    server: Served, rank: int, model: str, number: signal.Signals, seen: str
) -> None:
    below = processes_below(server.process.pid)
    answers: list[str] = []
    # in the middle of a request, where the other ranks wait for the one that is gone
    before = server.metric("torch_engine_steps")
    client = threading.Thread(target=lambda: answers.append(str(_post_quietly(server))), daemon=True)
    client.start()
    until(lambda: server.metric("torch_engine_steps") > before, "the request has not begun")
    os.kill(process_of(server, rank, model), number)
    began = time.monotonic()
    status = server.process.wait(30)
    seconds = time.monotonic() - began
    text = "".join(server.lines)
    assert status != 0
    assert re.search(rf"RANK {rank} FAILED WHILE SERVING", text), text
    assert re.search(seen, text) and f"The last lines of rank {rank}" in text, text
    assert text.rstrip().splitlines()[-2].startswith("    make serve") or "    make serve" in text
    assert seconds < 10
    assert {pid: name for pid, name in below.items() if alive(pid)} == {}


def _post_quietly(server: Served) -> object:
    try:
        return server.post("ensemble", **LONG)
    except OSError as error:
        return error


def test_sigterm_lets_a_stream_finish_and_exits_0(server: Served) -> None:
    events: list[dict[str, Any]] = []
    before = server.metric("torch_engine_steps")
    client = threading.Thread(target=lambda: events.extend(server.stream("ensemble", **LONG, stream=True)))
    client.start()
    until(lambda: server.metric("torch_engine_steps") > before, "the request has not begun")
    below = processes_below(server.process.pid)
    environment = Path(f"/proc/{process_of(server, 0)}/environ").read_bytes().decode().split("\0")
    folders = [entry.rsplit("/", 1)[1] for entry in environment if entry.startswith("TMPDIR=/dev/shm/")]
    assert len(folders) == 1 and (Path("/dev/shm") / folders[0]).is_dir()
    assert server.end() == 0
    client.join(20)
    assert len("".join(event["text_output"] for event in events)) > 1000
    assert "error" not in events[-1]
    assert {pid: name for pid, name in below.items() if alive(pid)} == {}
    # mpirun's and the Python backend's shared memory lies in the run's folder or carries its name
    assert [name for name in os.listdir("/dev/shm") if name.startswith(folders[0])] == []


def test_ctrl_c_lets_grpc_streams_finish_and_goes_without_those_held_open(server: Served) -> None:
    """Triton 2.51 does not count answers over gRPC,
    and a client that only holds a stream open keeps it from ever exiting."""
    with ExitStack() as stack:
        held, *running = [stack.enter_context(closing(Stream(server))) for _ in range(17)]
        held.send("ensemble", text_input=texts("Once upon a time"), max_tokens=ints(3))
        assert len(list(held.until_final())) == 1
        # so many that their answers take longer than the models' end
        for stream in running:
            stream.send(
                "ensemble", text_input=texts("Once upon a time"), max_tokens=ints(480), end_id=ints(-1), stream=yes()
            )
        for stream in running:
            assert not is_final(stream.next())
        assert server.end(signal.SIGINT) == 0
        for stream in running:
            assert list(stream.until_final()), "what came after the first token, without an error"


def test_a_killed_supervisor_takes_its_ranks_with_it(server: Served) -> None:
    below = {pid: name for pid, name in processes_below(server.process.pid).items() if name != "make"}
    os.kill(server.supervisor, signal.SIGKILL)
    until(lambda: not [pid for pid in below if alive(pid)], "the end of all ranks")


def test_an_occupied_port_is_reported_before_anything_is_loaded(tree: Path, served: Served) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        http, metrics = free_ports(2)
        done = make(tree, "serve", f"HTTP_PORT={http}", f"GRPC_PORT={port}", f"METRICS_PORT={metrics}")
    assert done.returncode != 0
    assert f"PORT {port} CANNOT BE USED" in done.stderr and "Address already in use" in done.stderr
    assert "starting" not in done.stdout
    assert done.stderr.rstrip().splitlines()[-2].strip() == "" or "make serve" in done.stderr


def test_one_large_request_does_not_end_the_server(served: Served) -> None:
    """Triton 2.51 with the usual stack of 8 MB dies of a request of 5 MB (server issue 5840)."""
    for size in (5_000_000, 20_000_000):
        answer = served.post("ensemble", text_input="x" * size, max_tokens=5)
        assert answer["status"] in (400, 500) and "error" in answer
    deep = "[" * 100_000 + "]" * 100_000
    request = urllib.request.Request(
        f"{served.http}/v2/models/ensemble/generate", data=f'{{"text_input": {deep}, "max_tokens": 5}}'.encode()
    )
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=60)
    assert served.post("ensemble", text_input="Once", max_tokens=3)["status"] == 200


def caught(starting: Served, number: signal.Signals, model: str = "", maps: str = "") -> bool:
    """Signal rank 1's server, or the process of one of its models once it maps this library; False if it is not there yet."""
    try:
        pid = process_of(starting, 1, model)
        if maps in Path(f"/proc/{pid}/maps").read_text():
            os.kill(pid, number)
            return True
    except (AssertionError, OSError):
        pass
    return False


def test_a_rank_that_is_killed_or_stopped_while_starting_is_named(tree: Path, served: Served) -> None:
    for number, seen in ((signal.SIGKILL, "ended"), (signal.SIGSTOP, "is stopped")):
        starting = serve(tree, wait=False)
        try:
            until(lambda starting=starting, number=number: caught(starting, number))  # type: ignore[misc]
            assert starting.process.wait(30) != 0
            starting.reader.join(5)
            text = "".join(starting.lines)
            assert "RANK 1 FAILED WHILE STARTING" in text and seen in text, text
        finally:
            end_tree_of(starting.process)


def test_a_start_is_tried_again_if_triton_gave_up_on_a_model(tree: Path, served: Served) -> None:
    """What a busy machine does to a start: Triton takes a model's process for dead. Here it is dead, once."""
    starting = serve(tree, wait=False)
    try:
        # it is at work, and was seen
        until(lambda: caught(starting, signal.SIGSEGV, "tensorrt_llm", maps="libtorch"))
        assert starting.ready.wait(120)
        text = "".join(starting.lines)
        assert text.count("starting again") == 1 and "ready after" in text, text
        assert starting.post("ensemble", text_input="Once", max_tokens=3)["status"] == 200
        assert starting.end() == 0
    finally:
        end_tree_of(starting.process)


def test_a_rank_that_stops_while_ending_is_no_success(server: Served) -> None:
    before = server.metric("torch_engine_steps")
    client = threading.Thread(target=lambda: _post_quietly(server), daemon=True)
    client.start()
    until(lambda: server.metric("torch_engine_steps") > before, "the request has not begun")
    follower = process_of(server, 1)
    os.kill(server.supervisor, signal.SIGTERM)
    os.kill(follower, signal.SIGSTOP)
    assert server.process.wait(30) != 0
    server.reader.join(5)
    assert "RANK 1 FAILED WHILE ENDING" in "".join(server.lines)


def test_a_rank_that_ended_before_the_end_was_asked_for_is_no_success(server: Served) -> None:
    """`make demo` asks for the end as soon as its stream breaks, often before the supervisor has looked again."""
    follower = process_of(server, 1)
    os.kill(follower, signal.SIGKILL)
    until(lambda: not alive(follower))
    os.kill(server.supervisor, signal.SIGTERM)
    assert server.process.wait(30) != 0
    server.reader.join(5)
    assert "RANK 1 FAILED WHILE SERVING" in "".join(server.lines)


def test_a_second_server_of_the_same_rooms_has_a_log_of_its_own(tree: Path, served: Served) -> None:
    second = serve(tree)
    try:
        logs = {
            path.name: path.read_text() for path in (tree / "build/stories/torch-0.8.0-tp2-float16").glob("serve*.log")
        }
        assert f"127.0.0.1:{served.http_port}" in logs["serve.log"]
        assert f"127.0.0.1:{second.http_port}" in logs[f"serve-{second.http_port}.log"]
        assert second.end() == 0
    finally:
        end_tree_of(second.process)


def test_an_address_of_another_machine_is_told_so(tree: Path, served: Served) -> None:
    done = make(tree, "serve", "HOST=203.0.113.7")
    assert done.returncode != 0
    assert "NOT AN ADDRESS OF THIS MACHINE" in done.stderr and " HOST=127.0.0.1\n" in done.stderr


def test_it_listens_on_loopback_only(served: Served) -> None:
    """tritonserver's ports; mpirun's own control channel is Open MPI's (README, "What listens where")."""
    inodes: set[str] = set()
    for pid, name in processes_below(served.process.pid).items():
        if name in ("tritonserver", "triton_python_b"):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    target = os.readlink(fd)
                except OSError:
                    continue
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1])
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:")
    assert len(listening) == 3
    assert all(address.startswith(loopback) for address in listening), listening


def test_a_start_that_takes_too_long_explains_itself(tree: Path, served: Served) -> None:
    [variant] = [path.parent for path in (tree / "build/stories").glob("torch-0.8.0-tp2-float16/model_repo")]
    http, grpc, metrics = free_ports(3)
    code = "from scripts import reports, room, serve; room.SPEAK_SECONDS = 0.05; reports.run(serve.main)"
    command = [sys.executable, "-c", code, "--root", str(variant), "--startup-seconds", "0.3", "--log", "-"]
    ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    done = subprocess.run([*command, *ports], cwd=tree, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "THE SERVER DID NOT BECOME READY" in done.stderr and "make doctor" in done.stderr
    assert "serve       waiting for all ranks to load their engines and the text models" in done.stderr


def test_a_room_that_was_changed_is_not_served(own_tree: Path) -> None:
    assert make(own_tree, "model_repo").returncode == 0
    [rank1] = (own_tree / "build/stories").glob("*/engines/rank1.safetensors")
    data = rank1.read_bytes()
    rank1.unlink()
    rank1.write_bytes(data[:-8])
    done = make(own_tree, "serve")
    assert done.returncode != 0
    assert (
        "ENGINES WAS CHANGED" in done.stderr
        and f"{len(data)} bytes" in done.stderr
        and f"{len(data) - 8} bytes" in done.stderr
    )


TOOLBOX = Toolbox(Path("/opt/tritonserver/bin/tritonserver"), None, [])


def test_the_mpirun_line_is_nvidias_leader_mode() -> None:
    """tensorrtllm_backend v0.8.0, scripts/launch_triton_server.py, for --world_size 2."""
    settings = Settings(Path("."), "127.0.0.1", 8000, 8001, 8002)
    command = " ".join(mpirun_command(2, TOOLBOX, settings))
    assert "shm-region-prefix-name=bake-7-prefix1_" in " ".join(mpirun_command(2, TOOLBOX, settings, "bake-7-"))
    leader, follower = command.split(" : ")
    assert leader.startswith("mpirun --allow-run-as-root")
    for part in (
        "-n 1 /opt/tritonserver/bin/tritonserver --model-repository=model_repo",
        "--disable-auto-complete-config",
    ):
        assert part in leader and part in follower
    assert "--http-port=8000" in leader and "--grpc-port=8001" in leader and "--metrics-port=8002" in leader
    assert "--backend-config=python,shm-region-prefix-name=prefix0_" in leader
    assert "--backend-config=python,shm-region-prefix-name=prefix1_" in follower
    assert "--model-control-mode=explicit --load-model=tensorrt_llm" in follower and "--load-model" not in leader
    assert all(f"--allow-{port}=false" in follower for port in ("http", "grpc", "metrics"))


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_one_server_per_rank(world_size: int) -> None:
    command = mpirun_command(world_size, TOOLBOX, Settings(Path("."), "127.0.0.1", 8000, 8001, 8002))
    assert command.count("-n") == world_size and command.count(":") == world_size - 1


def test_ranks_yield_where_they_leave_no_core_to_the_others() -> None:
    """A rank that waits in MPI spins; tritonserver and the text models need a core too."""

    def environment(ranks: int, cores: int) -> dict[str, str]:
        return server_environment({}, TOOLBOX, Path("/tmp/x"), ranks, cores)

    assert environment(4, 2)["OMPI_MCA_mpi_yield_when_idle"] == environment(2, 2)["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert "OMPI_MCA_mpi_yield_when_idle" not in environment(2, 8)


def test_nvidias_older_open_mpi_is_spoken_to_in_its_own_words() -> None:
    """Open MPI 4.1 (HPC-X) calls the tags and the way through shared memory otherwise; 5 knows neither of its names."""
    older = replace(TOOLBOX, open_mpi=4)
    settings = Settings(Path("."), "127.0.0.1", 8000, 8001, 8002)
    assert "--tag-output" in mpirun_command(2, older, settings) and "--output" not in mpirun_command(2, older, settings)
    assert "--tag-output" not in mpirun_command(2, TOOLBOX, settings)
    environment = server_environment({}, older, Path("/tmp/x"), 2, 2)
    assert environment["OMPI_MCA_btl"] == "self,vader"
    assert environment["OMPI_MCA_btl_vader_backing_directory"] == "/tmp/x"
    assert server_environment({}, TOOLBOX, Path("/tmp/x"), 2, 2)["OMPI_MCA_btl"] == "self,sm"
    assert open_mpi_major() == 5


@pytest.mark.parametrize("stand_ins", ["", "docker/rehearsal/backends"])
def test_no_library_has_to_be_loaded_from_dev_shm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_ins: str
) -> None:
    """docker mounts it noexec: the server could load no model in a container."""
    monkeypatch.setenv("REHEARSAL_BACKENDS", stand_ins)
    toolbox = find_toolbox(tmp_path)
    assert toolbox.backends is not None
    for file in toolbox.backends.glob("python/*"):
        assert file.is_file() and tmp_path not in file.resolve().parents


def test_ports_must_differ_and_be_ports() -> None:
    with pytest.raises(reports.Problem, match="two ports are the same"):
        Settings(Path("."), "127.0.0.1", 8000, 8000, 8002)
    with pytest.raises(reports.Problem, match="HTTP_PORT cannot be 70000"):
        Settings(Path("."), "127.0.0.1", 70000, 8001, 8002)


@pytest.mark.parametrize(
    "line",
    [
        "Internal: TritonModelException: out of GPU memory: NVIDIA H100 has 85.0 GB, 13.5 GB of them weights, 2.1 GB "
        "free; a"
        " step of MAX_NUM_TOKENS=8192 takes 3.2 GB, the cache of one request of MAX_SEQ_LEN=4096 2.2 GB: lower "
        "MAX_NUM_TOKENS or"
        " MAX_SEQ_LEN, or raise TP",
        "out of GPU memory: NVIDIA H100 has 85.0 GB, 14.2 GB of them free at the start; the weights of this rank take "
        "137.9 GB: raise TP, or lower MAX_BATCH_SIZE",
    ],
)
def test_a_gpu_that_is_too_small_is_a_report_with_its_numbers(line: str) -> None:
    """The lines are those of gpu_llama.py and engine.py."""
    found = OUT_OF_MEMORY.search(f"rank 0: error: {line}\n    At: ...")
    assert found
    report = reports.serving.gpu_memory_too_small(0, found[1], ["pid 41 (python3) on GPU 1: 71.3 GB"]).report()
    assert "pid 41 (python3) on GPU 1: 71.3 GB" in report
    assert "OUT OF GPU MEMORY" in report and "85.0 GB" in report and "raise TP" in " ".join(report.split())
    assert report.rstrip().splitlines()[-1].strip().startswith("make serve MAX_NUM_TOKENS=2048")


def test_a_hidden_gpu_is_a_report_with_both_numbers() -> None:
    """The line is that of ranks.py in the torch engine."""
    found = NO_OWN_GPU.search("TritonModelException: rank 1 needs its own GPU; this host has 1\n    At: ...")
    assert found and found[2] == "1"
    report = reports.serving.ranks_without_gpu(2, int(found[2]), "0").report()
    assert "has 2 ranks" in report and "PyTorch sees 1, and CUDA_VISIBLE_DEVICES is 0." in report
    assert report.rstrip().splitlines()[-1].strip().startswith("make serve TP=1")


def test_a_machine_that_was_frozen_has_no_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot, a closed laptop: the clock is far ahead and the question under way is lost;
    the next one is answered."""
    now, answers = [1000.0], [False, True, False, False, False]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(pulse, "http_ok", lambda *_: answers.pop(0))
    listened = pulse.Pulse()
    now[0] += 3600
    assert not listened.silent
    listened.ask("")
    assert not listened.silent, "one question was lost"
    listened.ask("")
    for silent in (False, True):
        now[0] += 4.5
        listened.ask("")
        assert listened.silent == silent
