"""What happened when in one overlapped product: every group's signal and collective."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESOLUTION_S = 1e-6
"""Of the device's clock: times this close may come in either order."""


@dataclass(frozen=True)
class GroupEvents:
    """Times of one group, in seconds on the device's clock.

    Raises:
      ValueError: the collective ends before it starts.
    """

    signal_s: float
    """The group's counter was seen to have reached its number of tiles."""
    start_s: float
    """Its collective began."""
    end_s: float
    """Its collective was complete."""
    size_bytes: int
    """What each rank put in."""

    def __post_init__(self) -> None:
        if self.end_s < self.start_s - RESOLUTION_S:
            raise ValueError(f"{self}: the end comes before the start")


@dataclass(frozen=True)
class Trace:
    """One overlapped product on one GPU."""

    groups: tuple[GroupEvents, ...]
    gemm_start_s: float
    gemm_end_s: float
    end_s: float
    """All is complete: the last collective, and what comes after it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups:
            raise ValueError("a trace without a group")
        for before, after in zip(self.groups, self.groups[1:], strict=False):
            if after.start_s < before.end_s - RESOLUTION_S:
                raise ValueError(f"collectives at the same time: {before}, {after}")
        if (
            not self.gemm_start_s <= self.gemm_end_s
            or self.end_s < self.groups[-1].end_s - RESOLUTION_S
        ):
            raise ValueError(f"the ends of GEMM or trace come too early: {self}")

    @property
    def collective_s(self) -> float:
        """Seconds in which a collective ran."""
        return sum(group.end_s - group.start_s for group in self.groups)

    @property
    def hidden_s(self) -> float:
        """Seconds of these in which the GEMM ran too."""
        return sum(
            max(0.0, min(group.end_s, self.gemm_end_s) - max(group.start_s, self.gemm_start_s))
            for group in self.groups
        )

    @property
    def fraction_hidden(self) -> float:
        """Share of the collectives' time behind the GEMM, 0 to 1; 1 where they took no time."""
        return self.hidden_s / self.collective_s if self.collective_s > 0 else 1.0

    @property
    def exposed_s(self) -> float:
        """Seconds from the end of the GEMM to the end of everything."""
        return max(0.0, self.end_s - self.gemm_end_s)

    @property
    def waits_s(self) -> tuple[float, ...]:
        """Seconds from each group's signal to its collective's start."""
        return tuple(group.start_s - group.signal_s for group in self.groups)

    def premature(self, tolerance_s: float = 5e-6) -> tuple[int, ...]:
        """Groups whose collective started more than `tolerance_s` before their signal was seen.

        There should be none: such a collective may have sent tiles that were not computed. Where
        another stream than the collective's watches the counter, it may see it a little later.
        """
        return tuple(i for i, wait in enumerate(self.waits_s) if wait < -tolerance_s)

    def as_json(self) -> dict[str, Any]:
        """All of it, with what follows from it."""
        return {**asdict(self), "fraction_hidden": self.fraction_hidden}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Trace:
        """Reads what `as_json` gave."""
        times = {name: entry[name] for name in ("gemm_start_s", "gemm_end_s", "end_s")}
        return cls(groups=tuple(GroupEvents(**group) for group in entry["groups"]), **times)

    @classmethod
    def of_call(cls, call: Any) -> Trace:
        """From a `native.overlap.CallTrace`, which counts from when the GEMM may begin."""
        groups = tuple(
            GroupEvents(g.signal_us * 1e-6, g.start_us * 1e-6, g.end_us * 1e-6, g.nbytes)
            for g in call.groups
        )
        return cls(groups, 0.0, call.gemm_end_us * 1e-6, call.end_us * 1e-6)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Reads a file of `json.dumps(trace.as_json())`."""
        return cls.from_json(json.loads(path.read_text()))


def plot(trace: Trace, path: Path) -> bool:
    """Draws GEMM, signals and collectives over time; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.add_subplot()
    zero = trace.gemm_start_s

    def us(seconds: float) -> float:
        return (seconds - zero) * 1e6

    axes.barh("GEMM", us(trace.gemm_end_s), color="C0")
    signals = [us(group.signal_s) for group in trace.groups]
    axes.plot(signals, ["GEMM"] * len(signals), "k|", markersize=18, label="signal")
    for number, group in enumerate(trace.groups):
        width = (group.end_s - group.start_s) * 1e6
        axes.barh("collective", width, left=us(group.start_s), color="C1", edgecolor="white")
        centre = us(group.start_s) + width / 2
        axes.text(centre, "collective", str(number), ha="center", va="center", fontsize=7)
    axes.axvline(us(trace.gemm_end_s), color="grey", linestyle=":")
    axes.set_xlim(0, us(trace.end_s) * 1.02)
    axes.invert_yaxis()
    axes.set_xlabel("µs")
    axes.set_title(f"{len(trace.groups)} groups, {trace.fraction_hidden:.0%} of the time hidden")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True
