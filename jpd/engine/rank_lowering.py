"""Lowers steps for all ranks, with the NCCL communicators by which their sums overlap."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jpd.engine.lowering import StepLowering, StepSource
from jpd.engine.rank_step import overlaps
from jpd.engine.shapes import StepShape
from jpd.engine.stored_steps import StepStore
from jpd.ops import overlap
from jpd.ops.overlap.communicators import communicators, release
from jpd.ops.overlap.settings import Settings, communicators_of, settings
from jpd.parallel import MESH_AXIS, ManyDevices


class StepCommunicators:
    """The communicators that an executor's steps were traced with."""

    def __init__(self) -> None:
        self._traced: dict[StepShape, Sequence[Any]] = {}

    def traced(self, shape: StepShape, communicators: Sequence[Any]) -> None:
        """Notes those of a step."""
        self._traced[shape] = communicators

    def of(self, shape: StepShape) -> Sequence[Any]:
        """Those by which the sums of a step may overlap."""
        return self._traced.get(shape, ())

    def release(self) -> None:
        """Closes those that were made for these steps alone, which must not run any more."""
        self._traced.clear()
        release(self)


class RankLowering(StepLowering):
    """A `StepLowering` that makes in place, at every start, what holds communicators: they are this
    process's.

    Args:
      source: what the steps are made from; its model is a rank's.
      placement: of parameters, pages and inputs.
      inputs, store: see `StepLowering`.
      used: is told the communicators of every step that is traced here.
    """

    def __init__(
        self,
        source: StepSource,
        placement: ManyDevices,
        inputs: Callable[[StepShape], Any],
        store: StepStore | None,
        used: StepCommunicators,
    ) -> None:
        super().__init__(source, placement.everywhere, inputs, store)
        self._mesh = placement.mesh
        self._used = used

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
            if self._may_overlap(shape):
                self._used.traced(shape, communicators_of(MESH_AXIS))
            yield

    def _may_overlap(self, shape: StepShape) -> bool:
        return overlaps(shape) and self._source.kernels.matmul_all_reduce != "xla"

    def _communicators(self, shape: StepShape) -> dict[str, list[Any]]:
        """Those that plans for a step ask for."""
        if not self._may_overlap(shape):
            return {}
        model, tokens = self._source.model, shape.batch + shape.tokens
        widths = (model.num_heads * model.head_dim, model.ffn_size)
        products = [(tokens, model.hidden_size, width) for width in widths]
        return communicators(self._mesh, MESH_AXIS, products, self._used)
