"""The RMS norm kernel: numbers in interpret mode, lowering of every shipped width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import reference, rms_norm
from pallas_kernels.rms_norm.config import default_config
from tests.pallas_kernels import modes

WIDTHS = (896, 1024, 2048, 3584, 4096, 5120, 8192, 16384)
"""Hidden sizes of the models, and the widest row."""


def sass_cases() -> list[tuple[str, Callable, tuple[jax.ShapeDtypeStruct, ...]]]:
    """What is compiled for the GPU: a name, the function and its argument shapes."""
    return [
        (
            f"rms_norm-{width}-{dtype}",
            partial(rms_norm, eps=1e-5),
            tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in ((3, width), (width,))),
        )
        for width in WIDTHS
        for dtype in ("bfloat16", "float16")
    ]


def inputs(rows: int, width: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    x, weight = jax.random.key(0), jax.random.key(1)
    return 3 * jax.random.normal(x, (rows, width), dtype), jax.random.normal(weight, width, dtype)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "eps"),
    [
        (1, 128, "bfloat16", 1e-5),
        (3, 896, "bfloat16", 1e-6),
        (2, 1024, "float16", 1.0),
        (5, 640, "bfloat16", 10.0),
    ],
)
def test_numbers(
    rows: int, width: int, dtype: str, eps: float, capfd: pytest.CaptureFixture
) -> None:
    x, weight = inputs(rows, width, dtype)
    got = modes.run(partial(rms_norm, eps=eps), x, weight)
    assert got.dtype == x.dtype
    want = np.asarray(reference.rms_norm(x, weight, eps=eps))
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert error <= 4e-3
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_a_row_of_zeros_gives_zeros() -> None:
    x, weight = inputs(2, 256, "bfloat16")
    got = modes.run(partial(rms_norm, eps=1e-6), x.at[1].set(0), weight)
    got = np.asarray(got, np.float32)
    assert np.abs(got[0]).max() > 0
    assert (got[1] == 0).all()


@pytest.mark.parametrize(
    ("fn", "shapes"), [pytest.param(fn, shapes, id=name) for name, fn, shapes in sass_cases()]
)
def test_lowers_for_the_gpu(fn: Callable, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> None:
    text = modes.lower(fn, *shapes)
    assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("width", "vector"), [(128, 1), (384, 1), (896, 1), (3584, 4), (5120, 8), (8192, 8)]
)
def test_loads_are_as_wide_as_a_row_allows(width: int, vector: int) -> None:
    assert default_config(width).vector == vector


@pytest.mark.parametrize(("width", "dtype"), [(100, "bfloat16"), (16512, "float16")])
def test_widths_that_are_refused(width: int, dtype: str) -> None:
    x, weight = inputs(1, width, dtype)
    with pytest.raises(NotImplementedError, match=str(width)):
        rms_norm(x, weight, eps=1e-5)


def test_float32_is_refused() -> None:
    x, weight = inputs(1, 128, "float32")
    with pytest.raises(NotImplementedError, match="float32"):
        rms_norm(x, weight, eps=1e-5)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(3, 128\).*\(256,\)"):
        rms_norm(jnp.zeros((3, 128), jnp.bfloat16), jnp.zeros(256, jnp.bfloat16), eps=1e-5)
