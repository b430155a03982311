"""What the demo shows of its answers."""

import io

from rich.console import Console

from examples.demo import DemoAnswer, DemoInput, show_answers
from tasks.machine import Machine
from taxiway import Result
from tests.builders import a_report

LAPTOP = Machine(cores=2, memory=0, memory_free=0, instruction_sets=(), cuda=(), tpu_chips=0, runtimes={})
REASON = "cheapest of two that meet 45 s; the other is past its horizon by so much work that it would be late by far"


def answer(
    model: str, hardware_class: str, *, service: str = "standard", waited: float = 0.1, text: str = "an answer " * 20
) -> DemoAnswer:
    emulated = hardware_class != "cpu.batch"
    report = a_report(
        hardware_class=hardware_class, emulated=emulated, queue_wait=waited, run_time=2.0, cost=1e-6, reason=REASON
    )
    ask = DemoInput(
        model=model, shown="a question " * 20, inputs="", parameters={}, terms={"service": service, "deadline": 45.0}
    )
    return DemoAnswer(ask=ask, elapsed=2.5, result=Result(model=f"{model}:1", outputs={"text": text}, report=report))


ANSWERS = [
    *(answer("sentiment", "cpu.batch", waited=waited) for waited in (0.1, 0.3, 0.2)),
    answer("generate", "cpu.batch"),
    answer("generate", "gpu.realtime", service="live"),
    answer("embed", "tpu.bulk", service="bulk"),
    DemoAnswer(ask=answer("embed", "").ask, elapsed=1.0, error="NoDeviceError: none is live"),
]


def shown(*, every: bool = False) -> list[str]:
    written = io.StringIO()
    show_answers(ANSWERS, LAPTOP, Console(file=written, width=100), every=every)
    return written.getvalue().splitlines()


def test_a_summary_is_one_line_a_class_and_model_with_medians() -> None:
    assert [line.split() for line in shown()[1:5]] == [
        ["cpu.batch", "generate", "onnx-int8", "1", "100", "ms", "2.00", "s", "2.50", "s", "0.001"],
        ["cpu.batch", "sentiment", "onnx-int8", "3", "200", "ms", "2.00", "s", "2.50", "s", "0.001"],
        ["gpu.realtime", "(emulated)", "generate", "onnx-int8", "1", "100", "ms", "2.00", "s", "2.50", "s", "0.001"],
        ["tpu.bulk", "(emulated)", "embed", "onnx-int8", "1", "100", "ms", "2.00", "s", "2.50", "s", "0.001"],
    ]


def test_the_demo_fits_100_columns_and_explains_what_is_emulated() -> None:
    lines = shown()
    said = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 100
    assert "gpu.realtime (emulated)" in said
    assert "6 of 7 inputs answered" in said
    assert "2 of them, on gpu.realtime and tpu.bulk, are emulated: this machine has no such device" in said
    assert "…" not in lines[0]
    assert said.count(REASON) == 4
    assert "failed: embed" in said
    assert " ".join(" ".join(shown(every=True)).split()).count(REASON) == 6
