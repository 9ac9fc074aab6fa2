"""Step times as they are now: the models' shapes, on the scale of what was seen last."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jpd.semi_pd.controller import FULL, Shares
from jpd.semi_pd.flow import Load
from jpd.semi_pd.share_models import H200, Work
from jpd.semi_pd.step_times import StepTimes

DIVIDED = Shares(70, 30)
LOAD = Load(
    waiting_tokens=0.0,
    decoding=10.0,
    tokens_per_s=5000.0,
    seconds=20.0,
    prompt_tokens=500.0,
    queued_prompt_tokens=500.0,
    output_tokens=100.0,
)


def times(most_tokens: int = 2048, most_mixed_tokens: int = 2048) -> StepTimes:
    return StepTimes(H200, 60.0, 0.3, most_tokens, most_mixed_tokens)


def test_what_was_seen_last_sets_the_scale() -> None:
    """Also where the models, which average over what they remember, say otherwise."""
    now = times()
    assert not now.are_known
    for at_s, seconds in ((0.0, 2e-5), (1.0, 3e-5)):
        now.see_token(at_s, Work(shares=FULL if at_s else DIVIDED, other_busy=1.0), seconds)
    assert now.token_s(FULL, 1.0) == pytest.approx(3e-5)
    assert now.token_s(DIVIDED, 1.0) > 1.01 * now.token_s(FULL, 1.0)
    assert not now.are_known
    for at_s, seconds in ((0.0, 0.01), (1.0, 0.02)):
        work = Work(shares=FULL if at_s else DIVIDED, other_busy=0.0, sequences=8 + 56 * at_s)
        now.see_step(at_s, work, seconds)
    assert now.are_known
    assert now.step_s(FULL, 64, 0.0) == now.alone_s(64) == pytest.approx(0.02)
    assert now.alone_s(8) < now.alone_s(64)


@pytest.mark.parametrize(("most_tokens", "mixed_tokens"), [(256, 256), (2048, 2048), (2048, 512)])
def test_one_executor_and_two_teach_each_other(most_tokens: int, mixed_tokens: int) -> None:
    now = times(most_tokens, mixed_tokens)
    now.see_step(0.0, Work(shares=FULL, other_busy=0.0, sequences=20), 0.006)
    now.see_mixed_token(0.0, 2e-5)
    mixed = now.mixed(LOAD)
    assert mixed.token_s == pytest.approx(2e-5)  # what one executor said comes back
    assert mixed.decode_s(20) == pytest.approx(0.006)
    assert mixed.most_tokens == mixed_tokens - LOAD.decoding
    crowded = replace(LOAD, decoding=3000.0)
    assert now.mixed(crowded).most_tokens == 1
    # A prefill executor reads the weights for itself, once for a full step.
    alone_s = now.token_s(FULL, 0.0)
    assert alone_s == pytest.approx(2e-5 + now.alone_s(0) / most_tokens)
    assert now.token_s(DIVIDED, 1.0) > alone_s


def test_a_token_that_takes_no_longer_than_the_weights_costs_nothing_beside_rows() -> None:
    now = times()
    now.see_step(0.0, Work(shares=FULL, other_busy=0.0, sequences=1), 0.1)
    now.see_token(0.0, Work(shares=FULL, other_busy=0.0), 1e-6)
    assert now.mixed(LOAD).token_s == 0.0
