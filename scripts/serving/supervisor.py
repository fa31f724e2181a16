"""Start, wait until ready, watch, end: the ranks and the endpoint together."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from scripts import reports, room
from scripts.nvidia import gpus
from scripts.serving import checks, collector, processes
from scripts.serving.endpoint import TRACING_MODULES, Endpoint, openai_lacks
from scripts.serving.flag import Flag
from scripts.serving.host import (
    check_operating,
    check_ports,
    check_rooms,
    check_shared_memory,
    check_temporary,
    raise_stack_limit,
    reserve_ports,
)
from scripts.serving.launch import CUT_SECONDS, Settings, mpirun_command, server_environment
from scripts.serving.output import never_fail_to_print, open_log
from scripts.serving.pulse import SILENT_SECONDS, Pulse, http_ok
from scripts.serving.ranks import UNLOAD_SECONDS, Ranks
from scripts.serving.toolbox import Toolbox, check_mpirun, find_toolbox

# A start fails if a process of a model does not run for a second (ranks.py, GAVE_UP)
START_TRIES = 2
PROBE = {"text_input": "Hello", "max_tokens": 1}


def check_grpc_client() -> None:
    """A Problem without a gRPC client: the text models ask tensorrt_llm over it
    (model_repo_template/tensorrt_llm_bls/1/engine_link.py)."""
    if importlib.util.find_spec("tritonclient") is None:
        raise reports.packages.no_grpc_client()


class Supervisor:
    """Start, wait until ready, watch, end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.asked_to_end, self.loaded, self.answered = Flag(), threading.Event(), threading.Event()
        self.pulse = Pulse()
        self.endpoint: Endpoint | None = None

    def run(self) -> int:
        """Serve until the user ends it (returns 0) or until a rank fails (raises its Problem)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.asked_to_end.set())
        never_fail_to_print()
        processes.adopt_orphans()
        raise_stack_limit()
        started = time.monotonic()
        world_size = check_rooms(self.settings.root)
        check_mpirun()
        check_grpc_client()
        self.reserved = reserve_ports(self.settings)
        check_ports(self.settings)
        check_temporary()
        check_operating(self.settings)
        check_shared_memory(world_size)
        with tempfile.TemporaryDirectory(prefix="bake-", dir="/dev/shm", ignore_cleanup_errors=True) as folder:
            toolbox = find_toolbox(Path(folder))
            # the endpoint's secrets are none of Triton's business
            secret = ("BAKE_API_KEY", *collector.HEADERS)
            inherited = {name: value for name, value in os.environ.items() if name not in secret}
            environment = server_environment(
                inherited, toolbox, Path(folder), world_size, os.cpu_count() or 1, self.settings.root
            )
            environment["BAKE_GRPC_ADDRESS"] = self.settings.grpc_address
            opens = self._opens_endpoint(toolbox)
            log = open_log(self.settings.log, self.settings.http_port)
            try:
                room.say(
                    "serve",
                    f"starting {world_size} ranks"
                    + (f"; their log: {reports.shown(str(log.path))}" if self.settings.log else ""),
                )
                command = mpirun_command(
                    world_size, toolbox, self.settings, f"{Path(folder).name}-", secrets.token_hex(16)
                )
                checks.check(self.settings.root / "engines", environment, Path(folder), self.asked_to_end)
                ranks = Ranks(command, environment, self.settings.root, Path(folder), log)
                try:
                    if opens:
                        self.endpoint = Endpoint(self.settings, os.environ, Path(folder), log)
                    with room.waiting("serve", self._awaited):
                        self._wait_until_ready(ranks, world_size, started)
                    if not self.asked_to_end.is_set():
                        seconds = time.monotonic() - started
                        self._announce(world_size, seconds)
                        self._tell_ready(seconds)
                        self._watch(ranks)
                        # A client that lost its stream (make demo) may end the server before we see why the stream was
                        # lost.
                        if failure := ranks.settled_failure():
                            raise reports.serving.rank_failed(*failure, "while serving", ranks.tail(failure[0]))
                        self._be_lame(ranks)
                    # clients may send requests once the models are loaded,
                    # a moment before the server calls itself ready
                    if self.loaded.is_set():
                        drain_seconds = self.settings.operating.drain_seconds
                        room.say("serve", f"ending: running requests have {drain_seconds} s to finish")
                        if not self._drain(ranks):
                            room.say("serve", f"requests that needed more than {drain_seconds} s were cut off")
                finally:
                    if self.endpoint is not None:
                        self.endpoint.end()
                    ranks.end()
            finally:
                log.close()
        room.say("serve", "ended")
        return 0

    def _opens_endpoint(self, toolbox: Toolbox) -> bool:
        """Whether the OpenAI-compatible endpoint can be opened. NVIDIA's images may lack its packages;
        then a line says so."""
        missing = openai_lacks() if self.settings.openai_port is not None else []
        traced = self.settings.operating.traces == "on" and not missing
        if traced and (lacking := openai_lacks(TRACING_MODULES)):
            raise reports.packages.openai_package_missing(lacking[0])
        if missing and toolbox.backends is not None and "REHEARSAL_BACKENDS" not in os.environ:
            raise reports.packages.openai_package_missing(missing[0])
        if missing:
            room.say("serve", f"no OpenAI endpoint: this image's Python lacks {', '.join(missing)} (docker/README.md)")
        return self.settings.openai_port is not None and not missing

    def _be_lame(self, ranks: Ranks) -> None:
        """Announce that this server is ending, and serve on until load balancers have noticed.

        Triton cannot announce it: it is ready until SIGTERM, and then refuses all requests at once,
        also those of the endpoint.
        """
        seconds = self.settings.operating.lame_duck_seconds
        if self.endpoint is not None:
            self.endpoint.tell_ending()
        if seconds:
            room.say("serve", f"/health says 503; new requests are still served for {seconds} s")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if failure := ranks.failure():
                raise reports.serving.rank_failed(*failure, "while ending", ranks.tail(failure[0]))
            if self.endpoint is not None and (event := self.endpoint.failure()):
                raise reports.serving.endpoint_failed(event, "while ending", list(self.endpoint.last_lines))
            time.sleep(0.1)

    def _drain(self, ranks: Ranks) -> bool:
        """Let running requests finish, the endpoint's first; True if none was cut off."""
        deadline = time.monotonic() + self.settings.operating.drain_seconds + CUT_SECONDS
        if self.endpoint is not None:
            self.endpoint.process.terminate()  # it takes no new requests and ends after its last one
            while self.endpoint.process.poll() is None and time.monotonic() < deadline:
                if failure := ranks.failure():
                    raise reports.serving.rank_failed(*failure, "while ending", ranks.tail(failure[0]))
                time.sleep(0.05)
        finished = self.endpoint is None or self.endpoint.process.poll() == 0
        return ranks.drain(max(UNLOAD_SECONDS, deadline - time.monotonic())) and finished

    def _awaited(self) -> str:
        """What the start waits for, in words."""
        if self.answered.is_set() or not self.loaded.is_set():
            return "all ranks to load their engines and the text models"
        return "the first token through all ranks"

    def _wait_until_ready(self, ranks: Ranks, world_size: int, started: float) -> None:
        """Ready: a token came out of all ranks."""
        tries = 1
        threading.Thread(target=self._ask_until_answered, daemon=True).start()
        while not self.asked_to_end.wait(0.1):
            if self.answered.is_set():
                return
            if failure := ranks.failure():
                if "stopped" not in failure[1]:
                    ranks.hear_out()
                if ranks.out_of_memory:
                    raise reports.serving.gpu_memory_too_small(*ranks.out_of_memory, gpus.holders(ranks.session))
                if ranks.gpus_seen is not None:
                    hidden = ranks.environment.get("CUDA_VISIBLE_DEVICES")
                    raise reports.serving.ranks_without_gpu(world_size, ranks.gpus_seen, hidden)
                if ranks.model_lost and tries < START_TRIES:
                    room.say("serve", "a model's process was lost; starting again (is this machine busy?)")
                    tries += 1
                    self.loaded.clear()
                    ranks.start_again()
                    continue
                raise reports.serving.rank_failed(failure[0], failure[1], "while starting", ranks.tail(failure[0]))
            if self.endpoint is not None and self.endpoint.process.poll() is not None:
                event = self.endpoint.failure() or ""
                raise reports.serving.endpoint_failed(event, "while starting", list(self.endpoint.last_lines))
            if time.monotonic() - started > self.settings.startup_seconds:
                tails = {rank: ranks.tail(rank)[-3:] for rank in sorted(ranks.last_lines)}
                raise reports.serving.start_too_slow(self.settings.startup_seconds, tails)

    def _ask_until_answered(self) -> None:
        while not self.asked_to_end.wait(0.1) and not self.answered.is_set():
            if http_ok(f"{self.settings.url}/v2/health/ready", None, 2):
                self.loaded.set()
                if http_ok(f"{self.settings.url}/v2/models/ensemble/generate", PROBE, 30) and self._endpoint_answers():
                    self.answered.set()

    def _endpoint_answers(self) -> bool:
        """Whether a token comes through the endpoint, if there is one."""
        return self.endpoint is None or http_ok(f"{self.settings.openai_url}/health", None, 30)

    def _announce(self, world_size: int, seconds: float) -> None:
        settings = replace(self.settings, host=self.settings.shown_host or self.settings.host)
        host = settings.reached_at
        room.say("serve", f"ready after {seconds:.1f} s: a token went through {world_size} ranks")
        print(
            f"  HTTP      {settings.url}/v2/models/ensemble/generate\n"
            f"  gRPC      {host}:{settings.grpc_port}\n"
            f"  metrics   http://{host}:{settings.metrics_port}/metrics\n"
            + (
                f"  OpenAI    {settings.openai_url}/v1   (a page to try it: {settings.openai_url})\n"
                if self.endpoint
                else ""
            )
            + "\n"
            f"  curl -s {settings.url}/v2/models/ensemble/generate -d "
            f"""'{{"text_input": "Once upon a time", "max_tokens": 48}}'\n""",
            flush=True,
        )

    def _tell_ready(self, seconds: float) -> None:
        """The facts of _announce's lines, for programs."""
        if self.settings.ready_file is not None:
            endpoint_pid = None if self.endpoint is None else self.endpoint.process.pid
            about = {"seconds": seconds, "pid": os.getpid(), "endpoint_pid": endpoint_pid, **self.settings.ports}
            room.write_synced(self.settings.ready_file, json.dumps(about).encode())

    def _watch(self, ranks: Ranks) -> None:
        """Watch until the server is told to end: every process of every rank must run, and rank 0 must answer."""
        self._listen(self.pulse, f"{self.settings.url}/v2/health/live")
        if self.endpoint is not None:
            self.endpoint.listen()
        while not self.asked_to_end.wait(0.25):
            ranks.keep_guard()
            failure = ranks.failure()
            if failure is None and self.pulse.silent:
                failure = (0, f"its HTTP port has not answered for {SILENT_SECONDS:.0f} s")
            if failure:
                raise reports.serving.rank_failed(failure[0], failure[1], "while serving", ranks.tail(failure[0]))
            if self.endpoint is not None and (event := self.endpoint.failure()):
                raise reports.serving.endpoint_failed(event, "while serving", list(self.endpoint.last_lines))

    def _listen(self, pulse: Pulse, url: str) -> None:
        """Ask the port every second, in a separate thread."""

        def ask() -> None:
            while not self.asked_to_end.wait(1):
                pulse.ask(url)

        pulse.heard()
        threading.Thread(target=ask, daemon=True).start()
