"""The step on several ranks: the same ops on each, on its heads, channels and tokens.

`jpd.engine.step` is traced once, as one rank's program, for a model with as many heads as one rank
has. What it needs of the other ranks comes in through `jpd.ops.ranks`. No device is needed to trace
it: the mesh has none yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jpd.engine.shapes import StepShape
from jpd.ops import Ranks, over_ranks
from jpd.ops.ranks import own_heads, summed_count
from jpd.parallel import MESH_AXIS, Split, page_spec, param_specs


def overlaps(shape: StepShape) -> bool:
    """Whether sums over ranks are to hide behind the products that make them.

    In steps with prompt tokens: a product of a few decoding rows is shorter than the latency of a
    collective, and leaves nothing to hide behind.
    """
    return shape.tokens > 0


def on_all_ranks(
    rank_step: Callable[..., Any], split: Split, phi: np.ndarray | None, *, overlap: bool
) -> Callable[..., Any]:
    """The step of all ranks, as a function of global arrays.

    Args:
      rank_step: one rank's, a function of its inputs and of `phi`.
      split: of the model over the ranks.
      phi: of all heads, see `jpd.ops.decode_attention`.
      overlap: see `jpd.ops.Ranks`.
    """

    def of_rank(*inputs: Any) -> Any:
        with over_ranks(Ranks(MESH_AXIS, split.cut_axes, overlap)):
            kv, history, out, recomputed = rank_step(*inputs, phi=own_heads(phi))
            return kv, history, out, summed_count(recomputed)

    def of_all(*inputs: Any) -> Any:
        ranked = jax.shard_map(
            of_rank,
            mesh=_mesh(split),
            in_specs=_specs(split, inputs),
            out_specs=(page_spec(split), P(), P(), P()),
            check_vma=False,  # kernels say nothing of where their results differ
        )
        return ranked(*inputs)

    return of_all


def input_shardings(split: Split, inputs: tuple[Any, ...]) -> Any:
    """How the inputs of a step lie over the ranks, whatever the ranks' devices are."""
    mesh = _mesh(split)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(split, inputs))


def _mesh(split: Split) -> AbstractMesh:
    return AbstractMesh((split.ranks,), (MESH_AXIS,), axis_types=(AxisType.Auto,))


def _specs(split: Split, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of every leaf: parameters and pages are cut, each rank has all of the rest."""
    params, kv, *rest = inputs
    pages = page_spec(split)
    return (
        param_specs(split, params),
        jax.tree.map(lambda _: pages, kv),
        *jax.tree.map(lambda _: P(), rest),
    )
