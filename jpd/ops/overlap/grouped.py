"""The implementation "grouped": the groups of tiles that "overlap" sends, by XLA's collectives.

The product is complete before anything is sent, so nothing is hidden: this is what the method
computes, without how, on any device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpd.ops.overlap.packed import Packed
from jpd.ops.overlap.plain import collective
from jpd.ops.overlap.settings import settings
from jpd.ops.overlap.tiles import tiles_of
from jpd.ops.overlap.weights import product
from jpd.overlap import Plan


def matmul_collective(
    op: str, x: jax.Array, w: jax.Array, axis_name: Any, plan: Plan | None, resident: bool
) -> Packed:
    """Packs the product as the signalling GEMM stores it, then one collective a group.

    A plan that is not given is looked up in `Settings.plans`, whatever machine those are for.

    Raises:
      NotImplementedError: no plan that overlaps, or a number of ranks that tiles cannot have.
    """
    from pallas_kernels import signal_gemm

    (m, k), n, ranks = x.shape, w.shape[0], lax.axis_size(axis_name)
    table = settings().plans
    if plan is None and table is not None:
        plan = table.find(op, ranks, m, n, k)
    if plan is None or not plan.overlap:
        raise NotImplementedError(f"plan={plan}: groups follow from a plan that overlaps")
    tiles = tiles_of(op, ranks, m, n, plan)
    # Only the order of the tiles matters to an all-reduce, which has one receiver.
    packed = signal_gemm.pack(
        product(x, w, resident=resident), tiles.config, groups=tiles.groups, ranks=tiles.ranks
    )
    area = tiles.config.tile_m * tiles.config.tile_n
    received = []
    for offset, size in signal_gemm.group_spans(tiles.groups, tiles.config):
        parts = slice(offset * tiles.ranks // area, (offset + size) * tiles.ranks // area)
        received.append(collective(op, packed[parts], axis_name))
    return Packed(jnp.concatenate(received), tiles.layout)
