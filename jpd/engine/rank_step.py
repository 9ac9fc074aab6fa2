"""The step on several ranks: the same ops on each, on its heads, channels and tokens.

`jpd.engine.step` is traced once, as one rank's program, for a model with as many heads as one rank
has. What it needs of the other ranks comes in through `jpd.ops.ranks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jpd.engine.lowering import DONATED, StepSource
from jpd.engine.shapes import StepShape
from jpd.engine.step import step
from jpd.ops import Ranks, over_ranks, overlap
from jpd.ops.overlap.communicators import communicators
from jpd.ops.overlap.settings import settings
from jpd.ops.ranks import own_heads, summed_count
from jpd.parallel import MESH_AXIS, ManyDevices


def overlaps(shape: StepShape) -> bool:
    """Whether sums over ranks are to hide behind the products that make them.

    In steps with prompt tokens: a product of a few decoding rows is shorter than the latency of a
    collective, and leaves nothing to hide behind.
    """
    return shape.tokens > 0


class RankLowering:
    """Lowers steps for all ranks; the face of `jpd.engine.lowering.StepLowering`.

    Args:
      source: what the steps are made from; its model is a rank's.
      placement: of parameters, pages and inputs.
      inputs: the inputs of a shape.
    """

    def __init__(
        self,
        source: StepSource,
        placement: ManyDevices,
        inputs: Callable[[StepShape], Any],
    ) -> None:
        self._source = source
        self._placement = placement
        self._inputs = inputs

    def lower(self, shape: StepShape) -> jax.stages.Lowered:
        """The step of a shape, traced now."""
        function, inputs = self.traceable(shape)
        with self._source.tracing(), self._overlapping(shape):
            return jax.jit(function, donate_argnums=DONATED).lower(*inputs)

    def traceable(self, shape: StepShape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The step of all ranks as a function of global arrays, and what those look like."""
        everywhere = self._placement.everywhere
        params, kv, *rest = self._inputs(shape)
        kept = jax.tree.map(_abstract, (params, kv))
        sent = jax.tree.map(partial(_abstract, sharding=everywhere), rest)
        specs = (self._placement.specs(params), self._placement.page_spec, *[P()] * len(rest))
        ranked = jax.shard_map(
            partial(self._step_of_rank, shape),
            mesh=self._placement.mesh,
            in_specs=specs,
            out_specs=(self._placement.page_spec, P(), P(), P()),
            check_vma=False,  # kernels say nothing of where their results differ
        )
        return ranked, (*kept, *sent)

    def lower_ahead(
        self, shapes: list[StepShape]
    ) -> Iterator[tuple[StepShape, Callable[[], jax.stages.Lowered]]]:
        """Each shape with a function that gives it lowered."""
        for shape in shapes:
            lowered = self.lower(shape)
            yield shape, lambda lowered=lowered: lowered

    def _step_of_rank(self, shape: StepShape, *inputs: Any) -> Any:
        source, cut = self._source, self._placement.split.cut_axes
        with over_ranks(Ranks(MESH_AXIS, cut, overlaps(shape))):
            phi = own_heads(source.phi)
            kv, history, out, recomputed = step(
                source.model, shape, source.chunks, source.page_size, *inputs, phi=phi
            )
            return kv, history, out, summed_count(recomputed)

    def _overlapping(self, shape: StepShape) -> contextlib.AbstractContextManager[None]:
        """With the communicators that plans for this step ask for, if the caller brought none."""
        current = settings()
        if current.communicators or not overlaps(shape):
            return contextlib.nullcontext()
        model, tokens = self._source.model, shape.batch + shape.tokens
        widths = (model.num_heads * model.head_dim, model.ffn_size)
        products = [(tokens, model.hidden_size, width) for width in widths]
        made = communicators(self._placement.mesh, MESH_AXIS, products)
        changes = {**vars(current), "communicators": made}
        return overlap.using(**changes)


def _abstract(array: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding or array.sharding)
