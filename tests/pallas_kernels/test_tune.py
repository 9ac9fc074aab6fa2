"""Tuning that ends in time: what is tried, in which order, and what is left out. No GPU needed."""

import argparse
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import products, tune
from pallas_kernels.flat_gemm import candidates, default

SHAPE = (4096, 4096, False)
OURS = [("flat_gemm", config) for config in candidates(8, 4096, False)]


def stored_products(*winners):
    """Of a stored table: (shape, candidate) with 8 rows."""
    return [
        {
            "n": n,
            "k": k,
            "gated": gated,
            "rows": {"8": {"kernel": kernel, "config": vars_of(config), "us": 1.0}},
        }
        for (n, k, gated), (kernel, config) in winners
    ]


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_winners_of_the_product_itself_come_first_then_the_most_frequent():
    one, two, three = OURS[-3:]
    stored = stored_products(
        ((1, 1, False), two), ((2, 2, False), three), ((3, 3, False), three), (SHAPE, one)
    )
    assert tune.winners(stored, SHAPE, 8) == [one, three, two]
    assert tune.winners(stored, SHAPE, 16) == []


def test_an_entry_of_other_settings_is_passed_over():
    stored = stored_products((SHAPE, OURS[0]))
    stored[0]["rows"]["8"]["config"]["no_such_setting"] = 1
    assert tune.winners(stored, SHAPE, 8) == []
    stored[0]["rows"]["8"] = {"kernel": "unknown", "config": {}}
    assert tune.winners(stored, SHAPE, 8) == []


def test_likely_candidates_come_first_and_xla_stays():
    xla = ("xla", None)
    unknown = ("flat_gemm", "of another shape")
    order = tune.ranked([*OURS, xla], [OURS[2], unknown, OURS[1], OURS[2]], None)
    assert order[:3] == [OURS[2], OURS[1], OURS[0]]
    assert sorted(map(str, order)) == sorted(map(str, [*OURS, xla]))
    assert tune.ranked([*OURS, xla], [OURS[2]], 2) == [OURS[2], OURS[0], xla]


@pytest.mark.parametrize("rows", [8, 1024, 4096])
def test_xla_is_timed_for_any_number_of_rows(rows):
    product = SimpleNamespace(n=2560, k=8192, gated=False)
    kernels = [kernel for kernel, _ in tune.Product.candidates(product, rows)]
    assert kernels[-1] == "xla"
    assert {*kernels[:-1]} == {"flat_gemm" if rows == 8 else "dense_gemm"}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_few_rows_are_tried_with_a_gemv_too(rows):
    product = SimpleNamespace(n=2560, k=8192, gated=False)
    kernels = [kernel for kernel, _ in tune.Product.candidates(product, rows)]
    assert {*kernels} == {"gemv", "flat_gemm", "xla"}
    case = next(tune.Product.candidates(product, rows))
    entry = {"kernel": case[0], "config": vars_of(case[1])}
    assert tune.entry_candidate(entry) == case


@pytest.mark.parametrize(("rows", "gated"), [(1, False), (1, True), (2, False)])
def test_what_is_timed_of_xla_is_the_product(rows, gated):
    x = jax.random.normal(jax.random.key(0), (rows, 64), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (32, 64), jnp.bfloat16) / 8
    expected = products.reference(x, w, gated=gated)
    y = tune._xla(x, w, gated).astype(jnp.float32)
    assert y.shape == expected.shape
    assert jnp.linalg.norm(y - expected) <= 0.01 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("gated", [False, True])
def test_the_reference_is_the_product_in_float32(gated):
    product = tune.Product(64, 128, gated, nullcontext())
    x, w = product.x(3), product.weights[-1]
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    if gated:
        gate, up = np.split(expected, 2, axis=1)
        expected = gate / (1 + np.exp(-gate)) * up
    found = product.reference(3)(x, w)
    assert found.dtype == jnp.float32
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


class FakeProduct:
    """Candidates take the times that they are given, and the clock runs on with each."""

    n, k, gated = SHAPE

    def __init__(self, clock, us=None, disturbed=()):
        self.clock, self.tried, self.disturbed = clock, [], {*disturbed}
        self.us = (
            {case: 10.0 + i for i, case in enumerate(OURS)} | {("xla", None): 20.0} | (us or {})
        )
        self.weights = [jnp.zeros((1, 1))]

    def candidates(self, rows):
        return [*OURS, ("xla", None)]

    def lower(self, rows, kernel, config):
        return SimpleNamespace(compile=lambda options: (kernel, config)), {}

    def x(self, rows):
        return jnp.zeros((1, 1))

    def reference(self, rows):
        return lambda x, w: x

    def time(self, rows, program, expected):
        self.tried.append((rows, program))
        self.clock.now += 1
        if program in self.disturbed:
            self.disturbed.remove(program)
            return 1.4 * self.us[program]
        return self.us[program]


@pytest.fixture
def clock(monkeypatch):
    ticking = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tune.time, "monotonic", lambda: ticking.now)
    return ticking


def test_no_number_of_rows_is_begun_that_may_not_end_in_time(clock, capsys):
    product = FakeProduct(clock)
    limits = {"known": stored_products((SHAPE, OURS[3])), "most": 3, "end": 15.0}
    done = tune.tune(product, [8, 16, 32, 64], nullcontext(), **limits)
    # 7 s each, 4 of them for the first times: the third would end at 21 s.
    assert [*done["rows"]] == ["8", "16"]
    assert "M=32: out of time" in capsys.readouterr().out
    tried = [program for rows, program in product.tried if rows == 8][:4]
    assert tried[:2] == [("flat_gemm", default(8, 4096, False)), OURS[3]]
    assert tried[-1] == ("xla", None)
    entry = done["rows"]["8"]
    assert entry["us"] == min(product.us[case] for case in tried[:-1])
    assert entry["xla_us"] == 20.0
    assert entry["rule_us"] is not None


def winner(product):
    done = tune.tune(product, [8], nullcontext(), known=[])
    entry = done["rows"]["8"]
    return tune.entry_candidate(entry), entry["us"]


def test_a_time_that_another_process_disturbed_does_not_decide(clock):
    assert winner(FakeProduct(clock, {OURS[2]: 8.0}, [OURS[2]])) == (OURS[2], 8.0)


def test_the_rule_wins_a_tie(clock):
    rule = ("flat_gemm", default(8, 4096, False))
    other = next(case for case in OURS if case != rule)
    assert winner(FakeProduct(clock, {rule: 9.0, other: 8.95})) == (rule, 9.0)
    assert winner(FakeProduct(clock, {rule: 9.0, other: 8.5})) == (other, 8.5)


def test_shapes_are_those_of_the_models():
    assert tune.parse_shape("12288x4096") == (12288, 4096, False)
    assert tune.parse_shape("22016x4096:gated") == (22016, 4096, True)
    for text in ("7x7", "12288x4096:gated"):
        with pytest.raises(argparse.ArgumentTypeError, match="is none of"):
            tune.parse_shape(text)


def test_the_winners_of_the_nearest_sm_count_are_tried_first():
    tables = {"132": [{"n": 1}], "38": [{"n": 2}], "52": [{"n": 3}]}
    assert tune._nearest(tables, 38) == [{"n": 2}]
    assert tune._nearest(tables, 66) == [{"n": 3}]
    assert tune._nearest({}, 66) == []
