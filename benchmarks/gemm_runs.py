"""Times products with JAX: what `flat_gemm` and `dense_gemm` have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device_time, gemm_impls
from benchmarks.attention_reference import worst_row_error
from benchmarks.gemm_cases import Gemm
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


def gemm_chain(case: Gemm, impl: str, calls: int) -> device_time.Chain:
    """The program of one product, `calls` times with weights of its own."""
    product = gemm_impls.product(impl)
    x = jax.ShapeDtypeStruct((case.rows, case.inputs), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((case.outputs, case.inputs), jnp.bfloat16)
    return device_time.Chain(product, x, w, calls, lambda: gemm_impls.scope(impl))


def run(
    report: Report,
    cases: list[Gemm],
    impls: Callable[[Gemm], Collection[str]],
    *,
    names: dict[str, str],
    calls: int | None = None,
    variants: Sequence[str] | None = None,
) -> None:
    """Checks and times every case with every implementation and adds the rows.

    Args:
        report: gets the rows.
        cases: grouped by weight shape; the weights of a shape are made once.
        impls: keys of `gemm_impls.product` to run a case with.
        names: what rows call an implementation, where it is not its key.
        calls: of a program; by default as many as the rotation needs.
        variants: how kernels are launched, see `device_time.VARIANTS`; by default every way.
    """
    chains: dict[Any, Callable[[], device_time.Chain]] = {}
    # The counters are cleared once in a program; many short calls share that, as in a model's step.
    least = 16 if max(case.rows for case in cases) <= 128 else 8
    count = {c: calls or device_time.rotations(c.weight_bytes, least=least) for c in cases}
    for case in cases:
        for impl in impls(case):
            chains[case, impl] = lambda c=case, i=impl: gemm_chain(c, i, count[c])
    compiled = device_time.compile_chains(chains, variants)
    # Tuning a product that runs once is not worth it.
    exact = jax.jit(
        lambda x, w: jax.lax.dot_general(
            x.astype(jnp.float32),
            w.astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        ),
        compiler_options={"xla_gpu_autotune_level": 0},
    )
    for shape in dict.fromkeys(case[1:] for case in cases):
        group = [case for case in cases if case[1:] == shape]
        outputs, inputs = shape
        scale = inputs**-0.5
        weights = device_time.random_arrays(shape, jnp.bfloat16, count[group[0]], scale=scale)
        most = max(case.rows for case in group)
        x_all = np.asarray(device_time.random_arrays((most, inputs), jnp.bfloat16, 1, seed=1)[0])
        # One reference for all cases of the shape: no more than one program to compile.
        checked = np.unique(np.concatenate([checked_rows(case.rows) for case in group]))
        want_all = np.asarray(exact(x_all[checked], weights[0]))
        for case in group:
            x = jnp.asarray(x_all[: case.rows])
            inside = checked < case.rows
            picked, want = checked[inside], want_all[inside]
            for impl in impls(case):
                name, program = names.get(impl, impl), compiled[case, impl]
                try:
                    if isinstance(program, Exception):
                        raise program
                    got = program.first_output(x, weights)
                    if got.shape != (case.rows, outputs):
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
        del weights
