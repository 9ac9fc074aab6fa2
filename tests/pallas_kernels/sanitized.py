"""python -m tests.pallas_kernels.sanitized [far]: what compute-sanitizer runs, on a GPU.

Ragged products of the signalling GEMM; with `far` one of them, which signals beyond its counters.
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
    "ragged": (200, 256, 512, 3, SMALL, 1),
    "tall": (300, 200, 192, 2, SignalConfig(256, 192, 3), 1),
    "four-ranks": (404, 200, 128, 2, SMALL, 4),
}
FAR = 1 << 22
"""Counters beyond the last: past all that is allocated near them."""


def signals_far_away():
    """A context in which the kernel has the fault."""
    group = kernel._Work.group
    far = lambda self, tile: (group(self, tile)[0] + FAR, *group(self, tile)[1:])  # noqa: E731
    return mock.patch.object(kernel._Work, "group", far)


def main(fault: str | None = None) -> None:
    """Runs the cases, and asserts that what has no fault is right."""
    for name in CASES if fault is None else ["ragged"]:
        m, n, k, sms, config, ranks = CASES[name]
        random = np.random.default_rng(m)
        x = jnp.asarray(random.standard_normal((m, k)), jnp.bfloat16)
        w = jnp.asarray(random.standard_normal((n, k)) / k**0.5, jnp.bfloat16)
        groups = whole_waves(m, n, config, sms, ranks)
        static = {"groups": groups, "config": config, "ranks": ranks}
        with signals_far_away() if fault == "far" else contextlib.nullcontext():
            packed, counters = jax.jit(lambda x, w: call(x, w, **static, sms=sms))(x, w)  # noqa: B023
        right = reference.signal_gemm(x, w, **static)
        error = np.linalg.norm(np.asarray(packed, np.float32) - right) / np.linalg.norm(right)
        print(f"{name}: error {error:.2e}, counters {counters.tolist()} of {list(groups)}")
        if fault is None:
            assert error <= 4e-3
            assert counters.tolist() == list(groups)


if __name__ == "__main__":
    main(*sys.argv[1:])
