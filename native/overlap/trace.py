"""When each group was signalled, sent and received: what `Communicator.trace` returns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupTrace:
    """One group of tiles; times are those of the GPU, in µs after the call's `begin`.

    The GPU has a resolution of about 0.5 µs.
    """

    signal_us: float
    """The counter had reached the number of tiles. Two streams wait for it; the first that saw it
    counts, so that this is never after `start_us`."""
    start_us: float
    """The private stream came to the collective: the later of the signal and the end of the
    collective before. Its kernel may start later where no SM is free."""
    end_us: float
    """The collective was complete on this device."""
    nbytes: int
    """Of the group in the packed buffer."""


@dataclass(frozen=True)
class CallTrace:
    """One call on one device."""

    device: int
    """Ordinal of the GPU in its process."""
    rank: int
    number: int
    """Calls on this rank before it."""
    collective: str
    begin_us: float
    """After the first traced call on the device: XLA's stream had zeroed the counters and came to
    the GEMM."""
    gemm_end_us: float
    """After `begin`: XLA's stream had run all between start and done."""
    end_us: float
    """After `begin`: the last collective was complete."""
    groups: tuple[GroupTrace, ...]

    @property
    def communication_us(self) -> float:
        """Time in collectives."""
        return sum(group.end_us - group.start_us for group in self.groups)

    @property
    def exposed_us(self) -> float:
        """How long XLA's stream waited after the GEMM."""
        return max(0.0, self.end_us - self.gemm_end_us)

    @property
    def hidden_fraction(self) -> float:
        """Part of the communication that ran while the GEMM did, 0 to 1."""
        if self.communication_us <= 0:
            return 0.0
        return min(1.0, max(0.0, 1 - self.exposed_us / self.communication_us))


def parse(text: str) -> Sequence[CallTrace]:
    """Reads what the library writes."""
    return [
        CallTrace(**{**call, "groups": tuple(map(_group, call["groups"]))})
        for call in json.loads(text)
    ]


def _group(times: dict[str, float]) -> GroupTrace:
    return GroupTrace(**{**times, "signal_us": min(times["signal_us"], times["start_us"])})
