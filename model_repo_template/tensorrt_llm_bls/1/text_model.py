"""Text in, text out: tokenizes requests, asks tensorrt_llm, and streams the text of its answers as they come."""

from __future__ import annotations

import faulthandler
import json
import os
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engine_words
import numpy as np
import sent
import triton_python_backend_utils as pb_utils
from answer import ASKED_BY, COUNTED, Answer
from engine_link import TOKENS, Failed, GrpcLink, new_id
from text import Text

# Requests in progress at once; more are refused, so that what clients send cannot fill the memory. The engine's own
# batch is smaller.
MAX_CONCURRENT = 1024
# Asking Triton whether a client has gone costs a round trip between processes.
# How often it may ask for each request ...
POLL_SECONDS = 0.1
# ... and for all requests together: 1 % of a core
POLLS_PER_SECOND = 100
# Where this server's gRPC port is (scripts/serve.py says; empty: not to be used); Triton's own default
ADDRESS_VARIABLE, DEFAULT_ADDRESS = "BAKE_GRPC_ADDRESS", "127.0.0.1:8001"
# Names of inputs that differ: the text models' name -> tensorrt_llm's name (docker/contracts/backend, ensemble_steps)
RENAMED = {"top_k": "runtime_top_k", "top_p": "runtime_top_p", "length_penalty": "len_penalty"}
# Inputs that become something else on their way; all others are passed on as they are
TRANSLATED = {
    "text_input", "max_tokens", "stop_words", "bad_words", "embedding_bias_words", "embedding_bias_weights", "stream",
    "exclude_input_in_output", "skip_special_tokens",
}  # fmt: skip
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Call:
    """A request that is being served, and its name at tensorrt_llm."""

    def __init__(self, request: Any, has_sender: bool) -> None:
        self.request = request
        self.sender: Any = request.get_response_sender() if has_sender else None
        self.inner_id = new_id()
        self.answer: Answer | None = None
        self.streaming = False
        self.whole = ""
        # what tensorrt_llm has sent and no thread has looked at yet
        self.arrived: deque[Any] = deque()
        self.queued = False
        self.begun = False
        self.last: Any = None
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def send(self, response: Any) -> None:
        self.sender.send(response)

    def end(self, response: Any = None) -> None:
        """Send the last response, unless execute() is to return it; nothing may be asked of the sender after it."""
        with self._lock:
            if not self.ended.is_set():
                self.last = response
                if self.sender is not None:
                    self.sender.send(*([] if response is None else [response]), flags=FINAL)
                self.ended.set()

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self.ended.is_set() and bool((self.sender or self.request).is_cancelled())


class TritonPythonModel:
    """Triton's interface. One instance serves many requests at once.

    Three threads share the work: Triton's thread tokenizes and asks, the link's thread collects what tensorrt_llm
    sends, and `_deliver` turns it into text. What has come for a request while others were served becomes one response:
    a busy server sends fewer responses, not later ones.
    """

    def initialize(self, args: dict[str, str]) -> None:
        faulthandler.enable()  # a crash of this process says where
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.text = Text(Path(parameters["tokenizer_dir"]))
        self.vocab_size = int(parameters["vocab_size"])
        self.limits = sent.Limits.of(parameters, self.text.longest_piece_bytes)
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.has_sender = self.decoupled or sent.is_true(parameters["unary_response_sender"])
        self.without_value = parameters["sent_without_value"].split(",")
        self.accumulate_tokens = sent.is_true(parameters.get("accumulate_tokens", ""))
        self.dtypes = {
            output["name"]: pb_utils.triton_string_to_numpy(output["data_type"])
            for output in config["output"]
            if output["name"] != "text_output"
        }
        self.link = GrpcLink(os.environ.get(ADDRESS_VARIABLE, DEFAULT_ADDRESS), self.decoupled)
        self.calls: dict[str, Call] = {}
        self.ready: deque[Call] = deque()
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._deliver, self._watch)]
        for thread in self.threads:
            thread.start()

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Returns at once. But if Triton has no response sender for unary models, it returns with the last response."""
        calls = [Call(request, self.has_sender) for request in requests]
        given, prompts = {}, {}
        for call in calls:
            try:
                given[call] = sent.read(call.request)
                prompts[call] = sent.one_text(given[call], "text_input", self.limits.prompt_bytes)
            except Exception as problem:
                call.end(sent.failed(problem))
        for call, ids in zip(prompts, self.text.encode(list(prompts.values()))):
            try:
                self._ask(call, given[call], prompts[call], ids)
            except Exception as problem:
                self._forget(call)
                call.end(sent.failed(problem))
        if self.has_sender:
            return None
        for call in calls:
            call.ended.wait()
        return [call.last for call in calls]

    def finalize(self) -> None:
        for call in list(self.calls.values()):
            call.ended.wait()
        self.link.close()
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def _ask(self, call: Call, given: sent.Sent, prompt: str, ids: list[int]) -> None:
        """Check a request and hand it to tensorrt_llm.

        A request that does not stream gets exactly one response: Triton's HTTP generate takes no other number.
        """
        self.limits.check(len(ids), sent.scalar(given, "max_tokens"), "max_tokens")
        if sent.scalar(given, "stream", False):
            if not self.decoupled:  # in TensorRT-LLM's words; an error of tensorrt_llm would lose its code on the way
                raise sent.Refused("Streaming is only supported if model is deployed using decoupled mode.")
            call.streaming = True
        wanted = {name: self.dtypes[name] for name in call.request.requested_output_names() if name in self.dtypes}
        asked = [name for name in wanted if sent.scalar(given, ASKED_BY.get(name, "return_perf_metrics"), False)]
        stops = sent.words(given, "stop_words")
        skip_special_tokens = sent.scalar(given, "skip_special_tokens", True)
        # a client's own end_id is the only one
        end_ids = self.text.end_ids if "end_id" not in given else [sent.scalar(given, "end_id")]
        call.answer = Answer(
            self.text, stops, wanted, asked, len(ids), skip_special_tokens, self.without_value, end_ids
        )
        call.whole = "" if sent.scalar(given, "exclude_input_in_output", True) else prompt
        inputs = self._engine_inputs(given, ids, stops, end_ids)
        with self.changed:
            if len(self.calls) >= MAX_CONCURRENT:
                raise sent.Busy(f"the server is busy: {MAX_CONCURRENT} requests are in progress")
            self.calls[call.inner_id] = call
        passed_on = [name for name in asked if name not in COUNTED]
        self.link.ask(call.inner_id, inputs, [*TOKENS, *passed_on], lambda said: self._receive(call, said))

    def _engine_inputs(
        self, given: sent.Sent, ids: list[int], stops: list[str], end_ids: list[int]
    ) -> Mapping[str, sent.Array]:
        """The tensors for tensorrt_llm. It takes one end_id; the other end_ids become stop words of one token."""
        values: dict[str, sent.Array] = {
            # some inputs come without their axis of one value (`reshape` in the config)
            RENAMED.get(name, name): value if value.ndim > 1 else value.reshape(1, 1)
            for name, value in given.items()
            if name not in TRANSLATED
        }
        values["input_ids"] = np.array([ids], dtype=np.int32)
        values["input_lengths"] = np.array([[len(ids)]], dtype=np.int32)
        values["request_output_len"] = np.array([[sent.scalar(given, "max_tokens")]], dtype=np.int32)
        # stream whenever possible: then a stop string ends the work at the next token; else only a stop string of whole
        # tokens does
        values["streaming"] = np.array([[self.decoupled]])
        spelt = [] if self.decoupled else stops
        if spelt or end_ids[1:]:
            values["stop_words_list"] = self.text.word_list(spelt, after=ids, tokens=end_ids[1:])
        if end_ids:
            values["end_id"] = np.array([end_ids[:1]], dtype=np.int32)
            values.setdefault("pad_id", values["end_id"])
        if bad_words := sent.words(given, "bad_words"):
            values["bad_words_list"] = self.text.word_list(bad_words)
        if bias := sent.weighted_words(given, "embedding_bias_words", "embedding_bias_weights"):
            values["embedding_bias"] = self.text.embedding_bias(bias, self.vocab_size)
        return values

    def _receive(self, call: Call, said: Any) -> None:
        """The link's thread calls this."""
        with self.changed:
            call.arrived.append(said)
            if not call.queued:
                call.queued = True
                # a first token does not wait for the next token of another request
                (self.ready.append if call.begun else self.ready.appendleft)(call)
                self.changed.notify()

    def _deliver(self) -> None:
        """Send what is ready, request after request, each with all that has come for it."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.ready or self.closing.is_set())
                if not self.ready:
                    return
                call = self.ready.popleft()
                call.queued = False
                said = list(call.arrived)
                call.arrived.clear()
            call.begun = True
            try:
                if not call.ended.is_set():
                    self._tell(call, said)
            except Exception as problem:
                self.link.stop(call.inner_id)
                try:
                    self._end(call, sent.failed(problem))
                except Exception as another:  # its sender does not work; the other requests must still be served
                    sent.failed(another)

    def _tell(self, call: Call, said: list[Any]) -> None:
        """At most one response, with everything that tensorrt_llm has sent for a request since the last one."""
        answer = call.answer
        assert answer is not None
        has_text = False
        for one in said:
            if isinstance(one, Failed):
                code, message = engine_words.told(str(one), one.is_refusal)
                if code == "INTERNAL" and message != str(one):  # the client sees less than the log
                    pb_utils.Logger.log_error(f"tensorrt_llm failed: {one}")
                # the client knows this input by its own name
                message = message.replace("request_output_len", "max_tokens")
                self._end(call, sent.error(message, getattr(pb_utils.TritonError, code)))
                return
            if one is None:
                has_rest = answer.finish()
                self._end(call, self._response(call) if has_rest or not call.streaming else None)
                return
            has_text |= answer.push(self.link.outputs_of(one))
            if answer.stopped:
                self.link.stop(call.inner_id)
                self._end(call, self._response(call))
                return
        if has_text and call.streaming:
            call.send(self._response(call))

    def _response(self, call: Call) -> Any:
        assert call.answer is not None
        values = call.answer.take()
        shown = values["text_output"]
        if self.accumulate_tokens or not call.streaming:
            call.whole = shown = call.whole + shown
        # One axis, as NVIDIA's: its end_to_end_grpc_client.py decodes the first element
        values["text_output"] = np.array([shown.encode()], dtype=object)
        return sent.response(call.request, values)

    def _end(self, call: Call, last: Any) -> None:
        self._forget(call)
        call.end(last)

    def _forget(self, call: Call) -> None:
        with self.changed:
            self.calls.pop(call.inner_id, None)

    def _watch(self) -> None:
        """Ends the requests whose client has gone, also those that wait for their first token.

        Triton 2.51 reports a cancelled gRPC call and an HTTP stream whose client has left. It does not report that for
        an HTTP generate without a stream.
        """
        while not self.closing.wait(POLL_SECONDS):
            for call in list(self.calls.values()):
                try:
                    if call.is_cancelled():
                        self.link.stop(call.inner_id)
                except Exception as problem:  # a problem of one request; the others must still be watched
                    sent.failed(problem)
                if len(self.calls) > POLL_SECONDS * POLLS_PER_SECOND and self.closing.wait(1 / POLLS_PER_SECOND):
                    return
