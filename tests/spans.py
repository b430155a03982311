"""An exporter that writes spans to files, found as an operator's is; and those that all processes of a test wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import format_span_id, format_trace_id

FOLDER = "TAXIWAY_TEST_SPANS"


class FileExporter(SpanExporter):
    """Writes each span as a line, to a file of this process."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a") as file:
            for span in spans:
                file.write(json.dumps(_plain(span)) + "\n")
        return SpanExportResult.SUCCESS


def export_to(folder: Path) -> dict[str, str]:
    """The variables by which a process exports to `folder`."""
    distribution = folder / "spans-1.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: spans\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text(f"[opentelemetry_traces_exporter]\nfile = {__name__}:FileExporter\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, FOLDER: str(folder), "OTEL_TRACES_EXPORTER": "file", "OTEL_BSP_SCHEDULE_DELAY": "50"}


def exported(folder: Path) -> list[dict[str, Any]]:
    """The spans that are there, in the order in which they began."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda span: int(span["start"]))


def _plain(span: ReadableSpan) -> dict[str, Any]:
    context = span.get_span_context()
    assert context is not None
    return {
        "name": span.name.removeprefix("taxiway."),
        "trace": format_trace_id(context.trace_id),
        "id": format_span_id(context.span_id),
        "parent": format_span_id(span.parent.span_id) if span.parent else "",
        "start": span.start_time,
        "end": span.end_time,
        "service": span.resource.attributes["service.name"],
        "error": span.status.description or "",
        **{name.removeprefix("taxiway."): value for name, value in (span.attributes or {}).items()},
    }
