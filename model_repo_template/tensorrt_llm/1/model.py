"""Triton's Python backend serving the torch engine as the model tensorrt_llm: one process per rank, rank 0 answers.

Nothing here blocks Triton. execute() checks a request, queues it and returns. A sender thread sends what the engine has
produced: a response carries every token that is ready, so a slow reader gets longer pieces, never later ones.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from contract import Asked, outputs, understood
from engine import Engine, Follower, Piece, Refused, Request, open_engine
from guides import Guides
from ranks import RankLost

log = logging.getLogger("torch engine")

POLL_SECONDS = 0.1  # asking Triton whether a client has gone costs a round trip between processes: not at every step
# How long a thread may hold the interpreter while another one waits for it. Python's default is 5 ms, as long as a
# step: the engine's thread must not wait so long for the sender's
SWITCH_SECONDS = 0.0005
TRUE = ("true", "True", "TRUE", "1")
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def named(request_id: str) -> str:
    """A client's word for its request, as a line of the log may have it."""
    return json.dumps(request_id[:200])[1:-1] or "a request without id"


class Reply:
    """One request on its way: the pieces that the engine has produced and Triton has not got yet."""

    def __init__(self, asked: Asked, request: Any, sender: Any, ready: threading.Condition) -> None:
        self.asked, self.request_id, self.sender = asked, request.request_id(), sender
        # Only the wanted outputs are made. The Python backend would drop the others itself, but it frees them while
        # other threads run Python, which corrupts the heap (seen with Triton 2.51, ResponseSender::Send).
        self.wanted = set(request.requested_output_names())
        self.pieces: list[Piece] = []
        self.cum_log_prob = 0.0
        self._ready = ready
        self.request = Request(
            prompt=asked.prompt,
            max_new_tokens=asked.max_new_tokens,
            receive=self.receive,
            sampling=asked.sampling,
            log_probs=asked.log_probs,
            prompt_log_probs=asked.prompt_log_probs,
            context_logits=asked.context_logits,
            generation_logits=asked.generation_logits,
            likeliest=asked.likeliest,
        )

    def receive(self, piece: Piece) -> None:
        with self._ready:
            self.pieces.append(piece)
            self._ready.notify()

    def take(self) -> list[Piece]:
        """The pieces to send now: for a request that does not stream, all or none. The caller holds `ready`."""
        if not self.pieces or not (self.asked.streaming or self.pieces[-1].final):
            return []
        pieces, self.pieces = self.pieces, []
        return pieces


class TritonPythonModel:
    """Triton's hooks."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads this rank; returns when all ranks have. Ranks above 0 follow in a thread and get no request."""
        faulthandler.enable()  # a crash of this process says where
        sys.setswitchinterval(SWITCH_SECONDS)
        logging.basicConfig(format="%(name)s: %(message)s")
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._exclude_input = parameters.get("exclude_input_in_output", "") in TRUE
        self._without_value = set(parameters.get("sent_without_value", "").split(","))
        # the model's ends if it has several (scripts/build_model_repo.py)
        self._end_ids = [int(token) for token in parameters.get("end_ids", "").split(",") if token]
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        try:
            reuse = parameters.get("enable_kv_cache_reuse", "") in TRUE
            engine = open_engine(Path(parameters["gpt_model_path"]), reuse)
        except (ValueError, RankLost) as problem:
            raise pb_utils.TritonModelException(str(problem)) from None
        self._engine = engine
        self._guides = None
        if isinstance(engine, Engine):
            tokenizer = Path(args["model_repository"]).parent / "preprocessing/1/tokenizer"
            self._guides = Guides(tokenizer, engine.config.vocab_size)
        self._live: list[Reply] = []
        self._ready = threading.Condition()
        self._closing = False
        self._metrics: Metrics | None = None
        if isinstance(engine, Engine):
            self._metrics = Metrics(args["model_name"], args["model_version"], engine)
            self._thread = threading.Thread(
                target=self._send_all, args=(engine, self._metrics), name="sender", daemon=True
            )
        else:
            self._thread = threading.Thread(target=follow_or_die, args=(engine,), name="follower", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Queues each request, or answers at once why it cannot be served."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except Refused as refusal:
                sender.send(pb_utils.InferenceResponse(error=self._refusal(str(refusal))), flags=FINAL)

    def _refusal(self, why: str) -> Any:
        """A request that cannot be served, as a TritonError."""
        return pb_utils.TritonError(why, pb_utils.TritonError.INVALID_ARG)

    def finalize(self) -> None:
        """Triton has drained the requests; on a rank above 0 this waits until rank 0 has ended."""
        if isinstance(self._engine, Engine):
            self._engine.close()
            with self._ready:
                self._closing = True
                self._ready.notify()
        self._thread.join()
        # A metric or a response sender that outlives finalize() takes the stub down with a segmentation fault when it
        # is deleted after the stub's queues (seen with Triton 2.51).
        self._metrics = None
        gc.collect()

    def _accept(self, request: Any, sender: Any) -> None:
        """Raises Refused."""
        if not isinstance(self._engine, Engine):
            raise Refused("this rank answers no requests; rank 0 does")
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if "stop" in inputs and inputs["stop"].any():
            self._stop(request.request_id(), self._engine)
            # a unary request has exactly one response
            sender.send(*([] if self._decoupled else [pb_utils.InferenceResponse([])]), flags=FINAL)
            return
        asked = self._understood(request, inputs)
        if asked.streaming and not self._decoupled:  # in TensorRT-LLM's words
            raise Refused("Streaming is only supported if model is deployed using decoupled mode.")
        reply = Reply(asked, request, sender, self._ready)
        with self._ready:
            self._live.append(reply)
            self._ready.notify()
        try:
            self._engine.submit(reply.request)
        except Refused:
            with self._ready:
                self._live.remove(reply)
            raise

    def _understood(self, request: Any, inputs: dict[str, Any]) -> Asked:
        """Raises Refused."""
        parameters = json.loads(request.parameters() or "{}")
        return understood(inputs, self._exclude_input, self._end_ids, parameters, self._guides)

    def _stop(self, request_id: str, engine: Engine) -> None:
        """The contract's way to end a running request: a second one with its id and stop=true."""
        if not request_id:
            raise Refused("stop needs the request id of the request that is to end")
        with self._ready:
            meant = [reply for reply in self._live if reply.request_id == request_id]
        for reply in meant:
            engine.cancel(reply.request)

    def _send_all(self, engine: Engine, metrics: Metrics) -> None:
        next_poll = 0.0
        while True:
            with self._ready:
                batch = [(reply, pieces) for reply in self._live if (pieces := reply.take())]
                if not batch and self._closing:
                    return
                if not batch:
                    self._ready.wait(timeout=POLL_SECONDS if self._live else None)
                ended = [reply for reply, pieces in batch if pieces[-1].final]
                self._live = [reply for reply in self._live if reply not in ended]
                live = list(self._live)
            for reply, pieces in batch:
                try:
                    self._send(reply, pieces)
                except Exception:
                    log.exception("%s: sending failed", named(reply.request_id))
                    engine.cancel(reply.request)
            if time.monotonic() >= next_poll or not live:
                next_poll = time.monotonic() + POLL_SECONDS
                metrics.update()
                for reply in live:
                    if reply.sender.is_cancelled():
                        engine.cancel(reply.request)

    def _send(self, reply: Reply, pieces: list[Piece]) -> None:
        last = pieces[-1]
        if last.error is not None:
            log.error("%s: %s", named(reply.request_id), last.error)
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(last.error))
        else:
            tensors = [pb_utils.Tensor(name, array) for name, array in self._arrays(reply, pieces).items()]
            response = pb_utils.InferenceResponse(output_tensors=tensors)
        reply.sender.send(response, flags=FINAL if last.final else 0)

    def _arrays(self, reply: Reply, pieces: list[Piece]) -> dict[str, Any]:
        """The tensors of a response, those that the request names."""
        reply.cum_log_prob += sum(piece.log_probs[0] for piece in pieces if piece.log_probs)
        return outputs(reply.asked, pieces, reply.cum_log_prob, self._without_value, reply.wanted)


class Metrics:
    """The engine's counters on Triton's metrics page, under the names of NVIDIA's backend."""

    def __init__(self, model: str, version: str, engine: Engine) -> None:
        self._engine, self._steps = engine, 0
        family = pb_utils.MetricFamily(
            name="nv_trt_llm_request_metrics", description="Requests of the engine", kind=pb_utils.MetricFamily.GAUGE
        )
        counter = pb_utils.MetricFamily(
            name="torch_engine_steps", description="Forward steps taken", kind=pb_utils.MetricFamily.COUNTER
        )
        cache = pb_utils.MetricFamily(
            name="nv_trt_llm_kv_cache_block_metrics",
            description="Blocks of the cache",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        labels = {"model": model, "version": version}
        self._families = (family, counter, cache)  # a metric lives as long as its family
        self._blocks = {
            kind: cache.Metric(labels={**labels, "kv_cache_block_type": kind})
            for kind in ("max", "free", "used", "tokens_per", "reused")
        }
        self._gauges = {
            kind: family.Metric(labels={**labels, "request_type": kind}) for kind in ("active", "waiting", "max")
        }
        self._counter = counter.Metric(labels=labels)
        self._gauges["max"].set(engine.config.max_batch_size)

    def update(self) -> None:
        self._gauges["active"].set(self._engine.running)
        self._gauges["waiting"].set(self._engine.waiting)
        for kind, number in self._engine.blocks.numbers().items():
            self._blocks[kind].set(number)
        steps = self._engine.steps
        self._counter.increment(steps - self._steps)
        self._steps = steps


def follow_or_die(follower: Follower) -> None:
    """A rank that cannot follow must end: rank 0 sees its socket close and says so."""
    try:
        follower.follow()
    except Exception:
        log.exception("this rank cannot follow rank 0 any more; it ends")
        os._exit(1)
