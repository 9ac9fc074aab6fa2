"""Compares sums over ranks that hide behind their products with NumPy, before anything is served.

Beside `jpd.ops.self_check`, which looks at each rank by itself: here all of them run a program
together, with the communicators, plans and shapes of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jpd.config import KernelConfig
from jpd.errors import KernelError
from jpd.ops import overlap, registry
from jpd.ops.overlap import gpu
from jpd.ops.overlap.communicators import communicators, planned
from jpd.ops.overlap.settings import communicators_of, settings
from jpd.ops.overlap.tiles import tiles_of
from jpd.ops.self_check import (
    Case,
    Columns,
    Draw,
    Product,
    Widths,
    as_float,
    drawing,
    normed_rows,
    run_cases,
    sampled_rows,
)
from jpd.overlap import Plan


@dataclass(frozen=True)
class Sum:
    """A linear layer whose results are summed over ranks."""

    name: str
    weight: jax.Array
    """`[N, K]` of all ranks, which have an equal part of its columns each."""
    rows: Sequence[int]
    """Tokens of the steps in which the sum may hide behind the product."""

    def on_rank(self, rows: int, ranks: int) -> tuple[int, int, int]:
        """M, N and K of the product on one of `ranks` ranks."""
        n, k = self.weight.shape
        return rows, n, k // ranks


def run(widths: Widths, kernels: KernelConfig, sums: Sequence[Sum], mesh: Mesh) -> list[str]:
    """Checks sums where plans say that steps overlap them with products: each plan's largest step.

    Compared are the product of every rank, as the GEMM that signals stores it, its counters, the
    sum on every rank, and the norm that reads the sum where it lies.

    Args:
      widths: the model's.
      kernels: the engine's selection.
      sums: the model's layers.
      mesh: of the ranks, with one axis.

    Returns:
      What was checked; nothing where nothing overlaps.

    Raises:
      KernelError: a result is not finite, or its relative error exceeds 1e-2; a collective failed
        or was stuck.
      ConfigError: the plans that were set are for another machine.
    """
    (axis,) = mesh.axis_names
    with registry.using(kernels, mesh.devices.flat[0].platform):
        found = _largest(sums, mesh.size)
        products = [each.on_rank(rows, mesh.size) for each, rows in found.values()]
        known = settings().communicators or communicators(mesh, axis, products)
        if not found or axis not in known:
            return []
        draw = drawing(np.random.default_rng(0), widths.dtype)

        def cases(pool: ThreadPoolExecutor) -> Iterator[Case]:
            columns = {s.name: Columns(Product(s.name, s.weight, s.rows), pool) for s in sums}
            for (name, plan), (each, rows) in found.items():
                yield _case(widths, each, columns[name], rows, plan, mesh, draw)

        with overlap.using(**{**vars(settings()), "communicators": known}):
            try:
                return run_cases(cases)
            except KernelError as error:
                _check(axis, error)
                raise


def _largest(sums: Sequence[Sum], ranks: int) -> Mapping[tuple[str, Plan], tuple[Sum, int]]:
    """For each plan of each layer, the most rows that it serves."""
    found: dict[tuple[str, Plan], tuple[Sum, int]] = {}
    for each in sums:
        products = [each.on_rank(rows, ranks) for rows in sorted(each.rows)]
        for (rows, _, _), plan in planned(ranks, products).items():
            found[each.name, plan] = each, rows
    return found


def _check(axis: str, error: KernelError) -> None:
    """Raises `KernelError` if a communicator says why results are wrong: it fills them with NaN."""
    for communicator in communicators_of(axis):
        try:
            communicator.check()
        except RuntimeError as reason:
            raise KernelError(f"{error}; {reason}") from reason


def _case(
    widths: Widths, each: Sum, columns: Columns, rows: int, plan: Plan, mesh: Mesh, draw: Draw
) -> Case:
    (axis,), ranks = mesh.axis_names, mesh.size
    outputs, width = each.weight.shape
    some = sampled_rows(rows)
    x, residual, norm = draw(rows, width), draw(rows, outputs), draw(outputs)
    tiles = tiles_of("all_reduce", ranks, rows, outputs, plan)

    def of_rank(x: jax.Array, w: jax.Array, residual: jax.Array, norm: jax.Array) -> Any:
        y = overlap.matmul_all_reduce(x, w, axis, packed=True, resident=True)  # as layers do
        normed, stream = overlap.rms_norm_residual(y, residual, norm, widths.eps)
        total = overlap.unpack(y)
        got = {
            "finite": jnp.isfinite(total).all(),
            "sum": total[some],
            "stream": stream[some],
            "norm": normed[some],
        }
        if isinstance(y, overlap.Packed):
            alone, got["counters"] = gpu.product(x, w, tiles)
            got["product"] = overlap.unpack(alone)[some]
        return jax.tree.map(lambda a: a[None], got)

    def want(got: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        owner = np.arange(width) // (width // ranks)
        own = [columns.multiply(as_float(x[some]) * (owner == rank))[0] for rank in range(ranks)]
        for rank in range(ranks):
            of = {name: as_float(array[rank]) for name, array in got.items()}
            if "product" in of:
                yield of["product"][:, columns.columns], own[rank]
                yield of["counters"], np.asarray(tiles.groups, np.float32)
            yield of["sum"][:, columns.columns], sum(own)
            yield of["finite"], np.ones((), np.float32)
            stream = of["sum"] + as_float(residual[some])
            yield of["stream"], stream
            yield of["norm"], normed_rows(stream, as_float(norm), widths.eps)

    split, whole = P(None, axis), P()
    run = jax.shard_map(
        of_rank,
        mesh=mesh,
        in_specs=(split, split, whole, whole),
        out_specs=P(axis),
        check_vma=False,  # kernels say nothing of where their results differ
    )
    name = f"matmul_all_reduce {each.name} {x.dtype}[{rows}, {width}] x {list(each.weight.shape)}"
    return Case(f"{name} on {ranks} ranks", run, (x, each.weight, residual, norm), want)
