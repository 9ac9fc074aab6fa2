"""One executor as one more choice of jpd's controller: what it learns there, what it foresees."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpd.config import EngineConfig
from jpd.errors import ConfigError
from jpd.semi_pd import build
from jpd.semi_pd.controller import FULL, Observation, Shares, Slo, StaticController
from jpd.semi_pd.decision_log import LoggedController
from jpd.semi_pd.mode import BreakEven, ForeseenMode, Mode
from jpd.semi_pd.slo_controller import ONE, Forecast, SloController

DIVIDED = Shares(70, 30)
ALLOWED = (FULL, DIVIDED)
TOKEN_S = 2e-5
"""By which a prompt token makes a step longer."""
WEIGHTS_S = 0.004


def alone_s(decoding: int) -> float:
    """A decode step without prompts."""
    return WEIGHTS_S + 4e-5 * decoding


def on_one(now_s: float, decoding: int, chunk: int, steps: int = 1) -> Observation:
    """A tenth of a second in which so many steps had a chunk of prompts, and others none."""
    held = [alone_s(decoding) + chunk * TOKEN_S] * steps
    others = max(0, round((0.1 - sum(held)) / alone_s(decoding)))
    return Observation(
        now_s=now_s,
        ttft_s=[0.05] * steps,
        token_gap_s=held + [alone_s(decoding)] * others,
        held_gap_s=held,
        prefill_tokens=steps * chunk,
        decoding_requests=decoding,
    )


def on_two(now_s: float, decoding: int, tokens: int, gap_s: float, token_s: float) -> Observation:
    """A tenth of a second of both phases side by side."""
    return Observation(
        now_s=now_s,
        ttft_s=[0.05],
        token_gap_s=[gap_s] * round(0.1 / gap_s),
        prefill_tokens=tokens,
        prefill_busy_s=tokens * token_s,
        decoding_requests=decoding,
    )


def play(
    controller: SloController,
    one: Callable[[float], Observation],
    two: Callable[[float, Shares], Observation],
    mode: Mode = "unified",
    shares: Shares = FULL,
    seconds: float = 6.0,
    from_s: float = 0.0,
) -> list[Mode | Shares]:
    """Asks as `jpd.semi_pd.topology` does, ten times a second; answers serve at once. What served,
    without repeats."""
    policy, served = ForeseenMode(controller), [mode if mode == ONE else shares]
    for tenth in range(1, round(10 * seconds) + 1):
        now_s = from_s + tenth / 10
        before = mode
        seen = one(now_s) if mode == ONE else two(now_s, shares)
        mode = policy.decide(seen, mode)
        if before == mode == "semi_pd":
            shares = controller.decide(seen, shares)
        now = mode if mode == ONE else shares
        if now != served[-1]:
            served.append(now)
    return served


def crowded_two(now_s: float, shares: Shares) -> Observation:
    """Beside as many prompts as `crowded_one` has."""
    if shares == DIVIDED:
        return on_two(now_s, 80, 3000, 0.0145, 3.3e-5)
    return on_two(now_s, 80, 3000, 0.035, 2.7e-5)


def crowded_one(now_s: float) -> Observation:
    """Decode is held up for most of the time."""
    return on_one(now_s, 80, 1500, steps=2)


def quiet_one(now_s: float) -> Observation:
    """Few decode, and for less of the time are held up."""
    return on_one(now_s, 6, 500, steps=3)


def quiet_two(now_s: float, shares: Shares) -> Observation:
    """The same on two."""
    return on_two(now_s, 6, 1500, 0.009, 2.7e-5)


def test_it_learns_both_phases_from_one_executor() -> None:
    controller = SloController(allowed=ALLOWED)
    play(controller, lambda now_s: on_one(now_s, 32, 1000), quiet_two, seconds=1.0)
    ((work, seconds),) = controller.decode_model.points
    assert (work.shares, work.other_busy, work.sequences) == (FULL, 0.0, 32)
    assert seconds == pytest.approx(alone_s(32))
    ((work, seconds),) = controller.prefill_model.points
    assert (work.shares, work.other_busy) == (FULL, 0.0)
    # Alone it reads the weights too, once in 2048 tokens; how long that takes is the model's guess.
    assert TOKEN_S < seconds < TOKEN_S + 1.1 * alone_s(32) / 2048
    assert set(controller.forecasts) == {*ALLOWED, ONE}


def test_where_all_steps_have_prompts_it_knows_a_step_from_before() -> None:
    controller = SloController(allowed=ALLOWED)

    def full(now_s: float) -> Observation:
        seen = on_one(now_s, 32, 2000, steps=2)
        return replace(seen, token_gap_s=seen.held_gap_s)

    play(controller, full, quiet_two, seconds=2.0)
    assert controller.reason == "nothing learned yet"  # a step without prompts was never seen
    play(controller, lambda now_s: on_one(now_s, 32, 1000), quiet_two, seconds=1.0, from_s=2.0)
    (_, before_s), *_ = controller.prefill_model.points
    controller.min_gain = 0.99  # stays
    play(controller, full, quiet_two, seconds=3.0, from_s=3.0)
    ((_, seconds),) = controller.prefill_model.points
    assert seconds == pytest.approx(before_s, rel=0.02)


def test_one_executor_where_little_is_held_up() -> None:
    assert play(SloController(allowed=ALLOWED), quiet_one, quiet_two) == [ONE]
    # Begun on two, under either shares.
    for shares in ALLOWED:
        served = play(SloController(allowed=ALLOWED), quiet_one, quiet_two, "semi_pd", shares)
        assert served[-1] == ONE


@pytest.mark.parametrize("slo", [None, Slo(ttft_s=1.0, tpot_s=0.03)])
def test_two_where_decode_is_held_up_and_at_once_under_the_best_shares(slo: Slo | None) -> None:
    controller = SloController(slo=slo, allowed=ALLOWED)
    served = play(controller, crowded_one, crowded_two)
    # (100, 100) are the shares of before, and are left with the first answer.
    assert served == [ONE, FULL, DIVIDED]
    assert controller.forecasts[DIVIDED].cost < controller.forecasts[ONE].cost
    assert ForeseenMode(controller).estimate == pytest.approx(
        controller.forecasts[ONE].cost / controller.forecasts[DIVIDED].cost
    )


def test_first_tokens_that_are_late_keep_it_on_one() -> None:
    """Under (70, 30) prompts take longer, and with them requests miss an SLO that one keeps."""
    aim = Slo(ttft_s=0.07, tpot_s=0.2)
    assert play(SloController(slo=aim, allowed=ALLOWED), crowded_one, crowded_two) == [ONE]
    served = play(SloController(slo=aim, allowed=ALLOWED), crowded_one, crowded_two, "semi_pd")
    assert served[-1] == ONE


def test_nobody_asks_for_the_mode_where_two_always_serve() -> None:
    controller = SloController(allowed=ALLOWED)
    for tenth in range(30):
        assert controller.decide(quiet_two(tenth / 10, DIVIDED), DIVIDED) in ALLOWED
    assert set(controller.forecasts) == set(ALLOWED)
    assert ForeseenMode(controller).estimate is None


class Foretold(SloController):
    """Whose forecasts are made up: the cost of each choice."""

    told: Callable[[float, object], float]
    """From the time and the choice."""

    def _forecast_all(self, observation: Observation, current: object) -> None:
        self.forecasts = {
            choice: Forecast(0.0, 0.0, 0.0, 1.0, self.told(observation.now_s, choice))
            for choice in [*self._choices, current]
        }


def test_changes_of_the_mode_have_their_time_between_them() -> None:
    """Whatever serves, the other looks better."""
    for dwell_s in (1e-9, 4.0):
        controller = Foretold(allowed=ALLOWED, min_dwell_s=dwell_s, max_dwell_s=dwell_s)
        policy, mode, changes = ForeseenMode(controller), "unified", []
        for tenth in range(1, 301):
            controller.told = lambda _, choice, mode=mode: 1 + ((choice == ONE) == (mode == ONE))
            seen = crowded_one(tenth / 10) if mode == ONE else crowded_two(tenth / 10, FULL)
            wanted = policy.decide(seen, mode)
            if mode == wanted == "semi_pd":
                controller.decide(seen, FULL)
            if wanted != mode:
                changes.append(tenth / 10)
                mode = wanted
        gaps = [b - a for a, b in itertools.pairwise(changes)]
        assert len(changes) >= 5
        assert min(gaps) >= dwell_s - 0.11  # one executor is asked for a tenth after it was chosen
        assert (min(gaps) < 1.0) == (dwell_s < 1.0)


@pytest.mark.parametrize(("cost", "served"), [(0.95, [ONE]), (0.9, [ONE, DIVIDED])])
def test_a_little_less_cost_changes_nothing(cost: float, served: list) -> None:
    controller = Foretold(allowed=[DIVIDED])
    controller.told = lambda _, choice: 1.0 if choice == ONE else cost
    assert play(controller, crowded_one, crowded_two, shares=DIVIDED, seconds=2.0) == served
    # And back.
    controller = Foretold(allowed=[DIVIDED])
    controller.told = lambda _, choice: cost if choice == ONE else 1.0
    back = play(controller, crowded_one, crowded_two, "semi_pd", DIVIDED, seconds=2.0)
    assert back == ([DIVIDED] if served == [ONE] else [DIVIDED, ONE])


def test_an_idle_time_on_one_stays_there_and_lends_nothing() -> None:
    controller = SloController(allowed=ALLOWED)

    def one(now_s: float) -> Observation:
        return quiet_one(now_s) if now_s < 3 else Observation(now_s=now_s)

    assert play(controller, one, quiet_two, seconds=10.0) == [ONE]
    # SMs that were lent before are not asked back for.
    lent = SloController(allowed=ALLOWED, idle_after_s=0.5)
    for tenth in range(1, 10):
        shares = lent.decide(crowded_two(tenth / 10, DIVIDED), DIVIDED)
    assert shares == DIVIDED
    for tenth in range(10, 20):
        alone = Observation(now_s=tenth / 10, decoding_requests=4, token_gap_s=[0.01])
        shares = lent.decide(alone, shares)
    assert (shares, lent.reason) == (FULL, "a phase is idle")
    modes = {ForeseenMode(lent).decide(quiet_one(2 + i / 10), "unified") for i in range(10)}
    assert modes == {"unified"}


def test_one_slow_step_without_prompts_teaches_nothing() -> None:
    """As that in which two executors became one."""
    controller = SloController(allowed=ALLOWED)
    full = [alone_s(32) + 2000 * TOKEN_S] * 2

    def one(now_s: float) -> Observation:
        seen = on_one(now_s, 32, 1000)
        if now_s < 2:
            return seen
        slow = [0.05] if 2.0 <= now_s < 2.05 else []
        return replace(seen, token_gap_s=full + slow, held_gap_s=full, prefill_tokens=4000)

    controller.min_gain = 0.99
    play(controller, one, quiet_two, seconds=6.0)
    assert all(
        seconds == pytest.approx(alone_s(32)) for _, seconds in controller.decode_model.points
    )


def test_one_executor_that_never_comes_is_given_up() -> None:
    controller = Foretold(allowed=ALLOWED, switch_timeout_s=5.0)
    controller.told = lambda _, choice: 1.0 if choice == ONE else 2.0
    policy, modes = ForeseenMode(controller), []
    for tenth in range(1, 121):
        seen = crowded_two(tenth / 10, FULL)
        modes.append(policy.decide(seen, "semi_pd"))
        if modes[-1] == "semi_pd":
            controller.decide(seen, FULL)
    runs = [(mode, len(list(run))) for mode, run in itertools.groupby(modes)]
    assert [mode for mode, _ in runs[:4]] == ["semi_pd", "unified", "semi_pd", "unified"]
    assert runs[1][1] == pytest.approx(50, abs=1)
    # What was seen meanwhile counts: the rate is known at once.
    assert controller._load(crowded_two(12.0, FULL)).tokens_per_s == pytest.approx(30_000, rel=0.05)


def test_where_nobody_follows_shares_are_divided_as_ever() -> None:
    """A user's policy that asked, and does as it likes; or nobody that asks any more."""
    controller = Foretold(allowed=ALLOWED)
    controller.told = lambda _, choice: {ONE: 1.0, DIVIDED: 2.0, FULL: 4.0}[choice]
    for tenth in range(1, 11):
        controller.decide_mode(crowded_two(tenth / 10, FULL), "semi_pd")
        controller.decide(crowded_two(tenth / 10, FULL), FULL)
    assert ONE in controller.forecasts
    served = [controller.decide(crowded_two(1 + i / 10, FULL), FULL) for i in range(60)]
    assert ONE not in controller.forecasts
    assert served[-1] == DIVIDED


def test_a_step_takes_as_many_tokens_as_the_engine_lets_it() -> None:
    costs = []
    for tokens, mixed in ((256, None), (2048, 256), (2048, 2048), (2048, None)):
        controller = SloController(
            allowed=ALLOWED, max_num_batched_tokens=tokens, max_num_mixed_tokens=mixed
        )
        controller.min_gain = 0.99  # stays
        play(controller, crowded_one, crowded_two, seconds=1.0)
        costs.append(controller.forecasts[ONE].cost)
    # A token costs more, as each step reads the weights and the rows' pages for fewer.
    assert min(costs[:2]) > 1.1 * costs[2]
    assert costs[2] == costs[3]


def test_a_log_does_not_hide_that_it_foresees(tmp_path) -> None:
    config = EngineConfig(model="none", topology="auto")
    logged = LoggedController(SloController(allowed=ALLOWED), tmp_path / "log")
    policy = build.make_mode_policy(config, logged)
    assert isinstance(policy, ForeseenMode)
    assert policy.decide(quiet_one(0.1), "unified") == "unified"
    static = LoggedController(StaticController(), tmp_path / "log")
    assert isinstance(build.make_mode_policy(config, static), BreakEven)
    # What is foreseen is chunked prefill.
    first = config.replace(prefill_policy="first")
    assert isinstance(build.make_mode_policy(first, logged), BreakEven)


def test_it_goes_on_asking_while_the_change_is_under_way() -> None:
    """An executor may have to be started first; what is seen meanwhile changes nothing."""
    controller = SloController(allowed=ALLOWED)
    policy = ForeseenMode(controller)
    modes = [policy.decide(crowded_one(i / 10), "unified") for i in range(20)]
    first = modes.index("semi_pd")
    assert set(modes[first:]) == {"semi_pd"}
    assert controller.decide(crowded_two(2.0, FULL), FULL) == DIVIDED
    assert controller.reason == "switch under way"
    back = SloController(allowed=ALLOWED)
    play(back, quiet_one, quiet_two, "semi_pd", seconds=3.0)
    answers = [ForeseenMode(back).decide(quiet_two(3 + i / 10, FULL), "semi_pd") for i in range(9)]
    assert set(answers) == {"unified"}


def test_refuses_a_step_of_no_tokens() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=0"):
        SloController(max_num_batched_tokens=0)
    for tokens in (0, 2049):
        most = f"max_num_mixed_tokens={tokens} .* at most max_num_batched_tokens=2048"
        with pytest.raises(ConfigError, match=most):
            SloController(max_num_mixed_tokens=tokens)


times = st.lists(st.floats(0, 1e6, allow_nan=False, allow_subnormal=False), max_size=6)


@given(st.data())
def test_any_observations_give_legal_answers(data: st.DataObject) -> None:
    controller = SloController(slo=Slo(ttft_s=1.0, tpot_s=0.1), allowed=ALLOWED)
    policy, mode, shares, now_s = ForeseenMode(controller), "unified", FULL, 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        now_s += data.draw(st.sampled_from([0.0, 0.1, 1.0, 100.0]))
        seen = Observation(
            now_s=now_s,
            ttft_s=data.draw(times),
            token_gap_s=data.draw(times),
            held_gap_s=data.draw(times),
            prefill_tokens=data.draw(st.integers(0, 10**6)),
            prefill_busy_s=data.draw(st.sampled_from([0.0, 0.05, 50.0])),
            waiting_requests=data.draw(st.integers(0, 3)),
            waiting_tokens=data.draw(st.integers(0, 10**7)),
            decoding_requests=data.draw(st.integers(0, 1000)),
        )
        wanted = policy.decide(seen, mode)
        assert wanted in ("unified", "semi_pd")
        if mode == wanted == "semi_pd":
            shares = controller.decide(seen, shares)
            assert shares in ALLOWED
        mode = wanted if data.draw(st.booleans()) else mode
