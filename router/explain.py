"""A placement's explanation: the table it was chosen from, as it is kept in the job's record."""

from __future__ import annotations

import msgspec

from router.placement import Option, Placement


class Considered(msgspec.Struct, frozen=True, array_like=True):
    """One candidate as it stood in the choice. Seconds and US dollars, for the whole request."""

    hardware_class: str
    variant: str
    cost: float
    finish: float
    guaranteed: float
    transfer: float
    wait: float
    forming: float
    load: float
    run: float
    warm: bool
    live: bool
    warning: str | None


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """One hardware class and variant that could not run the request."""

    hardware_class: str
    variant: str
    reason: str


class Explanation(msgspec.Struct, frozen=True, array_like=True):
    """What was considered, cheapest first, and what was refused."""

    considered: tuple[Considered, ...]
    refused: tuple[Refused, ...]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Explanation).decode


def explanation_text(placement: Placement) -> str:
    """The placement's table, compact: it is kept with every job."""
    refused = tuple(Refused(r.hardware_class, r.variant, r.reason) for r in placement.refusals)
    return _encode(Explanation(tuple(_considered(o) for o in placement.options), refused)).decode()


def read_explanation(text: str) -> Explanation:
    """The table in a job's record; an empty one where none was kept."""
    return _decode(text) if text else Explanation((), ())


def _considered(option: Option) -> Considered:
    figures = option.estimate
    return Considered(
        hardware_class=option.candidate.hardware_class,
        variant=option.candidate.variant_name,
        cost=float(f"{figures.cost:.4g}"),
        finish=round(figures.finish, 6),
        guaranteed=round(figures.guaranteed, 6),
        transfer=round(figures.transfer, 6),
        wait=round(figures.wait, 6),
        forming=round(figures.forming, 6),
        load=round(figures.load, 6),
        run=round(figures.run, 6),
        warm=option.warm,
        live=option.live,
        warning=option.warning,
    )
