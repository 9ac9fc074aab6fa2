"""Times of programs that run on several GPUs at once, under sustained load.

What is timed is a chain: one compiled program that calls an operation several times in order, each
time on operands of its own, which together are more than 400 MB on every GPU. Runs of the program
are enqueued behind a kernel that holds all GPUs, so that they enter together and never wait for
the host, and are timed by the clock of each GPU (`pallas_kernels/timing.py`): the slowest counts.
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
from pallas_kernels.timing import STREAM_OPTIONS, device_us, spin, stamp

AXIS = "tp"
SAMPLES = 5
MOST_SETS = 24
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
    program = _on_all(mesh, spin(us))
    jax.block_until_ready(program())
    return program


@functools.cache
def _stamp(mesh: Mesh) -> Callable[[], Any]:
    """A compiled program that reads the clock of every GPU."""
    return _on_all(mesh, stamp())


def _on_all(mesh: Mesh, kernel: Callable[[], jax.Array]) -> Callable[[], Any]:
    mapped = jax.shard_map(kernel, mesh=mesh, in_specs=(), out_specs=P(AXIS), check_vma=False)
    return jax.jit(mapped).lower().compile(compiler_options=STREAM_OPTIONS)


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
    hold = functools.partial(_hold, mesh)
    return device_us(run, (), launches, samples=samples, hold=hold, stamp=_stamp(mesh))


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
