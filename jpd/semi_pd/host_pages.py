"""KV pages that several processes share on a CPU.

XLA's CPU client updates only memory of its own in place: a step that is given pages in shared
memory leaves its new keys and values in a copy. So they are copied back, those that the step wrote
and no others: the rest of the pages may be changing under another process's hands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpd.engine.executor import Executor
from jpd.engine.plan import StepPlan
from jpd.parallel import Placement
from jpd.semi_pd import arrays
from jpd.semi_pd.layout import Layout
from native.memory import Block


def written_places(plan: StepPlan, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pages and offsets in them, `[n]` each, that a step stores keys and values at."""
    tables = [plan.page_table[i] for i in range(len(plan.rows))]
    tables += [plan.chunk_page_table[i] for i in range(len(plan.chunks))]
    positions = [np.array([p]) for p in plan.positions.tolist()]
    positions += [np.arange(chunk.start, chunk.end) for chunk in plan.chunks]
    pages = [t[p // page_size] for t, p in zip(tables, positions, strict=True)]
    return np.concatenate(pages), np.concatenate(positions) % page_size


class HostPagesExecutor(Executor):
    """An executor whose pages lie in blocks of host memory, one of each rank.

    Args:
      blocks, layout: the pages, see `jpd.semi_pd.layout.pages_layout`.
      placement: of the ranks.
      *args, **options: of `Executor`.
    """

    def __init__(
        self,
        *args: Any,
        blocks: Sequence[Block],
        layout: Layout,
        placement: Placement,
        **options: Any,
    ) -> None:
        self._blocks, self._layout = blocks, layout
        self._views = [
            [block.array(f.offset, f.shape, f.dtype) for f in layout.fields] for block in blocks
        ]
        kv = arrays.kv_pages(blocks, layout, placement)
        super().__init__(*args, kv=kv, placement=placement, **options)

    def _written(self, plan: StepPlan) -> None:
        places = written_places(plan, self._views[0][0].shape[1])
        for rank, views in enumerate(self._views):
            computed = jax.tree.leaves(self.placement.of_rank(self.kv, rank))
            for view, new in zip(views, computed, strict=True):
                view[places] = np.asarray(new)[places]
        self.kv = arrays.kv_pages(self._blocks, self._layout, self.placement)
