"""Times of programs that run on several GPUs at once, under sustained load.

What is timed is a chain: one compiled program that calls an operation several times in order, each
time on operands of its own, which together are more than 400 MB on every GPU. Runs of the program
are enqueued behind a kernel that holds all GPUs, so that they enter together and never wait for
the host. A sample follows on other runs without a pause (after a rest clocks are higher), as in
`pallas_kernels/timing.py`: the time of a run is the difference between enqueueing more of them and
fewer, divided by their number, from the host's call to the end of all GPUs. Every run ends with
the slowest GPU, and where it has a collective they all begin the next one together.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.device_time import ROTATED_BYTES
from pallas_kernels.timing import STREAM_OPTIONS, spin

AXIS = "tp"
SAMPLES = 5
WARM_US, SAMPLE_US = 40_000.0, 20_000.0
MOST_SETS = 24
_HOLDS_US = tuple(3_000 * 2**i for i in range(7))
"""Lengths of holds: each is a program of its own."""
_LAUNCHES = 800
"""Launches that the driver queues before it makes the host wait are about a thousand."""
_PROGRAMS = 24
"""XLA lets the host run ahead by 32 programs."""
_TRIES = 5
GPU_OPTIONS = {**STREAM_OPTIONS, "xla_gpu_enable_triton_gemm": False}
"""Compiler options of all programs: kernels launched one by one, and XLA's products are those of
cuBLAS, the fastest algorithm of which it searches."""


class Operation(NamedTuple):
    """What a chain calls: (x, w) -> result, any pytree of arrays."""

    call: Callable[[jax.Array, jax.Array], Any]
    whole: bool = False
    """It gets whole matrices, split along K over the GPUs, and XLA partitions the program; else
    one GPU's part, inside `shard_map`."""
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The context in which it is traced."""


def on_gpu() -> bool:
    """Whether there is a GPU to time anything on."""
    return jax.default_backend() == "gpu"


def mesh_of(ranks: int) -> Mesh:
    """The first `ranks` devices.

    Raises:
        ValueError: there are fewer.
    """
    devices = jax.devices()
    if len(devices) < ranks:
        raise ValueError(f"{ranks} devices are needed, there are {len(devices)}")
    return Mesh(devices[:ranks], (AXIS,))


def calls_of(set_bytes: int) -> int:
    """Calls of a chain: operand sets that are more than the L2s hold, two at least."""
    return min(MOST_SETS, max(2, -(-ROTATED_BYTES // set_bytes)))


def operands(mesh: Mesh, m: int, n: int, k: int, sets: int, dtype: Any = jnp.bfloat16) -> Any:
    """`sets` of x and w: matrices `[m, ranks * k]` and `[n, ranks * k]`, split along K."""
    split = NamedSharding(mesh, P(None, AXIS))

    @functools.partial(jax.jit, static_argnums=1, out_shardings=split)
    def random(key: jax.Array, rows: int) -> jax.Array:
        return jax.random.normal(key, (rows, mesh.size * k), dtype)

    keys = jax.random.split(jax.random.key(0), 2 * sets)
    # w as weights are, so that results are about 1.
    scaled = jax.jit(lambda w: w * jnp.asarray(k**-0.5, w.dtype), out_shardings=split)
    xs = [random(key, m) for key in keys[:sets]]
    return xs, [scaled(random(key, n)) for key in keys[sets:]]


def chain(operation: Operation, mesh: Mesh) -> Any:
    """A jitted function of lists of x and of w that calls the operation on each pair in turn."""

    def calls(xs: Sequence[jax.Array], ws: Sequence[jax.Array]) -> list[Any]:
        outs: list[Any] = []
        for x, w in zip(xs, ws, strict=True):
            if outs:  # not before the result of the call before is there
                x, outs[-1] = lax.optimization_barrier((x, outs[-1]))
            outs.append(operation.call(x, w))
        return outs

    if operation.whole:
        return jax.jit(calls)
    split = P(None, AXIS)
    mapped = jax.shard_map(calls, mesh=mesh, in_specs=split, out_specs=P(AXIS), check_vma=False)
    return jax.jit(mapped)


def lower(operation: Operation, mesh: Mesh, xs: Any, ws: Any) -> jax.stages.Lowered:
    """Traces and lowers the chain for these operands; not safe in several threads."""
    with operation.scope():
        return chain(operation, mesh).lower(xs, ws)


@functools.cache
def _hold(mesh: Mesh, us: int) -> Callable[[], Any]:
    """A compiled program that keeps one SM of every GPU busy for `us` microseconds."""
    mapped = jax.shard_map(spin(us), mesh=mesh, in_specs=(), out_specs=P(AXIS), check_vma=False)
    program = jax.jit(mapped).lower().compile(compiler_options=STREAM_OPTIONS)
    jax.block_until_ready(program())
    return program


def run_us(
    mesh: Mesh, run: Callable[[], Any], launches: int, *, samples: int = SAMPLES
) -> list[float]:
    """Samples of the time of one run in µs.

    Args:
        mesh: the GPUs.
        run: enqueues a program on all of them and returns its results.
        launches: kernels, waits and events that one run puts on a GPU, roughly.
        samples: number of samples.

    Raises:
        RuntimeError: the host is too busy to enqueue the runs before the GPUs come to them.
    """
    if not on_gpu():  # no time to find: one run shows that it works
        jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        return [(time.perf_counter() - start) * 1e6]
    one_us, host_us = 0.0, 100.0 + 40.0 * launches

    def total_s(runs: int, most: int) -> float:
        """Time of a hold that is long enough for `most` runs, and of `runs` after it."""
        ahead_us = 2_000 + most * max(0.0, host_us - one_us)
        hold_us = next((us for us in _HOLDS_US if us >= ahead_us), _HOLDS_US[-1])
        hold = _hold(mesh, hold_us)
        for _ in range(_TRIES):
            start = time.perf_counter()
            hold()
            for _ in range(runs):
                out = run()
            enqueued_us = (time.perf_counter() - start) * 1e6
            jax.block_until_ready(out)
            if enqueued_us < hold_us + 0.9 * one_us * (runs - 1):
                return time.perf_counter() - start
        raise RuntimeError(
            f"the host took {enqueued_us:.0f} us to enqueue {runs} runs, longer than the hold of "
            f"{hold_us} us and the runs, {_TRIES} times: the GPUs waited for it"
        )

    jax.block_until_ready(run())  # loads the kernels
    start = time.perf_counter()
    out = run()
    host_us = max(100.0, 2e6 * (time.perf_counter() - start))
    jax.block_until_ready(out)
    one_us = max((total_s(3, 3) - total_s(1, 3)) / 2 * 1e6, 1.0)
    most = max(4, min(_PROGRAMS, _LAUNCHES // max(1, launches)))
    counted = max(2, min(most // 2, round(SAMPLE_US / one_us)))
    warm = max(1, min(most - counted, round(WARM_US / one_us)))
    all_runs = warm + counted
    return [
        (total_s(all_runs, all_runs) - total_s(warm, all_runs)) / counted * 1e6
        for _ in range(samples)
    ]


def host_us(call: Callable[[], Any], *, samples: int = SAMPLES, warm: int = 10) -> list[float]:
    """Samples of a call that the host drives and waits for, in µs."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(4 * samples):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(times[i::samples]) for i in range(samples)]
