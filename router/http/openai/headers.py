"""The headers of answers in OpenAI's form. Pure."""

from __future__ import annotations

from router.service.admission import Admitted
from taxiway.contract.job import Result

_SAFE = dict.fromkeys((*range(32), 127), "?")
_LONGEST = 256  # characters of a header


def headers_of_result(job: str, result: Result) -> dict[str, str]:
    """The headers of a whole answer."""
    report = result.report
    headers = _headers(job, report.hardware_class, report.variant, report.reason)
    return {**headers, "x-taxiway-device": report.device, "x-taxiway-cost": f"{report.cost:.9f}"}


def headers_of_placement(admitted: Admitted) -> dict[str, str]:
    """The headers of a stream, which begins before its job has run: where the job was placed first."""
    placement, job = admitted.placement, admitted.ticket.job
    if placement.held:
        return {"x-request-id": job}
    candidate = placement.candidate
    return _headers(job, candidate.hardware_class, candidate.variant_name, placement.reason)


def _headers(job: str, hardware_class: str, variant: str, reason: str) -> dict[str, str]:
    named = {"class": hardware_class, "variant": variant, "reason": reason}
    headers = {f"x-taxiway-{name}": _printable(text) for name, text in named.items()}
    return {"x-request-id": job, **headers}


def _printable(text: str) -> str:
    return text[:_LONGEST].encode("ascii", "replace").decode().translate(_SAFE)
