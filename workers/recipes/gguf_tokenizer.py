"""Recipe: the byte-level tokenizer inside SmolLM2's GGUF file, as a tokenizer.json.

What GGUF calls the `smollm` pre-tokenizer splits digits one by one, then as GPT-2 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_CONTROL = 3  # the token type of GGUF that no text may spell: <|im_start|> and its like


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the tokenizer of `inputs["weights"]` (GGUF); there are no options.

    Raises:
        ValueError: it is of another kind.
    """
    fields = gguf.GGUFReader(str(inputs["weights"])).fields
    kind = fields["tokenizer.ggml.pre"].contents()
    if kind != "smollm":
        raise ValueError(f"tokenizer.ggml.pre: expected 'smollm', got {kind!r}")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(output))
