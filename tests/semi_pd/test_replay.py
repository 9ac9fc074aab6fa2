"""Controllers in charge of a small queueing model: what they reach, and how often they switch."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from jpd.errors import ConfigError
from jpd.semi_pd.controller import (
    FULL,
    Controller,
    Observation,
    Shares,
    Slo,
    StaticController,
)
from jpd.semi_pd.paper_controller import PaperController
from jpd.semi_pd.replay import Arrival, Plant, Replay, replay
from jpd.semi_pd.slo_controller import SloController
from tests.semi_pd.ours import PAYS, ours

WAITS = replace(PAYS, overlap_wait=22)
"""So that many sequences, which wait as long as few, are too slow under full shares."""
PLANT = Plant(interference=WAITS, parallel=0.6, knee=35.0)
SLO = Slo(ttft_s=0.6, tpot_s=0.012)


def slo_controller(slo: Slo) -> SloController:
    """Ours, which knows the GPU."""
    return ours(slo=slo, interference=WAITS)


def lengths(rng: np.random.Generator, mean: float, count: int, highest: int) -> list[int]:
    """Lognormal, standard deviation 0.8 of the mean, as conversations are."""
    spread = math.log(1 + 0.8**2)
    values = rng.lognormal(math.log(mean) - spread / 2, math.sqrt(spread), count)
    return np.clip(values, 2, highest).astype(int).tolist()


def poisson(rate: float, duration_s: float, prompt: int, output: int, seed: int) -> list[Arrival]:
    """Requests with mean lengths, independent of each other."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, int(rate * duration_s))).tolist()
    prompts = lengths(rng, prompt, len(times), 8192)
    outputs = lengths(rng, output, len(times), 1024)
    return [
        Arrival(at_s=t, prompt_tokens=p, output_tokens=o)
        for t, p, o in zip(times, prompts, outputs, strict=True)
    ]


def burst(at_s: float, count: int, seed: int) -> list[Arrival]:
    """As in the Azure code trace: many within a second, prompts of 2k tokens, outputs of 28."""
    rng = np.random.default_rng(seed)
    times = (at_s + rng.uniform(0, 1, count)).tolist()
    prompts, outputs = lengths(rng, 2048, count, 7437), lengths(rng, 28, count, 600)
    return [
        Arrival(at_s=t, prompt_tokens=p, output_tokens=o)
        for t, p, o in zip(times, prompts, outputs, strict=True)
    ]


def serve(controller: Controller, arrivals: list[Arrival], plant: Plant = PLANT, **how) -> Replay:
    return replay(controller, arrivals, plant, start=FULL, **how)


# -- the plant


def test_requests_one_by_one_take_what_the_plant_says() -> None:
    apart = [Arrival(at_s=10.0 * i, prompt_tokens=1000, output_tokens=11) for i in range(3)]
    shares = Shares(50, 50)
    seen = replay(StaticController(shares), apart, PLANT, start=shares)
    prefill_s = (0.003 + 1000 * 27e-6) * 1.6  # 1 - 0.6 + 0.6 * 100 / 50
    decode_s = (0.006 + 40e-6) * (1 + 0.7**4) ** 0.25
    assert seen.ttft_s == pytest.approx([prefill_s] * 3)
    assert seen.tpot_s == pytest.approx([decode_s] * 3)
    assert seen.switches == 0


def test_prefill_is_first_come_first_served_and_decode_takes_all() -> None:
    together = [Arrival(at_s=0.0, prompt_tokens=4000, output_tokens=50) for _ in range(3)]
    seen = serve(StaticController(), together)
    assert seen.ttft_s == sorted(seen.ttft_s)
    assert seen.ttft_s[2] > 2.5 * seen.ttft_s[0]
    assert max(seen.tpot_s) < 5 * PLANT.decode_step_s


def test_an_unfinished_request_is_infinitely_late_and_one_token_has_no_tpot() -> None:
    arrivals = [
        Arrival(at_s=0.0, prompt_tokens=10, output_tokens=1),
        Arrival(at_s=0.0, prompt_tokens=10, output_tokens=10**6),
        Arrival(at_s=1.0, prompt_tokens=10**7, output_tokens=2),
    ]
    seen = serve(StaticController(), arrivals, drain_s=5)
    assert seen.tpot_s == [0, math.inf, math.inf]
    assert seen.ttft_s[2] == math.inf
    assert seen.attainment(Slo(ttft_s=1, tpot_s=1)) == pytest.approx(1 / 3)
    assert seen.attainment(Slo(ttft_s=1, tpot_s=1), after_s=1) == 0
    with pytest.raises(ValueError, match="no request arrived"):
        seen.attainment(SLO, after_s=2)


def test_observations_add_up_to_what_was_served() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen = []

        def decide(self, observation, current):
            self.seen.append(observation)
            return current

    recorder = Recorder()
    arrivals = poisson(20, 10, 500, 50, seed=1)
    result = serve(recorder, arrivals)
    assert sum(o.prefill_tokens for o in recorder.seen) == sum(a.prompt_tokens for a in arrivals)
    assert sorted(t for o in recorder.seen for t in o.ttft_s) == sorted(result.ttft_s)
    # The last requests end after the last call.
    assert len(arrivals) - 5 <= sum(len(o.tpot_s) for o in recorder.seen) <= len(arrivals)
    times = [o.now_s for o in recorder.seen]
    assert {round(b - a, 6) for a, b in itertools.pairwise(times)} == {0.1}
    assert 0.1 < sum(o.prefill_busy_s for o in recorder.seen) / times[-1] < 1


def test_a_switch_takes_its_time_and_a_new_answer_replaces_it() -> None:
    class Fickle:
        def decide(self, observation, current):
            return Shares(50, 50) if observation.now_s < 2 else Shares(60, 40)

    arrivals = poisson(10, 10, 100, 50, seed=2)
    seen = replay(Fickle(), arrivals, PLANT, start=FULL, switch_delay_s=5)
    (_, first), (when_s, second) = seen.shares
    assert (first, second) == (FULL, Shares(60, 40))
    assert when_s == pytest.approx(7.0, abs=0.2)


def test_a_replay_needs_requests() -> None:
    with pytest.raises(ConfigError, match=r"arrivals=\[\]"):
        serve(StaticController(), [])
    with pytest.raises(ConfigError, match="knee=-1"):
        Plant(knee=-1)


# -- the controllers


class Counted:
    """Ours, and how often it decided on other shares: SMs lent and taken back are not counted."""

    def __init__(self, slo: Slo) -> None:
        self.inner, self.decided, self._asked = slo_controller(slo=slo), 0, FULL

    def decide(self, observation: Observation, current: Shares) -> Shares:
        wanted = self.inner.decide(observation, current)
        if wanted != self._asked:
            self.decided += self.inner.reason in ("an SLO is in danger", "mean latency")
        self._asked = wanted
        return wanted


@pytest.mark.parametrize(
    ("rate", "prompt", "output", "slo"),
    [(8.5, 2048, 200, SLO), (40, 251, 338, Slo(ttft_s=0.3, tpot_s=0.03))],
)
@pytest.mark.parametrize("delay_s", [0.05, 3.0])
def test_ours_comes_to_meet_slos_that_full_shares_miss(
    rate: float, prompt: int, output: int, slo: Slo, delay_s: float
) -> None:
    arrivals = poisson(rate, 60, prompt, output, seed=0)
    fixed = serve(StaticController(FULL), arrivals)
    ours = serve(slo_controller(slo=slo), arrivals, switch_delay_s=delay_s)
    assert fixed.attainment(slo, after_s=20) < 0.8
    assert ours.attainment(slo, after_s=20) >= 0.95
    assert ours.switches <= 8  # its dwell alone would allow 30
    assert mean_e2e_s(ours) < 0.9 * mean_e2e_s(fixed)


@pytest.mark.parametrize(
    "plant",
    [
        replace(PLANT, knee=60),
        replace(PLANT, knee=100, parallel=1),  # the paper's Eq. 1, for both phases
        replace(PLANT, interference=replace(WAITS, overlap_wait=50, overlap_offset=12)),
    ],
)
def test_ours_gains_where_the_plant_is_not_what_its_priors_say(plant: Plant) -> None:
    arrivals = poisson(8, 60, 2048, 200, seed=0)
    fixed = serve(StaticController(FULL), arrivals, plant).attainment(SLO)
    assert serve(slo_controller(slo=SLO), arrivals, plant).attainment(SLO) > fixed + 0.2


def mean_e2e_s(seen: Replay) -> float:
    outputs = [a.output_tokens for a in seen.arrivals]
    ends = [t + (n - 1) * p for t, p, n in zip(seen.ttft_s, seen.tpot_s, outputs, strict=True)]
    return float(np.mean(ends))


LOADS = {
    "conversations": (poisson(6, 60, 1155, 211, seed=0), SLO),
    "light": (poisson(2, 60, 1155, 211, seed=1), SLO),
    "chat": (poisson(30, 60, 251, 338, seed=2), Slo(ttft_s=0.3, tpot_s=0.03)),
    "summaries": (poisson(4, 60, 2588, 291, seed=3), SLO),
    "bursts": (
        [a for at_s in range(0, 60, 6) for a in burst(at_s, 12, seed=at_s)],
        Slo(ttft_s=0.6, tpot_s=0.03),
    ),
}


@pytest.mark.parametrize("load", LOADS)
def test_ours_is_never_notably_worse_than_full_shares(load: str) -> None:
    arrivals, slo = LOADS[load]
    controller = Counted(slo)
    ours, full = serve(controller, arrivals), serve(StaticController(FULL), arrivals)
    assert mean_e2e_s(ours) < 1.03 * mean_e2e_s(full)
    # What is above the SLO's percentile it may spend.
    assert ours.attainment(slo) > min(0.95, full.attainment(slo)) - 0.02
    assert controller.decided <= 10  # its dwell alone would allow 30
    pauses = 10 if load == "bursts" else 1
    assert ours.switches - controller.decided <= 2 * pauses  # SMs are lent once in each


def test_ours_comes_near_the_best_fixed_shares_where_load_comes_in_bursts() -> None:
    """3 s of work and 3 s of nothing: what was found in one burst must serve the next one."""
    slo = Slo(ttft_s=2.0, tpot_s=0.015)
    arrivals = [
        Arrival(at_s=6 * n + a.at_s, prompt_tokens=a.prompt_tokens, output_tokens=a.output_tokens)
        for n in range(20)
        for a in poisson(8, 3, 2000, 150, seed=300 + n)
        if a.at_s < 3
    ]
    controller = Counted(slo)
    ours, full = serve(controller, arrivals), serve(StaticController(FULL), arrivals)
    best = replay(StaticController(Shares(80, 100)), arrivals, PLANT, start=Shares(80, 100))
    assert full.attainment(slo) < 0.95 < 0.99 < best.attainment(slo)
    assert ours.attainment(slo) >= 0.99
    assert mean_e2e_s(best) < 0.95 * mean_e2e_s(full)
    assert mean_e2e_s(ours) < mean_e2e_s(best) + 0.25 * (mean_e2e_s(full) - mean_e2e_s(best))
    assert controller.decided <= 6
    assert ours.switches - controller.decided <= 2 * 20


def test_ours_lowers_mean_latency_where_both_slos_hold() -> None:
    slo = Slo(ttft_s=2.0, tpot_s=0.05)
    arrivals = poisson(8, 60, 1155, 211, seed=4)
    seen = [serve(c, arrivals) for c in (slo_controller(slo=slo), StaticController(FULL))]
    assert all(each.attainment(slo) > 0.99 for each in seen)
    ours, full = (mean_e2e_s(each) for each in seen)
    static = (StaticController(s) for s in (Shares(90, 100), Shares(80, 100), Shares(60, 40)))
    best = min(mean_e2e_s(replay(c, arrivals, PLANT, start=c.shares)) for c in static)
    assert best < 0.92 * full
    assert ours < best + 0.25 * (full - best)


@pytest.mark.parametrize("seed", range(4))
def test_hardly_a_switch_under_a_load_that_full_shares_bear(seed: int) -> None:
    arrivals = poisson(3, 60, 1000, 200, seed)
    makes = (slo_controller, PaperController)
    ours, paper = (serve(make(slo=SLO), arrivals) for make in makes)
    assert ours.attainment(SLO) > 0.95
    assert ours.switches <= 4
    assert paper.switches == 0


def test_ours_recovers_after_a_burst() -> None:
    arrivals = poisson(6, 60, 1155, 211, seed=5) + burst(30, 60, seed=6)
    seen = serve(slo_controller(slo=SLO), arrivals, switch_delay_s=0.05)
    assert seen.attainment(SLO, after_s=30, before_s=31) < 0.5  # nothing could serve it in time
    assert seen.attainment(SLO, after_s=40) > 0.95
    during = [shares for at_s, shares in seen.shares if 30 <= at_s < 36]
    assert max(shares.prefill for shares in during) >= 90
    assert seen.switches <= 8


@pytest.mark.parametrize("rate", [14, 25])
def test_overload_does_not_make_ours_flap(rate: float) -> None:
    arrivals = poisson(rate, 60, 2588, 291, seed=3)
    seen = serve(slo_controller(slo=SLO), arrivals)
    assert seen.quantile("ttft_s", 0.9) > 2
    assert seen.switches <= 12  # its dwell alone would allow 30 and more
    assert seen.shares[-1][1].prefill >= 80  # prefill is what is short


def test_ours_gives_decode_everything_once_prompts_stop() -> None:
    slo = Slo(ttft_s=0.3, tpot_s=0.03)
    arrivals = poisson(40, 20, 251, 338, seed=0)
    last_s = arrivals[-1].at_s
    controller = ours(slo=slo, interference=WAITS, allowed=[Shares(50, 50), Shares(60, 40), FULL])
    seen = serve(controller, arrivals)
    assert [s for at_s, s in seen.shares if at_s <= last_s][-1] != FULL
    idle_s, shares = seen.shares[-1]
    assert shares == FULL
    assert last_s + 1 <= idle_s <= last_s + 1.5


@pytest.mark.parametrize(
    ("rate", "prompt", "output", "slo"),
    [
        (8, 2048, 200, SLO),
        (45, 251, 338, Slo(ttft_s=0.3, tpot_s=0.03)),
        (55, 251, 338, Slo(ttft_s=0.3, tpot_s=0.04)),
    ],
)
def test_ours_meets_slos_sooner_than_the_papers(
    rate: float, prompt: int, output: int, slo: Slo
) -> None:
    """Also with a window and steps that fit a minute of trace, which the released ones do not."""
    arrivals = poisson(rate, 60, prompt, output, seed=0)
    ours = serve(slo_controller(slo=slo), arrivals).attainment(slo)
    for paper in (
        PaperController(slo=slo),
        PaperController(slo=slo, window_size=50, step_size=5),
    ):
        assert ours > serve(paper, arrivals).attainment(slo) + 0.02


def test_the_papers_finds_its_way_where_load_is_steady() -> None:
    arrivals = poisson(8, 60, 2048, 200, seed=0)
    paper = PaperController(slo=SLO, window_size=50, step_size=5)
    seen = serve(paper, arrivals)
    assert seen.attainment(SLO) > serve(StaticController(FULL), arrivals).attainment(SLO) + 0.1
    assert 1 <= seen.switches <= 3
    assert len(paper.tpot_model.points) >= 5
