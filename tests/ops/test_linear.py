"""Products with a weight against float64."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from jpd import ops
from jpd.config import KernelConfig
from jpd.ops import registry
from jpd.ops.pallas import kernels_without_gpu
from pallas_kernels import dataflow, gemv


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # One rounding of the result: half a unit in the last place, 2**-9 and 2**-12 of it at most.
    [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 1e-6)],
)
def test_rows_of_any_number_and_type(rows: int, dtype: str, bound: float) -> None:
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, 300)), dtype)
    weight = jnp.asarray(rng.standard_normal((70, 300)), dtype)
    got = ops.linear(x, weight)
    assert got.dtype == x.dtype
    assert got.shape == (rows, 70)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error <= bound


def arrays(*shapes: tuple[int, ...]) -> list[jnp.ndarray]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes]


@pytest.mark.parametrize("rows", [1, 3])
def test_bias_and_residual_are_added(rows: int) -> None:
    x, weight, bias, residual = arrays((rows, 20), (7, 20), (7,), (rows, 7))
    got = ops.linear(x, weight, bias=bias, residual=residual)
    want = np.asarray(x) @ np.asarray(weight).T + np.asarray(bias) + np.asarray(residual)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_gate_is_the_first_half() -> None:
    x, weight, bias = arrays((3, 20), (10, 20), (10,))
    y = np.asarray(x) @ np.asarray(weight).T + np.asarray(bias)
    gate, up = y[:, :5], y[:, 5:]
    want = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(ops.gated_linear(x, weight, bias=bias), want, rtol=1e-4, atol=1e-5)


def test_the_kernel_for_one_row_is_the_table_s(gemv_table, monkeypatch) -> None:
    taken = []

    def spy(*args, **options):
        taken.append(options["config"])
        return gemv.gemv(*args, **options)

    monkeypatch.setattr(dataflow, "gemv", spy)
    made = arrays((1, 256), (64, 256), (64,), (1, 64))
    x, weight, bias, residual = (array.astype("bfloat16") for array in made)
    with registry.using(KernelConfig(), "gpu"), kernels_without_gpu(plgpu.InterpretGPUParams()):
        got = ops.linear(x, weight, bias=bias, residual=residual)
        gated = ops.gated_linear(x, weight, bias=bias)
    assert taken == [gemv_table, gemv_table]
    kernels = KernelConfig(linear="xla", gated_linear="xla")
    with registry.using(kernels):
        want = ops.linear(x, weight, bias=bias, residual=residual)
        want_gated = ops.gated_linear(x, weight, bias=bias)
    for one, other in ((got, want), (gated, want_gated)):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.linalg.norm(one - other) <= 0.01 * np.linalg.norm(other)


NORM_EPS = 1e-5


def read_through_a_norm(kernels: KernelConfig) -> set[str]:
    """Products of a row that is not normalised yet; gives the ops that were traced."""
    made = arrays((1, 256), (64, 256), (256,), (64,))
    x, weight, norm, bias = (array.astype("bfloat16") for array in made)
    unnormed = ops.Unnormed(x, norm, NORM_EPS)
    before = registry.choices()
    with registry.using(kernels, "gpu"), kernels_without_gpu(plgpu.InterpretGPUParams()):
        got = ops.linear_of(unnormed, weight, bias=bias), ops.gated_linear_of(unnormed, weight)
    taken = {op for (op, name), n in registry.choices().items() if n > before.get((op, name), 0)}
    with registry.using(KernelConfig(linear="xla", gated_linear="xla", rms_norm="xla")):
        x = ops.rms_norm(x, norm, NORM_EPS)
        want = ops.linear(x, weight, bias=bias), ops.gated_linear(x, weight)
    for one, other in zip(got, want, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.linalg.norm(one - other) <= 0.01 * np.linalg.norm(other)
    return taken


def test_a_gemv_takes_the_norm_along(gemv_table) -> None:
    assert read_through_a_norm(KernelConfig()) == {"linear", "gated_linear"}
    # A norm that is to be XLA's is not the kernel's.
    kernels = KernelConfig(rms_norm="xla")
    assert read_through_a_norm(kernels) == {"linear", "gated_linear", "rms_norm"}


@pytest.mark.parametrize("op", ["rms_norm", "linear"])
def test_an_op_of_one_s_own_is_not_passed_over(op, gemv_table) -> None:
    """Neither is its norm left out, nor does its product get rows that are not normalised."""
    seen, before = [], dict(registry.ops()[op].implementations)

    def mine(*args, **options):
        seen.append(args)
        return before["xla"](*args, **options)

    ops.register(op, "mine", mine, first=True)
    try:
        assert "rms_norm" in read_through_a_norm(KernelConfig())
    finally:
        registry.ops()[op].implementations = before
    assert seen


def test_float32_is_normalised_first_as_no_kernel_takes_it(gemv_table) -> None:
    """Widths for which the table has a GEMV: it refuses the dtype, and XLA's op takes no norm."""
    x, weight, norm = arrays((1, 256), (64, 256), (256,))
    with registry.using(KernelConfig(), "gpu"), kernels_without_gpu(plgpu.InterpretGPUParams()):
        got = ops.linear_of(ops.Unnormed(x, norm, NORM_EPS), weight)
    want = ops.linear(ops.rms_norm(x, norm, NORM_EPS), weight)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
