"""A controller that foresees latencies under every share and takes the one that serves best."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from jpd.config import require
from jpd.semi_pd.controller import (
    FULL,
    PERCENTILE,
    Observation,
    Shares,
    Slo,
    SwitchInFlight,
    require_positive,
)
from jpd.semi_pd.flow import Flow, Load, follow
from jpd.semi_pd.mode import Mode, gaps_alone_s, held_up_s
from jpd.semi_pd.share_models import (
    H200_SERVING,
    DecodeTimeModel,
    Interference,
    PrefillTimeModel,
    Work,
)
from jpd.semi_pd.step_times import StepTimes

DEFAULT_SHARES = (*(Shares(x, 100 - x) for x in (30, 40, 50, 60, 70, 80)), FULL)
"""Disjoint shares, which protect decode, and all SMs for both, which favours prefill. Shares that
overlap in part gained nothing over those on an H200."""

ONE = "unified"
"""In place of shares: one executor on all SMs, which mixes prompts and decode in its steps."""
Setting = Shares | Literal["unified"]

_URGENCY = 4
"""Power in the cost of the part lost: 1.2 times as many weigh like twice the mean time."""
_SHARPNESS = 12
"""Steepness of the part of requests that are late: 22 % of those foreseen to take 0.9 times their
SLO, 76 % of those at 1.1 times. So a forecast that goes a little over it is no edge. What loses 1
in 100 is below it: with an SLO for 99 % of the requests, TPOT costs from 0.67 of it on."""
_PLACES = np.arange(0.05, 1, 0.1)
"""Of requests in a queue: parts, 0..1, of its tokens that are computed until their turn is over."""
_NOISE = 0.3
"""Spread of the logarithm of the times of a prompt token and of a decode step: prompts of a window,
and those beside a step, differ in length. With a smaller one of decode's, waits for prompts were
taken for sequences that cost much."""
_FEWEST_ALONE = 5
"""Steps of one executor without prompts that say how long one takes: where nearly all have prompts,
the one that has none is that of a change between one executor and two. Their median counts, too."""
_NEVER_MORE_BUSY = 0.8
"""Part, 0..1, of what prefill can do at all: forecasts of short windows must not see the pole."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What requests would see under some shares, or on one executor."""

    ttft_s: float
    """At the SLO's percentile, 0.9 without one."""
    tpot_s: float
    miss: float
    """The larger of TTFT and TPOT over its SLO: 1 is just within both; 0 without SLOs."""
    e2e_s: float
    """Mean time to the end of the requests that are here and that come soon (`flow.Flow`)."""
    cost: float
    """`e2e_s`, and more where an SLO is in danger: what the controller makes small."""
    lost: float = 0.0
    """Part, 0..1, of the requests that do not keep both SLOs; 0 without SLOs."""


@dataclass(kw_only=True)
class SloController:
    """Makes the mean end-to-end time small as far as both SLOs, if there are any, allow it.

    Each call it

    1. learns the time of a prompt token and of a decode step under the current shares
       (`prefill_model`, `decode_model`) and the prompt tokens that arrive a second;
    2. lends SMs once a phase has been idle for `idle_after_s`: the other one gets the whole GPU,
       (100, 100), or stays if its own share is as large already. When both work again, the shares
       before serve again at once, unless that was `memory_s` ago;
    3. forecasts under every allowed share (`forecasts`)

       - the mean end-to-end time and TPOT: of the requests that are here, and that come within
         `foresee_s` if they come as they did, followed through both phases until all have ended
         (`jpd.semi_pd.flow`). Prompts that wait are taken to be as long as those that waited within
         `load_window_s`, if that is longer than the mean one. A wait is at least the mean TTFT
         seen, times the ratio below;
       - TTFT, the larger of: the percentile of the queue's, now or in `horizon_s` if tokens arrive
         faster than they are computed; the percentile seen in `load_window_s`, times the ratio of
         s / (1 - load) (the paper's Eq. 3);
       - the part of requests that will not keep both SLOs: late are those seen, times that ratio,
         or those of the queue, whichever is the larger part of its own; and each may be late by
         the mean TPOT, whatever its TTFT;

    4. takes the share with the least cost, if that is lower by `min_gain`: the end-to-end time,
       times (lost / (`act_above` * (1 - percentile)))^4 where that is above 1. Far from both SLOs
       this is the least mean end-to-end time; near one of them, a share under which fewer requests
       are lost, the more so the more are. There is no edge between the two at which to flap. A
       request is lost once, however late it is: where all are lost under all shares, or as many,
       the least mean decides again.

    Two such decisions are `min_dwell_s` apart. A share whose miss is above `act_above` may be left
    before that, unless another one was left so less than `min_dwell_s` ago. Going back to shares
    that were left within `max_dwell_s` doubles that time, so a model that is wrong about a share
    cannot make it flap. To lend SMs and to take them back are no decisions: both are done at once,
    once in an idle time, and count for none of this, so a burst finds no door closed.

    Nothing is decided in the first quarter of `window_s` under new shares, or after a time in which
    it was not asked: what was seen before does not say what is there now.

    Where requests wait although the prefill executor is idle, they wait for KV pages or a row of
    the batch, that is for decode to finish others: the more of the time, the more TTFT follows
    decode's speed.

    It asks for no shares but the `allowed` ones: where those are the warm executors of a pool, no
    switch ever waits for a process to start.

    Where `decide_mode` is called (`topology="auto"`), one executor for both phases is one more
    choice, with the same cost, gain and dwell. What is learned while it serves, the time of a
    decode step without prompts and by how much a prompt token makes one longer
    (`mixed_steps.MixedSteps`), says by way of the same two models what two executors would take,
    and the other way round.
    """

    slo: Slo | None = None
    """None: the mean alone decides."""
    allowed: Sequence[Shares] | None = None
    """Shares to choose from, such as those of the warm executors in a pool; None: DEFAULT_SHARES.
    If (100, 100) is not among them, a lone phase gets the largest share that is."""
    window_s: float = 2.0
    """How far back step times and decoding requests count; a quarter of it is the least that they
    are learned from."""
    load_window_s: float = 10.0
    """How far back arrivals, TTFT and the lengths of requests count: a rate of whole prompts, and a
    percentile, need more time to show."""
    foresee_s: float = 20.0
    """For how long requests are foreseen to come. The shorter this time, the better look shares
    under which a queue grows."""
    horizon_s: float = 2.0
    """How far ahead a queue that grows is foreseen."""
    idle_after_s: float = 1.0
    """A phase without work for this long is idle."""
    act_above: float = 0.8
    """Part, 0..1, of an SLO from which on a share is left at once, and of the requests that its
    percentile lets go from which on they cost: forecasts err, and what is lost meanwhile counts."""
    min_gain: float = 0.07
    """Part, 0..1, by which a switch must lower the cost."""
    min_dwell_s: float = 2.0
    """Time between two decisions, at least."""
    max_dwell_s: float = 30.0
    """The most that going back and forth can raise it to; it falls back after as long a rest."""
    switch_timeout_s: float = 60.0
    """A switch that does not serve after this long is given up."""
    memory_s: float = 60.0
    """Age at which what was learned about a share is forgotten, and for how long SMs are lent."""
    interference: Interference = H200_SERVING
    """What the phases do to each other on this GPU."""
    max_num_batched_tokens: int = 2048
    """Prompt tokens of a step at most. It must be the engine's; an engine sets it in those that it
    makes itself."""
    max_num_mixed_tokens: int | None = None
    """Of a step of one executor that has decoding rows, too, these included; as many when not
    given."""

    prefill_model: PrefillTimeModel = field(init=False)
    decode_model: DecodeTimeModel = field(init=False)
    forecasts: dict[Setting, Forecast] = field(init=False, default_factory=dict)
    """Of the last decision that needed them, with that of `ONE` where it is a choice; for plots."""
    reason: str = field(init=False, default="")
    """Why the last answer is what it is; for plots and logs."""

    def __post_init__(self) -> None:
        for name in ("window_s", "load_window_s", "foresee_s", "horizon_s", "min_dwell_s"):
            require_positive(name, getattr(self, name))
        require(self.idle_after_s >= 0, "idle_after_s", self.idle_after_s, "at least 0")
        require(0 < self.act_above <= 1, "act_above", self.act_above, "above 0, at most 1")
        require(0 <= self.min_gain < 1, "min_gain", self.min_gain, "at least 0, below 1")
        dwell = f"at least min_dwell_s={self.min_dwell_s}"
        require(self.max_dwell_s >= self.min_dwell_s, "max_dwell_s", self.max_dwell_s, dwell)
        tokens = self.max_num_batched_tokens
        require(tokens >= 1, "max_num_batched_tokens", tokens, "at least 1")
        mixed = tokens if self.max_num_mixed_tokens is None else self.max_num_mixed_tokens
        most = f"at least 1, at most max_num_batched_tokens={tokens}"
        require(1 <= mixed <= tokens, "max_num_mixed_tokens", mixed, most)
        window = f"at least window_s={self.window_s}"
        require(self.load_window_s >= self.window_s, "load_window_s", self.load_window_s, window)
        self._allowed = tuple(DEFAULT_SHARES if self.allowed is None else self.allowed)
        require(len(self._allowed) > 0, "allowed", self._allowed, "at least one share")
        self._times = StepTimes(self.interference, self.memory_s, _NOISE, tokens, mixed)
        self.prefill_model, self.decode_model = self._times.prefill, self._times.decode
        self._prefill_busy = 0.0
        self._starved = 0.0  # 0..1: how far TTFT follows decode's speed
        self._switch = SwitchInFlight(self.switch_timeout_s)
        # Of load_window_s: each with its shares, None where they changed meanwhile.
        self._seen: deque[tuple[Observation, Setting | None]] = deque()
        self._serving: Setting | None = None
        self._since_s = -math.inf  # when the current shares began to serve
        self._prefill_worked_s = self._decode_worked_s = -math.inf
        self._lent: tuple[Shares, float] | None = None  # what served before, until when
        self._left_s: dict[Setting, float] = {}  # when each was left by a decision
        self._switched_s = self._urgent_s = -math.inf
        self._dwell_s = self.min_dwell_s
        self._may_unify = False  # somebody asks for the mode
        self._mode: Mode = "semi_pd"

    def decide(self, observation: Observation, current: Shares) -> Shares:
        """The shares to serve with; `reason` says why."""
        if self._mode == "unified":  # and yet shares are asked for: it was not to be
            self._switch.ask(current, observation.now_s)
        wanted = self._decide(observation, current)
        self._mode = "unified" if wanted == ONE else "semi_pd"
        self._may_unify = False  # until it is asked for again
        return current if wanted == ONE else wanted

    def decide_mode(self, observation: Observation, current: Mode) -> Mode:
        """Whether one executor or two are to serve; asked before `decide`.

        While one serves this learns and decides; while two do, what `decide` said last is told, for
        `switch_timeout_s` if one is wanted.
        """
        self._may_unify = True
        if current == ONE:
            self._mode = "unified" if self._decide(observation, ONE) == ONE else "semi_pd"
        elif self._mode == "unified":
            if self._serving == ONE:  # and ended by itself
                self._switch.ask(ONE, observation.now_s)
            self._take(observation, None)
            if self._switch.waiting_for(None, observation.now_s) is None:
                self._mode = "semi_pd"
        return self._mode

    @property
    def mode_estimate(self) -> float | None:
        """Cost on one executor over the least under the allowed shares, by the last forecasts."""
        if ONE not in self.forecasts:
            return None
        two = min(self.forecasts[shares].cost for shares in self._allowed)
        return self.forecasts[ONE].cost / two if two else None

    def _decide(self, observation: Observation, current: Setting) -> Setting:
        now_s = observation.now_s
        self._take(observation, current)
        under_way = self._switch.waiting_for(current, now_s)
        if under_way is not None:
            self.reason = "switch under way"
            return under_way
        learned = self._learn_one(now_s) if current == ONE else self._learn(now_s, current)
        lone = self._for_a_lone_phase(now_s, current)
        if lone is not None:
            self.reason = "a phase is idle"
            if lone != current and self._lent is None:
                self._lent = current, now_s
            return self._go(lone, current, now_s)
        if self._lent is not None:
            (before, lent_s), self._lent = self._lent, None
            if before in self._allowed and now_s - lent_s <= self.memory_s:
                self.reason = "both phases work again"
                return self._go(before, current, now_s)
        if not learned:
            self.reason = "nothing learned yet"
            return current
        self._forecast_all(observation, current)
        return self._choose(now_s, current)

    def _choose(self, now_s: float, current: Setting) -> Setting:
        best = min(self._choices, key=lambda setting: self.forecasts[setting].cost)
        here = self.forecasts[current]
        if self.forecasts[best].cost >= (1 - self.min_gain) * here.cost:
            self.reason = "no share gains enough"
            return current
        urgent = here.miss > self.act_above
        if now_s - (self._urgent_s if urgent else self._switched_s) < self._dwell_s:
            self.reason = "dwell"
            return current
        self.reason = "an SLO is in danger" if urgent else "mean latency"
        if best == ONE:
            self.reason += ": one executor"
        if urgent:
            self._urgent_s = now_s
        if now_s - self._switched_s > self.max_dwell_s:
            self._dwell_s = self.min_dwell_s
        if now_s - self._left_s.get(best, -math.inf) <= self.max_dwell_s:
            self._dwell_s = min(2 * self._dwell_s, self.max_dwell_s)
        self._left_s[current] = self._switched_s = now_s
        return self._go(best, current, now_s)

    def _go(self, wanted: Setting, current: Setting, now_s: float) -> Setting:
        if wanted != current:
            self._switch.ask(wanted, now_s)
        return wanted

    def _take(self, observation: Observation, current: Setting | None) -> None:
        now_s = observation.now_s
        away = bool(self._seen) and now_s - self._seen[-1][0].now_s > self.window_s
        if away:  # nobody asked, as while one executor served without `decide_mode`
            self._seen.clear()
        if away or current == ONE:
            self._lent = None
        if away:
            self._prefill_worked_s = self._decode_worked_s = now_s
        changed = away or current != self._serving
        if changed:
            self._serving, self._since_s = current, now_s
        self._seen.append((observation, None if changed else current))
        while now_s - self._seen[0][0].now_s > self.load_window_s:
            self._seen.popleft()
        if observation.waiting_requests or observation.prefill_tokens:
            self._prefill_worked_s = now_s
        if observation.decoding_requests or observation.token_gap_s:
            self._decode_worked_s = now_s

    def _learn(self, now_s: float, current: Shares) -> bool:
        """Whether enough is known of both phases to say what another share would change."""
        under = [o for o, shares in self._seen if shares == current]
        recent = self._recent(now_s, under)
        if not recent:
            return False
        self._see_waits(recent, now_s, sum(o.prefill_busy_s for o in recent))
        tokens = sum(o.prefill_tokens for o in under)
        if tokens and self._prefill_busy >= 0.1:  # with less, a step's fixed cost is most of it
            seconds = sum(o.prefill_busy_s for o in under) / tokens
            decode_busy = sum(bool(o.decoding_requests or o.token_gap_s) for o in under)
            work = Work(shares=current, other_busy=decode_busy / len(under))
            self._times.see_token(now_s, work, seconds)
        gaps = [gap for o in recent for gap in o.token_gap_s]
        if sum(gaps):
            seconds = sum(gaps) / len(gaps)
            sequences = sum(o.decoding_requests for o in recent) / len(recent)
            work = Work(shares=current, other_busy=self._prefill_busy, sequences=sequences)
            self._times.see_step(now_s, work, seconds)
        return self._times.are_known

    def _learn_one(self, now_s: float) -> bool:
        """The same while one executor serves: both phases as they would be alone on all SMs."""
        recent = self._recent(now_s, [o for o, setting in self._seen if setting == ONE])
        if not recent:
            return False
        sequences = sum(o.decoding_requests for o in recent) / len(recent)
        alone = gaps_alone_s(recent)
        if len(alone) >= _FEWEST_ALONE and (alone_s := float(np.median(alone))):
            work = Work(shares=FULL, other_busy=0.0, sequences=sequences)
            self._times.see_step(now_s, work, alone_s)
        beside = [o for o in recent if o.held_gap_s]
        if beside and self.decode_model.points:
            held_s = held_up_s(beside, self._times.alone_s(sequences))
            if held_s > 0:
                self._times.see_mixed_token(now_s, held_s)
        busy_s = sum(sum(o.held_gap_s) for o in recent)
        if self._times.are_known:  # not all prompts hold somebody up
            tokens = sum(o.prefill_tokens for o in recent)
            busy_s = max(busy_s, tokens * self._times.token_s(FULL, 0.0))
        self._see_waits(recent, now_s, busy_s)
        return self._times.are_known

    def _recent(self, now_s: float, under: Sequence[Observation]) -> list[Observation]:
        """Those of `window_s` since what serves began to; none while they say too little."""
        start_s = max(self._since_s, now_s - self.window_s)
        if now_s - start_s < self.window_s / 4:  # a step or two of each phase
            return []
        return [o for o in under if o.now_s > start_s]

    def _see_waits(self, recent: Sequence[Observation], now_s: float, busy_s: float) -> None:
        """Learns for which part of the time prefill worked, and whether it was what others wait
        for."""
        start_s = max(self._since_s, now_s - self.window_s)
        self._prefill_busy = min(1.0, busy_s / (now_s - start_s))
        waited = sum(o.waiting_requests > 0 for o in recent) / len(recent)
        # Requests waited and prefill did not work: 0 up to a quarter of the time, 1 from three on.
        self._starved = min(1.0, max(0.0, 2 * (waited - self._prefill_busy) - 0.5))

    def _forecast_all(self, observation: Observation, current: Setting) -> None:
        """Fills `forecasts`, the current setting among them."""
        load = self._load(observation)
        mixed = self._times.mixed(load)

        def token_s(setting: Setting) -> float:
            if setting == ONE:
                return mixed.prompt_token_s(load.decoding)
            return self._times.token_s(setting, 1.0)  # both work: else it need not be divided

        def flow_under(setting: Setting) -> Flow:
            if setting == ONE:
                return follow(load, mixed.prompt_token_s, mixed.step_s)
            each_s = token_s(setting)
            return follow(load, lambda _: each_s, partial(self._times.step_s, setting))

        def queue_s(setting: Setting) -> float:
            each_s = token_s(setting)
            least_s = mixed.least_token_s(load.decoding) if setting == ONE else each_s
            return each_s / (1 - min(_NEVER_MORE_BUSY, load.tokens_per_s * least_s))

        # In units of `queue_s`: what is seen under one share says what it would be under another.
        under = [(o, queue_s(shares)) for o, shares in self._seen if shares is not None]
        ttfts = np.array([ttft_s / queue for o, queue in under for ttft_s in o.ttft_s] or [0.0])
        percentile = PERCENTILE if self.slo is None else self.slo.percentile
        ttft, mean_ttft = float(np.quantile(ttfts, percentile)), float(ttfts.mean())
        flows = {setting: flow_under(setting) for setting in [*self._choices, current]}
        growing = load.waiting_tokens + load.tokens_per_s * self.horizon_s

        def forecast(setting: Setting) -> Forecast:
            each_s, flow = token_s(setting), flows[setting]
            starved_s = queue_s(current) * flow.tpot_s / flows[current].tpot_s
            queue = self._starved * starved_s + (1 - self._starved) * queue_s(setting)
            # Of the last request of the queue, now or in `horizon_s`.
            waits_s = max(load.waiting_tokens * each_s, growing * each_s - self.horizon_s)
            ttft_s = max(percentile * waits_s, ttft * queue)
            e2e_s = flow.new * max(flow.wait_s, mean_ttft * queue) + flow.decode_s
            miss = lost = 0.0
            if self.slo is not None:
                miss = max(ttft_s / self.slo.ttft_s, flow.tpot_s / self.slo.tpot_s)
                foreseen = ttfts * queue, _PLACES * waits_s
                late = max(_late(times_s, self.slo.ttft_s).mean() for times_s in foreseen)
                lost = float(1 - (1 - late) * (1 - _late(flow.tpot_s, self.slo.tpot_s)))
            costs_above = self.act_above * (1 - percentile)
            cost = e2e_s * max(1.0, lost / costs_above) ** _URGENCY
            return Forecast(ttft_s, flow.tpot_s, miss, e2e_s, cost, lost)

        self.forecasts = {setting: forecast(setting) for setting in flows}

    @property
    def _choices(self) -> tuple[Setting, ...]:
        return (*self._allowed, ONE) if self._may_unify else self._allowed

    def _load(self, observation: Observation) -> Load:
        """Requests of now, and those that come if they come as in `load_window_s`."""
        first, *later = (o for o, _ in self._seen)
        waiting, decoding = observation.waiting_requests, observation.decoding_requests
        computed, begun = sum(o.prefill_tokens for o in later), sum(len(o.ttft_s) for o in later)
        prompts = computed + observation.waiting_tokens
        decoded = begun + first.decoding_requests
        # The long ones of them are still here: tokens for each end count what those have made. A
        # quarter has ended at least, or nothing would be known while none has.
        made = sum(o.decoding_requests * len(o.token_gap_s) for o in later)
        ended = max(1.0, decoded - decoding, decoded / 4)
        prompt_tokens = max(1.0, prompts / max(1, begun + waiting))
        # Those that wait are longer than the mean where short prompts go first. Where they do not,
        # the first of them is computed in part: what is left of it says nothing, hence the max.
        queued = sum(o.waiting_requests for o, _ in self._seen)
        queued_tokens = sum(o.waiting_tokens for o, _ in self._seen)
        return Load(
            waiting_tokens=observation.waiting_tokens,
            decoding=decoding,
            tokens_per_s=self._arriving_tokens_per_s(),
            seconds=self.foresee_s,
            prompt_tokens=prompt_tokens,
            queued_prompt_tokens=max(prompt_tokens, queued_tokens / max(1, queued)),
            output_tokens=max(1.0, made / ended),
        )

    def _arriving_tokens_per_s(self) -> float:
        first, last = self._seen[0][0], self._seen[-1][0]
        span_s = last.now_s - first.now_s
        if span_s < self.window_s / 4:
            return 0.0
        computed = sum(o.prefill_tokens for o, _ in self._seen) - first.prefill_tokens
        queued = last.waiting_tokens - first.waiting_tokens
        return max(0, computed + queued) / span_s  # aborts can make the sum negative

    def _for_a_lone_phase(self, now_s: float, current: Setting) -> Shares | None:
        """The shares for the phase that works alone; None if both work, or one executor for both,
        which has all SMs."""
        if current == ONE:
            return None
        prefill_idle = now_s - self._prefill_worked_s > self.idle_after_s
        decode_idle = now_s - self._decode_worked_s > self.idle_after_s
        if not prefill_idle and not decode_idle:
            return None
        phase = "prefill" if decode_idle else "decode"  # prefill also when both are: it comes first
        most = max(self._allowed, key=lambda s: (getattr(s, phase), s.prefill, s.decode))
        return current if getattr(current, phase) >= getattr(most, phase) else most


def _late(seconds: np.ndarray | float, slo_s: float) -> np.ndarray:
    """Part, 0..1, of requests foreseen to take `seconds` that take over `slo_s`, elementwise."""
    ratio = np.maximum(np.asarray(seconds) / slo_s, 1e-3)
    return 1 / (1 + ratio**-_SHARPNESS)
