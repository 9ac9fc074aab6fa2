"""What the controllers answer to observations that are made up one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpd.errors import ConfigError
from jpd.semi_pd.controller import (
    FULL,
    Controller,
    Observation,
    Shares,
    Slo,
    StaticController,
    SwitchInFlight,
)
from jpd.semi_pd.paper_controller import PaperController
from jpd.semi_pd.share_models import prefill_curve
from jpd.semi_pd.slo_controller import DEFAULT_SHARES, Forecast, SloController
from tests.semi_pd.ours import SHARES, ours

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
GOOD, BAD = 0.5, 2.0  # times the SLO


def paper(**changes) -> PaperController:
    return PaperController(**({"slo": SLO, "window_size": 10, "step_size": 5} | changes))


def finished(now_s: float, ttft: float, tpot: float, count: int = 10) -> Observation:
    """Requests that took so many times their SLO."""
    return Observation(
        now_s=now_s, ttft_s=[ttft * SLO.ttft_s] * count, tpot_s=[tpot * SLO.tpot_s] * count
    )


def after_a_window(controller: PaperController, ttft: float, tpot: float, at: Shares) -> Shares:
    """The answer to one full window under these shares."""
    assert controller.decide(finished(0.0, ttft, tpot), at) == at  # seen under other shares
    return controller.decide(finished(1.0, ttft, tpot), at)


# -- shares, SLO, observations


@pytest.mark.parametrize("percent", [0, 101, -5, 50.0, True, "50"])
def test_shares_are_whole_percents(percent: object) -> None:
    with pytest.raises(ConfigError, match=r"prefill=.* 1\.\.100"):
        Shares(percent, 100)
    with pytest.raises(ConfigError, match=r"decode=.* 1\.\.100"):
        Shares(100, percent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slo(ttft_s=0, tpot_s=1), "ttft_s=0"),
        (lambda: Slo(ttft_s=1, tpot_s=float("inf")), "tpot_s=inf"),
        (lambda: Slo(ttft_s=1, tpot_s=1, percentile=90), "percentile=90"),
        (lambda: Observation(now_s=float("nan")), "now_s=nan"),
        (lambda: Observation(now_s=0, ttft_s=[1, float("nan")]), "ttft_s=nan"),
        (lambda: Observation(now_s=0, token_gap_s=[-1.0]), r"token_gap_s=-1\.0"),
        (lambda: Observation(now_s=0, prefill_busy_s=float("inf")), "prefill_busy_s=inf"),
        (lambda: Observation(now_s=0, waiting_tokens=-1), "waiting_tokens=-1"),
        (lambda: Observation(now_s=0, free_pages_fraction=1.5), r"free_pages_fraction=1\.5"),
        (lambda: paper(window_size=0), "window_size=0"),
        (lambda: paper(step_size=0), "step_size=0"),
        (lambda: paper(max_step=0), "max_step=0"),
        (lambda: paper(min_share=0), "min_share=0"),
        (lambda: paper(max_points=2), "max_points=2"),
        (lambda: paper(switch_timeout_s=0), "switch_timeout_s=0"),
        (lambda: ours(slo=SLO, window_s=0), "window_s=0"),
        (lambda: ours(slo=SLO, foresee_s=0), "foresee_s=0"),
        (lambda: ours(slo=SLO, load_window_s=1), "load_window_s=1.*window_s=2"),
        (lambda: ours(slo=SLO, horizon_s=-1), "horizon_s=-1"),
        (lambda: ours(slo=SLO, idle_after_s=-1), "idle_after_s=-1"),
        (lambda: ours(slo=SLO, act_above=0), "act_above=0"),
        (lambda: ours(slo=SLO, min_gain=1), "min_gain=1"),
        (lambda: ours(slo=SLO, max_dwell_s=1), "max_dwell_s=1.*min_dwell_s=2"),
        (lambda: ours(slo=SLO, memory_s=0), "memory_s=0"),
        (lambda: ours(slo=SLO, allowed=()), r"allowed=\(\)"),
    ],
)
def test_errors_name_the_value(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_static_controller_asks_again_for_its_shares() -> None:
    controller = StaticController(Shares(80, 100))
    assert controller.decide(Observation(now_s=0), Shares(80, 100)) == Shares(80, 100)
    assert controller.decide(Observation(now_s=1), FULL) == Shares(80, 100)


def test_a_switch_is_in_flight_until_it_serves_or_is_late() -> None:
    switch = SwitchInFlight(timeout_s=10)
    assert switch.waiting_for(FULL, 0.0) is None
    switch.ask(Shares(50, 50), 1.0)
    assert switch.waiting_for(FULL, 2.0) == Shares(50, 50)
    assert switch.waiting_for(Shares(50, 100), 3.0) == Shares(50, 50)  # one phase came first
    assert switch.waiting_for(Shares(50, 50), 4.0) is None
    assert switch.waiting_for(FULL, 5.0) is None  # what served is over
    switch.ask(Shares(50, 50), 6.0)
    assert switch.waiting_for(FULL, 15.9) == Shares(50, 50)
    assert switch.waiting_for(FULL, 16.0) is None


# -- Algorithm 1


@pytest.mark.parametrize(
    ("ttft", "tpot", "start", "wanted"),
    [
        (GOOD, GOOD, Shares(60, 60), Shares(60, 60)),
        (BAD, BAD, Shares(60, 60), Shares(60, 60)),  # the paper: both fail, keep
        (BAD, GOOD, Shares(60, 60), Shares(75, 60)),  # three steps of 5
        (GOOD, BAD, Shares(60, 60), Shares(60, 75)),
        (BAD, GOOD, Shares(100, 100), Shares(100, 85)),  # 100 is the end: from decode instead
        (GOOD, BAD, Shares(100, 100), Shares(85, 100)),
        (BAD, GOOD, Shares(97, 60), Shares(100, 48)),  # 3 up, 2 + 5 + 5 down
        (BAD, GOOD, Shares(100, 12), Shares(100, 10)),  # the floor
        (BAD, GOOD, Shares(100, 4), Shares(100, 4)),  # below it already: left there
    ],
)
def test_algorithm_1(ttft: float, tpot: float, start: Shares, wanted: Shares) -> None:
    assert after_a_window(paper(), ttft, tpot, start) == wanted


def test_it_takes_no_more_steps_than_its_model_asks_for() -> None:
    """Eq. 1 until Eq. 4 can be fitted: TTFT 1.05 at x' = 0.5 is 1 at 0.525, two steps of 3 %."""
    controller = paper(step_size=3, max_step=10)
    assert after_a_window(controller, 1.05, GOOD, Shares(50, 50)) == Shares(56, 50)
    assert controller.ttft_model.coefficients == pytest.approx({"a": 0.525, "b": 0, "lambda": 0})


def test_the_window_counts_finished_requests_under_the_shares_that_serve() -> None:
    controller = paper(window_size=10)
    start = Shares(60, 60)
    for now_s in range(4):  # the first call's came under unknown shares
        assert controller.decide(finished(now_s, GOOD, BAD, 3), start) == start
    assert controller.decide(finished(4, GOOD, BAD, 1), start) == Shares(60, 75)
    # Under way, and the first after it: not counted, the switch is asked for all the while.
    assert controller.decide(finished(5, GOOD, GOOD, 50), start) == Shares(60, 75)
    assert controller.decide(finished(6, GOOD, GOOD, 50), Shares(60, 75)) == Shares(60, 75)
    assert len(controller.tpot_model.points) == 1
    assert controller.decide(finished(7, GOOD, BAD, 10), Shares(60, 75)) == Shares(60, 90)
    # Given up: it plans from what serves.
    assert controller.decide(finished(66, BAD, GOOD, 10), Shares(60, 75)) == Shares(60, 90)
    assert controller.decide(finished(67, BAD, GOOD, 10), Shares(60, 75)) == Shares(75, 75)


def test_a_window_without_a_ttft_holds_its_slo() -> None:
    controller = paper()
    decode_only = Observation(now_s=0, tpot_s=[BAD * SLO.tpot_s] * 10)
    assert controller.decide(decode_only, Shares(60, 60)) == Shares(60, 60)
    assert controller.decide(decode_only, Shares(60, 60)) == Shares(60, 75)
    assert controller.ttft_model.coefficients is None


def test_the_percentile_decides_which_requests_may_fail() -> None:
    for percentile, wanted in ((0.5, Shares(60, 60)), (0.95, Shares(60, 75))):
        controller = paper(slo=Slo(ttft_s=1, tpot_s=0.1, percentile=percentile))
        some_fail = Observation(now_s=0, tpot_s=[0.05] * 8 + [0.2] * 2)
        controller.decide(some_fail, Shares(60, 60))
        assert controller.decide(some_fail, Shares(60, 60)) == wanted


# -- ours


def busy(now_s: float, *, gap: float = GOOD, queue: float = 0.0, **changes) -> Observation:
    """A tenth of a second in which both phases worked.

    Args:
        now_s: Its end.
        gap: Between two tokens, times the SLO.
        queue: Time to compute the tokens that wait, at 1e-4 s each, over the SLO.
        changes: Fields of the observation.
    """
    values = {
        "ttft_s": [0.1],
        "token_gap_s": [gap * SLO.tpot_s],
        "prefill_tokens": 500,
        "prefill_busy_s": 0.05,
        "waiting_requests": 1,
        "waiting_tokens": int(queue * SLO.ttft_s / 1e-4),
        "decoding_requests": 1,
    }
    return Observation(now_s=now_s, **(values | changes))


def play(
    controller: Controller,
    observe: Callable[[float], Observation],
    start: Shares = FULL,
    *,
    from_s: float = 0.0,
    until_s: float = 10.0,
) -> list[tuple[float, Shares]]:
    """Ten calls a second, answers serve at once; every change with its time.

    Prefill computes fewer tokens under smaller shares, or the controller would learn otherwise.
    """
    shares, changes = start, []
    for tenth in range(round(from_s * 10), round(until_s * 10)):
        observation = observe(tenth / 10)
        tokens = int(observation.prefill_tokens / prefill_curve(shares.prefill, 0.55))
        wanted = controller.decide(replace(observation, prefill_tokens=tokens), shares)
        if wanted != shares:
            changes.append((tenth / 10, wanted))
        shares = wanted
    return changes


def first_change(observe: Callable[[float], Observation], start: Shares = FULL) -> Shares:
    """What ours goes to first, by what it has seen under `start`; `start` if it stays."""
    changes = play(ours(slo=SLO), observe, start, until_s=5)
    return changes[0][1] if changes else start


@pytest.mark.parametrize("gap", [0.1, 0.5])
def test_ours_lowers_mean_latency_where_both_slos_hold(gap: float) -> None:
    """Many decode: they are to be quick. Many wait, or nearly nobody is there: prefill is."""
    overlapping = Shares(80, 100)
    many_decode = {"gap": gap, "decoding_requests": 40, "waiting_requests": 1}
    wanted = first_change(lambda s: busy(s, **many_decode))
    assert wanted.prefill < 90
    # At 0.5 under (80, 100), (100, 100) would take 0.78 of TPOT's SLO: some requests would miss it.
    many_wait = {"gap": min(gap, 0.4), "ttft_s": [0.1] * 8, "waiting_requests": 80, "queue": 1.0}
    many_wait |= {"prefill_tokens": 750, "prefill_busy_s": 0.075, "decoding_requests": 2}
    assert first_change(lambda s: busy(s, **many_wait), overlapping).prefill == 100
    assert first_change(lambda s: busy(s, **many_wait)) == FULL


def test_ours_protects_decode_and_then_prefill() -> None:
    controller = ours(slo=SLO)
    often = {"prefill_tokens": 750, "prefill_busy_s": 0.075, "decoding_requests": 20}
    ((when_s, wanted), *_) = play(controller, lambda s: busy(s, gap=BAD, **often), until_s=2)
    assert when_s < 1  # it does not wait for requests to finish
    assert wanted.prefill + wanted.decode <= 100
    ((_, wanted_then), *_) = play(
        controller, lambda s: busy(s, queue=BAD), wanted, from_s=20, until_s=22
    )
    assert wanted_then.prefill > wanted.prefill
    assert set(controller.forecasts) == set(SHARES)


def test_ours_sees_requests_that_wait_before_any_is_late() -> None:
    controller = ours(slo=SLO, allowed=[Shares(50, 50), FULL])
    start = Shares(50, 50)
    assert play(controller, lambda s: busy(s, decoding_requests=20), start, until_s=5) == []
    assert controller.decide(busy(5.0, queue=1.5, decoding_requests=20), start) == FULL
    assert controller.reason == "an SLO is in danger"


def test_ours_foresees_a_queue_that_will_grow() -> None:
    """Tokens arrive 8 % faster than they are computed; 0.1 s more of them wait each second."""

    def observe(now_s: float) -> Observation:
        queue = 0.1 * now_s
        return busy(now_s, prefill_tokens=1000, prefill_busy_s=0.1, queue=queue)

    missed_s = dict.fromkeys((8, 0.1), math.inf)
    for horizon_s in missed_s:
        controller = ours(slo=SLO, horizon_s=horizon_s, allowed=[Shares(50, 50)])
        for tenth in range(100):
            controller.decide(observe(tenth / 10), Shares(50, 50))
            forecasts = controller.forecasts
            if forecasts and forecasts[Shares(50, 50)].ttft_s > SLO.ttft_s:
                missed_s[horizon_s] = tenth / 10
                break
    assert missed_s[8] < 4
    assert missed_s[0.1] > 9


IDLE = {
    "prefill": {"ttft_s": [], "prefill_tokens": 0, "prefill_busy_s": 0.0, "waiting_requests": 0},
    "decode": {"token_gap_s": [], "decoding_requests": 0},
}
IDLE["both"] = IDLE["prefill"] | IDLE["decode"]


@pytest.mark.parametrize("idle_phase", IDLE)
def test_ours_gives_a_lone_phase_everything(idle_phase: str) -> None:
    def observe(now_s: float) -> Observation:
        return busy(now_s, **{"decoding_requests": 20} | (IDLE[idle_phase] if now_s >= 3 else {}))

    controller = ours(slo=SLO, idle_after_s=0.5, allowed=[Shares(50, 50), FULL])
    ((when_s, wanted),) = play(controller, observe, Shares(50, 50))
    assert wanted == FULL
    assert 3 <= when_s <= 3.5
    assert controller.reason == "a phase is idle"
    # Of the allowed ones, the phase that works gets the most.
    allowed = (Shares(10, 70), Shares(50, 50), Shares(95, 80))
    controller = ours(slo=SLO, idle_after_s=0.5, allowed=allowed)
    assert play(controller, observe, Shares(50, 50))[-1][1] == Shares(95, 80)


def test_ours_changes_nothing_where_a_lone_phase_has_everything() -> None:
    for idle_phase, wanted in (("prefill", []), ("decode", [FULL]), ("both", [FULL])):
        idle = IDLE[idle_phase]
        controller = ours(slo=SLO, allowed=[Shares(80, 100), FULL])
        changes = play(controller, lambda s, o=idle: busy(s, **o), Shares(80, 100))
        assert [shares for _, shares in changes] == wanted


class Foretold(SloController):
    """Whose forecasts are made up: the mean time and the miss of each share."""

    told: dict[Shares, tuple[float, float]]

    def _forecast_all(self, observation: Observation, current: Shares) -> None:
        self.forecasts = {
            shares: Forecast(0.0, 0.0, miss, e2e_s, e2e_s * max(1.0, miss / 0.8) ** 4)
            for shares, (e2e_s, miss) in self.told.items()
        }


@pytest.mark.parametrize("idle_phase", IDLE)
def test_ours_takes_lent_sms_back_at_once_and_as_often_as_needed(idle_phase: str) -> None:
    """Bursts of 3 s, 3 s apart: each finds the shares that were decided on, and no dwell."""
    decided = Shares(50, 50)

    def observe(now_s: float) -> Observation:
        return busy(now_s, **(IDLE[idle_phase] if now_s % 6 >= 3 else {}))

    controller = Foretold(slo=SLO, allowed=[decided, FULL])
    controller.told = {decided: (10, 0.5), FULL: (20, 0.5)}
    ((first_s, first), *changes) = play(controller, observe, until_s=60)
    assert first_s < 1
    assert first == decided
    assert [shares for _, shares in changes] == [FULL, decided] * 9 + [FULL]
    assert [back_s for back_s, _ in changes[1::2]] == [6.0 * n for n in range(1, 10)]
    # A miss is left as soon as anything is known, and not later for all the lending.
    controller.told = {decided: (10, 1.5), FULL: (10, 0.5)}
    left = play(controller, busy, FULL, from_s=60, until_s=62)
    assert left == [(60.0, decided), (60.6, FULL)]


def test_ours_leaves_lent_sms_where_they_are_after_a_long_time() -> None:
    def observe(now_s: float) -> Observation:
        return busy(now_s, **(IDLE["prefill"] if 3 <= now_s < 33 else {}))

    for memory_s, wanted in ((60, [FULL, Shares(50, 50)]), (20, [FULL])):
        controller = Foretold(slo=SLO, allowed=[Shares(50, 50), FULL], memory_s=memory_s)
        controller.told = {Shares(50, 50): (10, 0.5), FULL: (10, 0.5)}
        changes = play(controller, observe, Shares(50, 50), until_s=40)
        assert [shares for _, shares in changes] == wanted


def test_ours_takes_back_what_served_before_one_and_then_both_were_idle() -> None:
    for_prefill, for_decode = Shares(70, 30), Shares(30, 70)

    def observe(now_s: float) -> Observation:
        idle = IDLE["prefill"] if now_s < 6 else IDLE["both"] if now_s < 9 else {}
        return busy(now_s, **(idle if now_s >= 3 else {}))

    for start, wanted in (
        (Shares(50, 50), [for_decode, for_prefill, Shares(50, 50)]),
        (Shares(50, 51), [for_decode, for_prefill]),  # not among the allowed ones
    ):
        allowed = [for_prefill, Shares(50, 50), for_decode]
        controller = Foretold(slo=SLO, allowed=allowed)
        controller.told = dict.fromkeys([*allowed, start], (10, 0.5))
        changes = play(controller, observe, start, until_s=12)
        assert [shares for _, shares in changes] == wanted


def test_ours_waits_for_a_switch() -> None:
    controller = Foretold(slo=SLO, allowed=[FULL, Shares(50, 50)])
    controller.told = {FULL: (10, 0.5), Shares(50, 50): (5, 0.5)}
    asked = [controller.decide(busy(tenth / 10), FULL) for tenth in range(10)]
    assert asked[-1] == Shares(50, 50)
    controller.told = {FULL: (5, 0.5), Shares(50, 50): (10, 0.5)}
    # Not there yet: it asks for the same, whatever is seen.
    for tenth in range(10, 30):
        assert controller.decide(busy(tenth / 10), FULL) == Shares(50, 50)
        assert controller.reason == "switch under way"
    # Then it looks at what is there for a quarter of its window.
    assert play(controller, busy, Shares(50, 50), from_s=3, until_s=4) == [(3.5, FULL)]


def test_ours_dwells_but_for_an_slo_in_danger() -> None:
    """A gain in mean latency waits its turn; what would miss an SLO is left at once, but once."""
    a, b, c = Shares(50, 50), Shares(80, 100), FULL
    controller = Foretold(slo=SLO, allowed=[a, b, c], min_dwell_s=4)
    controller.told = {a: (10, 0.5), b: (9, 0.5), c: (20, 0.5)}
    ((first_s, shares),) = play(controller, busy, a, until_s=1)
    assert shares == b
    controller.told = {a: (10, 0.5), b: (20, 0.5), c: (9, 0.5)}
    assert play(controller, busy, b, from_s=1, until_s=2) == []
    assert controller.reason == "dwell"
    controller.told = {a: (10, 0.5), b: (20, 1.5), c: (9, 0.5)}
    assert play(controller, busy, b, from_s=2, until_s=3) == [(2.0, c)]
    assert first_s < 1
    controller.told = {a: (10, 0.5), b: (20, 0.5), c: (9, 1.5)}
    ((again_s, _),) = play(controller, busy, c, from_s=3, until_s=9)
    assert again_s == pytest.approx(2.0 + 4, abs=0.11)


def test_ours_gives_up_latency_for_an_slo_and_takes_the_better_of_two_that_miss() -> None:
    quick, safe = Shares(80, 100), FULL
    for misses, wanted in (((0.7, 0.5), quick), ((1.2, 0.5), safe), ((1.2, 1.5), quick)):
        controller = Foretold(slo=SLO, allowed=[quick, safe])
        controller.told = {quick: (10, misses[0]), safe: (15, misses[1])}
        for start in (quick, safe):
            changes = play(controller, busy, start, until_s=5)
            assert (changes[-1][1] if changes else start) == wanted


def test_ours_lengthens_its_dwell_when_it_goes_back_and_forth() -> None:
    """A model that is always wrong: whatever serves fails, and the others promise not to."""

    class Fooled(Foretold):
        def _forecast_all(self, observation: Observation, current: Shares) -> None:
            self.told = {s: (10.0, 2.0 if s == current else 0.5) for s in self.allowed}
            super()._forecast_all(observation, current)

    allowed = (Shares(30, 70), Shares(50, 50), Shares(95, 100))
    controller = Fooled(slo=SLO, allowed=allowed, min_dwell_s=1, max_dwell_s=16)
    times = [now_s for now_s, _ in play(controller, busy, allowed[0], until_s=60)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert 3 <= len(times) <= 8  # a dwell of 1 s would allow 60
    assert gaps == sorted(gaps)
    assert max(gaps) >= 15


def test_ours_speeds_decode_up_when_requests_wait_for_a_place_not_for_sms() -> None:
    """They wait, yet prefill does next to nothing: there are no pages, or no row of the batch.

    Late by more than half, nearly all would be lost under any share, and the mean would decide.
    """
    disjoint = [shares for shares in SHARES if shares.prefill + shares.decode <= 100]
    late = {"ttft_s": [1.5], "waiting_requests": 20, "decoding_requests": 20}
    found = []
    for seconds in (0.02, 0.1):
        work = late | {"prefill_tokens": int(5000 * seconds), "prefill_busy_s": seconds}
        controller = ours(slo=SLO, allowed=disjoint)
        changes = play(controller, lambda s, w=work: busy(s, **w), Shares(60, 40), until_s=5)
        found.append(changes[0][1].prefill)
    assert found[0] < 60 < found[1]


def test_ours_gives_up_an_slo_that_is_missed_by_half_and_takes_the_better_mean() -> None:
    late = {"ttft_s": [1.1], "queue": 2, "waiting_requests": 40, "decoding_requests": 60}
    late |= {"prefill_tokens": 400, "prefill_busy_s": 0.04}
    controller = ours(slo=SLO, allowed=[Shares(60, 40), FULL])
    changes = play(controller, lambda s: busy(s, gap=0.9, **late), until_s=1)
    full, divided = (controller.forecasts[shares] for shares in (FULL, Shares(60, 40)))
    assert 1.5 < full.miss < 0.9 * divided.miss
    assert divided.e2e_s < 0.93 * full.e2e_s
    assert [wanted for _, wanted in changes] == [Shares(60, 40)]


def test_ours_gives_up_an_slo_that_nobody_keeps_and_takes_the_better_mean() -> None:
    late = {"ttft_s": [2.2], "queue": 4, "waiting_requests": 40, "decoding_requests": 100}
    late |= {"prefill_tokens": 400, "prefill_busy_s": 0.04}
    controller = ours(slo=SLO, allowed=[Shares(60, 40), FULL])
    changes = play(controller, lambda s: busy(s, gap=0.9, **late), until_s=1)
    full, divided = (controller.forecasts[shares] for shares in (FULL, Shares(60, 40)))
    assert 1.5 * SLO.ttft_s < full.ttft_s < 0.9 * divided.ttft_s
    assert full.lost == pytest.approx(1, rel=1e-3) == divided.lost
    assert divided.e2e_s < 0.93 * full.e2e_s
    assert [wanted for _, wanted in changes] == [Shares(60, 40)]


@pytest.mark.parametrize(
    ("middle", "percentile", "lost"),
    [(0.5, 0.9, (0.2, 0.2)), (0.85, 0.9, (0.26, 0.51)), (0.85, 0.85, (0.26, 0.51))],
)
def test_ours_counts_the_requests_that_would_not_keep_the_slos(
    middle: float, percentile: float, lost: tuple[float, float]
) -> None:
    """Two of ten are late under either share, and count once however late. Four more may be."""
    ttfts = {"ttft_s": [0.02] * 4 + [middle] * 4 + [3.0] * 2}
    much = {"decoding_requests": 20, "prefill_tokens": 900, "prefill_busy_s": 0.09}
    slo = replace(SLO, percentile=percentile)
    controller = ours(slo=slo, allowed=[FULL, Shares(60, 40)], act_above=percentile / 2)
    play(controller, lambda s: busy(s, gap=0.3, **ttfts, **much), until_s=1)
    full, divided = (controller.forecasts[shares] for shares in (FULL, Shares(60, 40)))
    assert full.ttft_s == pytest.approx(3.0)
    assert divided.ttft_s > 1.3 * full.ttft_s
    for forecast, part in zip((full, divided), lost, strict=True):
        assert forecast.lost == pytest.approx(part, rel=0.05)
        over = forecast.lost / (1 - percentile) / controller.act_above
        assert forecast.cost == pytest.approx(forecast.e2e_s * max(1, over) ** 4)


def test_ours_counts_late_requests_under_the_share_they_were_seen_under() -> None:
    """What took 0.9 of the SLO on half of the SMs takes less on all of them."""
    work = {"prefill_tokens": 1000, "prefill_busy_s": 0.1, "gap": 0.3}
    half = Shares(50, 50)
    controller = ours(slo=SLO, allowed=[half, FULL], min_gain=0.9999)  # it stays
    play(controller, lambda s: busy(s, ttft_s=[0.9], **work), half, until_s=5)
    play(controller, lambda s: busy(s, ttft_s=[], **work), FULL, from_s=5, until_s=6)
    lost = [controller.forecasts[shares].lost for shares in (half, FULL)]
    assert lost[0] == pytest.approx(0.22, abs=0.05)
    assert lost[1] < 0.02


def test_ours_loses_a_request_once_that_is_late_twice() -> None:
    """Half of them by TTFT and, of either half, half by TPOT: a quarter keeps both."""
    ttfts = {"ttft_s": [0.1, 3.0], "decoding_requests": 20}
    controller = ours(slo=SLO, allowed=[FULL])
    play(controller, lambda s: busy(s, gap=1.0, **ttfts), until_s=1)
    assert controller.forecasts[FULL].lost == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("seen", [[], [0.05], [0.05] * 22 + [3.0] * 3])
def test_ours_counts_those_of_a_queue_however_quick_others_were(seen: list[float]) -> None:
    """Each waits for what is before it: with a queue of twice the SLO half of them are late."""
    for queue, part in ((2, 0.5), (20, 0.95)):
        controller = ours(slo=SLO, allowed=[FULL], load_window_s=2)
        waits = {"ttft_s": seen, "queue": queue, "waiting_requests": 10 * queue}
        play(controller, lambda s, w=waits: busy(s, gap=0.3, **w), until_s=1)
        assert controller.forecasts[FULL].lost == pytest.approx(part, abs=0.06)


def test_ours_without_an_slo_takes_the_better_mean_however_late_a_first_token() -> None:
    late = {"ttft_s": [0.9], "queue": 1.1, "waiting_requests": 22, "decoding_requests": 60}
    late |= {"prefill_tokens": 200, "prefill_busy_s": 0.02}
    allowed = [Shares(50, 50), FULL]
    for slo, wanted in ((SLO, []), (None, [Shares(50, 50)])):
        controller = ours(slo=slo, allowed=allowed)
        changes = play(controller, lambda s: busy(s, **late), until_s=1)
        assert [shares for _, shares in changes] == wanted
        divided, full = (controller.forecasts[shares] for shares in allowed)
        assert divided.e2e_s < 0.93 * full.e2e_s
    assert divided.miss == full.miss == divided.lost == full.lost == 0
    assert divided.cost == divided.e2e_s


@pytest.mark.parametrize(("foresee_s", "taken"), [(3, True), (30, False)])
def test_ours_foresees_shares_that_cannot_compute_what_comes(foresee_s: float, taken: bool) -> None:
    """They are better for decode, and for all until their queue is long."""
    divided = Shares(60, 40)
    much = {"ttft_s": [0.05], "decoding_requests": 20}
    much |= {"prefill_tokens": 900, "prefill_busy_s": 0.09}
    controller = ours(allowed=[divided, FULL], foresee_s=foresee_s)
    changes = play(controller, lambda s: busy(s, **much), until_s=1)
    assert [shares for _, shares in changes] == ([divided] if taken else [])


@pytest.mark.parametrize(("waiting", "taken"), [(10, False), (3, True)])
def test_ours_knows_how_many_wait_in_a_queue(waiting: int, taken: bool) -> None:
    """Tokens of ten mean prompts wait; where they are of three long ones, fewer are kept so."""
    divided = Shares(60, 40)
    much = {"ttft_s": [0.05], "decoding_requests": 40, "waiting_requests": waiting}
    much |= {"prefill_tokens": 900, "prefill_busy_s": 0.09, "queue": 0.9}
    controller = ours(allowed=[divided, FULL], foresee_s=10)
    changes = play(controller, lambda s: busy(s, **much), until_s=1)
    assert [shares for _, shares in changes] == ([divided] if taken else [])


def test_ours_has_no_edge_between_waiting_for_sms_and_for_a_place() -> None:
    """A little more or less of prefill's time must not turn a forecast round."""
    allowed = (Shares(50, 50), Shares(60, 40), Shares(80, 20))
    late = {"ttft_s": [2.0], "waiting_requests": 20, "decoding_requests": 20}
    ttfts = []
    for percent in range(20, 81, 2):
        prefill = {"prefill_tokens": 5 * percent, "prefill_busy_s": percent / 1000}
        controller = ours(slo=SLO, allowed=allowed, min_gain=0.99)
        play(controller, lambda s, o=late | prefill: busy(s, **o), Shares(60, 40), until_s=1)
        ttfts.append([controller.forecasts[shares].ttft_s for shares in allowed])
    assert min(ttfts[0]) == ttfts[0][0]
    assert min(ttfts[-1]) == ttfts[-1][2]
    for before, after in itertools.pairwise(ttfts):
        assert after == pytest.approx(before, rel=0.2)


def test_ours_knows_that_slower_decode_fills_its_own_batch() -> None:
    """As fast now, but what would slow down a step of many would also make them more."""
    here, there = Shares(50, 50), Shares(75, 25)
    slowdowns = []
    for sequences in (1, 30, 300):
        controller = ours(slo=SLO, allowed=[here, there], min_gain=0.99)
        play(controller, lambda s, n=sequences: busy(s, decoding_requests=n), here)
        forecasts = controller.forecasts
        slowdowns.append(forecasts[there].tpot_s / forecasts[here].tpot_s)
    assert 1 < slowdowns[0] < slowdowns[1] < 0.95 * slowdowns[2]


def test_ours_learns_nothing_from_steps_under_other_shares() -> None:
    controller = ours(slo=SLO, min_gain=0.99)  # it stays where it is
    play(controller, busy, Shares(50, 50), until_s=5)
    seen = controller.decode_model.points
    controller.decide(busy(5.0, gap=9.0), Shares(40, 60))
    for tenth in range(1, 5):  # less than a quarter of the window under the new ones
        controller.decide(busy(5 + tenth / 10), Shares(40, 60))
    assert controller.decode_model.points == seen
    play(controller, busy, Shares(40, 60), from_s=5.5, until_s=6)
    assert {work.shares: s for work, s in controller.decode_model.points} == {
        Shares(50, 50): pytest.approx(0.05),
        Shares(40, 60): pytest.approx(0.05),
    }


def test_ours_learns_nothing_from_a_time_in_which_it_was_not_asked() -> None:
    controller = ours(slo=SLO)
    play(controller, busy, Shares(50, 50), until_s=5)
    seen = controller.decode_model.points, controller.prefill_model.points
    for tenth in range(3):  # after one executor served for a while
        controller.decide(busy(25 + tenth / 10), Shares(50, 50))
        assert (controller.decode_model.points, controller.prefill_model.points) == seen
    play(controller, busy, Shares(50, 50), from_s=25.3, until_s=26)
    assert controller._prefill_busy == pytest.approx(0.5, abs=0.06)


def test_ours_decides_nothing_before_it_has_looked_again() -> None:
    """Many wait, which it would not know of in its first look: only of those that decoded then."""
    prefill = {"prefill_tokens": 750, "prefill_busy_s": 0.075, "queue": 0.5}
    many = prefill | {"decoding_requests": 20, "waiting_requests": 80}
    controller, rests = ours(slo=SLO), Shares(80, 100)
    assert play(controller, lambda s: busy(s, **many), rests, until_s=30) == []
    forecasts = controller.forecasts
    for tenth in range(5):
        assert controller.decide(busy(45 + tenth / 10, **many), rests) == rests
        assert controller.reason == "nothing learned yet"
        assert controller.forecasts is forecasts
    assert play(controller, lambda s: busy(s, **many), rests, from_s=45.5, until_s=60) == []


def test_ours_knows_of_no_idle_phase_and_of_no_lent_sms_while_it_was_not_asked() -> None:
    controller = Foretold(slo=SLO, allowed=[Shares(50, 50), FULL])
    controller.told = {Shares(50, 50): (10, 0.5), FULL: (10, 0.5)}
    idle = IDLE["prefill"]
    play(controller, busy, Shares(50, 50), until_s=3)
    ((_, lent),) = play(controller, lambda s: busy(s, **idle), Shares(50, 50), from_s=3, until_s=5)
    assert lent == FULL
    assert play(controller, busy, FULL, from_s=15, until_s=18) == []
    (begins_s, _), *_ = play(
        controller, lambda s: busy(s, **idle), Shares(50, 50), from_s=30, until_s=33
    )
    assert begins_s == pytest.approx(30 + controller.idle_after_s, abs=0.11)


# -- whatever is seen

seconds = st.floats(0, 1e6, allow_nan=False, allow_subnormal=False)
latencies = st.lists(seconds, max_size=6)
shares_of_all_kinds = st.builds(Shares, st.integers(1, 100), st.integers(1, 100))


@st.composite
def observations(draw: st.DrawFn) -> list[Observation]:
    now_s, sequence = draw(seconds), []
    for _ in range(draw(st.integers(1, 40))):
        now_s += draw(st.sampled_from([0.0, 0.1, 1.0, 100.0]))
        sequence.append(
            Observation(
                now_s=now_s,
                ttft_s=draw(latencies),
                tpot_s=draw(latencies),
                token_gap_s=draw(latencies),
                prefill_tokens=draw(st.integers(0, 10**6)),
                prefill_busy_s=draw(st.sampled_from([0.0, 0.05, 0.1, 50.0])),
                waiting_requests=draw(st.integers(0, 3)),
                waiting_tokens=draw(st.integers(0, 10**7)),
                decoding_requests=draw(st.integers(0, 1000)),
                free_pages_fraction=draw(st.floats(0, 1)),
            )
        )
    return sequence


@given(
    sequence=observations(),
    start=shares_of_all_kinds,
    arrives=st.lists(st.booleans(), min_size=40, max_size=40),
    allowed=st.none() | st.lists(shares_of_all_kinds, min_size=1, max_size=5),
)
def test_any_observations_give_legal_shares(
    sequence: list[Observation],
    start: Shares,
    arrives: list[bool],
    allowed: Sequence[Shares] | None,
) -> None:
    """`Shares` itself refuses what is not 1..100; ours also stays within the allowed ones."""
    for controller in (
        paper(window_size=3, switch_timeout_s=1),
        SloController(slo=SLO, allowed=allowed, switch_timeout_s=1),
    ):
        current = start
        for observation, soon in zip(sequence, arrives, strict=False):
            wanted = controller.decide(observation, current)
            assert isinstance(wanted, Shares)
            if isinstance(controller, SloController):
                assert wanted in {current, *(allowed or DEFAULT_SHARES)}
            current = wanted if soon else current
