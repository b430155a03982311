"""Generation on torch: a network that keeps its cache by slot, on its own device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from workers.runtimes import Placed
from workers.runtimes.stepping import SlotDecoder
from workers.runtimes.torch import TorchRuntime


class TorchDecoder(SlotDecoder, TorchRuntime):
    """A network whose `forward(slots, input_ids, last)` gives `logits`, and whose `keep(tokens)` frees memory."""

    def __init__(self, placed: Placed) -> None:
        SlotDecoder.__init__(self)
        TorchRuntime.__init__(self, placed)

    def _read(self, slots: Sequence[int], ids: np.ndarray, last: np.ndarray) -> np.ndarray:
        return self.run({"slots": np.array(slots, np.int64), "input_ids": ids, "last": last.astype(np.int64)})["logits"]

    def _forget(self, slots: Sequence[int]) -> None:
        cast(Any, self._module).keep(max(self._lengths.values(), default=0))


def open_variant(placed: Placed) -> TorchDecoder:
    """The runtime for one variant, not yet loaded."""
    return TorchDecoder(placed)
