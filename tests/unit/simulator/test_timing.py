"""The roofline against measured rows, and the arithmetic of batches."""

from typing import Any

import numpy as np
import pytest

from lab.fleet_file import Transformer
from lab.roofline import Roofline
from tests.unit.simulator.public_data import rows_of

LLAMA: Any = {"intermediate": 11008, "heads": 32, "kv_heads": 32, "vocabulary": 32000}
MODELS = {
    "microsoft/phi-2": Transformer(
        layers=32, hidden=2560, gated=False, **{**LLAMA, "intermediate": 10240, "vocabulary": 51200}
    ),
    "meta-llama/Llama-2-7b-hf": Transformer(layers=32, hidden=4096, **LLAMA),
    "meta-llama/Llama-2-70b-hf": Transformer(
        layers=80, hidden=8192, **{**LLAMA, "intermediate": 28672, "heads": 64, "kv_heads": 8}
    ),
}
DEVICES = {"a40": "NVIDIA A40", "a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100-SXM5-80GB"}
A100 = Roofline(peak_flops=312e12, bandwidth=1555e9, host_link=31.5e9)


@pytest.mark.parametrize("device", DEVICES)
def test_the_roofline_is_near_the_measured_dense_operators(device: str) -> None:
    facts = next(row for row in rows_of("accelerators.csv") if row["name"] == DEVICES[device])
    bandwidth, link = float(facts["memory_bandwidth_bytes_per_s"]), float(facts["host_link_bytes_per_s"])
    roofline = Roofline(peak_flops=float(facts["peak_bf16_flops"]), bandwidth=bandwidth, host_link=link)

    def error(row: dict[str, str]) -> float:
        shape, tokens, parallel = MODELS[row["model"]].shape(), int(row["num_tokens"]), int(row["tensor_parallel"])
        return abs(1000 * roofline.layer(shape, tokens, parallel) / float(row["layer_linear_total_ms"]) - 1)

    errors = [error(row) for row in rows_of("vidur_profiles.csv") if row["device"] == device]
    assert len(errors) == 459
    assert np.median(errors) < 0.12
    assert np.quantile(errors, 0.9) < 0.30
