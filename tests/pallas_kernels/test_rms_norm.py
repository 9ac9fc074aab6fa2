"""The RMS norm kernel: numbers in interpret mode, lowering of every shipped width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import reference, rms_norm, rms_norm_residual
from pallas_kernels.rms_norm.config import default_config
from pallas_kernels.rms_norm.residual import tile_number
from pallas_kernels.signal_gemm import SignalConfig, candidates, pack, packed_shape
from pallas_kernels.signal_gemm.schedule import tile_order
from tests.pallas_kernels import modes

WIDTHS = (896, 1024, 2048, 3584, 4096, 5120, 8192, 16384)
"""Hidden sizes of the models, and the widest row."""


def sass_cases() -> list[tuple[str, Callable, tuple[jax.ShapeDtypeStruct, ...]]]:
    """What is compiled for the GPU: a name, the function and its argument shapes."""
    norms = [
        (
            f"rms_norm-{width}-{dtype}",
            partial(rms_norm, eps=1e-5),
            tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in ((3, width), (width,))),
        )
        for width in WIDTHS
        for dtype in ("bfloat16", "float16")
    ]
    sums = [
        (
            f"rms_norm_residual-{width}-{tiling}",
            partial(rms_norm_residual, eps=1e-5, tiling=tiling),
            tuple(
                jax.ShapeDtypeStruct(shape, "bfloat16")
                for shape in (packed_shape(1000, width, tiling), (1000, width), (width,))
            ),
        )
        for width in (4096, 8192, 16384)
        for tiling in candidates(1000, width, 4096, 116)[:3]
    ]
    rows = [
        (f"rms_norm_residual-{width}", partial(rms_norm_residual, eps=1e-5), shapes)
        for width in WIDTHS
        for shapes in [
            tuple(jax.ShapeDtypeStruct(s, "bfloat16") for s in ((3, width), (3, width), (width,)))
        ]
    ]
    return norms + sums + rows


SUMS = (
    # rows, width and tiles of a product, ragged in both; bands of the order that are narrower too
    (3, 896, None),
    (5, 256, SignalConfig(64, 128, 2, "n", "m", 2)),
    (70, 640, SignalConfig(128, 192, 2, "m", "n", 2)),
    (200, 384, SignalConfig(64, 256, 2, "n", "m", 2)),
)


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


@pytest.mark.parametrize(("rows", "width", "tiling"), SUMS)
def test_a_product_is_added_first(
    rows: int, width: int, tiling: SignalConfig | None, capfd: pytest.CaptureFixture
) -> None:
    residual, weight = inputs(rows, width, "bfloat16")
    y = jax.random.normal(jax.random.key(2), residual.shape, "bfloat16")
    product = y
    if tiling is not None:  # padding must not reach the result
        used = pack(jnp.ones_like(y), tiling)
        product = jnp.where(used == 1, pack(y, tiling), jnp.nan)
    got, total = modes.run(
        partial(rms_norm_residual, eps=1e-5, tiling=tiling), product, residual, weight
    )
    np.testing.assert_array_equal(total, residual + y)
    want = np.asarray(reference.rms_norm(residual + y, weight, eps=1e-5))
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert error <= 4e-3
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("minor", ["m", "n"])
@pytest.mark.parametrize("width", [1, 2, 3, 16])
def test_tiles_are_found_in_the_order_in_which_they_were_sent(minor: str, width: int) -> None:
    tiling = SignalConfig(64, 128, 2, "n", minor, width)
    for grid in ((1, 1), (3, 5), (5, 3), (7, 2)):
        order = tile_order(*grid, minor, width)
        numbers = [int(tile_number(int(i), int(j), grid, tiling)) for i, j in order]
        assert numbers == list(range(len(order)))


def test_tiles_that_do_not_fit() -> None:
    _, _, tiling = SUMS[1]
    residual, weight = inputs(70, 256, "bfloat16")
    call = partial(rms_norm_residual, eps=1e-5, tiling=tiling)
    with pytest.raises(ValueError, match=r"y is \(3, 64, 128\): no 70x256"):
        call(jnp.zeros((3, 64, 128), "bfloat16"), residual, weight)
    tiles = pack(residual, tiling)
    with pytest.raises(ValueError, match=r"\(70, 256\).*\(128,\)"):
        call(tiles, residual, weight[:128])
    with pytest.raises(ValueError, match=r"y \(4, 64, 128\) and residual \(70, 256\)"):
        rms_norm_residual(tiles, residual, weight, eps=1e-5)
    with pytest.raises(NotImplementedError, match="residual float32"):
        call(tiles, residual.astype("float32"), weight)


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


def test_no_rows_are_refused() -> None:
    none, weight = jnp.zeros((0, 128), jnp.bfloat16), jnp.zeros(128, jnp.bfloat16)
    for call in (partial(rms_norm, none), partial(rms_norm_residual, none, none)):
        with pytest.raises(NotImplementedError, match="M is 0: at least 1"):
            call(weight, eps=1e-5)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_an_eps_without_a_root_is_refused(eps: float) -> None:
    x, weight = inputs(1, 128, "bfloat16")
    for call in (partial(rms_norm, x), partial(rms_norm_residual, x, x)):
        with pytest.raises(
            ValueError, match=f"eps is {eps}, expected a finite number of at least 0"
        ):
            call(weight, eps=eps)
