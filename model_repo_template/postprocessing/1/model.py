"""The model `postprocessing`: token ids in, text out, with the tensors of NVIDIA's model of the same name."""

import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(str(Path(__file__).resolve().parents[2] / "tensorrt_llm_bls" / "1"))

from text import Text  # noqa: E402


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: Dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.text = Text(Path(parameters["tokenizer_dir"]))
        self.skip_special_tokens = parameters["skip_special_tokens"].lower() in ("true", "yes", "1", "t", "y")
        # 0.8.0 hands log probabilities and logits through this model; later versions do not
        self.handed_through = {tensor["name"][4:] for tensor in config["output"] if tensor["name"].startswith("OUT_")}

    def execute(self, requests: List[Any]) -> List[Any]:
        return [self._answer({t.name(): t.as_numpy() for t in request.inputs()}) for request in requests]

    def _answer(self, given: Dict[str, np.ndarray]) -> Any:
        # (batch, beams, tokens) and (batch, beams)
        ids, lengths = given["TOKENS_BATCH"], given["SEQUENCE_LENGTH"]
        texts = [
            self.text.decode(beam[:length].tolist(), self.skip_special_tokens)
            for beams, beam_lengths in zip(ids, lengths)
            for beam, length in zip(beams, beam_lengths)
        ]
        values = {"OUTPUT": np.array([text.encode() for text in texts], dtype=object).reshape(len(ids), -1)}
        values.update({f"OUT_{name}": value for name, value in given.items() if name in self.handed_through})
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in values.items()])
