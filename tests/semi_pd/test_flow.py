"""Requests as a fluid: what is known in closed form, and what a queue that grows does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jpd.semi_pd.flow import Load, follow

LOAD = Load(
    waiting_tokens=0.0,
    decoding=0.0,
    tokens_per_s=5000.0,
    seconds=100.0,
    prompt_tokens=500.0,
    queued_prompt_tokens=500.0,
    output_tokens=100.0,
)
"""Ten requests a second."""


def constant(seconds: float):
    """A decode step, or a prompt token, that takes as long whatever runs."""
    return lambda decoding, busy=0.0: seconds


def test_nothing_takes_no_time() -> None:
    flow = follow(replace(LOAD, tokens_per_s=0.0), constant(1e-4), constant(0.01))
    assert (flow.wait_s, flow.decode_s, flow.new, flow.tpot_s) == (0.0, 0.0, 0.0, 0.01)


def test_prompts_that_are_computed_as_they_come_only_decode() -> None:
    flow = follow(LOAD, constant(1e-4), constant(0.01))
    assert flow.wait_s == 0
    assert flow.new == 1
    assert flow.decode_s == pytest.approx(100 * 0.01, rel=0.02)
    assert flow.tpot_s == pytest.approx(0.01)


@pytest.mark.parametrize("output", [10.0, 300.0])
def test_decoding_requests_end_with_no_memory(output: float) -> None:
    """n requests, each of which ends after `output` more steps in the mean."""
    load = replace(LOAD, tokens_per_s=0.0, decoding=40.0, output_tokens=output)
    flow = follow(load, constant(1e-4), constant(0.02))
    assert flow.new == 0
    assert flow.decode_s == pytest.approx(output * 0.02, rel=0.05)


def test_a_queue_without_arrivals_drains_at_the_rate_of_prefill() -> None:
    load = replace(LOAD, waiting_tokens=50_000.0, tokens_per_s=0.0, seconds=0.01)
    flow = follow(load, constant(1e-3), constant(1e-4))
    assert flow.wait_s == pytest.approx(50 / 2, rel=0.02)  # the mean of 0 and 50 s


def test_a_queue_that_grows_is_waited_for_until_it_is_gone() -> None:
    """Twice as much comes as can be computed: the last one waits as long as arrivals lasted."""
    flow = follow(LOAD, constant(4e-4), constant(1e-4))
    assert flow.wait_s == pytest.approx(100 / 2, rel=0.02)


def test_a_queue_of_long_prompts_is_one_of_few_requests() -> None:
    """Short ones go first: the queue is as long in tokens, and half or a quarter as many wait."""
    for longer in (2, 4):
        growing = replace(LOAD, queued_prompt_tokens=longer * LOAD.prompt_tokens)
        flow = follow(growing, constant(4e-4), constant(1e-4))
        assert flow.wait_s == pytest.approx(100 / 2 / longer, rel=0.02)
        draining = replace(growing, waiting_tokens=50_000.0, tokens_per_s=0.0, seconds=0.01)
        flow = follow(replace(draining, decoding=50.0), constant(1e-3), constant(1e-4))
        assert flow.wait_s == pytest.approx(50 / 2, rel=0.02)  # of each that waits: it is there
        assert flow.new == pytest.approx(100 / longer / (100 / longer + 50))
        assert flow.decode_s == pytest.approx(100 * 1e-4, rel=0.02)  # none is lost or doubled


def test_arrivals_wait_and_decode_as_events_one_by_one_do() -> None:
    """Against a plain simulation in small steps, with steps that depend on both phases."""

    def step_s(decoding: float, busy: float) -> float:
        return (0.005 + 1e-4 * decoding) * (1 + 0.5 * busy)

    load = replace(LOAD, waiting_tokens=20_000.0, decoding=30.0, seconds=10.0)
    token_s, dt = 2.5e-4, 1e-3
    waiting, decoding, waited, decoded, now_s = 20_000.0, 30.0, 0.0, 0.0, 0.0
    while waiting >= 1 or decoding >= 0.01:
        come = load.tokens_per_s * dt * (now_s < load.seconds)
        computed = min(waiting + come, dt / token_s)
        ends = decoding * dt / (load.output_tokens * step_s(decoding, computed * token_s / dt))
        waited += waiting * dt / load.prompt_tokens
        decoded += decoding * dt
        waiting += come - computed
        decoding += computed / load.prompt_tokens - ends
        now_s += dt
    flow = follow(load, constant(token_s), step_s)
    new = (20_000 + 50_000) / 500
    assert flow.new == pytest.approx(new / (new + 30))
    assert flow.wait_s == pytest.approx(waited / new, rel=0.02)
    assert flow.decode_s == pytest.approx(decoded / (new + 30), rel=0.05)


def test_slower_decode_fills_its_own_batch() -> None:
    """Steps of half the speed, and longer with more rows: more than twice the time."""
    gaps = [
        follow(LOAD, constant(1e-4), lambda n, busy, s=s: s * (0.005 + 1e-4 * n)).tpot_s
        for s in (1.0, 2.0)
    ]
    assert gaps[1] > 2.2 * gaps[0]


@pytest.mark.parametrize("output", [1.0, 1e9])
@pytest.mark.parametrize("token_s", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("gap_s", [1e-9, 1e6])
def test_whatever_comes_ends_in_numbers(output: float, token_s: float, gap_s: float) -> None:
    load = replace(LOAD, waiting_tokens=1e7, decoding=1000.0, output_tokens=output)
    flow = follow(load, constant(token_s), constant(gap_s))
    assert np.isfinite(list(flow)).all()
    assert min(flow) >= 0
