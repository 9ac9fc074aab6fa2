"""Device times of JAX operations, over operands that rotate through more than the L2 holds.

An operation of some microseconds cannot be timed alone: the host needs longer to launch it, and a
second run would find its operands in the cache. So one compiled program (:class:`Chain`) calls it
`n` times, each time on operands of its own, :data:`ROTATED_BYTES` or more in all, and runs of the
program are enqueued behind a kernel that holds the stream, so that the device never waits for the
host (:mod:`pallas_kernels.timing`).

Each program is compiled twice: kernels launched one by one (``stream``), and as one CUDA graph
(``graph``). The faster one counts and is named in the row; :func:`profiled_us` reads the time of
one kernel from the profiler.
"""

from __future__ import annotations

import functools
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from benchmarks.lowered import Gpu, Lowering
from pallas_kernels.timing import STREAM_OPTIONS, device_us

ROTATED_BYTES = 400_000_000
"""Bytes of operands that a program reads at least: several times the L2 of any GPU."""
SAMPLES = 5

# Independent kernels of a CUDA graph must not run side by side: their time would be shared.
VARIANTS: dict[str, dict[str, Any]] = {
    "stream": STREAM_OPTIONS,
    "graph": {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"},
}


def rotations(nbytes: int, *, least: int = 8, most: int = 64) -> int:
    """Operand sets that together exceed :data:`ROTATED_BYTES`, `nbytes` each."""
    return min(most, max(least, -(-ROTATED_BYTES // nbytes)))


def _after(carried: Any, out: Any) -> tuple[Any, Any]:
    """The same values, the floating ones of `carried` not to be had before `out` is there."""
    leaves, tree = jax.tree.flatten(carried)
    late = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    values, out = jax.lax.optimization_barrier(([leaves[i] for i in late], out))
    for i, value in zip(late, values, strict=True):
        leaves[i] = value
    return jax.tree.unflatten(tree, leaves), out


class Chain:
    """A program that calls `op(carried, operands)` `calls` times, in order.

    `carried` are the small operands that all calls share, `operands` those that every call has of
    its own. Every call waits for the one before, and all outputs are results of the program, so
    that no call is merged, reordered or dropped. What a call computes from integers of `carried`
    alone (a schedule from lengths, say) is computed once, as for all layers of a model's step.

    Args:
        op: jitted (or made of jitted functions), so that it is lowered once however often called.
        carried: pytree of arrays or of what describes them (`jax.ShapeDtypeStruct`).
        operands: the same for one call.
        calls: number of calls, see :func:`rotations`.
        scope: makes the context in which the program is traced.
    """

    def __init__(
        self,
        op: Callable[[Any, Any], Any],
        carried: Any,
        operands: Any,
        calls: int,
        scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.op, self.calls, self.scope = op, calls, scope
        self.specs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (carried, [operands] * calls)
        )

    def lower(self) -> jax.stages.Lowered:
        """Traces and lowers the program."""
        return self._program().lower(*self.specs)

    def export(self) -> bytes:
        """Traces and lowers the program for the GPU that `pallas_kernels.mosaic.TARGET` names."""
        return bytes(export.export(self._program(), platforms=["cuda"])(*self.specs).serialize())

    def load(self, module: bytes) -> jax.stages.Lowered:
        """The program from what :meth:`export` gave, in whatever process.

        Raises:
            ValueError: it is the module of another chain.
        """
        exported = export.deserialize(bytearray(module))

        def program(carried: Any, rotated: list[Any]) -> list[Any]:
            return exported.call(carried, rotated)

        return jax.jit(program).lower(*self.specs)

    def _program(self) -> Any:
        def program(carried: Any, rotated: list[Any]) -> list[Any]:
            outs = []
            with self.scope():
                for operands in rotated:
                    out = self.op(carried, operands)
                    carried, out = _after(carried, out)
                    outs.append(out)
            return outs

        return jax.jit(program)


def gpu_of_jax() -> Gpu | None:
    """The GPU that jax uses here; None on a CPU."""
    if jax.default_backend() != "gpu":
        return None
    from pallas_kernels import mosaic

    return Gpu(jax.local_devices(backend="gpu")[0].device_kind, mosaic.sm_count())


class Compiled(NamedTuple):
    """The programs of one chain, by variant."""

    calls: int
    programs: dict[str, Callable[..., list[Any]]]

    def first_output(self, carried: Any, rotated: Sequence[Any]) -> Any:
        """What the first call gives: for a check of the numbers."""
        return next(iter(self.programs.values()))(carried, list(rotated))[0]


class Timing(NamedTuple):
    """Samples in µs a call, and the variant they are of."""

    samples: list[float]
    launch: str

    @property
    def us(self) -> float:
        """Median."""
        return statistics.median(self.samples)


class CompileAhead:
    """Compiles chains in the order in which they will be taken, some of them ahead.

    Chains come lowered from other processes, or are lowered by the thread that takes them, as
    lowering is not safe in several. Other threads compile them, also while something is measured: a
    program's launches are enqueued before they run, and half of the CPUs are left alone. Not so
    XLA's own products: what it times on the GPU while it compiles would disturb a measurement, and
    the other way around.

    Use as a context manager; what was not taken at its end is not waited for longer than needed.

    Args:
        chains: by any key, functions that make the chain.
        variants: keys of :data:`VARIANTS`; all on a GPU, else one without options.
        searches: XLA searches products of these chains on the GPU: they are compiled by tens, and
            nothing is taken before all of its ten are ready.
        ahead: chains that are compiled before they are asked for.
        lowering: of chains in other processes; those that it does not have are lowered here.
        beside: by the first part of the chains' keys, functions that compile what is called beside
            these chains, and keep it (`functools.cache`): called ahead too.
    """

    def __init__(
        self,
        chains: Mapping[Any, Callable[[], Chain]],
        variants: Sequence[str] | None = None,
        *,
        searches: bool = False,
        ahead: int | None = None,
        lowering: Lowering | None = None,
        beside: Mapping[Any, Sequence[Callable[[], Any]]] | None = None,
    ) -> None:
        self._modules = {} if lowering is None else lowering.modules_for(gpu_of_jax())
        self._on_gpu = jax.default_backend() == "gpu"
        self._names = list(variants or VARIANTS) if self._on_gpu else ["stream"]
        self._workers = max(1, (os.cpu_count() or 1) // 2)
        self._ahead = ahead or (10 if searches else 2 * self._workers)
        self._searches = searches
        self._pool = ThreadPoolExecutor(self._workers)
        self._waiting = dict(chains)
        self._beside = dict(beside or {})
        self._started: dict[Any, tuple[int, dict[str, Future[Any]]] | Exception] = {}

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *_: object) -> None:
        for key in self._waiting.keys() | self._started.keys():
            if key in self._modules:
                self._modules[key].cancel()
        self._pool.shutdown(cancel_futures=True)

    def _start_next(self) -> None:
        key = next(iter(self._waiting))
        make = self._waiting.pop(key)
        if self._beside:
            for prepare in self._beside.pop(key[0], ()):
                self._pool.submit(prepare)
        try:
            chain = make()
            if key in self._modules:
                module = self._modules[key]
                lowered = self._pool.submit(lambda: chain.load(module.result()))
            else:
                lowered = Future()
                lowered.set_result(chain.lower())
        except Exception as error:  # a kernel that refuses a shape must not end the run
            self._started[key] = error
            return
        programs = {}
        for name in self._names:
            options = VARIANTS[name] if self._on_gpu else None
            programs[name] = self._pool.submit(
                lambda options=options: lowered.result().compile(compiler_options=options)
            )
        self._started[key] = chain.calls, programs

    def _futures(self, key: Any) -> list[Future[Any]]:
        started = self._started[key]
        return [] if isinstance(started, Exception) else [*started[1].values()]

    def take(self, key: Any) -> Compiled | Exception:
        """The compiled chain; one that fails is its exception. Each can be taken once.

        Raises:
            KeyError: there is no such chain, or it was taken.
        """
        if self._searches and key not in self._started:
            for _ in range(min(self._ahead, len(self._waiting))):
                self._start_next()
        while key not in self._started:
            if not self._waiting:
                raise KeyError(key)
            self._start_next()
        if self._searches:
            wait([future for started in self._started for future in self._futures(started)])
        else:
            # What is wanted next is lowered while this one is compiled, and one more in any case.
            more = True
            while self._waiting and len(self._started) <= self._ahead:
                if not more and next(iter(self._waiting)) not in self._modules:
                    break
                self._start_next()
                more = not all(future.done() for future in self._futures(key))
        futures, started = self._futures(key), self._started.pop(key)
        if isinstance(started, Exception):
            return started
        calls, programs = started
        wait(futures)
        ready = {name: f.result() for name, f in programs.items() if f.exception() is None}
        if ready:
            return Compiled(calls, ready)
        error = futures[0].exception()
        return error if isinstance(error, Exception) else RuntimeError(str(error))


def compile_chains(
    chains: Mapping[Any, Callable[[], Chain]], variants: Sequence[str] | None = None
) -> dict[Any, Compiled | Exception]:
    """Compiles many chains, several at a time; one that fails becomes its exception.

    Args:
        chains: by any key, functions that make the chain.
        variants: keys of :data:`VARIANTS`; all on a GPU, else one without options.
    """
    with CompileAhead(chains, variants, searches=True, ahead=len(chains)) as ahead:
        return {key: ahead.take(key) for key in chains}


def seconds_of(program: Callable[..., Any], args: Sequence[Any], runs: int) -> float:
    """Host time of `runs` executions enqueued back to back."""
    start = time.perf_counter()
    for _ in range(runs):
        out = program(*args)
    jax.block_until_ready(out)
    return time.perf_counter() - start


def measure(
    compiled: Compiled,
    carried: Any,
    rotated: Sequence[Any],
    *,
    samples: int = SAMPLES,
    launches: int = 1,
) -> Timing:
    """Times all variants; the one with the shortest median counts.

    Args:
        compiled: as :class:`CompileAhead` gives it.
        carried: what all calls share.
        rotated: the operands of every call.
        samples: for each variant.
        launches: kernels that one call launches, at least roughly.
    """
    args = (carried, list(rotated))
    if jax.default_backend() != "gpu":  # no device time to find: one run shows that it works
        (name, program), *_ = compiled.programs.items()
        return Timing([seconds_of(program, args, 1) * 1e6 / compiled.calls], name)
    best = None
    for name, program in compiled.programs.items():
        runs = device_us(program, args, launches * compiled.calls, samples=samples)
        timing = Timing([us / compiled.calls for us in runs], name)
        if best is None or timing.us < best.us:
            best = timing
    assert best is not None
    return best


def kernel_times_us(profile: jax.profiler.ProfileData, pattern: str) -> list[float]:
    """Durations of the kernels whose name matches, from all GPUs of a profile."""
    found = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # other lines show the same again, derived
                continue
            found += [e.duration_ns / 1e3 for e in line.events if re.search(pattern, e.name)]
    return found


def profiled_us(
    compiled: Compiled, carried: Any, rotated: Sequence[Any], pattern: str
) -> float | None:
    """Median time of one kernel by the profiler; None if no kernel's name matches.

    A kernel that was allowed to start before the one before it ended (programmatic dependent
    launch) shows the time it waited too, so that this is an upper bound.

    Args:
        compiled: runs four times.
        carried: as for :func:`measure`, `rotated` too.
        rotated: the operands of every call.
        pattern: regular expression to search in kernel names.
    """
    program = compiled.programs.get("stream") or next(iter(compiled.programs.values()))
    args = (carried, list(rotated))
    seconds_of(program, args, 1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds_of(program, args, 3)
        files = Path(folder).rglob("*.xplane.pb")
        profiles = [jax.profiler.ProfileData.from_file(str(file)) for file in files]
        times = [us for profile in profiles for us in kernel_times_us(profile, pattern)]
    return statistics.median(times) if times else None


def copy_bytes_per_s(nbytes: int) -> float:
    """Best rate of a device copy, read and written: XLA's own copy or a loop of additions."""
    x = jnp.ones(nbytes // 4, jnp.int32)
    rates = []
    for copy in (jax.jit(jnp.copy), jax.jit(lambda x: x + 1)):
        copy(x).block_until_ready()
        rates += [2 * nbytes * 10 / seconds_of(copy, (x,), 10) for _ in range(5)]
    return max(rates)


@functools.cache
def random_program(shape: tuple[int, ...], dtype: Any) -> Callable[..., jax.Array]:
    """Compiled: normal numbers from a key, times a float32 scale."""

    def make(key: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * scale.astype(dtype)

    key, scale = jax.eval_shape(lambda: (jax.random.key(0), jnp.float32(1)))
    return jax.jit(make).lower(key, scale).compile()


def random_arrays(shape: tuple[int, ...], dtype: Any, count: int, *, seed: int = 0, scale=1.0):
    """`count` arrays of normal numbers, made on the device; each shape is compiled once."""
    make = random_program(tuple(shape), dtype)
    keys = jax.random.split(jax.random.key(seed), count)
    return [make(key, jnp.float32(scale)) for key in keys]
