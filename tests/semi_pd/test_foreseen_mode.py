"""One executor as one more choice of jpd's controller: what it learns there, what it foresees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpd.errors import ConfigError
from jpd.semi_pd.controller import FULL, Observation, Shares, Slo
from jpd.semi_pd.mode import ForeseenMode, Mode
from jpd.semi_pd.slo_controller import ONE, SloController

DIVIDED = Shares(70, 30)
ALLOWED = (FULL, DIVIDED)
TOKEN_S = 2e-5
"""By which a prompt token makes a step longer."""
WEIGHTS_S = 0.004


def alone_s(decoding: int) -> float:
    """A decode step without prompts."""
    return WEIGHTS_S + 4e-5 * decoding


def on_one(
    now_s: float, decoding: int, chunk: int, steps: int = 1, waiting: int = 0
) -> Observation:
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
        waiting_requests=waiting,
        waiting_tokens=waiting * chunk,
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
    full = lambda now_s: replace(  # noqa: E731
        on_one(now_s, 32, 2000, steps=2), token_gap_s=[alone_s(32) + 2000 * TOKEN_S] * 2
    )
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


def test_changes_of_the_mode_have_their_time_between_them() -> None:
    """A load that goes up and down, twice a second."""
    controller = SloController(allowed=ALLOWED)

    def one(now_s: float) -> Observation:
        return crowded_one(now_s) if now_s % 0.5 < 0.25 else quiet_one(now_s)

    def two(now_s: float, shares: Shares) -> Observation:
        return crowded_two(now_s, shares) if now_s % 0.5 < 0.25 else quiet_two(now_s, shares)

    assert len(play(controller, one, two, seconds=30.0)) <= 1 + 30 / controller.min_dwell_s


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
