"""A controller that foresees both SLOs under every share and moves only when it pays."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jpd.config import require
from jpd.semi_pd.controller import (
    FULL,
    Observation,
    Shares,
    Slo,
    SwitchInFlight,
    require_positive,
)
from jpd.semi_pd.share_models import H200, DecodeTimeModel, Interference, PrefillTimeModel, Work

DEFAULT_SHARES = (
    *(Shares(x, 100 - x) for x in (30, 40, 50, 60, 70, 80)),
    *(Shares(x, 100) for x in (80, 90, 95, 100)),
)
"""Disjoint shares, which protect decode, then overlapping ones, which favour prefill. Where shares
overlap, decode's own is 100: on an H200 a smaller one only made it slower."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What requests would see under some shares; 1 in `miss` is just within both SLOs."""

    ttft_s: float
    tpot_s: float
    miss: float
    """The larger of TTFT and TPOT over its SLO."""


@dataclass(kw_only=True)
class SloController:
    """Keeps shares that meet both SLOs, else takes those that are forecast to.

    Each call it

    1. learns the time of a prompt token and of a decode step under the current shares
       (`prefill_model`, `decode_model`) and the prompt tokens that arrive a second;
    2. gives the whole GPU, (100, 100), to one phase once the other has been idle for
       `idle_after_s`, and takes shares that are still needed back when both work again;
    3. forecasts TTFT and TPOT under every allowed share (`forecasts`). TPOT: the mean gap between
       tokens now, times the ratio that the decode model gives, and what that does to the batch.
       TTFT, the largest of: what the SLO percentile of the waiting requests will see; what the
       queue will be in `horizon_s` if tokens arrive faster than they are computed; the percentile
       seen in the window, times the ratio of s / (1 - load) (the paper's Eq. 3);
    4. stays where it is while both are within `act_above` of their SLOs; else takes the share
       whose worse SLO is forecast to be best, if that is better by `min_gain`, at most once in
       `min_dwell_s`. Going back to shares that were left within `max_dwell_s` doubles that time:
       shares that all fail, or a model that is wrong about one, cannot make it flap. Where an SLO
       keeps failing, the gain asked for falls with time, so that a wrong model is put to the test.

    When no share meets both SLOs the same rule holds: the worse of the two is made as small as
    possible. Goodput counts requests that meet both, so holding one SLO while the other one's
    queue grows would win nothing; leaning to the phase that is further behind drains its queue
    soonest; and there is no edge between feasible and infeasible load at which to flap.

    When fewer than `min_free_pages` of the KV pages are free while requests wait, they wait for
    decode to finish others, not for SMs: it takes the shares with the least TPOT.

    It asks for no shares but the `allowed` ones: where those are the warm executors of a pool, no
    switch ever waits for a process to start.
    """

    slo: Slo
    allowed: Sequence[Shares] | None = None
    """Shares to choose from, such as those of the warm executors in a pool; None: DEFAULT_SHARES.
    If (100, 100) is not among them, a lone phase gets the largest share that is."""
    window_s: float = 2.0
    """How far back latencies and step times count."""
    load_window_s: float = 10.0
    """How far back arrivals count: a rate of whole prompts needs more time to show."""
    horizon_s: float = 2.0
    """How far ahead a queue that grows is foreseen."""
    idle_after_s: float = 1.0
    """A phase without work for this long is idle. When it works again, the shares before come back
    at once if an SLO asked for them within `max_dwell_s` and (100, 100) was forecast to fail."""
    act_above: float = 0.8
    """Part, 0..1, of an SLO from which on it acts: percentiles of requests come later and lie
    higher than a mean of now, and slow decode fills its own batch."""
    min_gain: float = 0.1
    """Part, 0..1, by which a switch must lower the worse SLO's miss."""
    min_dwell_s: float = 2.0
    """Time between two switches, at least; those for an idle phase are free."""
    max_dwell_s: float = 30.0
    """The most that going back and forth can raise it to; it falls back after as long a rest."""
    min_free_pages: float = 0.05
    """Part, 0..1, of the KV pages."""
    switch_timeout_s: float = 60.0
    """A switch that does not serve after this long is given up."""
    memory_s: float = 60.0
    """Age at which what was learned about a share is forgotten."""
    interference: Interference = H200
    """What the phases do to each other on this GPU."""

    prefill_model: PrefillTimeModel = field(init=False)
    decode_model: DecodeTimeModel = field(init=False)
    forecasts: dict[Shares, Forecast] = field(init=False, default_factory=dict)
    """Of the last decision that needed them; for plots."""
    reason: str = field(init=False, default="")
    """Why the last answer is what it is; for plots and logs."""

    def __post_init__(self) -> None:
        for name in ("window_s", "load_window_s", "horizon_s", "min_dwell_s"):
            require_positive(name, getattr(self, name))
        require(self.idle_after_s >= 0, "idle_after_s", self.idle_after_s, "at least 0")
        require(0 < self.act_above <= 1, "act_above", self.act_above, "above 0, at most 1")
        require(0 <= self.min_gain < 1, "min_gain", self.min_gain, "at least 0, below 1")
        require(0 <= self.min_free_pages <= 1, "min_free_pages", self.min_free_pages, "0..1")
        dwell = f"at least min_dwell_s={self.min_dwell_s}"
        require(self.max_dwell_s >= self.min_dwell_s, "max_dwell_s", self.max_dwell_s, dwell)
        longer = f"at least window_s={self.window_s}"
        require(self.load_window_s >= self.window_s, "load_window_s", self.load_window_s, longer)
        self._allowed = tuple(DEFAULT_SHARES if self.allowed is None else self.allowed)
        require(len(self._allowed) > 0, "allowed", self.allowed, "at least one pair of shares")
        self.prefill_model = PrefillTimeModel(self.interference, self.memory_s)
        self.decode_model = DecodeTimeModel(self.interference, self.memory_s)
        self._sequences = 1.0
        self._switch = SwitchInFlight(self.switch_timeout_s)
        self._seen: deque[Observation] = deque()  # of load_window_s, under any shares
        self._serving: Shares | None = None
        self._since_s = -math.inf  # when the current shares began to serve
        self._prefill_worked_s = self._decode_worked_s = -math.inf
        self._left_s: dict[Shares, float] = {}  # when each was left for the sake of an SLO
        self._switched_s = -math.inf
        self._dwell_s = self.min_dwell_s
        self._fails_since_s: float | None = None
        self._interrupted: Shares | None = None  # by an idle phase

    def decide(self, observation: Observation, current: Shares) -> Shares:
        """The shares to serve with; `reason` says why."""
        now_s = observation.now_s
        self._take(observation, current)
        under_way = self._switch.waiting_for(current, now_s)
        if under_way is not None:
            self.reason = "switch under way"
            return under_way
        self._learn(now_s, current)
        lone = self._for_a_lone_phase(now_s)
        if lone is not None:
            self.reason = "a phase is idle"
            if lone != current:
                self._interrupted = current
            return self._go(lone, current, now_s)
        interrupted, self._interrupted = self._interrupted, None
        if interrupted in self._allowed and self._needs(interrupted, current, now_s):
            self.reason = "both phases work again"
            return self._go(interrupted, current, now_s)
        if not self._forecast_all(observation, current):
            self.reason = "nothing learned yet"
            return current
        if now_s - self._switched_s < self._dwell_s:
            self.reason = "dwell"
            return current
        return self._choose(observation, current)

    def _choose(self, observation: Observation, current: Shares) -> Shares:
        starved = (
            observation.waiting_requests > 0
            and observation.free_pages_fraction < self.min_free_pages
        )

        def cost(shares: Shares) -> float:
            forecast = self.forecasts[shares]
            return forecast.tpot_s / self.slo.tpot_s if starved else forecast.miss

        now_s, now = observation.now_s, cost(current)
        if now <= self.act_above and not starved:
            self._fails_since_s = None
            self.reason = "both SLOs are met"
            return current
        if self._fails_since_s is None:
            self._fails_since_s = now_s
        best = min(self._allowed, key=cost)
        failing_s = now_s - max(self._fails_since_s, self._switched_s)
        # The longer it fails here, the less is risked by trying what merely looks better.
        gain = self.min_gain * (self._dwell_s / max(failing_s, self._dwell_s))
        if best == current or cost(best) >= (1 - gain) * now:
            self.reason = "no share gains enough"
            return current
        self._lengthen_dwell_on_return(best, current, now_s)
        self.reason = "KV pages are short" if starved else "an SLO fails"
        return self._go(best, current, now_s)

    def _needs(self, interrupted: Shares, current: Shares, now_s: float) -> bool:
        """Whether an SLO asked for the interrupted shares lately, and the last forecast that both
        phases allowed says that what serves now would fail."""
        if now_s - self._switched_s > self.max_dwell_s or current not in self.forecasts:
            return False
        before = self.forecasts[interrupted].miss
        return self.forecasts[current].miss > max(self.act_above, before)

    def _lengthen_dwell_on_return(self, best: Shares, current: Shares, now_s: float) -> None:
        if now_s - self._switched_s > self.max_dwell_s:
            self._dwell_s = self.min_dwell_s
        if now_s - self._left_s.get(best, -math.inf) <= self.max_dwell_s:
            self._dwell_s = min(2 * self._dwell_s, self.max_dwell_s)
        self._left_s[current] = self._switched_s = now_s

    def _go(self, wanted: Shares, current: Shares, now_s: float) -> Shares:
        if wanted != current:
            self._switch.ask(wanted, now_s)
        return wanted

    def _take(self, observation: Observation, current: Shares) -> None:
        now_s = observation.now_s
        away = bool(self._seen) and now_s - self._seen[-1].now_s > self.window_s
        if away:  # nobody asked, as while one executor served: that says nothing about two
            self._seen.clear()
        if away or current != self._serving:  # this observation is of before, or of both
            self._serving, self._since_s = current, now_s
        self._seen.append(observation)
        while now_s - self._seen[0].now_s > self.load_window_s:
            self._seen.popleft()
        if observation.waiting_requests or observation.prefill_tokens:
            self._prefill_worked_s = now_s
        if observation.decoding_requests or observation.token_gap_s:
            self._decode_worked_s = now_s

    def _learn(self, now_s: float, current: Shares) -> None:
        start_s = max(self._since_s, now_s - self.window_s)
        recent = [o for o in self._seen if o.now_s > start_s]
        self._ttft_s = [ttft for o in recent for ttft in o.ttft_s]
        self._token_s = self._gap_s = None
        self._prefill_busy = 0.0
        if now_s - start_s < self.window_s / 4:  # a step or two of each phase say little
            return
        busy_s = sum(o.prefill_busy_s for o in recent)
        tokens = sum(o.prefill_tokens for o in recent)
        gaps = [gap for o in recent for gap in o.token_gap_s]
        self._prefill_busy = min(1.0, busy_s / (now_s - start_s))
        if tokens and self._prefill_busy >= 0.1:  # with less, a step's fixed cost is most of it
            self._token_s = busy_s / tokens
            decode_busy = sum(bool(o.decoding_requests or o.token_gap_s) for o in recent)
            work = Work(shares=current, other_busy=decode_busy / len(recent))
            self.prefill_model.update(now_s, work, self._token_s)
        if sum(gaps):
            self._gap_s = sum(gaps) / len(gaps)
            self._sequences = sum(o.decoding_requests for o in recent) / len(recent)
            self.decode_model.update(
                now_s, self._decoding(current, self._prefill_busy), self._gap_s
            )

    def _decoding(self, shares: Shares, prefill_busy: float) -> Work:
        return Work(shares=shares, other_busy=prefill_busy, sequences=self._sequences)

    def _forecast_all(self, observation: Observation, current: Shares) -> bool:
        """Fills `forecasts`, the current shares among them; False if too little is known."""
        if not self.prefill_model.points or not self.decode_model.points:
            return False
        tokens_per_s = self._arriving_tokens_per_s()
        waiting = observation.waiting_tokens
        ttft_now_s = float(np.quantile(self._ttft_s, self.slo.percentile)) if self._ttft_s else 0.0

        # Both phases work, or there would be nothing to divide. What is seen now sets the scale,
        # the models say what another share would change: batch and context are as they are now.
        def token_s(shares: Shares) -> float:
            modelled = self.prefill_model.predict(Work(shares=shares, other_busy=1.0))
            if self._token_s is None:
                return modelled
            here = self.prefill_model.predict(Work(shares=current, other_busy=1.0))
            return self._token_s * modelled / here

        def gap_s(shares: Shares, prefill_busy: float) -> float:
            modelled = self.decode_model.predict(self._decoding(shares, prefill_busy))
            if self._gap_s is None:
                return modelled
            here = self.decode_model.predict(self._decoding(current, self._prefill_busy))
            ratio = modelled / here
            # Requests that take r times as long are r times as many (Little's law), and their
            # steps longer still: z = r (1 + b z) / (1 + b), b being the batch's part of a step.
            growth = 1 - self.decode_model.batch_weight(self._sequences) * (ratio - 1)
            return self._gap_s * ratio / growth if growth > 0 else math.inf

        def service_and_wait(shares: Shares) -> float:
            # The paper's Eq. 3, of which a window's percentile must not see the pole.
            return token_s(shares) / (1 - min(0.95, tokens_per_s * token_s(shares)))

        def forecast(shares: Shares) -> Forecast:
            each_s = token_s(shares)
            work_s = (waiting + tokens_per_s * self.horizon_s) * each_s
            ttft_s = max(
                self.slo.percentile * waiting * each_s,
                work_s - self.horizon_s,
                ttft_now_s * service_and_wait(shares) / service_and_wait(current),
            )
            tpot_s = gap_s(shares, min(1.0, work_s / self.horizon_s))
            return Forecast(ttft_s, tpot_s, max(ttft_s / self.slo.ttft_s, tpot_s / self.slo.tpot_s))

        self.forecasts = {shares: forecast(shares) for shares in {*self._allowed, current}}
        return True

    def _arriving_tokens_per_s(self) -> float:
        span_s = self._seen[-1].now_s - self._seen[0].now_s
        if span_s < self.window_s / 4:
            return 0.0
        computed = sum(o.prefill_tokens for o in self._seen) - self._seen[0].prefill_tokens
        queued = self._seen[-1].waiting_tokens - self._seen[0].waiting_tokens
        return max(0, computed + queued) / span_s  # aborts can make the sum negative

    def _for_a_lone_phase(self, now_s: float) -> Shares | None:
        prefill_idle = now_s - self._prefill_worked_s > self.idle_after_s
        decode_idle = now_s - self._decode_worked_s > self.idle_after_s
        if not prefill_idle and not decode_idle:
            return None
        if FULL in self._allowed:
            return FULL
        if decode_idle:  # also when both are: prefill comes first
            return max(self._allowed, key=lambda s: (s.prefill, s.decode))
        return max(self._allowed, key=lambda s: (s.decode, s.prefill))
