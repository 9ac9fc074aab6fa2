"""Brings the KV pages of sequences from a prefill device to a decode device.

Runs in the decode executor's process, which maps the pages of both: on GPUs it reads the other's
memory over NVLink or PCIe (peer access by CUDA IPC), on a CPU both are host memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jpd.engine.plan import PageCopy
from jpd.semi_pd.layout import Layout
from native.memory import Block


class PageCopier:
    """Copies whole pages of all layers.

    Args:
      source, target: blocks of pages.
      layout: of both, see `jpd.semi_pd.layout.pages_layout`.
    """

    def __init__(self, source: Block, target: Block, layout: Layout) -> None:
        self._on_cpu = target.device == "cpu"
        self._views = [
            tuple(block.array(f.offset, f.shape, f.dtype) for block in (source, target))
            for f in layout.fields
        ]
        self._page_bytes = sum(f.nbytes // f.shape[0] for f in layout.fields)

    def copy(self, copies: list[PageCopy]) -> int:
        """Returns when the pages are there.

        Nobody else touches them meanwhile: those of the source are released, and those of the
        target used, after the step that the copies belong to.

        Returns:
          Bytes copied.
        """
        if not copies:
            return 0
        source = np.concatenate([copy.source for copy in copies])
        target = np.concatenate([copy.target for copy in copies])
        if not self._on_cpu:
            return self._copy_on_gpu(source, target)
        for theirs, ours in self._views:
            ours[target] = theirs[source]
        return len(source) * self._page_bytes

    def _copy_on_gpu(self, source: np.ndarray, target: np.ndarray) -> int:
        import cupy

        with self._views[0][1].device, cupy.cuda.Stream(non_blocking=True) as stream:
            from_pages, to_pages = cupy.asarray(source), cupy.asarray(target)
            theirs: Any
            for theirs, ours in self._views:
                ours[to_pages] = theirs[from_pages]
            stream.synchronize()
        return len(source) * self._page_bytes
