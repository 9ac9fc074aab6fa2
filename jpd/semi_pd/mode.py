"""Whether one executor or two serve now: who decides it for `topology="auto"`.

Both phases on one executor ("unified") hold up everybody who decodes while a prompt is computed. On
two ("semi_pd") decode goes on, but prompts may take longer: they have fewer SMs, and less of the
memory bandwidth. Policies are plain Python that reads no clock, so they run the same on a server,
on recorded observations and in `jpd simulate`. A user's own policy is any object with `decide`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jpd.config import BREAK_EVEN, require
from jpd.semi_pd.controller import FULL, Observation, require_positive

Mode = Literal["unified", "semi_pd"]

UNIFIED_SHARE = FULL.decode
"""Percent of the SMs of the decode executor that computes prompts too."""


def phases_of(topology: str, phase: str, share: int) -> tuple[bool, bool]:
    """Whether an executor prepares for steps with prompts, and for steps with decoding rows.

    Args:
        topology: of the engine.
        phase: the executor's, "prefill" or "decode".
        share: percent of the SMs that it has.
    """
    serves_both = topology == "auto" and phase == "decode" and share == UNIFIED_SHARE
    return phase == "prefill" or serves_both, phase == "decode"


class ModePolicy(Protocol):
    """Decides who serves; called by the coordinator a few times a second."""

    def decide(self, observation: Observation, current: Mode) -> Mode:
        """The mode to serve in from now on.

        Args:
            observation: All since the last call; none is given twice or left out.
            current: What serves now. It may lag behind the last answer, while an executor on all
                SMs is started or steps of the other mode run.
        """
        ...


@dataclass(kw_only=True)
class BreakEven:
    """Two executors from a number of decoding requests for each waiting one, below it one.

    While a prompt is computed, n requests decode and w wait for their first token, it included. If
    one executor computes it in p seconds and holds decode up for h, and two in p' > p and hold it
    up for h' < h (as steps of decode are slower beside it), then in sum over all requests two save
    n (h - h') and cost w (p' - p). So two are better in the mean end-to-end time where

        n / w > (p' - p) / (h - h').

    The right side is a property of the GPU, of the shares and of the kernels: p, p', h and h' all
    grow with the prompt. It is small, or below 0, where decoding rows leave a step on one executor
    less room for prompts, so that p is long too; see `jpd.config.BREAK_EVEN`. The left side is
    measured over the prompt tokens of the last `window_s`, whoever computes them. It says more than
    requests/s, or than the part of the time that prompts take: for one and the same part, long
    outputs let more requests decode at once. Without load nobody is held up. With far too much of
    it most requests wait, and one executor is better again if it computes prompts faster.

    It looks at no SLO: where TPOT has one, a lower `ratio` keeps it sooner.
    """

    ratio: float = BREAK_EVEN
    """Break-even n / w; `benchmarks/semi_pd_serving.py` measures it (`break_even_ratio`)."""
    hysteresis: float = 1.5
    """Factor, at least 1: two executors from `ratio` times it on, one below `ratio` over it. In one
    and the same load n / w is lower on two executors, which wait longer and decode faster."""
    window_s: float = 5.0
    """How far back prompts count."""
    min_dwell_s: float = 2.0
    """Time between two changes, at least."""

    estimate: float | None = field(init=False, default=None)
    """n / w; None while no prompt token was computed within the window."""

    def __post_init__(self) -> None:
        for name in ("ratio", "window_s"):
            require_positive(f"break_even.{name}", getattr(self, name))
        for name, least in (("hysteresis", 1), ("min_dwell_s", 0)):
            value = getattr(self, name)
            ok = least <= value < math.inf
            require(ok, f"break_even.{name}", value, f"finite, at least {least}")
        self._seen: deque[Observation] = deque()
        self._wanted: Mode | None = None  # what serves may lag behind it
        self._changed_s = -math.inf

    def decide(self, observation: Observation, current: Mode) -> Mode:
        """The mode for the load of the window; the last one where nothing is known of it."""
        now_s = observation.now_s
        self._seen.append(observation)
        while now_s - self._seen[0].now_s > self.window_s:
            self._seen.popleft()
        waited = sum(o.waiting_beside for o in self._seen)
        held_up = sum(o.decoding_beside for o in self._seen)
        self.estimate = held_up / waited if waited else None
        if self._wanted is None:
            self._wanted = current
        if self.estimate is None or now_s - self._changed_s < self.min_dwell_s:
            return self._wanted
        other: Mode = "semi_pd" if self._wanted == "unified" else "unified"
        if other == "semi_pd":
            change = self.estimate >= self.ratio * self.hysteresis
        else:
            change = self.estimate < self.ratio / self.hysteresis
        if change:
            self._wanted, self._changed_s = other, now_s
        return self._wanted
