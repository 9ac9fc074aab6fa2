"""Times products with JAX: what `flat_gemm` and `dense_gemm` have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device_time, gemm_impls
from benchmarks.attention_reference import worst_row_error
from benchmarks.budget import Budget
from benchmarks.gemm_cases import Gemm
from benchmarks.gemm_chains import gemm_calls, gemm_chains
from benchmarks.lowered import Lowering
from benchmarks.report import Report

MAX_REL_ERR = 4e-3
CHECKED_ROWS = 32
"""About as many rows of a result are checked."""


def checked_rows(rows: int) -> np.ndarray:
    """Rows of a product whose values are checked: some of every part, and the last."""
    return np.append(np.arange(0, rows, max(1, rows // CHECKED_ROWS)), rows - 1)


def pick(y: jax.Array, rows: np.ndarray) -> np.ndarray:
    """These rows of a result, on the host; small results are copied whole, with no gather."""
    return np.asarray(y)[rows] if y.shape[0] <= 128 else np.asarray(y[rows])


@functools.cache
def exact_program(rows: int, outputs: int, inputs: int) -> Callable[..., jax.Array]:
    """Compiled: the float32 product of x `[rows, inputs]` and a weight `[outputs, inputs]`."""

    def exact(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x.astype(jnp.float32),
            w.astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )

    spec = jax.ShapeDtypeStruct
    x, w = (spec((n, inputs), jnp.bfloat16) for n in (rows, outputs))
    # Tuning a product that runs once is not worth it.
    return jax.jit(exact).lower(x, w).compile({"xla_gpu_autotune_level": 0})


class References:
    """Activations and float32 results of every weight shape, on the host.

    One program to compile for all cases of a shape.
    """

    def __init__(self, cases: Iterable[Gemm]) -> None:
        self._rows: dict[tuple[int, ...], list[int]] = {}
        for case in cases:
            self._rows.setdefault(case[1:], []).append(case.rows)
        self._made: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _drawn(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return max(self._rows[shape]), shape[1]

    def _checked(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.unique(np.concatenate([checked_rows(m) for m in self._rows[shape]]))

    def beside(self, case: Gemm) -> list[functools.partial[Any]]:
        """What compiles the programs that a case needs beside its chains."""
        shape = case[1:]
        return [
            functools.partial(device_time.random_program, shape, jnp.bfloat16),
            functools.partial(device_time.random_program, self._drawn(shape), jnp.bfloat16),
            functools.partial(exact_program, len(self._checked(shape)), *shape),
        ]

    def of(self, case: Gemm, weight: jax.Array) -> tuple[jax.Array, np.ndarray, np.ndarray]:
        """x `[M, K]`, the rows that are checked, and their results.

        Args:
            case: one of those that were named.
            weight: `[N, K]`, always the same for a shape.
        """
        shape = case[1:]
        if shape not in self._made:
            x = np.asarray(
                device_time.random_arrays(self._drawn(shape), jnp.bfloat16, 1, seed=1)[0]
            )
            checked = self._checked(shape)
            exact = exact_program(len(checked), *shape)
            self._made[shape] = x, checked, np.asarray(exact(x[checked], weight))
        x, checked, want = self._made[shape]
        inside = checked < case.rows
        return jnp.asarray(x[: case.rows]), checked[inside], want[inside]


def run(
    report: Report,
    cases: Sequence[Gemm],
    impls: Callable[[Gemm], Collection[str]],
    *,
    names: dict[str, str],
    budget: Budget,
    calls: int | None = None,
    variants: Sequence[str] | None = None,
    lowering: Lowering | None = None,
) -> None:
    """Checks and times every case with every implementation and adds the rows.

    Case by case as long as there is time, the file written after each. XLA's products come after
    all the others, because the search for the fastest kernel would disturb them.

    Args:
        report: gets the rows.
        cases: neighbours of one weight shape share its weights.
        impls: keys of `gemm_impls.product` to run a case with.
        names: what rows call an implementation, where it is not its key.
        budget: the run's.
        calls: of a program; by default as many as the rotation needs.
        variants: how kernels are launched, see `device_time.VARIANTS`; by default every way.
        lowering: of these products in other processes.
    """
    wanted = {case: [*impls(case)] for case in cases}
    report.expect((case.name, names.get(i, i)) for case in cases for i in wanted[case])
    references = References(cases)
    counts = dict.fromkeys(cases, calls) if calls else gemm_calls(cases)
    for searches in (False, True):
        left = {
            case: [impl for impl in some if gemm_impls.is_xla(impl, *case) is searches]
            for case, some in wanted.items()
        }
        left = {case: some for case, some in left.items() if some}
        chains = gemm_chains(left, counts)
        # A case's programs are there before its neighbours of the same shape ask for them again.
        firsts = {case[1:]: case for case in reversed(left)}.values()
        with device_time.CompileAhead(
            chains,
            variants,
            searches=searches,
            lowering=lowering,
            beside={case: references.beside(case) for case in firsts},
        ) as compiled:
            _run(report, left, names, budget, references, counts, compiled)


def _run(
    report: Report,
    impls: dict[Gemm, list[str]],
    names: dict[str, str],
    budget: Budget,
    references: References,
    counts: dict[Gemm, int],
    compiled: device_time.CompileAhead,
) -> None:
    shape: tuple[int, ...] = ()
    weights: list[jax.Array] = []
    for case, some in impls.items():
        if not budget.enough():
            return
        with budget.case():
            if case[1:] != shape:
                shape = case[1:]
                del weights
                scale = case.inputs**-0.5
                weights = device_time.random_arrays(shape, jnp.bfloat16, counts[case], scale=scale)
            programs = {(impl, names.get(impl, impl)): compiled.take((case, impl)) for impl in some}
            _run_case(report, case, programs, references, weights)
        report.save()


def _run_case(
    report: Report,
    case: Gemm,
    programs: dict[tuple[str, str], device_time.Compiled | Exception],
    references: References,
    weights: list[jax.Array],
) -> None:
    """Adds the rows of one case; programs by implementation and its name in rows."""
    x, picked, want = references.of(case, weights[0])
    for (impl, name), program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            got = program.first_output(x, weights)
            if got.shape != (case.rows, case.outputs):
                raise RuntimeError(f"shape {got.shape}")
            error = worst_row_error(pick(got, picked), want)
            del got
            if not error <= MAX_REL_ERR:
                raise RuntimeError(f"relative error {error:.2e} > {MAX_REL_ERR:.0e}")
            timing = device_time.measure(program, x, weights)
            extra: dict[str, Any] = {"mode": gemm_impls.mode(impl, timing.launch)}
            if impl == "table":
                extra["choice"] = gemm_impls.choice_label(*case)
            report.add(
                case.name,
                name,
                timing.samples,
                "us",
                nbytes=case.nbytes,
                flops=case.flops,
                rel_err=error,
                **extra,
            )
        except Exception as error:  # one implementation must not cost the others
            report.fail(case.name, name, error)
