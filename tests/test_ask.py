"""`make ask` against a server that closes its connection: before the first token it asks again,
later it reports that."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from scripts import ask, reports

GOAWAY = "GOAWAY received; Error code: 0; Debug Text: "


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Triton's gRPC port. streams: for each that is asked for, its texts and the status it ends with (None: well)."""

    def __init__(self, streams: list[tuple[list[str], Any]]) -> None:
        self.streams = streams

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelConfigResponse()
        answer.config.model_transaction_policy.decoupled = True
        return answer

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        next(requests)
        texts, ending = self.streams.pop(0)
        for text in texts:
            answer = service_pb2.ModelStreamInferResponse()
            output = answer.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
            output.contents.bytes_contents.append(text.encode())
            yield answer
        if ending is not None:
            context.abort(ending, GOAWAY)
        last = service_pb2.ModelStreamInferResponse()
        last.infer_response.parameters["triton_final_response"].bool_param = True
        yield last


@pytest.fixture
def scripted() -> Iterator[tuple[str, Scripted]]:
    """(address, what it says)"""
    server = grpc.server(ThreadPoolExecutor(4))
    said = Scripted([])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(said, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", said
    server.stop(None).wait()


UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def test_a_stream_that_was_lost_before_its_first_token_is_asked_for_again(
    scripted: tuple[str, Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    address, said = scripted
    said.streams = [([], UNAVAILABLE), (["Once", " more"], None)]
    ask.ask(address, "Hi", 5)
    assert capsys.readouterr().out == "Once more\n" and said.streams == []


def test_a_stream_that_is_lost_twice_is_a_report(scripted: tuple[str, Scripted]) -> None:
    address, said = scripted
    said.streams = [([], UNAVAILABLE), ([], UNAVAILABLE), (["never"], None)]
    with pytest.raises(reports.Problem, match="server") as caught:
        ask.ask(address, "Hi", 5)
    assert "GOAWAY" in caught.value.seen and len(said.streams) == 1


@pytest.mark.parametrize("ending", [UNAVAILABLE, grpc.StatusCode.INTERNAL])
def test_an_answer_that_is_lost_in_the_middle_is_told_and_not_asked_for_again(
    scripted: tuple[str, Scripted], capsys: pytest.CaptureFixture[str], ending: Any
) -> None:
    address, said = scripted
    said.streams = [(["Once"], ending), (["never"], None)]
    with pytest.raises(reports.Problem, match="the answer stopped in the middle") as caught:
        ask.ask(address, "Hi", 5)
    assert "GOAWAY received" in caught.value.seen and capsys.readouterr().out == "Once" and len(said.streams) == 1


@pytest.mark.parametrize("ending", ["cut off", "an error"])
def test_an_answer_over_http_that_is_lost_in_the_middle_is_told(
    capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = b'{"model_transaction_policy": {"decoupled": true}}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            events = ['data: {"text_output": "Once"}\n\n']
            events += ['data: {"error": "rank 1 of the engine has ended"}\n\n'] if ending == "an error" else []
            for event in events:
                self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())
            self.close_connection = True

        def log_message(self, *words: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(reports.Problem, match="the answer stopped in the middle"):
            ask.ask_over_http(f"http://127.0.0.1:{server.server_port}", "Hi", 5)
        server.shutdown()
    assert capsys.readouterr().out == "Once"


def test_what_is_no_triton_is_no_server() -> None:
    """Something else listens at that port: it knows none of Triton's calls."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(reports.Problem, match="no server answers"):
        ask.ask(f"127.0.0.1:{port}", "Hi", 5)
    server.stop(None).wait()
