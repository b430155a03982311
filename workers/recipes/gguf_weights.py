"""Recipe: a Llama-shaped GGUF file as float32 safetensors, under the names its makers use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Decoder:
    """The sizes of a Llama-shaped decoder: counts, widths in features, and its two constants."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    context: int
    rope_base: float
    epsilon: float


def read_gguf(path: Path) -> tuple[Decoder, dict[str, np.ndarray]]:
    """The decoder's sizes, and its weights as float32, each of shape (out features, in features)."""
    reader = gguf.GGUFReader(str(path))
    sizes = _read_sizes(reader)
    weights: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = {"attn_q": sizes.heads, "attn_k": sizes.kv_heads}.get(tensor.name.split(".")[-2])
        weights[_name(tensor.name)] = _split_halves(value, heads) if heads else value
    return sizes, weights


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the weights of `inputs["weights"]` (GGUF) to `output` (safetensors, float32)."""
    _, weights = read_gguf(inputs["weights"])
    save_file(weights, str(output))


def _read_sizes(reader: Any) -> Decoder:
    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    return Decoder(
        layers=field("block_count"),
        width=field("embedding_length"),
        heads=field("attention.head_count"),
        kv_heads=field("attention.head_count_kv"),
        head_width=field("rope.dimension_count"),
        hidden=field("feed_forward_length"),
        context=field("context_length"),
        rope_base=field("rope.freq_base"),
        epsilon=field("attention.layer_norm_rms_epsilon"),
    )


def _name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_BLOCK[part]}.weight"


def _split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of query and key rows: from pairs side by side to the two halves of a rotation."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
