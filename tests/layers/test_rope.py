"""Rotary positions against complex numbers."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jpd.layers.rope import RopeConfig, angles, inverse_frequencies
from jpd.ops import rotate

SIZE = 32
LLAMA3 = RopeConfig(
    theta=500_000.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=1_024,
)


def plain(theta: float) -> np.ndarray:
    return theta ** -(np.arange(0, SIZE, 2) / SIZE)


def test_default_and_linear_frequencies() -> None:
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(), SIZE), plain(1e4), rtol=1e-6)
    linear = RopeConfig(theta=2e4, kind="linear", factor=4.0)
    np.testing.assert_allclose(inverse_frequencies(linear, SIZE), plain(2e4) / 4, rtol=1e-6)


def test_llama3_keeps_short_waves_slows_long_ones_and_blends_between() -> None:
    got, base = inverse_frequencies(LLAMA3, SIZE), plain(5e5)
    turns = 1_024 * base / (2 * math.pi)
    short, long = turns > 4, turns < 1
    between = ~short & ~long
    assert short.any()
    assert long.any()
    assert between.any()
    np.testing.assert_allclose(got[short], base[short], rtol=1e-6)
    np.testing.assert_allclose(got[long], base[long] / 8, rtol=1e-6)
    share = (turns[between] - 1) / 3
    np.testing.assert_allclose(got[between], base[between] * (share + (1 - share) / 8), rtol=1e-5)


@pytest.mark.parametrize("config", [RopeConfig(), LLAMA3], ids=["default", "llama3"])
def test_rotation_is_that_of_complex_numbers(config: RopeConfig) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 3, SIZE)).astype(np.float32)
    positions = np.array([0, 1, 2, 5, 100, 1_000, 4_000])
    cos, sin = angles(config, SIZE, jnp.asarray(positions))
    assert cos.shape == sin.shape == (7, SIZE // 2)
    got = np.asarray(rotate(jnp.asarray(x), cos, sin))
    frequencies = inverse_frequencies(config, SIZE).astype(np.float64)
    pairs = x[..., : SIZE // 2] + 1j * x[..., SIZE // 2 :]
    want = pairs * np.exp(1j * positions[:, None, None] * frequencies)
    # The phase is a float32: at position 4000 its last bit is 2.4e-4 of a radian.
    np.testing.assert_allclose(got, np.concatenate([want.real, want.imag], -1), atol=1e-3)
    np.testing.assert_array_equal(got[0], x[0])


def test_products_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, SIZE)).astype(np.float32)
    products = []
    for first in (0, 3, 50):
        cos, sin = angles(RopeConfig(), SIZE, jnp.array([first, first + 9]))
        products.append(
            np.vdot(
                rotate(jnp.asarray(q), cos[:1], sin[:1]), rotate(jnp.asarray(k), cos[1:], sin[1:])
            )
        )
    np.testing.assert_allclose(products, products[0], rtol=1e-4, atol=1e-5)


def test_the_type_of_the_input_is_kept() -> None:
    cos, sin = angles(RopeConfig(), SIZE, jnp.arange(3))
    assert rotate(jnp.ones((3, 2, SIZE), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
