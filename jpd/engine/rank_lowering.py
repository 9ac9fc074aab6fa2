"""Lowers steps for all ranks, with the NCCL communicators by which their sums overlap."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jpd.engine.lowering import StepLowering, StepSource
from jpd.engine.rank_step import overlaps
from jpd.engine.shapes import StepShape
from jpd.engine.stored_steps import StepStore
from jpd.ops import overlap
from jpd.ops.overlap.communicators import communicators
from jpd.ops.overlap.settings import Settings, settings
from jpd.parallel import MESH_AXIS, ManyDevices


class RankLowering(StepLowering):
    """A `StepLowering` that makes in place, at every start, what holds communicators: they are this
    process's.

    Args:
      source: what the steps are made from; its model is a rank's.
      placement: of parameters, pages and inputs.
      inputs, store: see `StepLowering`.
    """

    def __init__(
        self,
        source: StepSource,
        placement: ManyDevices,
        inputs: Callable[[StepShape], Any],
        store: StepStore | None,
    ) -> None:
        super().__init__(source, placement.everywhere, inputs, store)
        self._mesh = placement.mesh

    def _key(self, shape: StepShape) -> str | None:
        if settings() != Settings() or self._communicators(shape):
            return None
        return super()._key(shape)

    @contextlib.contextmanager
    def _tracing(self, shape: StepShape) -> Iterator[None]:
        """With communicators, if the caller brought none."""
        current = settings()
        known = current.communicators or self._communicators(shape)
        changes = {**vars(current), "communicators": known}
        with super()._tracing(shape), overlap.using(**changes):
            yield

    def _communicators(self, shape: StepShape) -> dict[str, list[Any]]:
        """Those that plans for a step ask for."""
        if not overlaps(shape) or self._source.kernels.matmul_all_reduce == "xla":
            return {}
        model, tokens = self._source.model, shape.batch + shape.tokens
        widths = (model.num_heads * model.head_dim, model.ffn_size)
        products = [(tokens, model.hidden_size, width) for width in widths]
        return communicators(self._mesh, MESH_AXIS, products)
