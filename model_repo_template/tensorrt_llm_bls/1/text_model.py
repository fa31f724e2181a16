"""Text in, text out: tokenizes a request, asks tensorrt_llm, and streams the text of its answer as it comes."""

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import sent
import triton_python_backend_utils as pb_utils
from answer import ASKED_BY, Answer
from text import Text

# Requests in progress at once. More wait in line here; the engine's own batch is smaller.
MAX_CONCURRENT = 256
# Asking Triton whether a client has gone costs a round trip between processes: not at every token.
POLL_SECONDS = 0.1
# What tensorrt_llm calls what clients of the text models call otherwise (docker/contracts/backend, ensemble_steps)
RENAMED = {"top_k": "runtime_top_k", "top_p": "runtime_top_p", "length_penalty": "len_penalty"}
# Inputs that become something else on their way; all others are passed on as they are
TRANSLATED = {
    "text_input", "max_tokens", "stop_words", "bad_words", "embedding_bias_words", "embedding_bias_weights", "stream",
    "exclude_input_in_output",
}  # fmt: skip
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Call:
    """A request that is being served, and its name at tensorrt_llm."""

    def __init__(self, request: Any, has_sender: bool) -> None:
        self.request = request
        self.sender = request.get_response_sender() if has_sender else None
        self.inner_id = uuid.uuid4().hex
        self.ended = False
        self._lock = threading.Lock()

    def send(self, response: Any) -> None:
        self.sender.send(response)

    def end(self, response: Any = None) -> None:
        """Send the last response, unless execute() is to return it; nothing may be asked of the sender after it."""
        with self._lock:
            self.ended = True
            if self.sender is not None:
                self.sender.send(*([] if response is None else [response]), flags=FINAL)

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self.ended and bool((self.sender or self.request).is_cancelled())


class TritonPythonModel:
    """Triton's interface. One instance serves many requests at once, each in a thread that mostly waits."""

    def initialize(self, args: Dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.text = Text(Path(parameters["tokenizer_dir"]))
        self.vocab_size = int(parameters["vocab_size"])
        self.max_prompt_bytes = int(parameters["max_input_len"]) * self.text.longest_piece_bytes
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.has_sender = self.decoupled or sent.is_true(parameters["unary_response_sender"])
        self.accumulate_tokens = sent.is_true(parameters.get("accumulate_tokens", ""))
        self.dtypes = {
            output["name"]: pb_utils.triton_string_to_numpy(output["data_type"])
            for output in config["output"]
            if output["name"] != "text_output"
        }
        self.calls: Dict[str, Call] = {}
        self.closing = threading.Event()
        self.threads = ThreadPoolExecutor(MAX_CONCURRENT)
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def execute(self, requests: List[Any]) -> Optional[List[Any]]:
        """Returns at once; but where Triton has no response sender for unary models, with the last of the responses."""
        served = [self.threads.submit(self._serve, Call(request, self.has_sender)) for request in requests]
        return None if self.has_sender else [serving.result() for serving in served]

    def finalize(self) -> None:
        self.threads.shutdown(wait=True)
        self.closing.set()
        self.watcher.join()

    def _serve(self, call: Call) -> Any:
        """Answer one request to the end; returns its last response."""
        try:
            last = self._answer(call)
        except Exception as error:
            last = sent.failed(error)
        self.calls.pop(call.inner_id, None)
        call.end(last)
        return last

    def _answer(self, call: Call) -> Any:
        """Serve one request but for its last response, which is returned; None when everything has been sent.

        A request that does not stream gets exactly one response: Triton's HTTP generate takes no other number.
        """
        given = sent.read(call.request)
        prompt = sent.one_text(given, "text_input", self.max_prompt_bytes)
        [ids] = self.text.encode([prompt])
        wanted = {name: self.dtypes[name] for name in call.request.requested_output_names() if name in self.dtypes}
        asked = [name for name in wanted if sent.scalar(given, ASKED_BY.get(name, "return_perf_metrics"), False)]
        answer = Answer(self.text, sent.words(given, "stop_words"), wanted, asked, len(ids))
        streaming = sent.scalar(given, "stream", False)
        if streaming and not self.decoupled:  # in TensorRT-LLM's words; what tensorrt_llm says loses its code on the way (Triton 2.51)
            raise sent.Refused("Streaming is only supported if model is deployed using decoupled mode.")
        whole = "" if sent.scalar(given, "exclude_input_in_output", True) else prompt

        def response() -> Any:
            nonlocal whole
            values = answer.take()
            shown = values["text_output"]
            if self.accumulate_tokens or not streaming:
                whole = shown = whole + shown
            values["text_output"] = np.array([[shown.encode()]], dtype=object)
            return sent.response(call.request, values)

        engine = pb_utils.InferenceRequest(
            model_name="tensorrt_llm",
            request_id=call.inner_id,
            inputs=self._engine_inputs(given, ids),
            requested_output_names=["output_ids", *asked],
        )
        self.calls[call.inner_id] = call
        for part in engine.exec(decoupled=True):
            if part.has_error():
                # the client knows this input by its own name
                message = part.error().message().replace("request_output_len", "max_tokens")
                return sent.error(message, part.error().code())
            outputs = {tensor.name(): tensor.as_numpy() for tensor in part.output_tensors()}
            if "output_ids" not in outputs or answer.stopped:
                continue
            if answer.push(outputs) and streaming:
                call.send(response())
            if answer.stopped:
                self._stop(call)
        return response() if answer.finish() or not streaming else None

    def _engine_inputs(self, given: sent.Sent, ids: List[int]) -> List[Any]:
        """The tensors that tensorrt_llm is asked with."""
        values: Dict[str, sent.Array] = {
            # some inputs come without their axis of one value (`reshape` in the config)
            RENAMED.get(name, name): value if value.ndim > 1 else value.reshape(1, 1)
            for name, value in given.items()
            if name not in TRANSLATED
        }
        values["input_ids"] = np.array([ids], dtype=np.int32)
        values["input_lengths"] = np.array([[len(ids)]], dtype=np.int32)
        values["request_output_len"] = np.array([[sent.scalar(given, "max_tokens")]], dtype=np.int32)
        # streaming whenever it can be: so that a stop string ends the work at the next token; else only one that is whole tokens does
        values["streaming"] = np.array([[self.decoupled]])
        if not self.decoupled and (stop_words := sent.words(given, "stop_words")):
            values["stop_words_list"] = self.text.word_list(stop_words)
        if self.text.end_id is not None:
            values.setdefault("end_id", np.array([[self.text.end_id]], dtype=np.int32))
        if "end_id" in values:
            values.setdefault("pad_id", values["end_id"])
        if bad_words := sent.words(given, "bad_words"):
            values["bad_words_list"] = self.text.word_list(bad_words)
        if bias := sent.weighted_words(given, "embedding_bias_words", "embedding_bias_weights"):
            values["embedding_bias"] = self.text.embedding_bias(bias, self.vocab_size)
        return [pb_utils.Tensor(name, value) for name, value in values.items()]

    def _watch(self) -> None:
        """Ends the requests whose client has gone, also those that wait for their first token.

        Triton 2.51 tells of a gRPC call that was cancelled and of an HTTP stream that was left, not of a left HTTP generate.
        """
        while not self.closing.wait(POLL_SECONDS):
            for call in list(self.calls.values()):
                try:
                    if call.is_cancelled():
                        self._stop(call)
                except Exception as problem:  # of one request; the others are still to be watched
                    sent.failed(problem)

    def _stop(self, call: Call) -> None:
        """End a running request: the contract's `stop` input, with the same request id."""
        one = np.array([[1]], dtype=np.int32)
        inputs = [pb_utils.Tensor(name, one) for name in ("input_ids", "input_lengths", "request_output_len")]
        stop = pb_utils.InferenceRequest(
            model_name="tensorrt_llm",
            request_id=call.inner_id,
            inputs=[*inputs, pb_utils.Tensor("stop", np.array([[True]]))],
            requested_output_names=["output_ids"],
        )
        for _ in stop.exec(decoupled=True):
            pass
