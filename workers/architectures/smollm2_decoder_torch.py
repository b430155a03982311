"""SmolLM2 for torch: Llama's decoder (Touvron et al. 2023) with grouped queries, and a cache by slot.

The weights carry the makers' names (`model.layers.0.self_attn.q_proj.weight`, …); input and output embeddings are one
table. Sizes that weights do not tell stand below, as the model's config.json has them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_HEAD_WIDTH = 64
_ROPE_BASE = 100_000.0
_EPSILON = 1e-5
_CONTEXT = 2048  # tokens: the catalogue's limit
_BLOCK = 128  # tokens by which the cache's capacity grows


class Decoder(nn.Module):
    """All layers and their cache, of shape (layers, 2, slots, kv heads, capacity, head width)."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        count = len({name.split(".")[2] for name in weights if name.startswith("model.layers.")})
        self.table = nn.Parameter(weights["model.embed_tokens.weight"], requires_grad=False)
        self.norm = nn.Parameter(weights["model.norm.weight"], requires_grad=False)
        self.layers = nn.ModuleList(Layer(weights, f"model.layers.{index}") for index in range(count))
        half = torch.arange(_HEAD_WIDTH // 2, dtype=torch.float64)
        angle = torch.arange(_CONTEXT)[:, None] * _ROPE_BASE ** (-half / (_HEAD_WIDTH // 2))
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self._kv_heads = weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // _HEAD_WIDTH

    def forward(self, slots: Tensor, input_ids: Tensor, last: Tensor) -> dict[str, Tensor]:
        """`logits` (n, vocabulary) after each row's last real token.

        Args:
            slots: int64 (n,), where each row's cache is.
            input_ids: int64 (n, t): whole prompts padded at their right, one further token a row, or any further tokens
                of a row alone.
            last: int64 (n,), the position in its context of each row's last real token.
        """
        rows, width = input_ids.shape
        first = last - (width - 1) if rows == 1 or width == 1 else torch.zeros_like(last)
        positions = first[:, None] + torch.arange(width, device=input_ids.device)
        total = int(positions.max()) + 1
        self._grow(int(slots.max()) + 1, total)
        seen = torch.arange(total, device=input_ids.device) <= positions[..., None]
        turn = self.cos[positions][:, None], self.sin[positions][:, None]
        x = self.table[input_ids]
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, seen[:, None], Cache(self.cache[index], slots, positions, total))
        picked = x[torch.arange(rows, device=x.device), last - first]
        return {"logits": _normed(picked, self.norm) @ self.table.T}

    def keep(self, tokens: int) -> None:
        """Give back what the cache takes beyond `tokens` of each slot, where that is much."""
        wanted = _blocks(tokens)
        if not wanted:
            self.cache = self.table.new_zeros(0)
        elif self.cache.dim() > 1 and self.cache.shape[4] > 2 * wanted:
            self.cache = self.cache[..., :wanted, :].clone()

    def _grow(self, slots: int, tokens: int) -> None:
        """Make room, keeping what is there; capacity grows in blocks, so that it is copied seldom."""
        old = self.cache
        held, capacity = (old.shape[2], old.shape[4]) if old.dim() > 1 else (0, 0)
        if slots <= held and tokens <= capacity:
            return
        capacity_wanted = max(capacity, _blocks(tokens))
        shape = (len(self.layers), 2, max(held, slots), self._kv_heads, capacity_wanted, _HEAD_WIDTH)
        self.cache = self.table.new_zeros(shape)
        if held:
            self.cache[:, :, :held, :, :capacity] = old


class Cache:
    """One layer's keys and values, as one call sees them: where to write, and how far to read."""

    def __init__(self, store: Tensor, slots: Tensor, positions: Tensor, total: int) -> None:
        self._store = store
        self._slots = slots
        self._positions = positions
        self._total = total

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write both, of shape (n, kv heads, t, head width), and give all of each that rows may look at."""
        for store, new in zip(self._store, (key, value), strict=True):
            store[self._slots[:, None], :, self._positions] = new.transpose(1, 2)
        both = self._store[:, self._slots, :, : self._total]
        return both[0], both[1]


class Layer(nn.Module):
    """Attention, then SwiGLU, each after a norm and added to what came in."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        super().__init__()

        def own(*parts: str) -> nn.Parameter:
            return nn.Parameter(torch.cat([weights[f"{name}.{part}.weight"] for part in parts]), requires_grad=False)

        self.norm_in, self.norm_middle = own("input_layernorm"), own("post_attention_layernorm")
        self.qkv = own(*(f"self_attn.{part}_proj" for part in "qkv"))
        self.out = own("self_attn.o_proj")
        self.gate_up = own("mlp.gate_proj", "mlp.up_proj")
        self.down = own("mlp.down_proj")

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], seen: Tensor, cache: Cache) -> Tensor:
        """`x` (n, t, width) one layer on; `seen` (n, 1, t, total) says which places a token may look at."""
        x = x + self._attend(_normed(x, self.norm_in), turn, seen, cache) @ self.out.T
        gate, up = (_normed(x, self.norm_middle) @ self.gate_up.T).chunk(2, dim=-1)
        return x + (functional.silu(gate) * up) @ self.down.T

    def _attend(self, x: Tensor, turn: tuple[Tensor, Tensor], seen: Tensor, cache: Cache) -> Tensor:
        rows, width, features = x.shape
        heads = (x @ self.qkv.T).view(rows, width, -1, _HEAD_WIDTH).transpose(1, 2)
        count = features // _HEAD_WIDTH
        query, key, value = heads.split([count, (heads.shape[1] - count) // 2, (heads.shape[1] - count) // 2], dim=1)
        keys, values = cache.extend(_turned(key, turn), value)
        mixed = functional.scaled_dot_product_attention(
            _turned(query, turn), keys, values, attn_mask=seen, enable_gqa=True
        )
        return mixed.transpose(1, 2).reshape(rows, width, features)


def _blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK) * _BLOCK


def _normed(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm, in float32 whatever the precision."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)).to(x.dtype) * scale


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (n, heads, t, head width): its halves are a rotation's two coordinates."""
    cos, sin = turn
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def build(weights: Mapping[str, Tensor]) -> Decoder:
    """The network over these weights."""
    return Decoder(weights)
