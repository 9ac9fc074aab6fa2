"""Products with a weight against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jpd import ops


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
