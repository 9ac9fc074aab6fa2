"""Checks and times the implementations of cases, shape by shape, and adds the rows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks import overlap_impls, overlap_time
from benchmarks.overlap_cases import GEMM, Case, Shape
from benchmarks.overlap_impls import Implementation
from benchmarks.overlap_time import Operation
from benchmarks.report import Report
from benchmarks.rows import skipped_row
from jpd.ops.overlap.plain import collective
from jpd.overlap import Plan, PlanTable, Trace, plot

MAX_REL_ERR = 8e-3
"""Of the worst row: products are rounded to bf16 before they are summed over ranks."""
_TRACED_CALLS = 5


@dataclass
class Machine:
    """The GPUs of a run and what it has for them."""

    mesh: Mesh
    link: str
    plans: PlanTable | None = None
    communicators: list[Any] = field(default_factory=list)
    """Of `native.overlap`, one for each number of NCCL's blocks."""
    connect: Callable[[int], Any] | None = None
    """Makes one, of so many blocks."""
    host: Any = None
    """A `HostCommunicator`; None where there is none."""
    host_error: str = overlap_impls.NEEDS_GPUS

    def plan(self, case: Case) -> Plan | None:
        """The plan of this shape, or one like it; None if the table has none near."""
        if case.op == GEMM:
            return None
        if not overlap_time.on_gpu():
            return cpu_plan(case)
        found = self.plans and self.plans.find(case.op, case.ranks, *case.shape)
        if not found:
            return None
        return fitted(found, case)

    def recover(self) -> None:
        """Makes communicators anew whose collectives failed or were stuck."""
        for i, communicator in enumerate(self.communicators):
            try:
                communicator.check()
            except Exception as error:  # rows say it already
                print(f"communicator of {communicator.max_ctas} CTAs: {error}; a new one is made")
                communicator.close()
                self.communicators[i] = self.connect(communicator.max_ctas)


def fitted(plan: Plan, case: Case) -> Plan:
    """The plan of a shape nearby as one of this shape: its groups in proportion."""
    from pallas_kernels import signal_gemm as gemms

    m, n, k = case.shape
    if (plan.m, plan.n, plan.k) == case.shape:
        return plan
    changes: dict[str, Any] = {"m": m, "n": n, "k": k}
    changes |= dict.fromkeys(("sequential_s", "predicted_s", "measured_s"))
    if plan.overlap:
        shares = 1 if case.op == "all_reduce" else case.ranks
        config = gemms.SignalConfig(**dataclasses.asdict(plan.tiling))
        tiles = gemms.tile_count(m, n, config, shares)
        changes["waves"] = plan.waves_for(gemms.waves_of(tiles, plan.sms))
    return dataclasses.replace(plan, **changes, source="nearby")


def cpu_plan(case: Case) -> Plan:
    """A plan of one wave a group for trying things out on a CPU."""
    from jpd.overlap import Tiling
    from pallas_kernels import signal_gemm as gemms

    tiling, sms = Tiling(64, 128, 2, "n", "m", 2), 2
    m, n, k = case.shape
    shares = 1 if case.op == "all_reduce" else case.ranks
    tiles = gemms.tile_count(m, n, gemms.SignalConfig(**vars(tiling)), shares)
    return Plan(
        op=case.op,
        ranks=case.ranks,
        m=m,
        n=n,
        k=k,
        overlap=True,
        tiling=tiling,
        sms=sms,
        ctas=1,
        waves=(1,) * gemms.waves_of(tiles, sms),
    )


def describe(plan: Plan | None) -> str:
    """A plan for a row."""
    if plan is None:
        return "none"
    if not plan.overlap:
        return f"not to overlap ({plan.source})"
    waves = "+".join(map(str, plan.waves))
    return (
        f"{plan.sms} SMs + {plan.ctas} CTAs, {plan.tiling.tile_m}x{plan.tiling.tile_n}, "
        f"waves {waves} ({plan.source})"
    )


class Operands:
    """x and w of every call of a chain, and the matrices that collectives alone are timed with."""

    def __init__(self, mesh: Mesh, shape: Shape) -> None:
        self.calls = overlap_time.calls_of(shape.set_bytes) if overlap_time.on_gpu() else 2
        self.mesh, self.shape = mesh, shape
        self.xs, self.ws = overlap_time.operands(mesh, *shape, self.calls)
        self._wide: dict[int, Any] = {}

    def of(self, implementation: Implementation) -> tuple[Any, Any]:
        """Those of one implementation."""
        columns = implementation.x_columns
        if columns is None:
            return self.xs, self.ws
        if columns not in self._wide:
            m = self.shape.m
            self._wide[columns], _ = overlap_time.operands(self.mesh, m, 8, columns, self.calls)
        return self._wide[columns], self.ws


class Checker:
    """Compares results with a float32 reference, on every rank.

    Args:
        mesh: the devices.
        op: what follows the product, or `GEMM`.
        operands: of a chain; references are those of its first and its last call.
    """

    def __init__(self, mesh: Mesh, op: str, operands: Operands) -> None:
        def exact(x: jax.Array, w: jax.Array) -> jax.Array:
            y = jax.lax.dot_general(
                x.astype(jnp.float32),
                w.astype(jnp.float32),
                (((1,), (1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
            )
            return y if op == GEMM else collective(op, y, overlap_time.AXIS)

        # A search for the fastest of products that run once is not worth it.
        options = {"xla_gpu_autotune_level": 0} if overlap_time.on_gpu() else {}
        pairs = [([operands.xs[i]], [operands.ws[i]]) for i in (0, -1)]
        lowered = overlap_time.lower(Operation(exact), mesh, *pairs[0])
        program = lowered.compile(compiler_options=options)
        self._want = [program(*pair)[0] for pair in pairs]
        self._mesh = mesh
        self._programs: dict[Any, Any] = {}

    def error(self, implementation: Implementation, outs: Sequence[Any]) -> float:
        """Worst relative error of a row of any rank.

        Args:
            implementation: whose results they are.
            outs: results of a chain's first and last call, or of the first.

        Raises:
            RuntimeError: a result has another shape.
        """
        key = implementation.ordered or implementation.result_spec
        if key not in self._programs:
            self._programs[key] = self._program(implementation)
        worst = [
            self._programs[key](out, want) for out, want in zip(outs, self._want, strict=False)
        ]
        return max(float(np.asarray(errors).max()) for errors in worst)

    def _program(self, implementation: Implementation) -> Any:
        def worst(out: Any, want: jax.Array) -> jax.Array:
            got = implementation.ordered(out) if implementation.ordered else out
            if got.shape != want.shape:
                raise RuntimeError(f"shape {got.shape}, not {want.shape}")
            apart = jnp.square(got.astype(jnp.float32) - want).sum(1)
            errors = jnp.sqrt(apart / jnp.square(want).sum(1))
            return jnp.where(jnp.isfinite(errors), errors, jnp.inf).max()[None]

        ranks = P(overlap_time.AXIS)
        specs = (implementation.result_spec, ranks)
        return jax.jit(
            jax.shard_map(worst, mesh=self._mesh, in_specs=specs, out_specs=ranks, check_vma=False)
        )


def compile_all(
    mesh: Mesh, operands: Operands, wanted: Mapping[Any, Implementation]
) -> dict[Any, Any]:
    """Compiled chains by key; one that fails is its exception.

    All before anything is measured: XLA's search for the fastest product uses the GPUs.
    """
    found: dict[Any, Any] = {}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for key, implementation in wanted.items():
            try:
                lowered = overlap_time.lower(
                    implementation.operation, mesh, *operands.of(implementation)
                )
            except Exception as error:  # one that refuses a shape must not end the run
                found[key] = error
                continue
            options = implementation.compiler_options()
            found[key] = pool.submit(lowered.compile, compiler_options=options)
    done: dict[Any, Any] = {}
    for key, future in found.items():
        failure = future if isinstance(future, Exception) else future.exception()
        done[key] = failure or future.result()
    return done


def checked_us(
    mesh: Mesh,
    operands: Operands,
    checker: Checker,
    implementation: Implementation,
    program: Any,
    *,
    samples: int = overlap_time.SAMPLES,
) -> tuple[list[float], float | None]:
    """Samples of one call in µs, and its error: of the first and the last call of the chain.

    It is the second run that is checked, whose buffers the first one has used.

    Raises:
        RuntimeError: the result is wrong, or it cannot be timed.
    """
    if isinstance(program, Exception):
        raise program
    xs, ws = operands.of(implementation)
    error = None
    if implementation.checked:
        jax.block_until_ready(program(xs, ws))
        outs = program(xs, ws)
        error = checker.error(implementation, (outs[0], outs[-1]))
        del outs
        if not error <= MAX_REL_ERR:
            raise RuntimeError(f"relative error {error:.2e} > {MAX_REL_ERR:.0e}")
    times = overlap_time.run_us(
        mesh,
        lambda: program(xs, ws),
        implementation.launches * operands.calls,
        samples=samples,
    )
    implementation.verify()
    return [us / operands.calls for us in times], error


def run_shape(
    report: Report,
    machine: Machine,
    cases: Sequence[Case],
    *,
    only: Sequence[str] | None = None,
    traced: Path | None = None,
) -> None:
    """Measures the cases of one shape and adds their rows.

    Args:
        report: gets the rows.
        machine: where they run.
        cases: product and collectives of one shape.
        only: names of implementations; None for all.
        traced: folder for plots of the traces of these cases; None for none.
    """
    mesh, shape = machine.mesh, cases[0].shape
    operands = Operands(mesh, shape)
    wanted: dict[tuple[Case, str], Implementation] = {}
    for case in cases:
        some = overlap_impls.in_jax(case, mesh, machine.plan(case), machine.communicators)
        for name, implementation in some.items():
            if only is not None and name not in only:
                continue
            if isinstance(implementation, str):
                report.rows.append(skipped_row(case.name, name, implementation))
            else:
                wanted[case, name] = implementation
    programs = compile_all(mesh, operands, wanted)
    for case in cases:
        checker = Checker(mesh, case.op, operands)
        for (owner, name), implementation in wanted.items():
            if owner == case:
                with _failing(report, case.name, name):
                    program = programs[case, name]
                    samples, error = checked_us(mesh, operands, checker, implementation, program)
                    extra = _extra(machine, case, name, implementation, operands, traced)
                    if name == "xla_windowed":
                        extra["mode"] = "a loop" if _permutes(program) else "not split by XLA"
                    report.add(
                        case.name,
                        name,
                        samples,
                        "us",
                        flops=shape.flops if name != "collective" else None,
                        rel_err=error,
                        **extra,
                    )
        if case.op != GEMM and overlap_time.on_gpu() and (only is None or "cupy" in only):
            with _failing(report, case.name, "cupy"):
                _host_row(report, machine, case, operands, checker)
        del checker
    machine.recover()


def _permutes(program: Any) -> bool:
    """Whether XLA split a product into parts that travel from rank to rank."""
    return "collective-permute" in program.as_text()


@contextlib.contextmanager
def _failing(report: Report, case: str, name: str) -> Iterator[None]:
    """One implementation must not cost the others."""
    try:
        yield
    except Exception as error:
        report.fail(case, name, error)


def _extra(
    machine: Machine,
    case: Case,
    name: str,
    implementation: Implementation,
    operands: Operands,
    traced: Path | None,
) -> dict[str, Any]:
    """Columns besides times."""
    if not name.startswith("jpd"):
        return {}
    plan = implementation.plan
    if name == "jpd_sequential":
        return {"plan": "one after the other"}
    known = machine.plan(case)
    extra: dict[str, Any] = {"plan": describe(known)}
    if not overlap_time.on_gpu():
        return {"plan": "XLA: no GPU"}
    if known is not None and known.predicted_s is not None:
        extra["predicted_us"] = known.predicted_s * 1e6
    if name == "jpd" and traced is not None and plan is not None:
        trace = traced_call(machine, case, plan, operands)
        extra["hidden"] = trace[0]
        plot(trace[1], traced / f"overlap_{case.name.replace(' ', '_')}.svg")
    return extra


def traced_call(
    machine: Machine, case: Case, plan: Plan, operands: Operands
) -> tuple[float, Trace]:
    """Median fraction hidden over calls and GPUs, and the trace of one.

    Raises:
        RuntimeError: a collective ran before its group was signalled.
    """
    communicators = machine.communicators
    traced = overlap_impls.ours(case, plan, communicators, packed=True, trace=True)
    xs, ws = operands.xs, operands.ws
    lowered = overlap_time.lower(traced.operation, machine.mesh, xs, ws)
    program = lowered.compile(compiler_options=traced.compiler_options())
    jax.block_until_ready(program(xs, ws))
    for communicator in communicators:
        communicator.trace()  # what was recorded before
    for _ in range(_TRACED_CALLS):
        jax.block_until_ready(program(xs, ws))
    calls = [call for communicator in communicators for call in communicator.trace()]
    traces = [Trace.of_call(call) for call in calls]
    if any(trace.premature() for trace in traces):
        raise RuntimeError("a collective started before its group was signalled")
    if not traces:
        raise RuntimeError("nothing was traced")
    return statistics.median(trace.fraction_hidden for trace in traces), traces[-1]


def _host_row(
    report: Report,
    machine: Machine,
    case: Case,
    operands: Operands,
    checker: Checker,
) -> None:
    """Adds the row of "cupy"."""
    from benchmarks.overlap_host import HostSequential

    if machine.host is None:
        raise RuntimeError(machine.host_error)
    call = HostSequential(machine.host, machine.mesh, case)
    ordered = Implementation(Operation(call), ordered=lambda y: y[0])
    error = checker.error(ordered, [call(operands.xs[0], operands.ws[0])])
    if not error <= MAX_REL_ERR:
        raise RuntimeError(f"relative error {error:.2e} > {MAX_REL_ERR:.0e}")
    turns = iter(range(1 << 30))

    def one() -> None:
        i = next(turns) % operands.calls
        call(operands.xs[i], operands.ws[i])

    samples = overlap_time.host_us(one)
    report.add(case.name, "cupy", samples, "us", flops=case.shape.flops, rel_err=error, mode="host")


def by_shape(cases: Sequence[Case]) -> dict[Shape, list[Case]]:
    """Cases of each shape, in the order in which the shapes come."""
    found: dict[Shape, list[Case]] = {}
    for case in cases:
        found.setdefault(case.shape, []).append(case)
    return found
