"""The programs that benchmarks of products time. JAX is imported when one is made."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.gemm_cases import LAYERS, Gemm


def gemm_chain(case: Gemm, impl: str, calls: int) -> Any:
    """The program of one product, `calls` times with weights of its own."""
    import jax
    import jax.numpy as jnp

    from benchmarks import gemm_impls
    from benchmarks.device_time import Chain

    product = gemm_impls.product(impl)
    x = jax.ShapeDtypeStruct((case.rows, case.inputs), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((case.outputs, case.inputs), jnp.bfloat16)
    return Chain(product, x, w, calls, lambda: gemm_impls.scope(impl))


def gemm_calls(cases: Collection[Gemm]) -> dict[Gemm, int]:
    """Calls of each case's program, as many as the rotation needs."""
    from benchmarks.device_time import rotations

    # The counters are cleared once in a program; many short calls share that, as in a model's step.
    least = 16 if max((case.rows for case in cases), default=0) <= 128 else 8
    return {case: rotations(case.weight_bytes, least=least) for case in cases}


def gemm_chains(
    impls: Mapping[Gemm, Sequence[str]], calls: Mapping[Gemm, int]
) -> dict[tuple[Gemm, str], partial[Any]]:
    """What makes the chains, by case and implementation."""
    return {
        (case, impl): partial(gemm_chain, case, impl, calls[case])
        for case, some in impls.items()
        for impl in some
    }


def products(model: str, rows: int) -> list[Gemm]:
    """The four products of a layer."""
    return [Gemm(rows, n, k) for n, k in LAYERS[model].values()]


def layer_chain(model: str, rows: int, impl: str, calls: int) -> Any:
    """The program that runs the products of `calls` layers."""
    import jax
    import jax.numpy as jnp

    from benchmarks import gemm_impls
    from benchmarks.device_time import Chain

    product = gemm_impls.product(impl)
    gemms = products(model, rows)
    xs = [jax.ShapeDtypeStruct((rows, g.inputs), jnp.bfloat16) for g in gemms]
    ws = [jax.ShapeDtypeStruct((g.outputs, g.inputs), jnp.bfloat16) for g in gemms]

    def layer(xs: list[Any], ws: list[Any]) -> list[Any]:
        ys: list[Any] = []
        for x, w in zip(xs, ws, strict=True):
            # Each product waits for the one before it, as in a layer.
            x, ys = jax.lax.optimization_barrier((x, ys))
            ys = [*ys, product(x, w)]
        return ys

    return Chain(layer, xs, ws, calls, lambda: gemm_impls.scope(impl))


def layer_calls(models: Collection[str]) -> dict[str, int]:
    """Calls of each model's programs, as many as the rotation needs."""
    from benchmarks.device_time import rotations

    return {
        model: rotations(sum(g.weight_bytes for g in products(model, 1)), least=4)
        for model in models
    }


def layer_chains(
    layers: Sequence[tuple[str, int]], impls: Sequence[str], calls: Mapping[str, int]
) -> dict[tuple[str, int, str], partial[Any]]:
    """What makes the chains, by model, rows and implementation."""
    return {
        (model, rows, impl): partial(layer_chain, model, rows, impl, calls[model])
        for model, rows in layers
        for impl in impls
    }
