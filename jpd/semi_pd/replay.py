"""Plays arrivals against a controller and a small queueing model, in simulated time.

For tests and for a first look at a policy. It knows nothing of pages, shapes or switching pools:
`jpd simulate` runs the real coordinator instead.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from jpd.config import require
from jpd.semi_pd.controller import Controller, Observation, Shares, Slo, require_positive
from jpd.semi_pd.share_models import (
    H200,
    Interference,
    decode_curve,
    overlap_wait,
    prefill_beside,
    prefill_curve,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """Two servers on one GPU, first come first served; shares and load make the steps' times.

    The times alone at 100 % are of the size of Llama-3.1-8B on one H200 (arithmetic from its
    bandwidth and GEMM speed, not a measurement); what shares do to them is in `share_models`.
    """

    prefill_step_s: float = 0.003
    """A prefill step with no tokens."""
    prefill_token_s: float = 27e-6
    decode_step_s: float = 0.006
    """A decode step with no sequences."""
    decode_sequence_s: float = 40e-6
    """More for each sequence: its KV pages."""
    max_prefill_tokens: int = 4096
    """In one prefill step; requests are not cut, so a longer prompt is a step of its own."""
    parallel: float = 0.55
    """Of `prefill_curve`."""
    knee: float = 40.0
    """Of `decode_curve`."""
    interference: Interference = H200

    def __post_init__(self) -> None:
        for name in ("prefill_step_s", "prefill_token_s", "decode_step_s", "decode_sequence_s"):
            require_positive(name, getattr(self, name))
        require(0 <= self.parallel <= 1, "parallel", self.parallel, "0..1")
        require(self.knee >= 0, "knee", self.knee, "at least 0 percent")

    def prefill_s(self, tokens: int, shares: Shares, beside_decode: bool) -> float:
        """Seconds for one prefill step."""
        alone = self.prefill_step_s + tokens * self.prefill_token_s
        slowdown = prefill_beside(shares, self.interference) if beside_decode else 1.0
        return alone * prefill_curve(shares.prefill, self.parallel) * slowdown

    def decode_s(self, sequences: int, shares: Shares, beside_prefill: bool) -> float:
        """Seconds for one decode step."""
        full_s = self.decode_step_s + sequences * self.decode_sequence_s
        alone_s = full_s * decode_curve(shares.decode, self.knee)
        if not beside_prefill:
            return alone_s
        wait_s = self.decode_step_s * overlap_wait(shares, self.interference)
        return alone_s * self.interference.decode_slowdown + wait_s


@dataclass(slots=True)
class _Request:
    arrival: Arrival
    left: int
    ttft_s: float = math.nan
    tpot_s: float = math.nan


@dataclass(slots=True)
class Replay:
    """What came of it."""

    arrivals: list[Arrival]
    ttft_s: list[float]
    """In order of arrival; infinite where the replay ended before the first token."""
    tpot_s: list[float]
    """In order of arrival; 0 for one token, infinite where the replay ended first."""
    shares: list[tuple[float, Shares]]
    """(time, shares that serve from then on), the first at the start."""

    @property
    def switches(self) -> int:
        """Changes of the shares."""
        return len(self.shares) - 1

    def attainment(self, slo: Slo, after_s: float = -math.inf, before_s: float = math.inf) -> float:
        """Part of the requests that arrived in [after_s, before_s) and meet both limits of `slo`.

        Raises:
            ValueError: None arrived then.
        """
        met = [
            ttft <= slo.ttft_s and tpot <= slo.tpot_s
            for arrival, ttft, tpot in zip(self.arrivals, self.ttft_s, self.tpot_s, strict=True)
            if after_s <= arrival.at_s < before_s
        ]
        if not met:
            raise ValueError(f"no request arrived in [{after_s}, {before_s})")
        return sum(met) / len(met)

    def quantile(self, values: str, q: float) -> float:
        """The q-quantile (0..1) of 'ttft_s' or 'tpot_s'."""
        return float(np.quantile(getattr(self, values), q, method="higher"))


@dataclass(slots=True)
class _World:
    """The state of a replay; the methods are what happens."""

    plant: Plant
    shares: Shares
    now_s: float = 0.0
    waiting: deque[_Request] = field(default_factory=deque)
    prefilling: list[_Request] = field(default_factory=list)
    prefill_began_s: float = 0.0
    handed_over: list[_Request] = field(default_factory=list)
    decoding: list[_Request] = field(default_factory=list)
    decode_runs: bool = False
    published_s: float = math.nan  # the last decode step, if its batch has not run dry since
    seen: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.seen = {
            "ttft_s": [],
            "tpot_s": [],
            "token_gap_s": [],
            "prefill_tokens": 0,
            "prefill_busy_s": 0.0,
        }

    @property
    def busy(self) -> bool:
        """Whether any request is inside."""
        return bool(self.waiting or self.prefilling or self.handed_over or self.decoding)

    def observe(self) -> Observation:
        unfinished = [*self.waiting, *self.prefilling]
        observation = Observation(
            now_s=self.now_s,
            waiting_requests=len(unfinished),
            waiting_tokens=sum(r.arrival.prompt_tokens for r in unfinished),
            decoding_requests=len(self.decoding) + len(self.handed_over),
            **self.seen,
        )
        self.forget()
        return observation

    def start_prefill(self) -> float | None:
        """Starts a step if it can; how long it takes."""
        if self.prefilling or not self.waiting:
            return None
        tokens = 0
        while self.waiting:
            more = self.waiting[0].arrival.prompt_tokens
            if self.prefilling and tokens + more > self.plant.max_prefill_tokens:
                break
            tokens += more
            self.prefilling.append(self.waiting.popleft())
        self.prefill_began_s = self.now_s
        return self.plant.prefill_s(tokens, self.shares, self.decode_runs)

    def end_prefill(self) -> None:
        for request in self.prefilling:
            request.ttft_s = self.now_s - request.arrival.at_s
            self.seen["ttft_s"].append(request.ttft_s)
            self.seen["prefill_tokens"] += request.arrival.prompt_tokens
            if request.left > 1:
                request.left -= 1
                self.handed_over.append(request)
            else:
                request.tpot_s = 0.0
        self.seen["prefill_busy_s"] += self.now_s - self.prefill_began_s
        self.prefilling = []

    def start_decode(self) -> float | None:
        """Starts a step if it can; how long it takes."""
        if self.decode_runs or not (self.decoding or self.handed_over):
            return None
        if not self.decoding:
            self.published_s = math.nan
        self.decoding += self.handed_over
        self.handed_over = []
        self.decode_runs = True
        return self.plant.decode_s(len(self.decoding), self.shares, bool(self.prefilling))

    def end_decode(self) -> None:
        self.decode_runs = False
        if not math.isnan(self.published_s):
            self.seen["token_gap_s"].append(self.now_s - self.published_s)
        self.published_s = self.now_s
        going_on = []
        for request in self.decoding:
            request.left -= 1
            if request.left:
                going_on.append(request)
                continue
            arrival = request.arrival
            spent_s = self.now_s - arrival.at_s - request.ttft_s
            request.tpot_s = spent_s / (arrival.output_tokens - 1)
            self.seen["tpot_s"].append(request.tpot_s)
        self.decoding = going_on


def replay(
    controller: Controller,
    arrivals: Iterable[Arrival],
    plant: Plant,
    *,
    start: Shares,
    decide_every_s: float = 0.1,
    switch_delay_s: float = 0.0,
    drain_s: float = 30.0,
) -> Replay:
    """Serves the arrivals with the controller in charge of the shares.

    Args:
        controller: Is called every `decide_every_s`; a new answer while a switch is under way
            replaces it.
        arrivals: In any order.
        plant: How long steps take.
        start: Shares at first.
        decide_every_s: Simulated seconds.
        switch_delay_s: From an answer until it serves, as steps that run end under the old shares:
            0 for a pool, about 1 and more for a process that must start.
        drain_s: How long after the last arrival the replay goes on at most.

    Returns:
        Latencies of all requests and the shares over time.
    """
    require_positive("decide_every_s", decide_every_s)
    ordered = sorted(arrivals, key=lambda a: a.at_s)
    require(len(ordered) > 0, "arrivals", ordered, "at least one")
    requests = [_Request(a, a.output_tokens) for a in ordered]
    world = _World(plant, start)
    history = [(ordered[0].at_s, start)]
    end_s = ordered[-1].at_s + drain_s
    # (time, tie-break: in order of creation, what happens, request or shares)
    events: list[tuple[float, int, str, object]] = [
        (r.arrival.at_s, i, "arrival", r) for i, r in enumerate(requests)
    ]
    created = len(events)

    def at(time_s: float, what: str, subject: object = None) -> None:
        nonlocal created
        heapq.heappush(events, (time_s, created, what, subject))
        created += 1

    asked: Shares | None = None
    at(ordered[0].at_s, "decide")
    while events[0][0] <= end_s and (events[0][0] <= ordered[-1].at_s or world.busy):
        world.now_s, _, what, subject = heapq.heappop(events)
        match what:
            case "arrival":
                world.waiting.append(subject)
            case "prefilled":
                world.end_prefill()
            case "decoded":
                world.end_decode()
            case "decide":
                wanted = controller.decide(world.observe(), world.shares)
                if wanted != (asked or world.shares):
                    asked = wanted
                    at(world.now_s + switch_delay_s, "switch", wanted)
                at(world.now_s + decide_every_s, "decide")
            case "switch" if subject == asked:
                asked = None
                if subject != world.shares:
                    world.shares = subject
                    history.append((world.now_s, subject))
        if (step_s := world.start_prefill()) is not None:
            at(world.now_s + step_s, "prefilled")
        if (step_s := world.start_decode()) is not None:
            at(world.now_s + step_s, "decoded")

    def known(value: float) -> float:
        return math.inf if math.isnan(value) else value

    return Replay(
        ordered,
        [known(r.ttft_s) for r in requests],
        [known(r.tpot_s) for r in requests],
        history,
    )
