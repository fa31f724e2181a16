"""`make synthetic`: a model of Llama-2-7B's shape with seeded random weights, in Hugging Face's form, for measuring speed.

Writes  weights/synthetic-7b: config.json, model-*.safetensors, tokenizer.model
Needs   PyTorch; a GPU, where there is one, makes the numbers in seconds, a processor in minutes (and other ones)

It says nothing of sense. Its tokenizer is the bundled model's with words made up to 32000, so that every token has a text.
"""

import argparse
import json
import shutil
import struct
from pathlib import Path
from typing import Any, Dict, List

from scripts import reports
from scripts.room import human_bytes, progress, say
from scripts.weights.shape import LlamaShape

SHAPE = LlamaShape(4096, 11008, 32, 32, 32, 32000)
POSITIONS = 4096
# of a normal distribution; Llama's own matrices have about as much
SPREAD = 0.02
LAYERS_PER_FILE = 8
TOKENIZER = Path(__file__).parent.parent / "models" / "stories" / "tokenizer.model"


def hf_config(shape: LlamaShape) -> Dict[str, Any]:
    """config.json as transformers has it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size, "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads, "num_key_value_heads": shape.n_kv_heads, "vocab_size": shape.vocab_size,
        "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def tokenizer_model(bundled: bytes, size: int) -> bytes:
    """The bundled tokenizer.model with pieces appended up to `size`: in a protobuf, a repeated field may go on at the end.

    Field numbers: sentencepiece's src/sentencepiece_model.proto (pieces = 1; piece = 1, score = 2). No text has these words, so the
    encoding of any text stays as it is.
    """
    from scripts.tokenizer.sentencepiece import parse_model

    out = bundled
    for index in range(parse_model(bundled).vocab_size, size):
        text = f"\u2581word{index}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -float(index))
        out += b"\x0a" + bytes([len(piece)]) + piece
    return out


def files(shape: LlamaShape) -> Dict[str, List[str]]:
    """File name -> tensors: some layers each, the rest in the first."""
    groups: Dict[int, List[str]] = {}
    for name in shape.hf_tensors():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        groups.setdefault(layer // LAYERS_PER_FILE, []).append(name)
    return {f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors": names for n, names in sorted(groups.items())}


def write(output: Path, shape: LlamaShape, seed: int) -> None:
    """All or nothing: the folder appears when it is whole."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    shapes, plan = shape.hf_tensors(), files(shape)
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
    (partial / "config.json").write_text(json.dumps(hf_config(shape), indent=2))
    (partial / "tokenizer.model").write_bytes(tokenizer_model(TOKENIZER.read_bytes(), shape.vocab_size))
    partial.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.is_dir():
        say("synthetic", f"{reports.shown(args.output)} is there already")
    else:
        write(args.output, SHAPE, args.seed)


if __name__ == "__main__":
    reports.run(main)
