"""Derives profiles of two unavailable accelerators, an L4 and a TPU v5e, from public measurements.

`python -m lab.derive_profiles [--data ../shared/data] [--output models]` writes the profiles of MiniLM (the
models embed and sentiment), prints each as one line, and validates the method on a device that it was not fitted to.

The method is a roofline: a batch takes its launch time plus the slowest of reading the weights, moving the activations
and computing. The shares of peak that engines reach come from the rows named in each file. An engine that is less
efficient than theirs (TensorRT, Flax) is slower than these figures; R = 2 and the warning account for that.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.document import Size
from tasks.models.folder import load_catalogue
from tasks.models.model import Model, Variant
from tasks.models.profiles import UNSURE, DeviceProfile, Measurement, Processor, Residuals, profile_path, render_profile
from tasks.settings import TREE
from workers.profiling.fit import rounded

MODELS = ("embed", "sentiment")

PUBLISHED = "2024-08-28"
"""The day on which MLPerf Inference v4.1 was published."""

SQUAD_TOKENS = 177.0
"""Mean tokens of a bert-99 sample. Assumed: engines skip padding; with all 384 tokens an L4 would be at 98 % of its
peak."""

SDXL_OPERATIONS = 20 * 2 * 5.98e12
"""Operations of a stable-diffusion-xl sample: 20 steps, each of two passes of a network of 5.98e12. Assumed."""

EAGER_TRAFFIC = 38
"""Activations that one layer reads and writes, in widths a token, with no operation fused into another."""

FUSED_TRAFFIC = 26
"""The same if XLA fuses element-wise operations into their neighbours."""

_BERT = ("Offline", "SingleStream")
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
_PEAKS = {"fp32": "peak_fp32_flops", "bf16": "peak_bf16_flops", "int8": "peak_int8_ops"}

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Encoder:
    """A transformer encoder whose feed-forward layers are four times its width."""

    width: int
    layers: int

    @property
    def weights(self) -> float:
        """Parameters of its layers."""
        return 12.0 * self.width**2 * self.layers

    def operations(self, tokens: float) -> float:
        """Operations per token in a sequence of that many tokens."""
        return 2 * self.weights + 4 * tokens * self.width * self.layers


BERT_LARGE = Encoder(1024, 24)
MINILM = Encoder(384, 6)


@dataclass(frozen=True, slots=True)
class Engine:
    """What a device reaches: shares of its peaks, and launch seconds per layer and per batch."""

    peak: Row
    compute: float
    memory: float
    a_layer: float
    a_batch: float

    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.memory * float(self.peak["memory_bandwidth_bytes_per_s"])

    def rate(self, precision: str) -> float:
        """Operations a second. A TPU multiplies float32 as bfloat16 unless set otherwise (JAX's default precision)."""
        column = _PEAKS[precision]
        return self.compute * float(self.peak[column] or self.peak["peak_bf16_flops"])


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def only(rows: Sequence[Row], **wanted: str) -> Row:
    """The one row with these values.

    Raises:
        ValueError: there is none, or several.
    """
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"expected one row with {wanted}, found {len(found)}")
    return found[0]


def share_of_bandwidth(vidur: Row, a100: Row) -> float:
    """The share of peak of an element-wise operation: phi-2's activation, 4 × 2,560 wide, in fp16."""
    moved = 2 * 4 * 2560 * 2 * float(vidur["num_tokens"])
    return moved / (float(vidur["mlp_act_ms"]) * 1e-3) / float(a100["memory_bandwidth_bytes_per_s"])


def bert_engine(offline: Row, single: Row, peak: Row, memory: float) -> Engine:
    """What a device reaches on bert-99: compute from its Offline rate, launches from what Single Stream leaves."""
    each = float(offline["samples_per_second"]) / float(offline["accelerator_count"])
    operations = SQUAD_TOKENS * BERT_LARGE.operations(SQUAD_TOKENS)
    reading = BERT_LARGE.weights / (memory * float(peak["memory_bandwidth_bytes_per_s"]))
    launches = float(single["latency_p50_s"]) - reading
    compute = each * operations / float(peak["peak_int8_ops"])
    return Engine(peak, compute, memory, launches / BERT_LARGE.layers, 0.0)


def sdxl_engine(offline: Row, peak: Row, memory: float, a_batch: float) -> Engine:
    """What a device reaches on stable-diffusion-xl; no row gives a batch's fixed cost."""
    each = float(offline["samples_per_second"]) / float(offline["accelerator_count"])
    return Engine(peak, each * SDXL_OPERATIONS / float(peak["peak_bf16_flops"]), memory, 0.0, a_batch)


def variant_on(engine: Engine, variant: Variant, model: Model, kind: str, traffic: int) -> Measurement:
    """The roofline of a MiniLM variant; load and memory are model.yaml's."""
    each = _BYTES[variant.precision]
    computing = MINILM.operations(model.expected_size) / engine.rate(variant.precision)
    moving = traffic * MINILM.width * MINILM.layers * each / engine.bandwidth()
    base = engine.a_batch + engine.a_layer * MINILM.layers
    return Measurement(
        date=PUBLISHED,
        load=next(p for k, p in variant.profiles.items() if k == kind).load,
        memory=Size(variant.memory),
        peak=Size(variant.memory),
        base=rounded(base),
        slope=rounded(max(computing, moving)),
        floor=rounded(base + MINILM.weights * each / engine.bandwidth()),
        residual=Residuals(p50=1.0, p90=UNSURE, p95=UNSURE, p99=UNSURE),
    )


def name_of(row: Row) -> str:
    """An MLPerf row's name in a profile file."""
    what = f"{row['submitter']} {row['platform']} {row['model']} {row['scenario']}"
    median = "" if row["scenario"] == "Offline" else f", latency_p50_s {row['latency_p50_s']}"
    return f"mlperf_offline_server.csv: {what}: {row['result']} {row['unit']}{median} ({row['weight_data_types']})"


def check(engine: Engine, offline: Row, single: Row, peak: Row) -> str:
    """How well the L4's shares predict bert-99 on another device, as one line of JSON."""
    other = Engine(peak, engine.compute, engine.memory, engine.a_layer, engine.a_batch)
    rate = other.rate("int8") / (SQUAD_TOKENS * BERT_LARGE.operations(SQUAD_TOKENS))
    latency = engine.a_layer * BERT_LARGE.layers + BERT_LARGE.weights / other.bandwidth()
    submitted = float(offline["samples_per_second"]) / float(offline["accelerator_count"])
    answer = {
        "question": "does the L4's roofline tell bert-99 on an L40S? predicted over published",
        "offline": round(rate / submitted, 3),
        "single_stream": round(latency / float(single["latency_p50_s"]), 3),
    }
    return json.dumps(answer)


def derive(data: Path, models: Callable[[str], Model]) -> list[DeviceProfile]:
    """The profiles of every model of `MODELS` on both devices."""
    mlperf, peaks = read(data / "mlperf_offline_server.csv"), read(data / "accelerators.csv")
    vidur = only(
        read(data / "vidur_profiles.csv"),
        device="a100",
        model="microsoft/phi-2",
        num_tokens="4096",
        tensor_parallel="1",
    )
    memory = share_of_bandwidth(vidur, only(peaks, name="NVIDIA A100-SXM4-80GB"))
    offline, single = (only(mlperf, platform="Lenovo_2xL4_TRT", model="bert-99", scenario=s) for s in _BERT)
    l4 = bert_engine(offline, single, only(peaks, name="NVIDIA L4"), memory)
    print(check(l4, *_held_out(mlperf), only(peaks, name="NVIDIA L40S")))
    images = only(mlperf, platform="tpu_v5e_x4_flax", model="stable-diffusion-xl", scenario="Offline")
    moved = (
        "vidur_profiles.csv: a100 microsoft/phi-2 tensor_parallel 1, num_tokens 4096: mlp_act_ms",
        "accelerators.csv: NVIDIA A100-SXM4-80GB",
    )
    made = []
    for model in map(models, MODELS):
        bert = (name_of(offline), name_of(single), *moved, "accelerators.csv: NVIDIA L4")
        made.append(_profile(model, Processor(kind="cuda", name="NVIDIA L4"), l4, bert, EAGER_TRAFFIC))
        a_batch = model.variants["jax-fp32"].profiles["tpu"].base
        v5e = sdxl_engine(images, only(peaks, name="Google TPU v5e"), memory, a_batch)
        sdxl = (name_of(images), *moved, "accelerators.csv: Google TPU v5e")
        made.append(_profile(model, Processor(kind="tpu", name="TPU v5 lite"), v5e, sdxl, FUSED_TRAFFIC))
    return made


def _held_out(mlperf: Sequence[Row]) -> tuple[Row, Row]:
    offline = only(mlperf, platform="Lenovo_2xL40S_TRT", model="bert-99", scenario="Offline")
    return offline, only(mlperf, platform="Lenovo_2xL40S_TRT", model="bert-99", scenario="SingleStream")


def _profile(model: Model, device: Processor, engine: Engine, rows: tuple[str, ...], traffic: int) -> DeviceProfile:
    able = {name: v for name, v in model.variants.items() if device.kind in v.profiles}
    assumed = (
        f"a bert-99 sample has {SQUAD_TOKENS:g} tokens"
        if device.kind == "cuda"
        else f"a stable-diffusion-xl sample is {SDXL_OPERATIONS:.4g} operations; base is model.yaml's estimate",
        f"a layer of MiniLM reads and writes {traffic} widths of activations a token",
        f"engines reach {engine.compute:.2f} of the peak rate and {engine.memory:.2f} of the bandwidth here as there",
        "load and memory are model.yaml's",
    )
    variants = {name: variant_on(engine, v, model, device.kind, traffic) for name, v in able.items()}
    return DeviceProfile(model=model.id, device=device, source="derived", rows=rows, assumed=assumed, variants=variants)


def main() -> None:
    """Derive and write the profiles, or report that the data is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=TREE.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=TREE / "models")
    options = parser.parse_args()
    if not (options.data / "mlperf_offline_server.csv").is_file():
        print(json.dumps({"skipped": f"no public data in {options.data}: the profiles in models/ stay as they are"}))
        return
    for profile in derive(options.data, load_catalogue(TREE / "models").resolve):
        path = profile_path(options.output, profile.model, profile.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_profile(profile), encoding="utf-8")
        fits = {n: {"base": v.base, "slope": v.slope, "floor": v.floor} for n, v in profile.variants.items()}
        print(json.dumps({"wrote": f"{path.parent.parent.name}/profiles/{path.name}", "variants": fits}))


if __name__ == "__main__":
    main()
