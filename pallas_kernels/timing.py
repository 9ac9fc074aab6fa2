"""Device time of a compiled program, free of the host's launches.

A kernel of some microseconds is shorter than the host needs to launch it. So a spin kernel holds
the stream while the host enqueues everything; what runs behind it runs back to back. The time of
one run is the difference between enqueueing many and enqueueing one.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir

from pallas_kernels import mosaic

STREAM_OPTIONS = {"xla_gpu_enable_command_buffer": ""}
"""Compiler options that launch kernels one by one: in a CUDA graph of XLA's, each kernel waits for
the end of the one before, and programmatic dependent launch is lost."""
_LAUNCHES = 200
"""Launches of one sample; the driver queues about a thousand before it makes the host wait."""
_HOST_US = 40
"""More than the host needs for a launch."""
_TRIES = 5
_HOLD_STEP_US = 5_000
"""Holds are multiples of this: each length is a program of its own."""


def nanoseconds() -> jax.Array:
    """The GPU's clock in a kernel, int32 nanoseconds that wrap around."""

    @plgpu.inline_mgpu(
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
    )
    def read(ctx):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        asm = "mov.u32 $0, %globaltimer_lo;"
        low = mgpu.utils.inline_ptx(asm, result_types=i32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(low, (), is_signed=True)

    return read()


def spin(us: int) -> Callable[[], jax.Array]:
    """A kernel that keeps one SM busy for `us` microseconds; to be called in a program."""

    def body(out):
        start = nanoseconds()
        out[0] = lax.while_loop(
            lambda now: now - start < 1000 * us, lambda now: nanoseconds(), start
        )

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        grid=(1,),
        grid_names=("block",),
        compiler_params=mosaic.WARPGROUP,
        kernel_name="spin",
    )


@functools.cache
def spinner(us: int) -> Callable[[], Any]:
    """A compiled program that keeps one SM busy for `us` microseconds."""
    program = jax.jit(spin(us)).lower().compile()
    jax.block_until_ready(program())
    return program


def device_us(
    program: Callable[..., Any],
    args: Sequence[Any],
    launches: int,
    *,
    samples: int = 5,
    warm_us: float = 40_000,
    sample_us: float = 20_000,
) -> list[float]:
    """Samples of one run's device time in microseconds.

    Every sample follows on other runs without a pause: what keeps the multipliers busy soon runs
    at lower clocks than after a rest, and takes up to a fifth longer.

    Args:
      program: compiled, with `STREAM_OPTIONS` if its kernels start early.
      args: its arguments.
      launches: kernels that one run launches, at least roughly.
      samples: number of samples.
      warm_us, sample_us: the runs ahead of a sample, and its own, take about this long, unless
        they are so short that they are too many to enqueue.

    Raises:
      RuntimeError: the host is too busy to enqueue the runs before the device comes to them.
    """
    host_us, run_us = _HOST_US * launches + 200.0, 0.0

    def total(runs: int, most: int) -> float:
        """Seconds of a hold that is long enough for `most` runs, and of `runs` after it."""
        # The device must not come to a run that is not enqueued yet.
        ahead_us = most * max(0.0, host_us - run_us)
        hold_us = 2_000 + _HOLD_STEP_US * math.ceil(ahead_us / _HOLD_STEP_US)
        hold = spinner(hold_us)
        for _ in range(_TRIES):
            start = time.perf_counter()
            hold()
            for _ in range(runs):
                out = program(*args)
            enqueued_us = (time.perf_counter() - start) * 1e6
            jax.block_until_ready(out)
            if enqueued_us < hold_us + 0.9 * run_us * (runs - 1):
                return time.perf_counter() - start
        raise RuntimeError(
            f"the host took longer to enqueue {runs} runs than the device for a hold of "
            f"{hold_us} us and the runs, {_TRIES} times: it waited for the host"
        )

    def runs_in(us: float) -> int:
        longest = us if run_us > host_us else min(us, _LAUNCHES // launches * run_us)
        return max(1, int(longest / run_us))

    total(1, 3)  # loads the kernels
    run_us = max((total(3, 3) - total(1, 3)) / 2 * 1e6, 1.0)
    warm, runs = runs_in(warm_us), max(2, runs_in(sample_us))
    most = warm + runs
    return [(total(most, most) - total(warm, most)) / runs * 1e6 for _ in range(samples)]


def median_us(*args: Any, **kwargs: Any) -> float:
    """Median of `device_us`."""
    return statistics.median(device_us(*args, **kwargs))
