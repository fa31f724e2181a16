"""Text in, text out: tokenizes a request, asks tensorrt_llm, and streams the text of its answer as it comes."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import triton_python_backend_utils as pb_utils
from text import StopStrings, Text

# Requests in progress at once. More wait in line here; the engine's own batch is smaller.
MAX_CONCURRENT = 256
# What tensorrt_llm calls what clients of the text models call otherwise (docker/contracts/backend, ensemble_steps)
RENAMED = {"top_k": "runtime_top_k", "top_p": "runtime_top_p", "length_penalty": "len_penalty"}
# Inputs that become something else on their way; all others are passed on as they are
TRANSLATED = {
    "text_input", "max_tokens", "stop_words", "bad_words", "embedding_bias_words", "embedding_bias_weights", "stream",
    "end_id", "pad_id", "exclude_input_in_output",
}  # fmt: skip
# Outputs of tensorrt_llm that are passed on, with the axis along which a stream's parts are joined (None: the last one counts)
PASSED_ON = {"cum_log_probs": None, "output_log_probs": 2, "context_logits": 1, "generation_logits": 2}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class BadRequest(Exception):
    """A request that cannot be served; the text goes to the client."""


class TritonPythonModel:
    """Triton's interface. One instance serves many requests at once, each in a thread that mostly waits."""

    def initialize(self, args: Dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.text = Text(Path(parameters["tokenizer_dir"]))
        self.accumulate_tokens = parameters.get("accumulate_tokens", "").lower() in ("true", "yes", "1", "t")
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.threads = ThreadPoolExecutor(MAX_CONCURRENT)

    def execute(self, requests: List[Any]) -> None:
        for request in requests:
            self.threads.submit(self._serve, request)

    def finalize(self) -> None:
        self.threads.shutdown(wait=True)

    def _serve(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            self._answer(request, sender)
        except BadRequest as problem:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem))), flags=FINAL)
        except Exception as error:  # the client learns that it failed, the log learns why
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            message = f"internal error ({type(error).__name__}); the server's log has more"
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)), flags=FINAL)

    def _answer(self, request: Any, sender: Any) -> None:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        tensors = self._engine_inputs(given)
        stops = StopStrings(_words(given, "stop_words"))
        stream = self.text.stream()
        streaming = bool(_scalar(given, "stream", False))
        outputs = [name for name in PASSED_ON if name in self.outputs]
        inner_id = uuid.uuid4().hex
        parts: Dict[str, List[np.ndarray]] = {name: [] for name in outputs}
        whole, stopped = "", False

        def response(text: str) -> Any:
            values = [np.array([[text.encode()]], dtype=object)]
            values += [_joined(parts[name], PASSED_ON[name]) for name in outputs]
            names = ["text_output", *outputs]
            return pb_utils.InferenceResponse([pb_utils.Tensor(n, v) for n, v in zip(names, values)])

        engine = pb_utils.InferenceRequest(
            model_name="tensorrt_llm", request_id=inner_id, inputs=tensors, requested_output_names=["output_ids", *outputs]
        )
        if not _scalar(given, "exclude_input_in_output", True):
            whole = _one_text(given)
        for answer in engine.exec(decoupled=True):
            if answer.has_error():
                raise BadRequest(answer.error().message())
            found = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
            if "output_ids" not in found or stopped:
                continue
            piece, stopped = stops.push(stream.push(found["output_ids"].reshape(-1).tolist()))
            whole += piece
            for name in outputs:
                parts[name].append(found[name])
            if streaming and piece:
                sender.send(response(whole if self.accumulate_tokens else piece))
                parts = {name: [] for name in outputs}
            if stopped or sender.is_cancelled():
                stopped = True
                self._stop(inner_id)
        rest = "" if stopped else stops.push(stream.finish())[0] + stops.finish()
        whole += rest
        if not streaming:
            sender.send(response(whole), flags=FINAL)
        elif rest or any(parts.values()):
            sender.send(response(whole if self.accumulate_tokens else rest), flags=FINAL)
        else:
            sender.send(flags=FINAL)

    def _engine_inputs(self, given: Dict[str, np.ndarray]) -> List[Any]:
        """The tensors that tensorrt_llm is asked with."""
        [ids] = self.text.encode([_one_text(given)])
        max_tokens = _scalar(given, "max_tokens", None)
        end_id = _scalar(given, "end_id", self.text.end_id)
        values: Dict[str, np.ndarray] = {
            "input_ids": np.array([ids], dtype=np.int32),
            "input_lengths": np.array([[len(ids)]], dtype=np.int32),
            "request_output_len": np.array([[max_tokens]], dtype=np.int32),
            # always streaming: so that a cancellation or a stop string ends the work at the next token
            "streaming": np.array([[True]]),
        }
        if end_id is not None:
            values["end_id"] = np.array([[end_id]], dtype=np.int32)
            values["pad_id"] = np.array([[_scalar(given, "pad_id", end_id)]], dtype=np.int32)
        if bad_words := _words(given, "bad_words"):
            values["bad_words_list"] = self.text.word_list(bad_words)
        if bias_words := _words(given, "embedding_bias_words"):
            weights = given.get("embedding_bias_weights", np.zeros(0, dtype=np.float32)).reshape(-1).tolist()
            try:
                values["embedding_bias"] = self.text.embedding_bias(bias_words, weights)
            except ValueError as error:
                raise BadRequest(str(error)) from None
        for name, value in given.items():
            if name not in TRANSLATED:
                values[RENAMED.get(name, name)] = value.reshape(1, *value.shape[1:]) if value.ndim else value.reshape(1, 1)
        return [pb_utils.Tensor(name, value) for name, value in values.items()]

    def _stop(self, inner_id: str) -> None:
        """End a running request: the contract's `stop` input, with the same request id."""
        one = np.array([[1]], dtype=np.int32)
        inputs = [pb_utils.Tensor(name, one) for name in ("input_ids", "input_lengths", "request_output_len")]
        stop = pb_utils.Tensor("stop", np.array([[True]]))
        request = pb_utils.InferenceRequest(
            model_name="tensorrt_llm", request_id=inner_id, inputs=[*inputs, stop], requested_output_names=["output_ids"]
        )
        for _ in request.exec(decoupled=True):
            pass


def _one_text(given: Dict[str, np.ndarray]) -> str:
    texts = given["text_input"].reshape(-1)
    if len(texts) != 1:
        raise BadRequest(f"text_input holds {len(texts)} texts; a request is one text")
    return _utf8("text_input", texts[0])


def _words(given: Dict[str, np.ndarray], name: str) -> List[str]:
    """A list of words; NVIDIA's clients send [""] for none."""
    return [word for word in (_utf8(name, value) for value in given.get(name, np.zeros(0, dtype=object)).reshape(-1)) if word]


def _utf8(name: str, value: Any) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name} is not UTF-8: byte {value[error.start]:#04x} at offset {error.start} of {len(value)}") from None


def _scalar(given: Dict[str, np.ndarray], name: str, default: Optional[Any]) -> Any:
    if name not in given:
        return default
    values = given[name].reshape(-1)
    if len(values) != 1:
        raise BadRequest(f"{name} holds {len(values)} values; it takes one")
    return values[0].item()


def _joined(parts: List[np.ndarray], axis: Optional[int]) -> np.ndarray:
    if axis is None or len(parts) == 1:
        return parts[-1]
    return np.concatenate(parts, axis=axis)
