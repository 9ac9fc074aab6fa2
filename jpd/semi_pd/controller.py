"""What every SM share controller sees and says, and the one that never changes its mind.

A controller decides which part of a GPU's SMs prefill and decode may use (arXiv 2504.19867 §4.3,
§5). It is plain Python that reads no clock, so it runs the same on a server, on a recorded trace
and in `jpd.semi_pd.replay`. A user's own controller is any object with `decide`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jpd.config import require


@dataclass(frozen=True, slots=True, order=True)
class Shares:
    """The paper's (x, y): percent of the SMs that each phase may use, 1..100.

    They may sum to more than 100: both phases then compete for the SMs that they have in common.
    """

    prefill: int
    decode: int

    def __post_init__(self) -> None:
        for name, percent in (("prefill", self.prefill), ("decode", self.decode)):
            whole = isinstance(percent, int) and not isinstance(percent, bool)
            require(whole and 1 <= percent <= 100, name, percent, "an integer percent, 1..100")

    def __str__(self) -> str:
        return f"({self.prefill}, {self.decode})"


FULL = Shares(100, 100)

PERCENTILE = 0.9
"""Part, 0..1, of the requests whose latencies count for an SLO."""

_COUNTS = (
    "prefill_tokens",
    "decoding_beside",
    "waiting_beside",
    "waiting_requests",
    "waiting_tokens",
    "decoding_requests",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request may take; an SLO is met when this part of all requests stays within it."""

    ttft_s: float
    """Time from arrival to the first token, waiting included."""
    tpot_s: float
    """Time per output token after the first: (E2E - TTFT) / (n - 1)."""
    percentile: float = PERCENTILE
    """The paper's p_SLO, 0..1 without the ends."""

    def __post_init__(self) -> None:
        require_positive("ttft_s", self.ttft_s)
        require_positive("tpot_s", self.tpot_s)
        require(0 < self.percentile < 1, "percentile", self.percentile, "between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the coordinator saw since it last called `decide`, and what waits now."""

    now_s: float
    """Any clock that never goes back; the same one for all observations."""
    ttft_s: Sequence[float] = ()
    """TTFT of each request whose first token came."""
    tpot_s: Sequence[float] = ()
    """TPOT of each request that finished with two tokens or more: true (E2E - TTFT) / (n - 1).
    Its requests lived under whatever shares served in between, so it comes late."""
    token_gap_s: Sequence[float] = ()
    """One value a decode step: time since the step before it was published, where the two have a
    sequence in common. It is what running requests feel now; a request's TPOT is their mean."""
    held_gap_s: Sequence[float] = ()
    """Those of `token_gap_s` in which prompts were computed: on one executor, instead of decode."""
    prefill_tokens: int = 0
    """Prompt tokens computed."""
    prefill_busy_s: float = 0.0
    """Time that the prefill executor spent computing them."""
    decoding_beside: int = 0
    """The requests that decoded while a prompt token was computed, summed over those tokens."""
    waiting_beside: int = 0
    """The requests without a first token meanwhile, its own included; summed likewise."""
    waiting_requests: int = 0
    """Requests without a first token now: in the queue or in prefill."""
    waiting_tokens: int = 0
    """Prompt tokens of those that are still to be computed."""
    decoding_requests: int = 0
    """Requests that decode now."""
    free_pages_fraction: float = 1.0
    """KV pages that nobody holds, 0..1 of all."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.now_s), "now_s", self.now_s, "a finite time")
        for name in ("ttft_s", "tpot_s", "token_gap_s", "held_gap_s"):
            for value in getattr(self, name):
                require(value >= 0 and math.isfinite(value), name, value, "finite, at least 0")
        busy = self.prefill_busy_s
        require(busy >= 0 and math.isfinite(busy), "prefill_busy_s", busy, "finite, at least 0")
        for name in _COUNTS:
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        free = self.free_pages_fraction
        require(0 <= free <= 1, "free_pages_fraction", free, "0..1")


class Controller(Protocol):
    """Decides the SM shares; called by the coordinator a few times a second.

    While one executor serves both phases (`topology="auto"`) there is nothing to divide: it is not
    called, and what happened meanwhile it is not told, unless it has `decide_mode` and is to say
    when that is (`jpd.semi_pd.mode.Foresees`).
    """

    def decide(self, observation: Observation, current: Shares) -> Shares:
        """The shares to serve with from now on.

        Args:
            observation: All since the last call; none is given twice or left out.
            current: What serves now. It may lag behind the last answer (a new executor is being
                started; each phase switches at the end of its own step, so one may come first) and
                may differ from it for good (the start failed, or only one phase is alive).

        Returns:
            The wanted shares; `current` to change nothing. An engine that is given anything else
            stops with an error that names it. A coordinator that still works towards an earlier
            answer goes on with it when it is repeated and drops it when it is not.
        """
        ...


@dataclass(frozen=True, slots=True)
class StaticController:
    """The same shares for ever: the released semi-PD's (80, 100), the paper's (100, 100), or any.

    It asks for them again whenever something else serves.
    """

    shares: Shares = FULL

    def decide(self, observation: Observation, current: Shares) -> Shares:
        """`shares`, whatever is seen."""
        return self.shares


class SwitchInFlight[Setting]:
    """The shares, or whatever else serves, asked for last, until they serve or it took too long.

    While a switch is under way nothing can be learned about either end of it, and a new plan would
    start from shares that are about to go: the released code neither samples nor plans then either.
    """

    def __init__(self, timeout_s: float) -> None:
        require_positive("switch_timeout_s", timeout_s)
        self._timeout_s = timeout_s
        self._wanted: Setting | None = None
        self._asked_s = -math.inf

    def ask(self, wanted: Setting, now_s: float) -> None:
        """Remembers that `wanted` was asked for."""
        self._wanted, self._asked_s = wanted, now_s

    def waiting_for(self, current: Setting | None, now_s: float) -> Setting | None:
        """What is still under way, or None once it serves or has been given up; `current` None:
        something else serves."""
        late = now_s - self._asked_s >= self._timeout_s
        if self._wanted is not None and (self._wanted == current or late):
            self._wanted = None
        return self._wanted


def require_positive(name: str, value: float) -> None:
    """Raises `ConfigError` unless the number is finite and above 0."""
    require(value > 0 and math.isfinite(value), name, value, "finite, above 0")
