"""The launch of the decode attention kernel: operands, results, shared memory, grid."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.decode_attention import plan as plans
from pallas_kernels.decode_attention.config import TILE
from pallas_kernels.decode_attention.kernel import FIRST, Body
from pallas_kernels.decode_attention.spec import Spec
from pallas_kernels.mosaic import WARPGROUP, tiled


def launch(
    spec: Spec,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    plan: plans.Plan,
    phi: jax.Array | None,
    counters: Any,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Calls the kernel: output, recomputed, lse (None if not wanted)."""
    batch, heads, _ = q.shape
    kv_heads = k_pages.shape[2]
    rows, columns = spec.rows, spec.columns
    dtype = jnp.dtype(spec.dtype)
    buffers = spec.config.buffers
    f32, i32 = jnp.float32, jnp.int32
    synchronized = spec.softmax != "async"

    inputs = {"q": q, "k": k_pages, "v": v_pages, "table": page_table, "lengths": lengths}
    inputs |= {"ends": plan.ends, "starts": plan.starts}
    if phi is not None:
        inputs["phi"] = phi
    inputs["counters"] = counters

    struct = jax.ShapeDtypeStruct
    outputs = {"out": struct(q.shape, q.dtype), "recomputed": struct((batch, kv_heads), i32)}
    if spec.return_lse:
        outputs["lse"] = struct((batch, heads), f32)
    parts = (spec.blocks + spec.config.merge, 2, kv_heads)  # a round reads past the last
    outputs["part_o"] = struct((*parts, columns, rows), f32)
    outputs["part_l"] = struct((*parts, rows), f32)
    if synchronized:
        outputs["part_m"] = struct((*parts, rows), f32)

    # All operands of a wgmma share the swizzle that the head size allows.
    swizzle = plgpu.find_swizzle(spec.head_size * dtype.itemsize * 8)
    layout = tiled(dtype, columns, swizzle)
    # Queries and output too, or Mosaic picks the widest swizzle for them, whose tiles do not divide
    # a head size of 96. TMA copies only whole tiles, so a group that ends within one stays untiled.
    rows_layout = layout if spec.group == rows else ()
    pages = TILE // spec.page_size
    scratch = {
        "ring": plgpu.SMEM((buffers, TILE, columns), dtype, transforms=layout),
        "q_raw": plgpu.SMEM((2, rows, columns), dtype, transforms=rows_layout),
        "q_s": plgpu.SMEM((rows, columns), dtype, transforms=layout),
        "p_s": plgpu.SMEM((rows, TILE), dtype, transforms=layout),
        "o_s": plgpu.SMEM((rows, columns), dtype, transforms=rows_layout),
        "numbers_s": plgpu.SMEM((3, rows), f32),
        "list_s": plgpu.SMEM((FIRST + batch,), i32),
        "full": plgpu.Barrier(num_arrivals=pages, num_barriers=buffers),
        "empty": plgpu.Barrier(num_barriers=buffers),
        "q_full": plgpu.Barrier(num_barriers=2),
        "q_empty": plgpu.Barrier(num_barriers=2),
    }
    if not synchronized:
        scratch["again"] = plgpu.Barrier(num_arrivals=2 * pages, num_barriers=buffers // 2)
        scratch["q_again"] = plgpu.Barrier()

    names = (*inputs, *outputs, *scratch)

    def body(*refs: Any) -> None:
        Body(spec, dict(zip(names, refs, strict=True)), interpret).run()

    results = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        scratch_types=tuple(scratch.values()),
        grid=(spec.blocks, kv_heads),
        grid_names=("block", "head"),  # the last axis runs fastest: heads share DRAM pages
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=WARPGROUP,
        kernel_name="decode_attention",
        **({} if interpret is None else {"interpret": interpret}),
    )(*inputs.values())
    named = dict(zip(outputs, results, strict=True))
    return named["out"], named["recomputed"], named.get("lse")
