"""/metrics, LOG=json, traces, keys and their limits, aliases, CORS: one server with two workers,
operated as an operator would."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from collector import Collector, values_of
from project import ROOT, copy_of_project
from prometheus_client.parser import text_string_to_metric_families
from server import Served, end_tree_of, processes_below, serve
from triton_requests import ask as triton_ask
from triton_requests import core_request
from tritonclient.utils import InferenceServerException
from waiting import until

from scripts.openai.engine import Stream
from scripts.openai.keys import Key, Keys, parsed
from scripts.openai.metrics import PAGE_SECONDS, Counts, Page, route_of, said_by
from scripts.serving.triton_client import ints

# the endpoint alone, while Triton stays on loopback's usual address
HOST = "127.0.0.3"
AGREED = json.loads((ROOT / "docker/dashboards/metrics.json").read_text())["endpoint"]["metrics"]
KEYS = "old-key\nana: key-of-ana\nbo key-of-bo requests=1\ncy: key-of-cy tokens=30\n"
ORIGIN = "https://chat.example"
SECRET = "for-the-collector-alone"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Served]:
    """The environment names a proxy that does not exist."""
    tree = copy_of_project(tmp_path_factory.mktemp("operated") / "tree")
    environment = {
        **os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_HEADERS": f"x-secret={SECRET}",
        "OTEL_BSP_SCHEDULE_DELAY": "100", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "",
    }  # fmt: skip
    (tree / "keys").write_text(KEYS)
    running = serve(
        tree, "TP=1", "MAX_BATCH_SIZE=2", "OPENAI_WORKERS=2", "API_KEY_FILE=keys", "LOG=json", f"OPENAI_HOST={HOST}",
        "MODEL_ALIASES=gpt-x,org/tale", f"CORS_ORIGINS={ORIGIN}", "TRACES=on",
        environment=environment,
    )  # fmt: skip
    try:
        yield running
        assert running.end() == 0, "".join(running.lines)
    finally:
        end_tree_of(running.process)


def ask(
    server: Served, path: str, body: object = None, key: str = "old-key", method: str = "", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request on its own connection, so that both workers get some."""
    link = http.client.HTTPConnection(HOST, server.openai_port, timeout=60)
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    given.update({name.replace("_", "-"): value for name, value in headers.items()})
    link.request(method or ("GET" if body is None else "POST"), path, None if body is None else json.dumps(body), given)
    answer = link.getresponse()
    said = answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    link.close()
    return said


def question(**more: Any) -> dict[str, Any]:
    return {"model": "stories", "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0, **more}


def scraped(server: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and labels."""
    status, headers, text = ask(server, "/metrics", key="")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(text.decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(server: Served, name: str, **labels: str) -> float:
    found = scraped(server)
    return sum(got for (one, own), got in found.items() if one == name and set(labels.items()) <= set(own))


def lines_of(server: Served) -> list[dict[str, Any]]:
    """Those that are whole: the last one may be half written."""
    log = next(server.tree.glob("build/*/*/serve.log")).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in log if line.startswith("{") and line.endswith("\n")]


def line_of(server: Served, request_id: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = [line for line in lines_of(server) if line["request_id"] == request_id]
        return bool(found)

    until(there)
    assert len(found) == 1
    return found[0]


# --- /metrics ---


def test_the_page_has_what_was_agreed_and_adds_up_over_workers(operated: Served) -> None:
    assert value(operated, "bake_generation_tokens_total") == 0, "there from the start"
    usage = []
    for number in range(12):
        answer = json.loads(ask(operated, "/v1/completions", question(n=1 + number % 2, prompt="Once upon a time"))[2])
        usage.append(answer["usage"])
    for _ in range(3):
        assert ask(operated, "/health", key="")[0] == 200
    assert ask(operated, "/v1/models", key="wrong")[0] == 401
    assert ask(operated, "/v1/models/what-a-client-typed")[0] == 404
    assert ask(operated, "/typed/by/a/client")[0] == 404
    until(lambda: value(operated, "bake_http_requests_total", route="other", status="404") == 1)
    threading.Event().wait(2 * PAGE_SECONDS)  # each worker has its own page, so old at most
    found = scraped(operated)
    text = ask(operated, "/metrics", key="")[2].decode()
    for metric in AGREED:
        samples = [own for one, own in found if one in (metric["name"], metric["name"] + "_count")]
        assert samples, metric["name"]
        assert all(sorted(metric["labels"]) == sorted(name for name, _ in own) for own in samples), metric
        base = metric["name"][:-6] if metric["type"] == "counter" else metric["name"]
        assert f"# TYPE {base}{'_total' if metric['type'] == 'counter' else ''} {metric['type']}" in text
    assert "typed" not in text and "old-key" not in text
    total = sum(one["completion_tokens"] for one in usage)
    assert value(operated, "bake_generation_tokens_total") == total
    assert value(operated, "bake_prompt_tokens_total") == sum(one["prompt_tokens"] for one in usage)
    assert value(operated, "bake_time_to_first_token_seconds_count") == 18
    assert value(operated, "bake_request_queue_time_seconds_count") == 18
    assert value(operated, "bake_e2e_request_latency_seconds_count") == 12
    assert value(operated, "bake_request_success_total", finished_reason="length") == 18
    assert value(operated, "bake_http_requests_total", route="/v1/completions", status="200") == 12
    assert value(operated, "bake_http_requests_total", route="/health", status="200") >= 3
    assert value(operated, "bake_http_requests_total", route="/v1/models", status="401") == 1
    assert value(operated, "bake_http_requests_total", route="/v1/models/{model}", status="404") == 1


def test_requests_that_run_and_wait_are_the_engines(operated: Served) -> None:
    """Two places; of one client a quarter more than that goes to the engine, and the others wait in the endpoint."""
    held = http.client.HTTPConnection(HOST, operated.openai_port, timeout=60)
    body = question(max_tokens=400, min_tokens=400, n=6, stream=True)
    held.request(
        "POST",
        "/v1/completions",
        json.dumps(body),
        {"Authorization": "Bearer old-key", "Content-Type": "application/json"},
    )
    assert held.getresponse().status == 200
    until(
        lambda: (value(operated, "bake_num_requests_running"), value(operated, "bake_num_requests_waiting")) == (2, 4)
    )
    held.close()
    until(
        lambda: (value(operated, "bake_num_requests_running"), value(operated, "bake_num_requests_waiting")) == (0, 0)
    )


def test_a_worker_that_dies_takes_no_count_with_it(operated: Served) -> None:
    before = value(operated, "bake_generation_tokens_total")
    children: dict[int, int] = {}
    for pid in processes_below(operated.process.pid):
        if b"scripts.openai" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            children[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    [parent] = set(children) - {pid for pid, above in children.items() if above in children}
    first = min(pid for pid, above in children.items() if above == parent)
    os.kill(first, signal.SIGKILL)
    until(lambda: f"(pid {first}) ended" in next(operated.tree.glob("build/*/*/serve.log")).read_text())
    for _ in range(6):
        assert ask(operated, "/v1/completions", question())[0] == 200
    until(lambda: value(operated, "bake_generation_tokens_total") == before + 30)


def test_many_scrapes_ask_triton_once_a_second() -> None:
    asked: list[float] = []
    said = (
        'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 5\n'
        'nv_trt_llm_request_metrics{model="other",request_type="active",version="1"} 9\n'
        'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 8\n'
        'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 3\n'
        'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 12\n'
    )

    async def triton(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(time.monotonic())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + said.encode())
        writer.close()

    async def run() -> list[bytes]:
        server = await asyncio.start_server(triton, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        counts = Counts(2)
        pages = [Page(counts, "m", lambda: (2, 7), 8, address) for _ in range(2)]
        began = time.monotonic()
        for _ in range(500):
            await asyncio.gather(*(page.page() for page in pages))
        told = [await pages[0].page()]
        assert len(asked) <= 1 + time.monotonic() - began
        server.close()
        return told

    [page] = asyncio.run(run())
    assert b'bake_num_requests_running{model_name="m"} 5.0' in page
    assert b'bake_num_requests_waiting{model_name="m"} 4.0' in page, (
        "two in line, and two that the engine has not taken"
    )
    assert b'bake_kv_cache_usage_perc{model_name="m"} 0.25' in page
    assert said_by("nv_trt_llm_request_metrics{ nonsense") == {}


@pytest.mark.parametrize("port", ["nobody", "silent", "endless"])
def test_a_triton_that_says_nothing_useful_costs_a_second(port: str) -> None:
    async def triton(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while port == "endless":
                writer.write(b"x" * 65536)
                await writer.drain()
            await reader.read()
        except OSError:
            pass
        writer.close()

    async def run() -> bytes:
        server = await asyncio.start_server(triton, "127.0.0.1", 0)
        number = server.sockets[0].getsockname()[1]
        if port == "nobody":
            server.close()
            await server.wait_closed()
        page = Page(Counts(1), "m", lambda: (2, 7), 4, f"127.0.0.1:{number}")
        text = await page.page()
        server.close()
        return text

    page = asyncio.run(run())
    assert b'bake_num_requests_running{model_name="m"} 4.0' in page and b"kv_cache" not in page


def test_routes_are_templates() -> None:
    assert route_of("/v1/models/a/b?c") == "/v1/models/{model}"
    assert route_of("/v1/completions") == "/v1/completions" and route_of("/v1/completions/x") == "other"


# --- LOG=json ---


def test_a_request_has_one_line_and_nothing_of_its_prompt(operated: Served) -> None:
    secret = "The secret dragon Zorblax"
    status, headers, body = ask(
        operated, "/v1/completions", question(prompt=secret, n=2, user="Zorblax"), "key-of-ana", X_Request_Id="my:id-1"
    )
    assert status == 200 and headers["x-request-id"] == "my:id-1"
    line, usage = line_of(operated, "my:id-1"), json.loads(body)["usage"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert 0 < line.pop("queue_seconds") < line.pop("first_token_seconds") <= line.pop("seconds") < 60
    assert line == {
        "request_id": "my:id-1", "key": "ana", "method": "POST", "route": "/v1/completions", "status": 200, "model": "stories",
        "prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"], "finish_reason": "length",
    }  # fmt: skip
    ask(operated, "/v1/completions", question(model="Zorblax"), X_Request_Id="my:id-2")
    assert line_of(operated, "my:id-2")["status"] == 404
    ask(operated, "/v1/completions", question(), "Zorblax", X_Request_Id="my:id-3")
    refused = line_of(operated, "my:id-3")
    assert (refused["status"], refused["key"]) == (401, "")
    ask(operated, "/Zorblax?Zorblax", method="DELETE", X_Request_Id="my:id-4")
    assert line_of(operated, "my:id-4")["route"] == "other"
    ask(operated, "/health", key="")
    log = next(operated.tree.glob("build/*/*/serve.log")).read_text()
    assert "Zorblax" not in log and "key-of-ana" not in log
    assert not [line for line in lines_of(operated) if line["route"] in ("/health", "/metrics")]


def test_tritons_id_ends_in_the_requests() -> None:
    """It begins as 0.8.0 wants it: not with a digit, and no two alike, whatever a client says."""
    asked: Any = SimpleNamespace(shares=None)
    ids = {Stream(asked, b"", lambda: None, None, 1.0, "7").id for _ in range(3)}
    assert len(ids) == 3 and all(re.fullmatch(r"r[0-9a-f]{32}-7", one) for one in ids)


def test_the_engines_line_about_a_request_has_its_id(operated: Served) -> None:
    """All tokens are bad words: none is left, and rank 0's log names the request."""
    everything = np.array([[range(2048), range(1, 2049)]], dtype=np.int32)
    with pytest.raises(InferenceServerException, match="no token is left"):
        triton_ask(operated, "tensorrt_llm", "my:id-5", **core_request(ints(1, 5, 7), 3), bad_words_list=everything)
    log = next(operated.tree.glob("build/*/*/serve.log"))
    until(lambda: "my:id-5: no token is left" in log.read_text())
    lines = [line for line in log.read_text().splitlines() if "my:id-5: no token is left" in line]
    assert {line.partition(":")[0] for line in lines} == {"rank 0"}


def test_an_id_that_is_not_clean_is_another(operated: Served) -> None:
    for given in ("a b", "x" * 129, '"}', "ä"):
        _, headers, _ = ask(operated, "/v1/models", X_Request_Id=given.encode().decode("latin-1"))
        assert re.fullmatch(r"req-[0-9a-f]{32}", headers["x-request-id"])


# --- traces ---


def test_a_request_is_a_trace_below_its_clients(operated: Served, collector: Collector) -> None:
    """The client's traceparent goes on, times are in order, and tokens are those of the answer."""
    secret = "The secret dragon Zorblax"
    traces = ("4bf92f3577b34da6a3ce929d0e0e4736", "5bf92f3577b34da6a3ce929d0e0e4737")
    for trace, stream in zip(traces, (False, True)):
        parent = f"00-{trace}-00f067aa0ba902b7-01"
        body = question(
            prompt=secret, stream=stream, user="Zorblax", stream_options={"include_usage": True} if stream else None
        )
        status, _, said = ask(operated, "/v1/completions", body, "key-of-ana", traceparent=parent, X_Request_Id=trace)
        assert status == 200
        told = said.decode().split("data: ")[-2] if stream else said
        usage = json.loads(told)["usage"]
        spans = collector.of_trace(trace, until)
        root = spans.pop("text_completion stories")
        assert root.parent_span_id.hex() == "00f067aa0ba902b7"
        assert all(span.parent_span_id == root.span_id for span in spans.values())
        queue, prompt, generation = spans["queue"], spans["prompt"], spans["generation"]
        times = [
            root.start_time_unix_nano,
            queue.start_time_unix_nano,
            queue.end_time_unix_nano,
            prompt.start_time_unix_nano,
            prompt.end_time_unix_nano,
            generation.start_time_unix_nano,
            generation.end_time_unix_nano,
            root.end_time_unix_nano,
        ]
        assert times == sorted(times) and times[1] < times[2] < times[4] < times[6]
        assert times[2] == times[3] and times[4] == times[5]
        attributes = values_of(root)
        assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 5
        assert (
            attributes["http.response.header.x-request-id"] == [trace] and attributes["gen_ai.request.stream"] is stream
        )
    assert not any("Zorblax" in str(span) or "ana" in str(values_of(span).values()) for span in collector.spans)


def test_the_collectors_secret_is_the_endpoints_alone(operated: Served, collector: Collector) -> None:
    assert ask(operated, "/v1/completions", question())[0] == 200
    assert collector.came.wait(60) and collector.headers[0]["x-secret"] == SECRET
    others = []
    for pid in processes_below(operated.process.pid):
        folder = Path(f"/proc/{pid}")
        command = (folder / "cmdline").read_bytes()
        assert SECRET.encode() not in command
        if SECRET.encode() in (folder / "environ").read_bytes() and not re.search(
            rb"scripts\.(openai|serve|serving\.processes)\0|^make", command
        ):
            others.append(command)
    assert others == []
    assert SECRET not in next(operated.tree.glob("build/*/*/serve.log")).read_text() + "".join(operated.lines)


# --- keys ---


def test_lines_of_the_file() -> None:
    assert parsed(KEYS) == {
        "old-key": Key("line 1"),
        "key-of-ana": Key("ana"),
        "key-of-bo": Key("bo", requests=1),
        "key-of-cy": Key("cy", tokens=30),
    }
    assert parsed("a:b\r\n\n  requests=4 \n") == {"a:b": Key("line 1"), "requests=4": Key("line 3")}
    for broken in ("", "\n \n", "a b c", "na\x00me: key", "x" * 65 + ": key", "key requests=0 more", "k" * 5000):
        with pytest.raises(ValueError) as told:
            parsed(broken)
        assert "key requests" not in str(told.value)
    with pytest.raises(ValueError, match="more than 1000"):
        parsed("\n".join(f"key{n}" for n in range(1001)))


def test_a_key_may_have_so_many_requests_at_once(operated: Served) -> None:
    held = http.client.HTTPConnection(HOST, operated.openai_port, timeout=60)
    body = question(max_tokens=400, min_tokens=400, stream=True)
    held.request(
        "POST",
        "/v1/completions",
        json.dumps(body),
        {"Authorization": "Bearer key-of-bo", "Content-Type": "application/json"},
    )
    assert held.getresponse().status == 200
    for _ in range(4):  # whichever worker
        status, headers, _ = ask(operated, "/v1/completions", question(), "key-of-bo")
        assert (status, headers["retry-after"]) == (429, "1")
    assert ask(operated, "/v1/completions", question(), "key-of-ana")[0] == 200
    held.close()
    until(lambda: ask(operated, "/v1/completions", question(), "key-of-bo")[0] == 200)


def test_a_key_may_use_so_many_tokens_a_minute(operated: Served) -> None:
    statuses = []
    for _ in range(8):
        status, headers, _ = ask(operated, "/v1/completions", question(), "key-of-cy")
        statuses.append(status)
    assert statuses[0] == 200 and statuses[-3:] == [429] * 3
    assert 1 <= int(headers["retry-after"]) <= 60
    assert ask(operated, "/v1/completions", question(), "key-of-ana")[0] == 200
    until(lambda: value(operated, "bake_http_requests_total", route="/v1/completions", status="429") > 0)


def test_the_file_is_read_again_and_one_that_is_gone_changes_nothing(operated: Served) -> None:
    file = operated.tree / "keys"
    log = next(operated.tree.glob("build/*/*/serve.log"))

    def taken(key: str) -> bool:
        """By every worker."""
        return {ask(operated, "/v1/models", key=key)[0] for _ in range(24)} == {200}

    def write(text: str) -> None:
        file.with_name("keys.new").write_text(text)
        os.replace(file.with_name("keys.new"), file)

    write(KEYS + "new: key-of-new\n")
    until(lambda: taken("key-of-new"))
    file.unlink()
    until(lambda: "No such file" in log.read_text())
    assert taken("key-of-new") and taken("old-key")
    write("one two three\n")
    until(lambda: "line 1 is neither" in log.read_text())
    assert taken("key-of-new")
    write(KEYS)
    until(lambda: ask(operated, "/v1/models", key="key-of-new")[0] == 401)
    until(lambda: not taken("key-of-new") and taken("old-key"))
    assert log.read_text().count("keys cannot be read") == 2


def test_a_worker_that_begins_while_the_file_is_broken_has_the_last_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n")
    keys = Keys(str(file), "alone")
    pid = os.fork()
    if not pid:  # a worker, which reads what was added
        file.write_text("second\n")
        os._exit(0 if "read again" in keys.refresh() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    file.unlink()
    keys.adopt()
    assert keys.known(b"second") and keys.known(b"alone") and not keys.known(b"first")
    assert "No such file" in keys.refresh() and keys.refresh() == "" and keys.known(b"second")
    os.mkfifo(file)
    assert "not a file" in keys.refresh() and keys.known(b"second")


# --- names, origins, addresses ---


def test_the_model_has_other_names(operated: Served) -> None:
    assert [one["id"] for one in json.loads(ask(operated, "/v1/models")[2])["data"]] == ["stories", "gpt-x", "org/tale"]
    assert json.loads(ask(operated, "/v1/models/org/tale")[2])["id"] == "org/tale"
    for name in ("gpt-x", "org/tale"):
        status, _, body = ask(operated, "/v1/completions", question(model=name))
        assert (status, json.loads(body)["model"]) == (200, "stories")
    assert ask(operated, "/v1/completions", question(model="gpt-y"))[0] == 404


def test_pages_of_named_origins_may_ask(operated: Served) -> None:
    asking = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    status, headers, _ = ask(operated, "/v1/chat/completions", key="", method="OPTIONS", Origin=ORIGIN, **asking)
    assert (status, headers["access-control-allow-origin"]) == (204, ORIGIN)
    assert (
        headers["access-control-allow-headers"] == "authorization,content-type"
        and "POST" in headers["access-control-allow-methods"]
    )
    status, headers, _ = ask(operated, "/v1/models", Origin=ORIGIN)
    assert (status, headers["access-control-allow-origin"], headers["vary"]) == (200, ORIGIN, "origin")
    status, headers, _ = ask(operated, "/v1/models", key="", method="OPTIONS", Origin="https://other.example", **asking)
    assert status == 403 and "access-control-allow-origin" not in headers
    assert "access-control-allow-origin" not in ask(operated, "/v1/models", Origin=ORIGIN + ".other")[1]


def test_the_endpoint_listens_apart_from_triton(operated: Served) -> None:
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", operated.openai_port, timeout=5).connect()
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(HOST, operated.http_port, timeout=5).connect()
    assert operated.post("ensemble", text_input="Once", max_tokens=1)["status"] == 200
