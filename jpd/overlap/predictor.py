"""How long a GEMM and its collective take, group by group: Algorithm 1 of FlashOverlap.

arXiv 2504.19519, section 4.1.2. A wave is what all SMs of the GEMM compute at a time, a group some
waves that are sent together. A group's collective starts when the group is computed and the
collective before it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from jpd.overlap.trace import GroupEvents, Trace


@dataclass(frozen=True)
class Contention:
    """How much the two slow each other down where they run at the same time.

    The paper has no such term: its GEMM merely loses the SMs of the collective. They share caches,
    memory bandwidth and power too.
    """

    gemm: float = 1.0
    """Time of a wave while a collective runs, over its time alone; at least 1."""
    collective_s: Callable[[Any], Any] | None = None
    """Seconds of a collective by bytes while the GEMM runs: a `BandwidthCurve`; None: as alone."""

    def __post_init__(self) -> None:
        if self.gemm < 1:
            raise ValueError(f"gemm={self.gemm} is not allowed: a factor of at least 1")


@dataclass(frozen=True)
class Work:
    """A product on some SMs and the collective after it.

    Raises:
      ValueError: a number that is not positive.
    """

    tiles: int
    sms: int
    """SMs that compute tiles, one tile each at a time."""
    tile_bytes: int
    """Bytes of a tile as it is sent, padding included."""
    gemm_s: float
    """Seconds of the signalling GEMM on these SMs, alone."""
    collective_s: Callable[[Any], Any]
    """Seconds by bytes of each rank, for numbers and arrays: a `BandwidthCurve`."""
    fixed_s: float = 0.0
    """Seconds of what overlapping adds whatever the groups are: start, done, reordering."""
    contention: Contention = Contention()

    def __post_init__(self) -> None:
        for name in ("tiles", "sms", "tile_bytes", "gemm_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def waves(self) -> int:
        """Number of waves; the last may be partial, and takes as long as the others."""
        return -(-self.tiles // self.sms)

    @property
    def wave_s(self) -> float:
        """Seconds of a wave."""
        return self.gemm_s / self.waves

    @property
    def total_bytes(self) -> int:
        """Bytes of all tiles."""
        return self.tiles * self.tile_bytes

    def beside_s(self, size: int) -> float:
        """Seconds of a collective of so many bytes while the GEMM runs."""
        return float((self.contention.collective_s or self.collective_s)(size))

    def sent_by(self, waves: Any) -> Any:
        """Bytes that the first `waves` waves hold, for a number or an array."""
        return np.minimum(np.asarray(waves) * self.sms, self.tiles) * self.tile_bytes

    def group_bytes(self, groups: Sequence[int]) -> list[int]:
        """Bytes of each group of so many waves.

        Raises:
          ValueError: an empty group, or another sum than `waves`.
        """
        if not groups or min(groups) < 1 or sum(groups) != self.waves:
            raise ValueError(f"groups of {tuple(groups)} waves do not cut {self.waves} waves")
        return np.diff(self.sent_by([0, *accumulate(groups)])).tolist()


def predict(work: Work, groups: Sequence[int]) -> float:
    """Seconds from the start of the GEMM to the end of the last collective (Algorithm 1).

    Contention is not in it: `simulate` has it, and agrees with this where there is none.

    Args:
      work: the product and its collective.
      groups: waves of each group, in order.
    """
    computed = communicated = 0.0
    for waves, size in zip(groups, work.group_bytes(groups), strict=True):
        computed += waves * work.wave_s
        communicated = max(computed, communicated) + work.collective_s(size)
    return communicated + work.fixed_s


def simulate(work: Work, groups: Sequence[int]) -> Trace:
    """The same with `work.contention`, as the events of every group, in seconds from the start.

    While both run, each advances at its own slowed pace. `fixed_s` comes after the last collective.
    """
    sizes = work.group_bytes(groups)
    left = [float(work.collective_s(size)) for size in sizes]
    paces = [min(1.0, alone / work.beside_s(size)) for alone, size in zip(left, sizes, strict=True)]
    until = list(accumulate(waves * work.wave_s for waves in groups))  # of undisturbed computing
    signals: list[float] = []
    starts: list[float] = []
    ends: list[float] = []
    now = computed = 0.0
    while len(ends) < len(groups):
        computing = len(signals) < len(groups)
        sending = len(ends) < len(signals)
        if sending and len(starts) == len(ends):
            starts.append(now)
        gemm_pace = 1 / (work.contention.gemm if sending else 1)
        link_pace = paces[len(ends)] if computing else 1.0
        to_signal = (until[len(signals)] - computed) / gemm_pace if computing else np.inf
        to_end = left[len(ends)] / link_pace if sending else np.inf
        step = min(to_signal, to_end)
        now += step
        computed += step * gemm_pace
        if sending:
            left[len(ends)] -= step * link_pace
        if to_end <= to_signal:
            ends.append(now)
        if to_signal <= to_end:
            computed = until[len(signals)]  # no rounding errors pile up
            signals.append(now)
    events = zip(signals, starts, ends, sizes, strict=True)
    return Trace(
        groups=tuple(GroupEvents(*event) for event in events),
        gemm_start_s=0.0,
        gemm_end_s=signals[-1],
        end_s=ends[-1] + work.fixed_s,
    )


def bound(work: Work) -> float:
    """The paper's bound on what overlapping can reach, in seconds (section 6.4).

    Where the GEMM takes longer than the collective: the GEMM, and the collective of its last wave,
    which nothing can hide. Else: the first wave, which nothing can be sent before, and the
    collective of everything at once. No partition is faster, if a collective in parts takes no
    less time than whole.
    """
    whole = work.collective_s(work.total_bytes)
    if work.gemm_s >= whole:
        last = work.total_bytes - work.sent_by(work.waves - 1)
        return work.gemm_s + float(work.collective_s(last))
    return work.wave_s + whole
