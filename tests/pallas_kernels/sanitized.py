"""python -m tests.pallas_kernels.sanitized [counter|slot]: what compute-sanitizer runs.

The signalling GEMM on a GPU, three ragged products; with a word, one that has that fault:

- counter: signals beyond the counters;
- slot: both computing warpgroups stage their sums in the same shared memory.
"""

import contextlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.signal_gemm import SignalConfig, kernel, reference
from pallas_kernels.signal_gemm.shapes import call, whole_waves

SMALL = SignalConfig(tile_m=128, tile_n=128, stages=3, grid_tile_width=2)
CASES = {  # M, N, K, SMs, config, ranks; blocks have one to three tiles
    "ragged": (200, 256, 320, 3, SMALL, 1),
    "tall": (300, 200, 192, 2, SignalConfig(256, 192, 3), 1),
    "four-ranks": (404, 200, 128, 2, SMALL, 4),
}
FAR = 1 << 22
"""Counters beyond the last: past what is allocated for them and its neighbours."""


def faulty(fault: str | None):
    """A context in which the kernel has the fault."""
    if fault is None:
        return contextlib.nullcontext()
    if fault == "counter":
        group = kernel._Work.group
        far = lambda self, tile: (group(self, tile)[0] + FAR, *group(self, tile)[1:])  # noqa: E731
        return mock.patch.object(kernel._Work, "group", far)
    if fault == "slot":
        store = kernel._store

        def from_one_slot(*args):
            with mock.patch.object(kernel.lax, "axis_index", return_value=jnp.int32(0)):
                store(*args)

        return mock.patch.object(kernel, "_store", from_one_slot)
    raise ValueError(f"the fault is {fault!r}, not one of: counter, slot")


def main(fault: str | None = None) -> None:
    """Runs the cases; their errors are printed, and large ones raise where no fault is planted."""
    for name, (m, n, k, sms, config, ranks) in CASES.items():
        random = np.random.default_rng(m)
        x = jnp.asarray(random.standard_normal((m, k)), jnp.bfloat16)
        w = jnp.asarray(random.standard_normal((n, k)) / k**0.5, jnp.bfloat16)
        groups = whole_waves(m, n, config, sms, ranks)
        static = {"groups": groups, "config": config, "ranks": ranks}
        with faulty(fault):
            packed, counters = jax.jit(lambda x, w: call(x, w, **static, sms=sms))(x, w)  # noqa: B023
        right = reference.signal_gemm(x, w, **static)
        got = np.asarray(packed, np.float32)
        error = np.linalg.norm(got - right) / np.linalg.norm(right)
        print(f"{name}: error {error:.2e}, counters {counters.tolist()} of {list(groups)}")
        if fault is not None:
            return
        assert error <= 4e-3
        assert counters.tolist() == list(groups)


if __name__ == "__main__":
    main(*sys.argv[1:])
