"""The model `postprocessing`: token ids in, text out, with the tensors of NVIDIA's model of the same name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "tensorrt_llm_bls" / "1"))

import sent  # noqa: E402
from text import Text  # noqa: E402


class TritonPythonModel:
    """Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.text = Text(Path(parameters["tokenizer_dir"]))
        self.skip_special_tokens = sent.is_true(parameters["skip_special_tokens"])
        # 0.8.0 and image 24.10 hand log probabilities and logits through this model; later versions do not
        self.handed_through = [tensor["name"][4:] for tensor in config["output"] if tensor["name"].startswith("OUT_")]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [sent.answered(request, self._outputs) for request in requests]

    def _outputs(self, given: sent.Sent) -> dict[str, sent.Array]:
        ids, lengths = given["TOKENS_BATCH"], given["SEQUENCE_LENGTH"]  # (batch, beams, tokens), (batch, beams)
        if ids.shape[:-1] != lengths.shape:
            raise sent.Refused(
                f"TOKENS_BATCH has shape {list(ids.shape)} and SEQUENCE_LENGTH {list(lengths.shape)};"
                " there must be one length per beam"
            )
        if lengths.size and not 0 <= lengths.min() <= lengths.max() <= ids.shape[-1]:
            raise sent.Refused(f"SEQUENCE_LENGTH is {lengths.tolist()}; TOKENS_BATCH has {ids.shape[-1]} tokens")
        skip = bool(sent.scalar(given, "SKIP_SPECIAL_TOKENS", self.skip_special_tokens))
        texts = [
            self.text.decode(beam[:length].tolist(), skip).encode()
            for beam, length in zip(ids.reshape(-1, ids.shape[-1]), lengths.reshape(-1))
        ]
        # one axis, as NVIDIA's: all beams of all rows, one after the other
        values = {"OUTPUT": np.array(texts, dtype=object)}
        values.update({f"OUT_{name}": given[name] for name in self.handed_through if name in given})
        return values
