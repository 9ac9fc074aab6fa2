"""What the Mosaic GPU kernels of this package share: layouts, SM count, launch order, tickets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, scf, vector

WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
HOPPER_SMS = 132
"""SMs assumed where no GPU is seen (lowering on a CPU)."""
SMEM_BYTES = 227 * 1024
"""Shared memory that one block may take on Hopper; two blocks an SM take half of it each."""

TARGET: ContextVar[tuple[str, int] | None] = ContextVar("pallas_kernels_target", default=None)
"""Device kind and SMs of the GPU that kernels are traced for; None is the one that jax sees."""


@contextlib.contextmanager
def tracing_for(device_kind: str, sms: int) -> Iterator[None]:
    """Kernels traced inside the block are made for this GPU, whatever the process sees.

    Args:
      device_kind: as jax names the GPU, "NVIDIA H200".
      sms: how many SMs the process that runs them may use.
    """
    token = TARGET.set((device_kind, sms))
    try:
        yield
    finally:
        TARGET.reset(token)


def sm_count() -> int:
    """SMs that this process may use: fewer under an MPS share than the chip has."""
    target = TARGET.get()
    if target is not None:
        return target[1]
    if jax.default_backend() != "gpu":
        return HOPPER_SMS
    return jax.local_devices(backend="gpu")[0].core_count


def tiled(dtype: Any, minor: int, swizzle: int | None = None) -> tuple[Any, ...]:
    """Transforms of a SMEM operand of wgmma or TMA whose last axis has `minor` elements."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = swizzle or plgpu.find_swizzle(minor * bits)
    return (
        plgpu.TilingTransform((8, swizzle * 8 // bits)),
        plgpu.SwizzleTransform(swizzle),
    )


def _by_first_thread(instruction: str, counter: Any, slot: Any) -> jax.Array:
    """What a PTX instruction on `counter` gives the first thread, handed to the warpgroup."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
    )
    def draw(ctx, counter_ref, slot_ref):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        utils = mgpu.utils
        utils.warpgroup_barrier()
        # Not `utils.single_thread`: it keeps its state in a global, and where two threads lower
        # kernels at once (jax 0.11.2) one of them loses the predicate: four warps draw tickets.
        first = scf.IfOp(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP))
        with ir.InsertionPoint(first.then_block):
            number = utils.inline_ptx(
                instruction,
                utils.memref_ptr(counter_ref),
                result_types=i32,
                has_side_effects=True,
            )
            memref.store(number, slot_ref, [utils.c(0, ir.IndexType.get())])
            scf.YieldOp([])
        utils.warpgroup_barrier()
        number = memref.load(slot_ref, [utils.c(0, ir.IndexType.get())])
        return mgpu.FragmentedArray.splat(number, (), is_signed=True)

    return draw(counter, slot)


def take_ticket(counter: Any, slot: Any, *, interpret: Any = None) -> jax.Array:
    """Adds one to `counter` (a GMEM int32 scalar ref) and returns what it was, to the warpgroup.

    Everything that the warpgroup wrote to GMEM before is visible to whoever draws a later ticket
    (acquire-release at GPU scope). `slot` is a SMEM `[1]` int32 ref through which the first thread
    hands the number to the others. In interpret mode blocks run one after another, so that a plain
    read and write does.
    """
    if interpret is not None:
        old = counter[...]
        counter[...] = old + 1
        return old
    return _by_first_thread("atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", counter, slot)


def read_ticket(counter: Any, slot: Any, *, interpret: Any = None) -> jax.Array:
    """How many tickets of `counter` were taken; what their takers wrote before is visible.

    Arguments as for `take_ticket`. One thread reads (acquire at GPU scope), so that the warpgroup
    agrees on the number.
    """
    if interpret is not None:
        return counter[...]
    return _by_first_thread("ld.acquire.gpu.global.u32 $0, [$1];", counter, slot)


def wait_for_previous(interpret: Any = None) -> None:
    """Waits until the kernels before this one are complete and their writes visible.

    Every kernel of this package calls it in every block and warpgroup before it reads what an
    earlier kernel may have written and before it writes anything to GMEM; weights may be read
    before. The launch then carries CUDA's programmatic stream serialization.
    """
    if interpret is None:
        plgpu.griddepcontrol_wait()


def let_next_start(interpret: Any = None) -> None:
    """Lets the next kernel's blocks come to the SMs while this one runs; they wait for its end.

    A product and a norm do so at once: the product that follows brings its first weights to shared
    memory as soon as the one before gives it back. The kernels of attention and what stands before
    it do so after their own wait, so that what begins after them finds all before them complete.
    """
    if interpret is None:
        plgpu.griddepcontrol_launch_dependents()


def take_turn(interpret: Any = None) -> None:
    """`wait_for_previous`, then `let_next_start`."""
    wait_for_previous(interpret)
    let_next_start(interpret)


def store(ref: Any, value: jax.Array) -> None:
    """Stores registers to GMEM in whatever layout they have; jax 0.12 asks for that by name."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def load(ref: Any, layout: Any) -> jax.Array:
    """Loads GMEM into registers in `layout`, coalesced or not."""
    return plgpu.load(ref, layout=layout, optimized=False)


def gather(
    ref: Any, width: int, place: Callable[[jax.Array], jax.Array], *, interpret: Any = None
) -> jax.Array:
    """Loads a row whose vectors lie scattered in GMEM; each thread finds where its own are.

    Args:
      ref: `[N, vector]`.
      width: numbers in the row.
      place: where in `ref` vectors of the row are, by their numbers in it; int32s both.
      interpret: as for the kernel.

    Returns:
      `[width]`, as if it were loaded in `WG_STRIDED((width,), vec_size=vector)`.
    """
    size = ref.shape[1]
    count = (width // size,)
    one_each = plgpu.Layout.WG_STRIDED(count, vec_size=1)  # a vector's number where the vector is
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=size)
    places = place(plgpu.broadcasted_iota(jnp.int32, count, 0, layout=one_each))
    if interpret is not None:
        return ref[...][places].reshape(width)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), one_each),
        return_type=plgpu.ShapeDtypeStruct((width,), ref.dtype, layout),
    )
    def load(ctx, ref, places):
        del ctx
        index = ir.IndexType.get()
        loaded_type = ir.VectorType.get((size,), ref.type.element_type)
        loaded = np.empty_like(places.registers)
        for i, at in enumerate(places.registers):
            row = arith.index_cast(index, vector.extract(at, [], [0]))
            loaded[i] = vector.load(loaded_type, ref, [row, mgpu.utils.c(0, index)])
        return mgpu.FragmentedArray(_registers=loaded, _layout=layout.to_mgpu(), _is_signed=None)

    return load(ref, places)
