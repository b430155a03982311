"""A decoder of some small layers with random weights, made by the recipe that makes SmolLM2's, and a model of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tasks.models.files import recipe_code
from workers.port import Placed
from workers.runtimes.onnx import OnnxDecoder

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = {
    "template": """<|im_start|>system
You are a helpful AI assistant<|im_end|>
{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>
{% endfor %}<|im_start|>assistant
""",
    "begin": "<|im_start|>",
    "end": "<|im_end|>",
    "ends": ["<|im_end|>", "<|endoftext|>"],
}
VOCABULARY = 256 + len(CONTROL)  # a token a byte, then those of `CONTROL`
_WIDTH, _HEADS, _KV_HEADS, _HEAD_WIDTH = 64, 2, 1, 32

MODEL = """
name: tiny
version: 1
summary: Some bytes after others, at random.
licence: Apache-2.0
pipeline: generation
inputs: [{{name: prompt, datatype: BYTES, shape: [-1]}}]
outputs:
  - {{name: text, datatype: BYTES, shape: [-1]}}
  - {{name: tokens, datatype: INT64, shape: [-1]}}
  - {{name: finish-reason, datatype: BYTES, shape: [-1]}}
parameters:
  max_tokens: {{type: integer, default: 16, minimum: 1, maximum: 1800, help: the most tokens to generate}}
  temperature: {{type: number, default: 0, minimum: 0, maximum: 2, help: "0 takes the likeliest token each time"}}
  seed: {{type: integer, minimum: 0, help: the same seed gives the same text}}
  stop: {{type: strings, maximum: 4, help: texts that end the answer}}
size_unit: tokens
expected_size: 256
buckets: [256, 512, 2048]
artefacts:
  graph: {{kind: file, path: graph.onnx, sha256: {graph}, licence: Apache-2.0}}
  tokenizer: {{kind: file, path: tokenizer.json, sha256: {tokenizer}, licence: Apache-2.0}}
  chat: {{kind: file, path: chat.json, sha256: {chat}, licence: Apache-2.0}}
reference: onnx
variants:
  onnx:
    runtime: onnx
    precision: fp32
    entry: decoder
    artefacts: {{graph: graph, tokenizer: tokenizer, chat: chat}}
    memory: {memory}
    profiles: {{cpu: {{base: 0.01, slope: 0.00001}}}}
"""


def tiny_decoder(folder: Path, *, layers: int = 2, hidden: int = 64) -> OnnxDecoder:
    """A loaded runtime over `VOCABULARY` tokens; it fails on any other token, as a large one does."""
    runtime = OnnxDecoder(Placed("tiny", "fp32", "decoder", {"graph": _write_graph(folder, layers, hidden)}, "cpu"))
    runtime.load()
    return runtime


def tiny_model(models: Path, *, layers: int = 2, hidden: int = 64, memory: str = "1MiB") -> None:
    """Put the model `tiny` among others: a small decoder over bytes, slower with more and wider layers.

    At temperature 0 an answer is always as long as it may be.
    """
    folder = models / "tiny"
    folder.mkdir()
    graph, tokenizer, chat = _write_graph(folder, layers, hidden), folder / "tokenizer.json", folder / "chat.json"
    byte_tokenizer().save(str(tokenizer))
    chat.write_text(json.dumps(CHAT))
    digests = {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in (graph, tokenizer, chat)}
    (folder / "model.yaml").write_text(MODEL.format(**digests, memory=memory))


def byte_tokenizer() -> Tokenizer:
    """A token a byte, and those of `CONTROL`."""
    vocabulary = {sign: number for number, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CONTROL))
    return tokenizer


def _write_graph(folder: Path, layers: int, hidden: int) -> Path:
    weights, graph = folder / "weights.gguf", folder / "graph.onnx"
    _write_weights(weights, layers, hidden)
    make = recipe_code("smollm2-onnx", "").load()
    make({"weights": weights}, graph, {"precision": "fp32"})
    return graph


def _write_weights(file: Path, layers: int, hidden: int) -> None:
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(_WIDTH)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(_HEAD_WIDTH)
    writer.add_feed_forward_length(hidden)
    writer.add_context_length(2048)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    random = np.random.default_rng(0)
    for name, shape in _shapes(layers, hidden).items():
        weight = random.normal(0, 0.3, shape).astype(np.float32) + (len(shape) == 1)
        if name == "token_embd.weight":
            weight[256:] = 0  # so no control token is ever the likeliest
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(layers: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, _WIDTH), "output_norm.weight": (_WIDTH,)}
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (_WIDTH,),
        "attn_q": (_HEADS * _HEAD_WIDTH, _WIDTH),
        "attn_k": (_KV_HEADS * _HEAD_WIDTH, _WIDTH),
        "attn_v": (_KV_HEADS * _HEAD_WIDTH, _WIDTH),
        "attn_output": (_WIDTH, _HEADS * _HEAD_WIDTH),
        "ffn_norm": (_WIDTH,),
        "ffn_gate": (hidden, _WIDTH),
        "ffn_up": (hidden, _WIDTH),
        "ffn_down": (_WIDTH, hidden),
    }
    return shapes | {f"blk.{n}.{part}.weight": shape for n in range(layers) for part, shape in layer.items()}
