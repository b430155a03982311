"""Which job had the longest prefix of a prompt, and how far a request may go to run where that job ran. Pure.

An engine keeps what it read of prompts in a cache, so a request that shares a prefix starts sooner on the replica that
has it. The requests of a conversation do, and those with the same instructions. A router remembers which job last had
each prefix; where that ran, its record tells, when the message is forwarded (`broker.port.Affinity`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from router.decide.candidates import CandidateTable
from router.decide.classify import Needs, Prefix
from router.decide.cost import of_prompt, read_before
from tasks.models.sizes import CHARACTERS_PER_TOKEN

BLOCK = 1024
"""Bytes of a prompt after which a prefix ends: about 256 tokens, as many blocks as vLLM's cache has in 16."""

BLOCKS = 64
"""Most blocks of a prompt that are looked at; longer prompts are alike if these are."""

PREFIXES_REMEMBERED = 32_768
"""Prefixes that a router remembers, those used last: about 6 MB."""

_FREELY = 4096  # slots: an endpoint has no more
_DIGITS = 2  # binary digits of a number of blocks: requests that differ by less are placed alike


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prefixes of a prompt, and of the longest that is known the job that had it, and where: so many tokens."""

    prefixes: tuple[bytes, ...] = ()
    earlier: str = ""
    prefix: Prefix | None = None


def prefixes_of(owner: str, beginning: bytes) -> tuple[bytes, ...]:
    """A digest of each prefix of whole blocks, the shortest first.

    `owner` is who may share them: what one tenant asked is not disclosed to another.
    """
    digest, found = blake2b(owner.encode(errors="replace"), digest_size=12), []
    for block in range(min(len(beginning) // BLOCK, BLOCKS)):
        digest.update(beginning[block * BLOCK : (block + 1) * BLOCK])
        found.append(digest.digest())
    return tuple(found)


class Prefixes:
    """The prefixes that were used last, each with the last job that had it."""

    def __init__(self, most: int = PREFIXES_REMEMBERED) -> None:
        self._most = most
        self._known: OrderedDict[bytes, tuple[str, str]] = OrderedDict()  # the job, and the class it was placed on

    def __len__(self) -> int:
        return len(self._known)

    def prompt(self, prefixes: tuple[bytes, ...]) -> Prompt:
        """The prompt with these prefixes, as it is known now."""
        for number in range(len(prefixes), 0, -1):
            known = self._known.get(prefixes[number - 1])
            if known is not None:
                job, hardware_class = known
                return Prompt(prefixes, job, Prefix(hardware_class, _tokens(number)))
        return Prompt(prefixes)

    def note(self, prefixes: Sequence[bytes], job: str, hardware_class: str) -> None:
        """A job with these prefixes was placed. The shortest are forgotten last: most prompts share them."""
        for prefix in reversed(prefixes):
            self._known[prefix] = job, hardware_class
            self._known.move_to_end(prefix)
        while len(self._known) > self._most:
            self._known.popitem(last=False)


def _tokens(blocks: int) -> int:
    """About as many tokens as the blocks have, rounded down to a few binary digits."""
    step = max(blocks.bit_length() - _DIGITS, 0)
    return (blocks >> step << step) * BLOCK // CHARACTERS_PER_TOKEN


def slots_worth(table: CandidateTable, index: int, needs: Needs) -> int:
    """How many slots more than elsewhere may be in use where the request's prefix was read, on the candidate's class.

    Each row beside it makes its own reading and writing take longer, and it makes that of the row take longer, which
    together must not be more than what reading the prefix again would take.
    """
    if needs.prefix is None:
        return 0
    (step, slope), known = of_prompt(table), float(read_before(needs, needs.prefix))
    left = max(needs.size - needs.output - known, 0.0)
    saved = known * float(step[index] + slope[index])
    lost = 2 * (needs.output * float(table.slope[index]) + left * float(slope[index]))
    return int(min(saved / lost, _FREELY)) if lost > 0 else _FREELY
