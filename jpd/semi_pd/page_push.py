"""Sends KV pages to decode devices while prefill devices fill them, layer by layer.

Runs in a prefill executor's process, which maps the pages of both: on GPUs it writes to the other's
memory over NVLink or PCIe (peer access by CUDA IPC), on a CPU both are host memory. The compiled
step says after each layer that its pages are filled, and `native.kv_push` copies them beside what
the step computes next.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jpd.engine.plan import PageCopy
from jpd.semi_pd.layout import Layout
from native import kv_push
from native.kv_push import Arrival, Link
from native.memory import Block

if TYPE_CHECKING:
    import jax

    from jpd.engine.step import KVPages


@dataclass(frozen=True)
class PushProgress:
    """What a step calls, see `jpd.engine.step.Progress`."""

    targets: ClassVar[tuple[str, ...]] = kv_push.TARGETS

    def filled(
        self, layer: int, following: jax.Array, keys: jax.Array, values: jax.Array
    ) -> jax.Array:
        return kv_push.filled(layer, following, keys, values)

    def ended(self, last: jax.Array, kv: KVPages) -> jax.Array:
        return kv_push.ended(last, itertools.chain.from_iterable(kv))


class PagePusher:
    """Says before each step what it is to send, and when all of it has arrived.

    Args:
      sources, targets: blocks of pages, of each rank.
      layout: of each block, see `jpd.semi_pd.layout.pages_layout`.
      devices: of the ranks.
    """

    def __init__(
        self,
        sources: Sequence[Block],
        targets: Sequence[Block],
        layout: Layout,
        devices: Sequence[jax.Device],
    ) -> None:
        pages = layout.fields[0].shape[0]
        self._targets = list(targets)  # mapped as long as they are held
        self._links: list[Link] = []
        for source, target, device in zip(sources, targets, devices, strict=True):
            # XLA's CPU client has the pages of each step elsewhere.
            from_there = [0 for _ in layout.fields]
            if source.device != "cpu":
                from_there = _addresses(source, layout)
            link = Link(
                device,
                from_there,
                _addresses(target, layout),
                pages=pages,
                page_bytes=layout.fields[0].nbytes // pages,
            )
            self._links.append(link)

    def announce(self, copies: Sequence[PageCopy]) -> list[int]:
        """Says what the step that is launched next sends.

        Returns:
          Numbers to `wait` for, of each rank.
        """
        source = [page for copy in copies for page in copy.source]
        target = [page for copy in copies for page in copy.target]
        return [link.announce(source, target) for link in self._links]

    def wait(self, numbers: Sequence[int]) -> Arrival:
        """Waits until all pages of a step that has run are there, of all ranks."""
        found = [link.wait(number) for link, number in zip(self._links, numbers, strict=True)]
        return Arrival(
            sum(each.nbytes for each in found),
            sum(each.overlapped_bytes for each in found),
            max(each.late_s for each in found),
        )

    def close(self) -> None:
        """Lets go, when the copies under way are done."""
        for link in self._links:
            link.close()


def _addresses(block: Block, layout: Layout) -> list[int]:
    """Of each field in a block, as this process maps it."""
    views: list[Any] = [block.array(f.offset, f.shape, f.dtype) for f in layout.fields]
    return [v.ctypes.data if block.device == "cpu" else v.data.ptr for v in views]
