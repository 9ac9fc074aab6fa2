"""The two FFI calls as JAX primitives.

XLA must neither drop, merge nor repeat them, so their custom calls have side effects. For JAX they
have none, unlike a `jax.ffi.ffi_call(has_side_effect=True)`: that would take every program that
they are part of off the fast path of `jit`, and order is what their buffers already give.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from native.overlap import library
from native.overlap.transfer import Transfer

start_p = Primitive("jpd_overlap_start")
"""(*after) -> packed, counters[, result]; params: transfer, communicator, size."""
start_p.multiple_results = True
done_p = Primitive("jpd_overlap_done")
"""packed, counters[, result] -> the same, in place; params: transfer, communicator."""
done_p.multiple_results = True


@start_p.def_abstract_eval
def _start_results(*_: Any, transfer: Transfer, size: int, **__: Any) -> list[Any]:
    shapes = [(transfer.shape, transfer.dtype), ((len(transfer.groups),), jnp.dtype(jnp.int32))]
    if transfer.collective != "all_reduce":
        shapes.append((transfer.result_shape(size), transfer.dtype))
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes]


@done_p.def_abstract_eval
def _done_results(*buffers: Any, **_: Any) -> list[Any]:
    return list(buffers)


def _lower_start(ctx: Any, *after: Any, transfer: Transfer, communicator: int, size: int) -> Any:
    del size
    rule = jax.ffi.ffi_lowering(library.START, has_side_effect=True)
    return rule(ctx, *after, communicator=np.int64(communicator), **transfer.attributes("start"))


def _lower_done(ctx: Any, *buffers: Any, transfer: Transfer, communicator: int) -> Any:
    rule = jax.ffi.ffi_lowering(
        library.DONE,
        has_side_effect=True,
        operand_output_aliases={i: i for i in range(len(buffers))},
    )
    return rule(ctx, *buffers, communicator=np.int64(communicator), **transfer.attributes("done"))


# The same names on both platforms; the library registers a handler for each.
mlir.register_lowering(start_p, _lower_start)
mlir.register_lowering(done_p, _lower_done)


def _no_batching(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("overlapped collectives cannot be vmapped")


def _no_derivative(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("overlapped collectives have no derivative; use jax.custom_vjp")


def _register_rules() -> None:
    from jax.interpreters import ad, batching

    for primitive in (start_p, done_p):
        batching.primitive_batchers[primitive] = _no_batching
        ad.primitive_jvps[primitive] = _no_derivative


_register_rules()
