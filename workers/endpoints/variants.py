"""The variants that an endpoint runs: those that queues.yaml names, as far as the endpoint announces them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from tasks.heartbeat import three_digits, variant_key
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import Announced, discovered, named
from tasks.models.model import Model, Profile, generates
from tasks.models.profiles import KnownProfile, ProfileBook
from tasks.queues.endpoints import Endpoint
from taxiway.contract.peers import Offers, SiteOffer
from taxiway.errors import ExecutionError
from workers.decide.endpoints import ENOUGH, Learned, after, curve_of
from workers.decide.occupation import Track, is_readable, observe
from workers.device import Device
from workers.endpoints.protocol import AskItem, EndpointProtocol, Exchange, ServedModel
from workers.learned import DeviceVariants, Loaded
from workers.port import Item, Row, Runtime
from workers.runtimes.echo import EchoRuntime

if TYPE_CHECKING:
    from workers.endpoints.places import EndpointHealth


class EndpointVariants(DeviceVariants):
    """Nothing is loaded here, and what is known of a variant is learned.

    `absent` has the keys of variants that the endpoint does not list now.
    """

    _catalogue: Catalogue

    def __init__(
        self, endpoint: Endpoint, protocol: EndpointProtocol, device: Device, catalogue: Catalogue, book: ProfileBook
    ) -> None:
        super().__init__()
        self.device = device
        self.unavailable: dict[str, str] = {}
        self.absent: Collection[str] = ()
        self._endpoint, self._protocol = endpoint, protocol
        self._lacking: dict[str, str] = {}
        self._announced: Collection[str] | None = None
        self._learned: dict[str, Learned] = {}
        self._calls: Mapping[str, str] = {}
        self._models: Mapping[str, Announced] = {}
        self._extensions: Collection[str] = ()
        self.renew(catalogue, book)

    def renew(self, catalogue: Catalogue, book: ProfileBook) -> None:
        """Switch to a new catalogue and profiles. Thread-safe."""
        self._catalogue, self._book = catalogue, book
        self._served = {one.key: one for model in catalogue.models.values() for one in self._of(model)}
        self._lacking.clear()
        self._judge()

    def change(self, endpoint: Endpoint, device: Device) -> None:
        """Switch to another description of the endpoint."""
        self._endpoint, self.device = endpoint, device
        self.renew(self._catalogue, self._book)

    def announce(self, said: EndpointHealth) -> None:
        """Note what the endpoint says of itself. One that lists no models is taken to have all."""
        models = said.models
        if (said.listed, models, said.extensions) == (self._announced, self._models, self._extensions):
            return
        self._announced, self._models, self._extensions = said.listed, models, said.extensions
        known = set(self._endpoint.calls.values())
        self._calls = named(called for called in models if called not in known)
        self.discovered = {
            name: msgspec.structs.replace(models[called], called=called) for name, called in self._calls.items()
        }
        self.renew(self._catalogue, self._book)

    def learn(self, loaded: Loaded, item: Item, exchange: Exchange, *, rows: float, seconds: float) -> None:
        """Learn from a row that was answered in `seconds`, with `rows` running at the same time on average.

        Prompts count with the length that they were expected to have: placement knows no other. What the engine had in
        its cache does not count: placement takes it off itself.
        """
        if self._endpoint.is_peer:
            seen = observe(self.track(loaded), predicted=exchange.expected, seconds=seconds, levels={item.level})
            self._tracks[loaded.key] = seen
            return
        tokens = exchange.tokens
        read = exchange.prompt * (1 - tokens.cached / tokens.input if tokens.cached else 1.0)
        written = exchange.tokens.output if generates(loaded.model) else 0
        curve = self.curve(loaded)
        predicted = curve.latency(rows, read + written, read)
        track = observe(self.track(loaded), predicted=predicted, seconds=seconds, levels={item.level})
        learned = after(
            self._learned.get(loaded.key, Learned()),
            loaded.known.profile,
            read=read,
            written=written,
            rows=rows,
            first=exchange.first - exchange.sent if exchange.first else seconds,
            seconds=seconds,
        )
        self._learned[loaded.key] = learned
        replaced = learned.first.count >= ENOUGH
        self._tracks[loaded.key] = dataclasses.replace(track, pace=1.0) if replaced else track

    def curve(self, loaded: Loaded) -> Profile:
        """The variant's profile as its answers have corrected it."""
        return curve_of(self._learned.get(loaded.key, Learned()), loaded.known.profile, self._endpoint.slots)

    def offered(self, offers: Offers) -> dict[str, dict[str, SiteOffer]]:
        """Another fleet's offers, which are by what it calls the models, by variant. Thread-safe."""
        served = {one.key: offers.get(_name(one)) for one in list(self._served.values())}
        return {key: dict(made) for key, made in served.items() if made}

    def curves(self) -> dict[str, Profile]:
        """What heartbeats report of the variants of which enough was learned. Thread-safe."""
        enough = [one for one in self.all_loaded() if self._learned.get(one.key, Learned()).first.count >= ENOUGH]
        return {one.key: _curve(self.curve(one)) for one in enough}

    def memory(self) -> bytes:
        """What was learned, to be kept across restarts. Thread-safe."""
        return msgspec.json.encode(_Memory(dict(self._learned), dict(self._tracks)))

    def recall(self, memory: bytes) -> None:
        """Go on with what an earlier process learned; what cannot be read is forgotten."""
        try:
            kept = _read_memory(memory)
        except msgspec.MsgspecError:
            return
        self._learned = kept.learned
        self._tracks = {key: one for key, one in kept.tracks.items() if is_readable(one)}

    def ready(self, model: Model, variant: str) -> Loaded | None:
        """See `learned.DeviceVariants`."""
        key = variant_key(model.id, variant)
        served = self._served.get(key)
        return served if served is not None and served.model is model and key not in self.unavailable else None

    def all_loaded(self) -> list[Loaded]:
        """See `learned.DeviceVariants`."""
        return [one for one in list(self._served.values()) if one.key not in self.unavailable]

    def lacks(self, key: str, reason: str) -> None:
        """See `learned.DeviceVariants`."""
        self._lacking[key] = reason
        self._judge()

    def known(self, model: Model, name: str) -> KnownProfile:
        """See `learned.DeviceVariants`."""
        return self._book.lookup(model, name, self.device.kind, self.device.name)

    def memory_used(self) -> int:
        """Nothing on this machine."""
        return 0

    def _of(self, model: Model) -> list[Loaded]:
        """The model's variants that the endpoint runs."""
        return [
            Loaded(
                variant_key(model.id, name),
                model,
                variant,
                _EndpointPipeline(
                    self._protocol,
                    ServedModel(model, variant.forwarding(self._endpoint.forwards), called, self._extensions),
                ),
                EchoRuntime(),  # never run
                self.known(model, name),
                0.0,
            )
            for name, variant in model.variants.items()
            if variant.runtime == self._endpoint.protocol and (called := self._called(model, name)) is not None
        ]

    def _called(self, model: Model, variant: str) -> str | None:
        if not model.discovered:
            return self._endpoint.name_of(model.name, model.version, variant)
        announced, protocol = self.discovered.get(model.name), self._endpoint.protocol
        same = announced is not None and discovered(model.name, protocol, announced) == model
        return self._calls[model.name] if same else None

    def _judge(self) -> None:
        """Which variants cannot run, and why."""
        listed = self._announced
        absent = {} if listed is None else {key: one for key, one in self._served.items() if _name(one) not in listed}
        said = ", ".join(sorted(listed or ())[:5]) or "none"
        reasons = {key: f"the endpoint lists no model {_name(one)!r} ({said})" for key, one in absent.items()}
        hidden = {name for name in self.discovered if any(one.name == name for one in self._written())}
        shadowed = {
            variant_key(f"{name}:1", self._endpoint.protocol): f"a model.yaml has the name of {self._calls[name]!r}: "
            "name that in endpoint.models"
            for name in hidden
        }
        self.absent, self.unavailable = frozenset(absent), {**self._lacking, **shadowed, **reasons}

    def _written(self) -> list[Model]:
        return [model for model in self._catalogue.models.values() if not model.discovered]


class _Memory(msgspec.Struct, frozen=True):
    """What is kept of each variant, by its key."""

    learned: dict[str, Learned]
    tracks: dict[str, Track]


_read_memory = msgspec.json.Decoder(_Memory).decode


def _curve(profile: Profile) -> Profile:
    """What heartbeats say of a learned profile."""
    figures = (profile.base, profile.step, profile.slope, *profile.of_prompt)
    base, step, slope, prompt_step, prompt_slope = map(three_digits, figures)
    return Profile(base=base, step=step, slope=slope, prompt_step=prompt_step, prompt_slope=prompt_slope)


class _EndpointPipeline:
    """Prepares rows for one model of an endpoint, which runs them."""

    def __init__(self, protocol: EndpointProtocol, served: ServedModel) -> None:
        self._protocol, self.served = protocol, served

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> AskItem:
        """See `Pipeline`."""
        return self._protocol.prepare(self.served, row, parameters)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """Never called: `stage` runs the items."""
        raise ExecutionError("a variant of an endpoint runs on the endpoint")


def _name(loaded: Loaded) -> str:
    assert isinstance(loaded.pipeline, _EndpointPipeline)
    return loaded.pipeline.served.called
