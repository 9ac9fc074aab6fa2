"""Several engines behind a router."""

from __future__ import annotations

import pytest

from jpd.bench import slo, workload
from jpd.bench.traces import fixed
from jpd.simulate.run import simulate
from tests.simulate.simulated import latencies, make_engine, requests, times_ms


def engines(folder, count: int):
    return [make_engine(folder, latencies()) for _ in range(count)]


def test_each_has_a_clock_of_its_own(folder):
    one = simulate(requests((0, 5, 3), (0.002, 5, 3)), engines(folder, 1))
    two = simulate(requests((0, 5, 3), (0.002, 5, 3)), engines(folder, 2))
    assert times_ms(one[1]) != pytest.approx(times_ms(two[1]))
    assert times_ms(two[0]) == pytest.approx((10, 20))
    assert times_ms(two[1]) == pytest.approx((12, 22))


def test_round_robin_and_least_tokens(folder):
    rows = [(0, 5, 200), (0.001, 5, 2), (0.050, 5, 20), (0.051, 5, 2), (0.052, 5, 20)]
    counts = {}
    for router in ("round_robin", "least_tokens"):
        group = engines(folder, 2)
        records = simulate(requests(*rows), group, router=router)
        assert all(r.ok for r in records)
        counts[router] = [e.coordinator.stats().requests_finished for e in group]
    assert counts["round_robin"] == [3, 2]
    # The first has 190 tokens left to the end.
    assert counts["least_tokens"] == [1, 4]


def test_more_engines_keep_the_slo_of_more_requests(folder):
    load = fixed(workload.poisson(150, 600, seed=0), 30, 20)
    limits = slo.Slo(0.05, 0.02)
    found = [
        slo.attainment(simulate(load, engines(folder, count), router="least_tokens"), limits).joint
        for count in (1, 2, 3, 4)
    ]
    assert found == sorted(found)
    assert found[0] < 0.2
    assert found[-1] > 0.95
