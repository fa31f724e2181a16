"""The dimensions of a Llama model, and the tensors with their shapes that follow from them."""

from dataclasses import dataclass
from typing import Dict, Tuple

Shape = Tuple[int, ...]

EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class LlamaShape:
    """The six numbers that decide every tensor's shape."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.n_heads

    def hf_tensors(self) -> Dict[str, Shape]:
        """Hugging Face's tensor names -> shapes; a linear layer's weight is (output, input)."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        kv_size = self.n_kv_heads * self.head_size
        layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        tensors: Dict[str, Shape] = {
            EMBEDDING: (self.vocab_size, hidden),
            LAST_NORM: (hidden,),
            HEAD: (self.vocab_size, hidden),
        }
        for index in range(self.n_layers):
            tensors.update({f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()})
        return tensors
