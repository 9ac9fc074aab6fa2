"""The products under test, as functions x `[M, K]`, weight `[N, K]` -> y `[M, N]`.

Kernels are imported when they are asked for: a benchmark shows what does not import as a failed
row, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

Product = Callable[[jax.Array, jax.Array], jax.Array]


def interpreted() -> dict[str, Any]:
    """Arguments that make a kernel run where there is no GPU: interpreted, many times slower.

    Empty on a GPU, and where programs are lowered for one that is elsewhere.
    """
    from pallas_kernels import mosaic

    if jax.default_backend() == "gpu" or mosaic.TARGET.get() is not None:
        return {}
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return {"interpret": plgpu.InterpretGPUParams()}


def mode(impl: str, launch: str) -> str:
    """How a row was made: the variant of the program, or that a kernel was interpreted."""
    on_gpu = jax.default_backend() == "gpu"
    return launch if on_gpu or impl == "xla" else "interpreted"


def _gemv() -> Product:
    from pallas_kernels.gemv import gemv

    return lambda x, w: gemv(x, w, **interpreted())


def _flat() -> Product:
    from pallas_kernels.flat_gemm import flat_gemm

    return lambda x, w: flat_gemm(x, w, **interpreted())


def _dense() -> Product:
    from pallas_kernels.dense_gemm import dense_gemm

    return lambda x, w: dense_gemm(x, w, **interpreted())


def _xla() -> Product:
    from jpd.ops.linear import linear_xla

    return jax.jit(linear_xla)


def _table() -> Product:
    """What the table of `pallas_kernels.dataflow` chooses for the shape, as the models do."""
    from pallas_kernels import dataflow

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        if dataflow.choose(x.shape[0], *w.shape).kernel == "xla":
            return _xla()(x, w)
        return dataflow.linear(x, w, **interpreted())

    return product


def scope(name: str) -> AbstractContextManager[Any]:
    """The context in which programs with this product are traced: kernels share one workspace."""
    if name == "xla":
        return nullcontext()
    from pallas_kernels.workspace import workspace

    return workspace()


_MAKERS = {
    "table": _table,
    "gemv": _gemv,
    "flat_gemm": _flat,
    "dense_gemm": _dense,
    "xla": _xla,
}


def product(name: str) -> Product:
    """The product "table", "gemv", "flat_gemm", "dense_gemm" or "xla".

    The kernels hold jitted functions of their own; they use the counters of the program around
    them, so they are not wrapped once more.

    Raises:
        ImportError: the kernel is not there.
    """
    return _MAKERS[name]()


def is_xla(name: str, rows: int, outputs: int, inputs: int) -> bool:
    """Whether XLA computes the product, so that it searches for the fastest way on the GPU."""
    if name != "table":
        return name == "xla"
    from pallas_kernels import dataflow

    return dataflow.choose(rows, outputs, inputs).kernel == "xla"


def choice_label(rows: int, outputs: int, inputs: int) -> str:
    """What the table or the rule chooses, for a row."""
    from pallas_kernels import dataflow

    choice = dataflow.choose(rows, outputs, inputs)
    return f"{choice.kernel} by {choice.source}"
