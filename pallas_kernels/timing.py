"""Device time of a compiled program, free of the host's launches.

A kernel of some microseconds is shorter than the host needs to launch it. So a spin kernel holds
the stream while the host enqueues everything; what runs behind it runs back to back, between two
kernels that read the GPU's clock. The host's clock says only whether it was quick enough.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
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
_HOLD_US = 5_000
"""The shortest hold; others are doublings of it, as each length is a program of its own."""


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


def _clock_kernel(body: Callable[..., None], name: str) -> Callable[[], jax.Array]:
    """A kernel of one block that writes one time."""
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        grid=(1,),
        grid_names=("block",),
        compiler_params=mosaic.WARPGROUP,
        kernel_name=name,
    )


def spin(us: int) -> Callable[[], jax.Array]:
    """A kernel that keeps one SM busy for `us` microseconds; to be called in a program."""

    def body(out):
        start = nanoseconds()
        out[0] = lax.while_loop(
            lambda now: now - start < 1000 * us, lambda now: nanoseconds(), start
        )

    return _clock_kernel(body, "spin")


@functools.cache
def spinner(us: int) -> Callable[[], Any]:
    """A compiled program that keeps one SM busy for `us` microseconds."""
    program = jax.jit(spin(us)).lower().compile()
    jax.block_until_ready(program())
    return program


def stamp() -> Callable[[], jax.Array]:
    """A kernel that reads the GPU's clock when all before it is complete, as `[1]`."""

    def body(out):
        mosaic.wait_for_previous(None)
        out[0] = nanoseconds()

    return _clock_kernel(body, "stamp")


@functools.cache
def stamper() -> Callable[[], jax.Array]:
    """`stamp` as a compiled program."""
    return jax.jit(stamp()).lower().compile()


def device_us(
    program: Callable[..., Any],
    args: Sequence[Any],
    launches: int,
    *,
    samples: int = 5,
    warm_us: float = 40_000,
    sample_us: float = 20_000,
    hold: Callable[[int], Callable[[], Any]] | None = None,
    stamp: Callable[[], Any] | None = None,
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
      hold, stamp: what to use in place of `spinner` and of `stamper()`, for a program that runs on
        several GPUs: on all of them. The slowest GPU counts.

    Raises:
      RuntimeError: the host is too busy to enqueue the runs before the device comes to them.
    """
    host_us, run_us = _HOST_US * launches + 200.0, 0.0
    hold, stamp = hold or spinner, stamp or stamper()

    def sample(warm: int, runs: int) -> float:
        """Microseconds of one of `runs` runs that follow on others."""
        # The device must not come to a run that is not enqueued yet.
        ahead_us = 2_000 + (warm + runs) * max(0.0, host_us - run_us)
        doublings = max(0, math.ceil(math.log2(ahead_us / _HOLD_US)))
        for more in range(_TRIES):
            hold_us = _HOLD_US * 2 ** (doublings + more)
            held = hold(hold_us)
            start = time.perf_counter()
            held()
            for _ in range(warm):
                program(*args)
            begin = stamp()
            for _ in range(runs):
                program(*args)
            end = stamp()
            enqueued_us = (time.perf_counter() - start) * 1e6
            jax.block_until_ready(end)
            if enqueued_us < hold_us + 0.9 * run_us * (warm + runs - 1):
                ns = np.subtract(end, begin, dtype=np.int64) % 2**32
                return float(ns.max()) / 1e3 / runs
        raise RuntimeError(
            f"the host took longer to enqueue {warm + runs} runs than the device for a hold of "
            f"{hold_us} us and the runs, {_TRIES} times: it waited for the host"
        )

    def runs_in(us: float) -> int:
        longest = us if run_us > host_us else min(us, _LAUNCHES // launches * run_us)
        return max(1, int(longest / run_us))

    sample(1, 1)  # loads the kernels
    run_us = max(sample(1, 2), 1.0)
    warm, runs = runs_in(warm_us), max(2, runs_in(sample_us))
    return [sample(warm, runs) for _ in range(samples)]
