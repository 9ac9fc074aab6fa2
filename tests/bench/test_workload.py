"""Workloads as data: parts of them, other rates, and arrival processes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpd.bench.workload import Workload, gamma, poisson, rescale, retime, select

ROWS = Workload(
    "rows",
    arrivals_s=[0, 1, 2, 4, 4, 7],
    prompt_tokens=[10, 20, 30, 40, 50, 60],
    output_tokens=[1, 2, 3, 4, 5, 6],
    source="here",
)


# ---- arrivals


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_variation_that_burstiness_says(burstiness):
    times = gamma(5.0, burstiness, 40_000, seed=0)
    gaps = np.diff(times, prepend=0)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)
    assert gaps.mean() == pytest.approx(1 / 5)


def test_poisson_gaps_are_exponential():
    gaps = np.diff(poisson(2.0, 40_000, seed=1), prepend=0)
    for q in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(gaps, q) == pytest.approx(-math.log(1 - q) / 2, rel=0.05)
    counts = np.bincount(np.cumsum(gaps).astype(int))  # a second each
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.05)


def test_infinite_burstiness_gives_equal_gaps():
    assert gamma(4.0, math.inf, 5, seed=0) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25])


@given(
    rate=st.floats(1e-3, 1e3),
    burstiness=st.floats(0.05, 20),
    n=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_n_requests_span_exactly_n_over_rate(rate, burstiness, n, seed):
    times = gamma(rate, burstiness, n, seed)
    assert times.shape == (n,)
    assert np.all(np.diff(times, prepend=0) >= 0)
    assert times[-1] == pytest.approx(n / rate)
    assert np.array_equal(times, gamma(rate, burstiness, n, seed))


def test_another_seed_gives_other_times():
    assert not np.array_equal(poisson(1.0, 10, seed=0), poisson(1.0, 10, seed=1))


@pytest.mark.parametrize(
    ("rate", "burstiness", "n"),
    [(0, 1, 1), (-1, 1, 1), (math.inf, 1, 1), (math.nan, 1, 1), (1, 0, 1), (1, 1, 0)],
)
def test_arrival_arguments_out_of_range(rate, burstiness, n):
    with pytest.raises(ValueError, match=r"must be positive.* got"):
        gamma(rate, burstiness, n, seed=0)


# ---- parts and rates


def test_a_window_counts_from_its_start_and_ends_before_its_end():
    part = select(ROWS, start_s=1.0, duration_s=3.0)
    assert part.arrivals_s.tolist() == [0, 1]
    assert part.prompt_tokens.tolist() == [20, 30]
    assert part.left_out == 0
    part = select(ROWS, start_s=0.5)
    assert part.arrivals_s.tolist() == [0.5, 1.5, 3.5, 3.5, 6.5]
    assert part.source == "here; from 0.5 s on"


@given(
    total=st.lists(st.integers(2, 12), min_size=1, max_size=30),
    limit=st.integers(2, 12),
    n=st.integers(1, 30),
)
def test_what_does_not_fit_is_passed_over_whole_and_counted(total, limit, n):
    count = len(total)
    workload = Workload("w", range(count), [t - 1 for t in total], [1] * count, "here", left_out=3)
    fitting = [i for i, t in enumerate(total) if t <= limit]
    if n > len(fitting):
        with pytest.raises(ValueError, match=rf"1\.\.{len(fitting)}, .* got {n}"):
            select(workload, n=n, max_total_tokens=limit)
        return
    part = select(workload, n=n, max_total_tokens=limit)
    assert part.arrivals_s.tolist() == fitting[:n]
    assert part.prompt_tokens.tolist() == [total[i] - 1 for i in fitting[:n]]
    assert part.left_out == 3 + fitting[n - 1] + 1 - n
    everything = select(workload, max_total_tokens=limit)
    assert len(everything) == len(fitting)
    assert everything.left_out == 3 + count - len(fitting)


def test_nothing_left_is_an_error():
    for options in ({"start_s": 8.0}, {"max_total_tokens": 0}, {"n": 0}):
        with pytest.raises(ValueError, match="n must be in"):
            select(ROWS, **options)


@given(rate=st.floats(0.01, 100))
def test_rescaling_changes_times_only(rate):
    other = rescale(ROWS, rate)
    assert other.rate == pytest.approx(rate)
    assert other.arrivals_s == pytest.approx(ROWS.arrivals_s * (5 / 7) / rate)
    assert other.prompt_tokens.tolist() == ROWS.prompt_tokens.tolist()
    assert other.output_tokens.tolist() == ROWS.output_tokens.tolist()


def test_what_cannot_be_rescaled():
    one = select(ROWS, n=1)
    assert math.isnan(one.rate)
    with pytest.raises(ValueError, match="one moment"):
        rescale(one, 2.0)
    with pytest.raises(ValueError, match="rate must be positive and finite, got 0"):
        rescale(ROWS, 0)


def test_other_times_for_the_same_requests():
    other = retime(ROWS, poisson(3.0, 6, seed=0))
    assert other.arrivals_s[-1] == pytest.approx(2.0)
    assert other.prompt_tokens.tolist() == ROWS.prompt_tokens.tolist()
    with pytest.raises(ValueError, match=r"\(5, 6, 6\)"):
        retime(ROWS, poisson(3.0, 5, seed=0))


@pytest.mark.parametrize(
    ("arrivals", "prompts", "outputs", "message"),
    [
        ([], [], [], "not empty"),
        ([0], [1, 2], [1, 2], "equally long"),
        ([0, 1], [1, 2], [1], "equally long"),
        ([1, 0], [1, 2], [1, 2], "fall"),
        ([-1, 0], [1, 2], [1, 2], "negative"),
        ([math.nan, 0], [1, 2], [1, 2], "negative"),
        ([0, 1], [1, 0], [1, 2], "at least 1"),
        ([0, 1], [1, 1], [0, 2], "at least 1"),
    ],
)
def test_what_is_no_workload(arrivals, prompts, outputs, message):
    with pytest.raises(ValueError, match=message):
        Workload("w", arrivals, prompts, outputs, "here")


def test_a_workload_describes_itself_and_does_not_change():
    assert ROWS.describe() == {
        "workload": "rows",
        "source": "here",
        "num_prompts": 6,
        "left_out": 0,
        "rate": 5 / 7,
        "mean_prompt_tokens": 35.0,
        "mean_output_tokens": 3.5,
    }
    with pytest.raises(ValueError, match="read-only"):
        ROWS.arrivals_s[0] = 1
