"""The torch engine in Triton keeps NVIDIA's tensor contract; Triton's own module is played by a few lines here."""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drive_engine import VERSION_DIR, Answer
from split_checkpoint import write_engine
from tiny_model import TINY, TINY_BUILD, random_weights

from scripts.nvidia import contracts

CONTRACT = json.loads((Path(__file__).resolve().parents[2] / "docker/contracts/backend/v0.8.0.json").read_text())
OUTPUTS = [output["name"] for output in CONTRACT["tensorrt_llm"]["outputs"]]
FINAL = 1


class Sender:
    """Plays Triton's response sender: keeps what is sent; `gate` closed makes it a slow one."""

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[tuple[Any, int]] = queue.SimpleQueue()
        self.gate, self.entered, self.cancelled = threading.Event(), threading.Event(), False
        self.gate.set()

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        self.sent.put((response, flags))

    def is_cancelled(self) -> bool:
        return self.cancelled

    def responses(self) -> list[Any]:
        """All responses up to the final one."""
        responses, flags = [], 0
        while flags != FINAL:
            response, flags = self.sent.get(timeout=30)
            responses.append(response)
        return responses


class FakeTensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class FakeError(Exception):
    INVALID_ARG = 3

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)


def fake_response(output_tensors: Any = (), error: Any = None) -> SimpleNamespace:
    return SimpleNamespace(error=error, **{tensor.name(): tensor.as_numpy() for tensor in output_tensors})


class FakeFamily:
    GAUGE, COUNTER = "gauge", "counter"
    values: dict[str, float] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str]) -> SimpleNamespace:  # noqa: N802 (Triton's name)
        key = f"{self.name} {labels.get('request_type', '')}".strip()
        self.values[key] = 0.0
        return SimpleNamespace(
            set=lambda value: self.values.update({key: value}),
            increment=lambda value: self.values.update({key: self.values[key] + value}),
        )


@pytest.fixture(scope="module")
def backend() -> Iterator[ModuleType]:
    """model.py as Triton loads it."""
    fake = ModuleType("triton_python_backend_utils")
    vars(fake).update(
        using_decoupled_model_transaction_policy=lambda config: True,
        Tensor=FakeTensor,
        InferenceResponse=fake_response,
        TritonError=FakeError,
        TritonModelException=FakeError,
        MetricFamily=FakeFamily,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", fake)
        spec = importlib.util.spec_from_file_location("torch_engine_model", VERSION_DIR / "model.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def model_args(engine_dir: str, exclude_input: str = "true") -> dict[str, str]:
    without_value = ",".join(contracts.sent_without_value("0.8.0"))
    parameters = {
        "gpt_model_path": engine_dir,
        "exclude_input_in_output": exclude_input,
        "sent_without_value": without_value,
    }
    config = {
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        "output": [{"name": name} for name in OUTPUTS],
    }
    return {
        "model_config": json.dumps(config),
        "model_name": "tensorrt_llm",
        "model_version": "1",
        "model_repository": "/there/is/none/tensorrt_llm",
    }


@pytest.fixture(scope="module")
def model(backend: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The model, opened from a path relative to the working directory."""
    folder = tmp_path_factory.mktemp("served")
    write_engine(folder / "engines", random_weights(TINY), TINY, 1, **{**TINY_BUILD, "max_output_len": 600})
    model = backend.TritonPythonModel()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model.initialize(model_args("engines"))
    yield model
    model.finalize()


def tensors(**values: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs in wire shape: a prompt of four tokens unless told otherwise."""
    ids = np.array([values.pop("prompt", [5, 6, 7, 8])], dtype=np.int32)
    inputs = {
        "input_ids": ids,
        "input_lengths": np.array([ids.shape[1]], np.int32),  # reshaped to a scalar: only the batch dimension is left
        "request_output_len": np.array([[values.pop("new", 6)]], np.int32),
    }
    for name, value in values.items():
        inputs[name] = value if isinstance(value, np.ndarray) else np.array([[value]])
    return inputs


def ask(
    model: Any, request_id: str = "", sender: Sender | None = None, wanted: Sequence[str] = OUTPUTS, **values: Any
) -> Sender:
    sender = sender or Sender()
    inputs = [FakeTensor(name, array) for name, array in tensors(**values).items()]
    request = SimpleNamespace(
        get_response_sender=lambda: sender,
        request_id=lambda: request_id,
        inputs=lambda: inputs,
        parameters=lambda: "",
        requested_output_names=lambda: wanted,
    )
    model.execute([request])
    return sender


def joined(responses: list[Any]) -> list[int]:
    return [token for response in responses for token in response.output_ids[0, 0].tolist()]


def test_without_streaming_there_is_exactly_one_response_with_all_outputs(model: Any) -> None:
    (response,) = ask(model, streaming=False).responses()
    assert {name for name in vars(response) if name != "error"} == set(OUTPUTS)
    shapes = {name: getattr(response, name).shape for name in OUTPUTS}
    assert shapes == {
        "output_ids": (1, 1, 6),
        "sequence_length": (1, 1),
        "cum_log_probs": (1, 1),
        "output_log_probs": (1, 1, 6),
        "context_logits": (1, 1, 1),
        "generation_logits": (1, 1, 1, 1),
    }
    assert response.output_ids.dtype == np.int32 and response.sequence_length.tolist() == [[6]]


def test_only_outputs_that_are_wanted_are_made(model: Any) -> None:
    (response,) = ask(model, wanted=["output_ids"]).responses()
    assert [name for name in vars(response) if name != "error"] == ["output_ids"]


def test_streaming_gives_the_same_tokens_in_pieces(model: Any) -> None:
    (whole,) = ask(model).responses()
    pieces = ask(model, streaming=True).responses()
    assert joined(pieces) == joined([whole]) and len(pieces) > 1
    assert all(piece.sequence_length[0, 0] == piece.output_ids.shape[2] for piece in pieces)


def test_a_slow_reader_gets_longer_pieces(model: Any) -> None:
    """While one send is stuck, the engine goes on; what has gathered comes in one response, the last with FINAL."""
    sender = Sender()
    sender.gate.clear()
    ask(model, new=20, streaming=True, sender=sender)
    assert sender.entered.wait(30)
    Answer(model._engine, [5, 6, 7, 8], 21).wait()  # the engine has done all 20 steps of the other when this ends
    sender.gate.set()
    pieces = sender.responses()
    assert len(pieces) == 2 and len(joined(pieces)) == 20


def test_log_probs_and_logits_come_when_asked_for(model: Any) -> None:
    asked: dict[str, Any] = {"return_log_probs": True, "return_context_logits": True, "return_generation_logits": True}
    (response,) = ask(model, **asked).responses()
    assert response.context_logits.shape == (1, 4, 101) and response.generation_logits.shape == (1, 1, 6, 101)
    assert response.cum_log_probs[0, 0] == pytest.approx(response.output_log_probs.sum(), rel=1e-5) and joined(
        [response]
    )
    assert response.generation_logits[0, 0].argmax(-1).tolist() == joined([response])
    pieces = ask(model, streaming=True, **asked).responses()
    np.testing.assert_allclose(pieces[-1].cum_log_probs, response.cum_log_probs, rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate([p.generation_logits for p in pieces], 2), response.generation_logits)


def test_the_prompt_is_part_of_the_output_unless_excluded(
    model: Any, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_exclude_input", False)
    (response,) = ask(model).responses()
    assert joined([response])[:4] == [5, 6, 7, 8] and response.sequence_length.tolist() == [[10]]
    assert joined(ask(model, exclude_input_in_output=True).responses()) == joined([response])[4:]
    assert joined(ask(model, streaming=True).responses()) == joined([response])[4:]


def test_end_at_once_is_an_answer_without_tokens(model: Any) -> None:
    first = joined(ask(model).responses())[0]
    (response,) = ask(model, end_id=np.array([first], np.int32)).responses()
    assert response.output_ids.shape == (1, 1, 0) and response.sequence_length.tolist() == [[0]]


def test_later_names_mean_the_same(model: Any) -> None:
    sampled: dict[str, Any] = {"runtime_top_k": 40, "temperature": 3.0}
    old = joined(ask(model, random_seed=np.array([[9]], np.uint64), **sampled).responses())
    assert joined(ask(model, seed=np.array([[9]], np.uint64), **sampled).responses()) == old
    end_id = joined(ask(model).responses())[0]
    with_old = joined(ask(model, end_id=end_id, min_length=3).responses())
    assert joined(ask(model, end_id=end_id, min_tokens=3).responses()) == with_old and len(with_old) >= 3


def test_every_input_of_the_contract_is_understood_or_refused_by_name(model: Any) -> None:
    kinds = {
        "TYPE_INT32": np.int32,
        "TYPE_FP32": np.float32,
        "TYPE_FP16": np.float16,
        "TYPE_BOOL": bool,
        "TYPE_UINT64": np.uint64,
    }
    for given in CONTRACT["tensorrt_llm"]["inputs"]:
        name, shape = given["name"], [1, *(1 if size == -1 else size for size in given["dims"])]
        if name in ("input_ids", "input_lengths", "request_output_len", "stop"):
            continue
        value: Any = np.ones(shape, kinds[given["data_type"]])
        if name.endswith("_words_list"):
            value[0, 1] = -1
        response = ask(model, **dict[str, Any]({name: value})).responses()[-1]
        refused = {
            "draft_input_ids",
            "prompt_embedding_table",
            "prompt_vocab_size",
            "lora_weights",
            "lora_config",
            "embedding_bias",
        }
        assert (response.error is not None) == (name in refused), name
        assert response.error is None or name in str(response.error)


@pytest.mark.parametrize(
    "values, seen, limit",
    [
        ({"beam_width": 4}, "beam_width is 4", "only 1"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2", "only 1"),
        ({"new": 0}, "request_output_len is 0", "greater than 0"),
        ({"prompt": []}, "prompt", "empty"),
        ({"input_ids": np.ones((2, 3), np.int32)}, "[2, 3]", "[1, tokens]"),
        ({"input_lengths": np.array([9])}, "9", "4 tokens"),
        ({"temperature": float("nan")}, "nan", "finite"),
        ({"temperature": np.ones((1, 2), np.float32)}, "[1, 2]", "one value"),
        ({"stop_words_list": np.ones((1, 3, 2), np.int32)}, "[1, 3, 2]", "[1, 2, n]"),
        ({"bad_words_list": np.array([[[1, 2], [5, -1]]])}, "end offset 5", "1 and 2"),
        ({"stop": True}, "stop", "request id"),
    ],
)
def test_refusals_name_the_input_with_both_values(model: Any, values: dict[str, Any], seen: str, limit: str) -> None:
    (response,) = ask(model, **values).responses()
    message = str(response.error)
    assert seen in message and limit in message and len(message) < 200 and "/" not in message


def test_a_client_that_goes_away_frees_its_slot(model: Any) -> None:
    sender = ask(model, new=600, streaming=True)
    sender.cancelled = True
    assert len(joined(sender.responses())) < 600
    assert model._engine.running == 0


def test_stop_ends_the_request_with_the_same_id(model: Any) -> None:
    running, other = ask(model, "one", new=600, streaming=True), ask(model, "two", new=40)
    assert ask(model, "one", stop=True).responses() == [None]
    assert len(joined(running.responses())) < 600 and len(joined(other.responses())) == 40


def test_metrics_carry_nvidias_names(model: Any) -> None:
    joined(ask(model).responses())
    values = FakeFamily.values
    assert values["nv_trt_llm_request_metrics max"] == TINY_BUILD["max_batch_size"]
    assert {"nv_trt_llm_request_metrics active", "nv_trt_llm_request_metrics waiting", "torch_engine_steps"} < set(
        values
    )


def test_an_engine_that_is_not_there_is_reported_without_a_traceback(backend: ModuleType) -> None:
    with pytest.raises(FakeError, match="no engine here: nowhere/config.json does not exist"):
        backend.TritonPythonModel().initialize(model_args("nowhere"))
