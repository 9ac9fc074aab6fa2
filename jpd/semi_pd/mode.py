"""Whether one executor or two serve now: who decides it for `topology="auto"`.

Both phases on one executor ("unified") hold up everybody who decodes while a prompt is computed. On
two ("semi_pd") decode goes on, but prompts may take longer: they have fewer SMs, and less of the
memory bandwidth. Policies are plain Python that reads no clock, so they run the same on a server,
on recorded observations and in `jpd simulate`. A user's own policy is any object with `decide`.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Sequence
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
    """Two executors from a number of requests that they save for each one that waits, else one.

    Two executors cost those who wait: prompts take longer. They are better for those who decode,
    if these are held up for long: on one executor decode stands still for the part H of the time,
    on two a step takes always, but `slowdown` times as long as it would alone. That is r =
    slowdown (1 - H) of the time on one, and by Little's law of the requests that decode. If while
    a prompt is computed n requests decode and w wait for their first token, it included, and those
    become W w, the requests inside, and so the mean end-to-end time, are fewer on two where

        estimate = n / w (1 - slowdown (1 - H)) > W - 1.

    The right side, `ratio`, is a property of the GPU, the shares and the kernels; see
    `jpd.config.BREAK_EVEN`. H is the prompt tokens that arrive a second times the time for which
    one of them holds decode up, as last seen on one executor: how much longer gaps between tokens
    are in which prompts were computed. n / w alone does not say it: with short prompts and long
    outputs many decode and few wait, and hardly anybody is held up.

    It looks at no SLO. On two executors more requests wait and fewer decode than on one in the same
    load, hence the `hysteresis`.
    """

    ratio: float = BREAK_EVEN
    """Break-even of the estimate; `benchmarks/semi_pd_serving.py` measures it
    (`break_even_ratio`)."""
    hysteresis: float = 20.0
    """Factor, at least 1: two executors from `ratio` on, one below `ratio` over it."""
    slowdown: float = 2.0
    """Time of a decode step on two executors over that of one that runs alone: about what (70, 30)
    costs on an H200 (`benchmarks/results/h200/sm_share_surface.json`)."""
    window_s: float = 5.0
    """How far back prompts count."""
    min_dwell_s: float = 2.0
    """Time between two changes, at least."""

    estimate: float | None = field(init=False, default=None)
    """Requests saved for each one that waits; None while nothing is known of the window."""

    def __post_init__(self) -> None:
        for name in ("ratio", "window_s"):
            require_positive(f"break_even.{name}", getattr(self, name))
        for name, least in (("hysteresis", 1), ("slowdown", 1), ("min_dwell_s", 0)):
            value = getattr(self, name)
            ok = least <= value < math.inf
            require(ok, f"break_even.{name}", value, f"finite, at least {least}")
        self._seen: deque[Observation] = deque()
        self._unified: deque[Observation] = deque()  # of the last time on one executor
        self._wanted: Mode | None = None  # what serves may lag behind it
        self._changed_s = -math.inf

    def decide(self, observation: Observation, current: Mode) -> Mode:
        """The mode for the load of the window; the last one where nothing is known of it."""
        now_s = observation.now_s
        self._seen.append(observation)
        while now_s - self._seen[0].now_s > self.window_s:
            self._seen.popleft()
        if current == "unified":
            self._unified.append(observation)
            while now_s - self._unified[0].now_s > self.window_s:
                self._unified.popleft()
        held_up = arriving_tokens_per_s(self._seen) * held_up_s(self._unified)
        self.estimate = saved_per_waiting(self._seen, held_up, self.slowdown)
        if self._wanted is None:
            self._wanted = current
        if self.estimate is None or now_s - self._changed_s < self.min_dwell_s:
            return self._wanted
        other: Mode = "semi_pd" if self._wanted == "unified" else "unified"
        if other == "semi_pd":
            change = self.estimate >= self.ratio
        else:
            change = self.estimate < self.ratio / self.hysteresis
        if change:
            self._wanted, self._changed_s = other, now_s
        return self._wanted


class Foresees(Protocol):
    """A controller that foresees one executor too, such as jpd's (`SloController`)."""

    def decide_mode(self, observation: Observation, current: Mode) -> Mode:
        """As `ModePolicy.decide`; called before the controller's own `decide`."""
        ...

    @property
    def mode_estimate(self) -> float | None:
        """Cost on one executor over that on two, both foreseen; None while nothing is known."""
        ...


class ForeseenMode:
    """One executor where the controller of the SM shares foresees less cost than under them.

    By the same forecast as between shares, SLOs included, with the same gain and dwell, and for
    chunked prefill alone (`prefill_policy="mixed"`). `BreakEven` asks less: it looks at two
    executors under about (70, 30), and at mean times.
    """

    def __init__(self, controller: Foresees) -> None:
        self._controller = controller

    def decide(self, observation: Observation, current: Mode) -> Mode:
        """What the controller says."""
        return self._controller.decide_mode(observation, current)

    @property
    def estimate(self) -> float | None:
        """Cost on one executor over that on two: two are better above 1."""
        return self._controller.mode_estimate


def arriving_tokens_per_s(seen: Sequence[Observation]) -> float:
    """Prompt tokens that come in a second; 0 where the observations are of no time."""
    first, last = seen[0], seen[-1]
    span_s = last.now_s - first.now_s
    if span_s <= 0:
        return 0.0
    computed = sum(o.prefill_tokens for o in seen) - first.prefill_tokens
    queued = last.waiting_tokens - first.waiting_tokens
    return max(0, computed + queued) / span_s  # aborts can make the sum negative


def held_up_s(seen: Collection[Observation], alone_s: float | None = None) -> float:
    """For how long one prompt token holds decode up on one executor; 0 while none was computed.

    Args:
        seen: On one executor.
        alone_s: Time of a step without prompts; None: as it was meanwhile, 0 if no step was.
    """
    tokens = sum(o.prefill_tokens for o in seen)
    held = [s for o in seen for s in o.held_gap_s]
    if alone_s is None:
        alone = gaps_alone_s(seen)
        alone_s = sum(alone) / len(alone) if alone else 0.0
    return max(0.0, sum(held) - len(held) * alone_s) / tokens if tokens else 0.0


def gaps_alone_s(seen: Collection[Observation]) -> list[float]:
    """Times of the decode steps without prompts on one executor."""
    gaps = Counter(s for o in seen for s in o.token_gap_s)
    gaps.subtract(s for o in seen for s in o.held_gap_s)
    return [s for s, count in gaps.items() for _ in range(count)]


def saved_per_waiting(
    seen: Collection[Observation], held_up: float, slowdown: float
) -> float | None:
    """Requests that two executors save for each one that waits; None if no prompt was computed.

    Args:
        seen: Of a time.
        held_up: Part of it for which one executor would hold decode up; more than 1 is 1.
        slowdown: Of decode steps on two.
    """
    waited = sum(o.waiting_beside for o in seen)
    if not waited:
        return None
    decoded = sum(o.decoding_beside for o in seen)
    return decoded / waited * (1 - slowdown * (1 - min(1.0, held_up)))
