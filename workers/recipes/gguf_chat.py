"""Recipe: how a GGUF file's model was trained to read a chat, as JSON: its Jinja template, and the tokens around it.

The JSON has `template`, `begin` and `end` (the texts of the tokens that the template knows as `bos_token` and
`eos_token`), and `ends`, the texts of the tokens that end an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

_END_OF_TEXT = "<|endoftext|>"  # ends the answers of many models, also where the metadata does not say so


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write what `inputs["weights"]` (GGUF) says; there are no options.

    Raises:
        ValueError: the file has no chat template.
    """
    fields = gguf.GGUFReader(str(inputs["weights"])).fields
    if "tokenizer.chat_template" not in fields:
        raise ValueError("tokenizer.chat_template: expected a template, got nothing")
    tokens = fields["tokenizer.ggml.tokens"].contents()

    def token(name: str) -> str:
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        return "" if field is None else str(tokens[int(field.contents())])

    ends = {token("eos"), token("eot"), _END_OF_TEXT if _END_OF_TEXT in tokens else ""} - {""}
    chat = {
        "template": fields["tokenizer.chat_template"].contents(),
        "begin": token("bos"),
        "end": token("eos"),
        "ends": sorted(ends),
    }
    output.write_text(json.dumps(chat, indent=1), encoding="utf-8")
