"""Metrics of requests, against a naive reading of their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpd.bench import slo
from jpd.bench.slo import Goodput, RequestRecord, Slo

# Powers of two: exact, so that a time may equal its SLO.
times = st.integers(0, 64).map(lambda n: n / 8)


@st.composite
def records(draw):
    sent = draw(times)
    wanted = draw(st.integers(1, 9))
    came = draw(st.integers(0, wanted))
    first = sent + draw(times)
    end = first + draw(times) if came > 1 else first
    return RequestRecord(
        due_s=max(0.0, sent - draw(times)),
        sent_s=sent,
        first_token_s=first if came else None,
        finished_s=end + 1 / 8,
        prompt_tokens=draw(st.integers(1, 50)),
        wanted_tokens=wanted,
        output_tokens=came,
        error=draw(st.sampled_from([None, None, None, "it broke"])),
    )


def record(ttft_s=1.0, tpot_s=0.5, tokens=3, **changes):
    e2e_s = ttft_s + tpot_s * (tokens - 1)
    fields = {
        "due_s": 10.0,
        "sent_s": 10.0,
        "first_token_s": 10 + ttft_s,
        "finished_s": 10 + e2e_s,
        "prompt_tokens": 5,
        "wanted_tokens": tokens,
        "output_tokens": tokens,
    }
    return RequestRecord(**(fields | changes))


# ---- one request


def test_times_of_a_request():
    one = record(ttft_s=2.0, tpot_s=0.25, tokens=5, due_s=9.5)
    assert (one.ttft_s, one.tpot_s, one.e2e_s, one.lateness_s) == (2.0, 0.25, 3.0, 0.5)
    assert one.ok
    assert record(tokens=1).tpot_s is None
    assert record(tokens=1).ok
    nothing = record(first_token_s=None, output_tokens=0)
    assert (nothing.ttft_s, nothing.tpot_s, nothing.ok) == (None, None, False)


def test_failed_and_truncated_requests_are_not_ok():
    assert not record(error="TimeoutError").ok
    assert not record(wanted_tokens=4).ok


# ---- attainment


def naive_attainment(all_records, limit):
    both = ttft = tpot = 0
    for one in all_records:
        if one.error is not None or one.output_tokens < one.wanted_tokens:
            continue
        e2e = one.finished_s - one.sent_s
        first = one.first_token_s - one.sent_s
        per_token = 0.0
        if one.output_tokens > 1:
            per_token = (e2e - first) / (one.output_tokens - 1)
        ttft += first <= limit.ttft_s
        tpot += per_token <= limit.tpot_s
        both += first <= limit.ttft_s and per_token <= limit.tpot_s
    n = len(all_records)
    return both / n, ttft / n, tpot / n


@given(st.lists(records(), min_size=1, max_size=20), times, times)
def test_attainment_as_defined(all_records, ttft_s, tpot_s):
    limit = Slo(ttft_s, tpot_s)
    assert slo.attainment(all_records, limit) == pytest.approx(naive_attainment(all_records, limit))


def test_all_requests_sent_are_the_denominator():
    good = record()
    bad = [
        replace(good, error="it broke"),
        replace(good, wanted_tokens=4),
        replace(good, first_token_s=None, output_tokens=0, error="late"),
    ]
    limit = Slo(1.0, 0.5)  # just what the good one takes
    assert slo.attainment([good, *bad], limit) == (0.25, 0.25, 0.25)
    assert slo.attainment(bad, limit) == (0, 0, 0)
    with pytest.raises(ValueError, match="no request was sent"):
        slo.attainment([], limit)


def test_joint_attainment_needs_both_in_one_request():
    slow_start, slow_tokens = record(ttft_s=2.0), record(tpot_s=2.0)
    assert slo.attainment([slow_start, slow_tokens], Slo(1.0, 0.5)) == (0, 0.5, 0.5)


def test_a_single_token_has_no_tpot_to_miss():
    assert slo.attainment([record(tokens=1)], Slo(1.0, 0.0)) == (1, 1, 1)


# ---- goodput


@pytest.mark.parametrize(
    ("rates", "shares", "expected"),
    [
        ([1, 2, 4], [1.0, 1.0, 0.8], Goodput(3.0, "=")),
        ([1, 2, 4], [1.0, 0.9, 0.5], Goodput(2.0, "=")),  # exactly at the threshold passes
        ([1, 2, 4], [1.0, 0.95, 0.9], Goodput(4.0, ">=")),
        ([1, 2, 4], [0.89, 0.5, 0.1], Goodput(1.0, "<")),
        ([1, 2, 4], [0.89, 1.0, 0.1], Goodput(1.0, "<")),  # a later rise is noise
        ([1, 2, 3, 4], [1.0, 0.8, 1.0, 0.0], Goodput(1.5, "=")),  # the first crossing
        ([5], [1.0], Goodput(5.0, ">=")),
        ([5], [0.0], Goodput(5.0, "<")),
    ],
)
def test_goodput_at_the_crossing(rates, shares, expected):
    found = slo.goodput(rates, shares)
    assert found.rate == pytest.approx(expected.rate)
    assert found.relation == expected.relation


@given(st.data())
def test_goodput_lies_on_the_curve(data):
    n = data.draw(st.integers(1, 8))
    gaps = data.draw(st.lists(st.floats(0.1, 5), min_size=n, max_size=n))
    shares = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    threshold = data.draw(st.floats(0.05, 1))
    rates = np.cumsum(gaps)
    found = slo.goodput(rates, shares, threshold)
    if found.relation == "=":
        assert np.interp(found.rate, rates, shares) == pytest.approx(threshold)
        below = [share for rate, share in zip(rates, shares, strict=True) if rate < found.rate]
        assert all(share >= threshold for share in below)
    elif found.relation == ">=":
        assert found.rate == rates[-1]
        assert min(shares) >= threshold
    else:
        assert found == (rates[0], "<")
        assert shares[0] < threshold


@pytest.mark.parametrize(
    ("rates", "shares", "threshold", "message"),
    [
        ([], [], 0.9, "as many"),
        ([1, 2], [1.0], 0.9, "as many"),
        ([2, 1], [1.0, 1.0], 0.9, "rise"),
        ([1, 1], [1.0, 1.0], 0.9, "rise"),
        ([0, 1], [1.0, 1.0], 0.9, "positive"),
        ([1], [90.0], 0.9, "in \\[0, 1\\]"),
        ([1], [math.nan], 0.9, "in \\[0, 1\\]"),
        ([1], [1.0], 0, "threshold"),
    ],
)
def test_what_has_no_goodput(rates, shares, threshold, message):
    with pytest.raises(ValueError, match=message):
        slo.goodput(rates, shares, threshold)


# ---- objectives


def test_objectives_from_unloaded_latency():
    alone = [
        record(ttft_s=0.1, tpot_s=0.01),
        record(ttft_s=0.3, tpot_s=0.03),
        record(0.2, tokens=1),
    ]
    tight = slo.slo_from_unloaded(alone, slo.TIGHT)
    loose = slo.slo_from_unloaded(alone, slo.LOOSE)
    assert (tight.ttft_s, tight.tpot_s) == pytest.approx((1.5, 0.15))
    assert (loose.ttft_s, loose.tpot_s) == pytest.approx((2.0, 0.2))
    with pytest.raises(ValueError, match="1 of 4 did not"):
        slo.slo_from_unloaded([*alone, record(error="it broke")], slo.TIGHT)
    with pytest.raises(ValueError, match="0 have a TPOT"):
        slo.slo_from_unloaded([record(tokens=1)], slo.TIGHT)


# ---- summaries


@given(st.lists(records(), min_size=1, max_size=20))
def test_summary_as_defined(all_records):
    found = slo.summarize(all_records)
    good = [r for r in all_records if r.error is None and r.output_tokens == r.wanted_tokens]
    duration = max(r.finished_s for r in all_records)
    assert found["num_prompts"] == len(all_records)
    assert found["completed"] == len(good)
    assert found["completed"] + found["failed"] + found["truncated"] == len(all_records)
    assert found["failed"] == sum(r.error is not None for r in all_records)
    assert found["duration"] == duration
    assert found["request_throughput"] == pytest.approx(len(good) / duration)
    inputs, outputs = (sum(getattr(r, f"{k}_tokens") for r in good) for k in ("prompt", "output"))
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (inputs, outputs)
    assert found["total_token_throughput"] == pytest.approx((inputs + outputs) / duration)
    naive = {
        "ttft": [r.first_token_s - r.sent_s for r in good],
        "tpot": [
            (r.finished_s - r.first_token_s) / (r.output_tokens - 1)
            for r in good
            if r.output_tokens > 1
        ],
        "e2el": [r.finished_s - r.sent_s for r in good],
    }
    for name, values in naive.items():
        ordered = sorted(values)
        for p in (50, 90, 99):
            expected = _percentile(ordered, p) if values else None
            assert found[f"p{p}_{name}_ms"] == pytest.approx(expected)
        mean = sum(values) / len(values) * 1e3 if values else None
        assert found[f"mean_{name}_ms"] == pytest.approx(mean)
    late = [r.sent_s - r.due_s for r in all_records]
    assert found["max_lateness_ms"] == pytest.approx(1e3 * max(late))
    assert found["p99_lateness_ms"] == pytest.approx(_percentile(sorted(late), 99))


def _percentile(ordered, p):
    """In ms, by linear interpolation between the two neighbours."""
    place = p / 100 * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return 1e3 * (low + (place - math.floor(place)) * (high - low))


def test_a_summary_needs_requests():
    with pytest.raises(ValueError, match="no request was sent"):
        slo.summarize([])
