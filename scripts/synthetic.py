"""`make synthetic`: a model of a Llama 2's shape with seeded random weights, in Hugging Face's form,
for measuring speed.

Writes  weights/synthetic-7b (or another name of SHAPES, as MODEL says): config.json, model-*.safetensors,
        tokenizer.model. For 80 layers also repeated.json: only the first four layers have their own numbers, so it
        takes 7.9 GB, and the disk needs room for little more than the ranks' files
Needs   PyTorch; a GPU makes the numbers in seconds, a CPU in minutes (and different ones)

Its text has no meaning. Its tokenizer is the bundled model's, filled up with invented words to 32000, so that every
token has a text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts import reports
from scripts.room import human_bytes, progress, say
from scripts.weights.hugging_face import REPEATED
from scripts.weights.shape import LlamaShape

SHAPES = {
    "synthetic-7b": LlamaShape(4096, 11008, 32, 32, 32, 32000),
    "synthetic-13b": LlamaShape(5120, 13824, 40, 40, 40, 32000),
    "synthetic-70b": LlamaShape(8192, 28672, 80, 64, 8, 32000),
    "synthetic-70b-4-layers": LlamaShape(8192, 28672, 4, 64, 8, 32000),
}
# How many layers have their own numbers; the others repeat them in turn
OWN_LAYERS = {"synthetic-70b": 4}
POSITIONS = 4096
# standard deviation of the normal distribution; about that of Llama's own matrices
SPREAD = 0.02
LAYERS_PER_FILE = 8
TOKENIZER = Path(__file__).parent.parent / "models" / "stories" / "tokenizer.model"


def hf_config(shape: LlamaShape) -> dict[str, Any]:
    """config.json in transformers' form."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size, "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads, "num_key_value_heads": shape.n_kv_heads, "vocab_size": shape.vocab_size,
        "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def tokenizer_model(bundled: bytes, size: int) -> bytes:
    """The bundled tokenizer.model with pieces appended up to `size`;
    a protobuf allows more of a repeated field at the end.

    Field numbers: sentencepiece's src/sentencepiece_model.proto (pieces = 1; piece = 1, score = 2). No text has these
    words, so the encoding of any text stays as it is.
    """
    from scripts.tokenizer.sentencepiece import parse_model

    out = bundled
    for index in range(parse_model(bundled).vocab_size, size):
        text = f"\u2581word{index}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -float(index))
        out += b"\x0a" + bytes([len(piece)]) + piece
    return out


def repeats(shape: LlamaShape, own_layers: int) -> dict[str, str]:
    """Tensors of the layers after the first `own_layers` -> the tensors whose numbers they repeat."""
    names = {}
    for name in shape.hf_tensors():
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            if layer >= own_layers:
                names[name] = name.replace(f".{layer}.", f".{layer % own_layers}.", 1)
    return names


def files(names: Iterable[str]) -> dict[str, list[str]]:
    """File name -> tensors: some layers each, the rest in the first."""
    groups: dict[int, list[str]] = {}
    for name in names:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        groups.setdefault(layer // LAYERS_PER_FILE, []).append(name)
    return {f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors": names for n, names in sorted(groups.items())}


def write(output: Path, shape: LlamaShape, seed: int, own_layers: int | None = None) -> None:
    """All or nothing: the folder appears when it is complete."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    same = repeats(shape, own_layers or shape.n_layers)
    shapes = {name: size for name, size in shape.hf_tensors().items() if name not in same}
    plan = files(shapes)
    total_bytes = 2 * sum(torch.Size(size).numel() for size in shapes.values())
    say(
        "synthetic",
        f"-> {reports.shown(output)}: {human_bytes(total_bytes)} of random numbers, seed {seed}, made on the {device}",
    )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with progress(total_bytes, "synthetic") as bar:
        for file, names in plan.items():
            tensors = {}
            for name in names:
                value = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
                if value.ndim > 1:
                    value.normal_(0, SPREAD, generator=generator)
                tensors[name] = value.cpu()
                bar.update(value.nbytes)
            save_file(tensors, partial / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: file for file in plan for name in plan[file]},
    }
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    if same:
        (partial / REPEATED).write_text(json.dumps(same, indent=1))
    (partial / "config.json").write_text(json.dumps(hf_config(shape), indent=2))
    (partial / "tokenizer.model").write_bytes(tokenizer_model(TOKENIZER.read_bytes(), shape.vocab_size))
    partial.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.name not in SHAPES:
        raise reports.settings.bad_setting(
            "MODEL", args.output.name, "one of " + ", ".join(SHAPES), reports.make("synthetic", MODEL="synthetic-7b")
        )
    if args.output.is_dir():
        say("synthetic", f"{reports.shown(args.output)} is there already")
    else:
        shape = SHAPES[args.output.name]
        write(args.output, shape, args.seed, OWN_LAYERS.get(args.output.name))


if __name__ == "__main__":
    reports.run(main)
