"""Compiled steps: every shape ahead of time, kept in a persistent cache, late ones counted."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

from jpd.config import KernelConfig
from jpd.engine.shapes import StepShape
from jpd.engine.stored_steps import FOLDER, StepStore

logger = logging.getLogger(__name__)


KERNEL_STEP_OPTIONS: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}
"""XLA's options for steps that may hold Pallas kernels. The kernels overlap by programmatic
dependent launch: each starts while the one before it ends. That needs plain launches on a stream;
in a CUDA graph, which XLA would otherwise make of them, they would follow each other."""

NO_TRITON_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_disable_hlo_passes": "triton-softmax-rewriter,fusion-block-level-rewriter",
}
"""XLA's options for `kernels.pallas_only`: no Triton in the sampler's reductions."""


def step_options(kernels: KernelConfig) -> dict[str, Any]:
    """XLA's options for steps that may hold kernels."""
    return KERNEL_STEP_OPTIONS | (NO_TRITON_OPTIONS if kernels.pallas_only else {})


def use_cache_dir(folder: str | None) -> None:
    """Points jax's persistent compilation cache at `folder`; "" leaves jax as it is.

    None means `~/.cache/jpd/xla`, unless the process has a cache folder already.
    """
    if folder == "" or (folder is None and jax.config.jax_compilation_cache_dir):
        return
    path = Path(folder) if folder else Path.home() / ".cache" / "jpd" / "xla"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def step_store(folder: str | None) -> StepStore | None:
    """Where lowered steps are kept: in jax's compilation cache; None if that is not used.

    Args:
      folder: what `use_cache_dir` was called with; "" keeps nothing.
    """
    cache = jax.config.jax_compilation_cache_dir
    if folder == "" or not cache or not jax.config.jax_enable_compilation_cache:
        return None
    # A bucket in a cloud is no path.
    return None if "://" in cache else StepStore(Path(cache) / FOLDER)


class CompiledSteps:
    """One executable for each step shape.

    Args:
      options: XLA's compile options.
    """

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self._options = options
        self._steps: dict[StepShape, Any] = {}
        self.recompiles = 0
        """Shapes that were compiled while requests waited."""

    def compile_ahead(
        self,
        shapes: list[StepShape],
        lower_ahead: Callable[[list[StepShape]], Generator[tuple[StepShape, Callable[[], Any]]]],
        *,
        show_progress: bool,
    ) -> None:
        """Compiles all shapes; XLA works on several while Python lowers the next.

        Args:
          shapes: what to compile.
          lower_ahead: gives each shape once, with a function that any thread may call for its
            `jax.stages.Lowered`.
          show_progress: with a bar.
        """
        bar = tqdm(total=len(shapes), desc="compile", unit="step", disable=not show_progress)
        with (
            contextlib.closing(lower_ahead(shapes)) as steps,
            bar,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):

            def compile_one(shape: StepShape, lowered: Callable[[], Any]) -> None:
                self._steps[shape] = lowered().compile(self._options)
                bar.update()

            futures = [pool.submit(compile_one, *step) for step in steps]
            for future in futures:
                future.result()

    def get(self, shape: StepShape, lower: Callable[[StepShape], Any]) -> Any:
        """The step of a shape; compiled now, and counted, if it was not ahead of time.

        `lower` gives the shape's `jax.stages.Lowered`.
        """
        compiled = self._steps.get(shape)
        if compiled is None:
            start = time.perf_counter()
            compiled = self._steps[shape] = lower(shape).compile(self._options)
            self.recompiles += 1
            logger.warning("compiled %s while serving: %.1f s", shape, time.perf_counter() - start)
        return compiled

    def temp_bytes(self) -> int:
        """Largest work space of any step, in bytes."""
        sizes = [s.memory_analysis() for s in self._steps.values()]
        return max((m.temp_size_in_bytes for m in sizes if m is not None), default=0)
