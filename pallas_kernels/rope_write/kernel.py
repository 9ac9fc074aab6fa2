"""One launch between the product that makes q, k and v and the attention that reads them.

Blocks turn a few heads of one token: those of queries go to the result, those of keys, and the
values as they are, to the token's slot in the pages.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks, mosaic
from pallas_kernels.checks import DTYPES
from pallas_kernels.rope_write.config import RopeWriteConfig, default_config, layout

HEAD_SIZE_STEP, MAX_HEAD_SIZE = 16, 512


def rope_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    *,
    num_heads: int,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float | None = None,
    config: RopeWriteConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates q and k (after a norm if there is one) and stores k and v in their pages.

    Element i of a head turns with element i + D/2, in float32. Rows with equal slots race; that
    is for padding, whose rows all go to a page that nobody reads.

    Args:
      qkv: `[T, Hq + 2 Hkv, D]` bf16 or fp16: heads of q, then of k, then of v. D is a multiple of
        16 up to 512.
      cos: `[T, D / 2]` float32.
      sin: `[T, D / 2]` float32.
      k_pages: `[P, S, Hkv, D]` of qkv's dtype, updated in place when the caller donates it.
      v_pages: the same.
      slots: `[T]` int32, page * S + offset of each token, all in the pages.
      num_heads: Hq.
      q_norm: `[D]` weight of an RMS norm of every query head before it turns (Qwen3), or None.
      k_norm: the same for key heads; both or none.
      eps: added to the mean of squares in the norms.
      config: tunables, those of `default_config` when not given.
      interpret: `plgpu.InterpretGPUParams` runs it on the CPU.

    Returns:
      q `[T, Hq, D]`, k_pages, v_pages.

    Raises:
      NotImplementedError: dtype or head size is not supported, or there are no tokens or heads.
      ValueError: the shapes do not fit together, or eps is negative or not finite.
    """
    if qkv.ndim != 3 or k_pages.ndim != 4:
        raise ValueError(
            f"qkv {qkv.shape} and k_pages {k_pages.shape} must be [T, Hq + 2 Hkv, D] and "
            "[P, S, Hkv, D]"
        )
    tokens, _, size = qkv.shape
    kv_heads = k_pages.shape[2]
    expected = {
        "qkv": (qkv.shape, (tokens, num_heads + 2 * kv_heads, size)),
        "cos": (cos.shape, (tokens, size // 2)),
        "sin": (sin.shape, (tokens, size // 2)),
        "k_pages": (k_pages.shape, (*k_pages.shape[:2], kv_heads, size)),
        "v_pages": (v_pages.shape, k_pages.shape),
        "slots": (slots.shape, (tokens,)),
    }
    for name, (shape, want) in expected.items():
        if shape != want:
            raise ValueError(f"{name} has shape {shape}, {want} is expected")
    if (q_norm is None) != (k_norm is None) or (q_norm is not None and eps is None):
        raise ValueError("q_norm, k_norm and eps: all or none are given")
    checks.positive(eps=eps, or_zero=True)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (size,):
            raise ValueError(f"{name} has shape {weight.shape}, {(size,)} is expected")
    kinds = {a.dtype for a in (qkv, k_pages, v_pages, q_norm, k_norm) if a is not None}
    if len(kinds) > 1 or qkv.dtype.name not in DTYPES:
        raise NotImplementedError(
            f"dtypes {sorted(k.name for k in kinds)}: all of one of {', '.join(DTYPES)}"
        )
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32 or slots.dtype != jnp.int32:
        raise NotImplementedError(
            f"cos {cos.dtype}, sin {sin.dtype}, slots {slots.dtype}: float32, float32 and int32"
        )
    if size % HEAD_SIZE_STEP or not 0 < size <= MAX_HEAD_SIZE:
        raise NotImplementedError(
            f"head size {size}: multiples of {HEAD_SIZE_STEP} up to {MAX_HEAD_SIZE} are supported"
        )
    checks.not_empty(T=tokens, Hq=num_heads, Hkv=kv_heads)
    return _rope_write(
        qkv,
        cos,
        sin,
        slots,
        () if q_norm is None else (q_norm, k_norm),
        k_pages,
        v_pages,
        num_heads=num_heads,
        eps=None if q_norm is None else float(eps),
        config=config or default_config(num_heads, kv_heads),
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("num_heads", "eps", "config", "interpret"))
def _rope_write(
    qkv, cos, sin, slots, norms, k_pages, v_pages, *, num_heads, eps, config, interpret
):
    tokens, _, size = qkv.shape
    _, page_size, kv_heads, _ = k_pages.shape
    half, dtype = size // 2, qkv.dtype
    query_blocks = num_heads // config.query_heads
    kv_blocks = kv_heads // config.kv_heads
    blocks = query_blocks + 2 * kv_blocks

    def body(*refs):
        qkv_ref, cos_ref, sin_ref, slots_ref, *norm_refs, k_ref, v_ref, q_ref = refs
        # One axis: the others of a CUDA grid end at 65535.
        block = lax.axis_index("block")
        token, part = lax.div(block, blocks), lax.rem(block, blocks)
        mosaic.take_turn(interpret)

        def load(first, count):
            """Left and right halves `[count, D / 2]` of heads that start at `first`."""
            rows = qkv_ref.at[token, pl.ds(first, count)]
            return [
                plgpu.load(rows.at[:, pl.ds(at, half)], layout=layout(count, half), optimized=False)
                for at in (0, half)
            ]

        def store(rows, halves):
            for at, values in zip((0, half), halves, strict=True):
                rows[:, pl.ds(at, half)] = values

        def row_of(ref, shape):
            """A `[D / 2]` ref as every row of an array, in float32."""
            row = plgpu.load(ref, layout=layout(*shape).reduce(0), optimized=False)
            return lax.broadcast_in_dim(row.astype(jnp.float32), shape, (1,))

        def normed(halves, weight_ref):
            halves = [x.astype(jnp.float32) for x in halves]
            shape = halves[0].shape
            square = jnp.sum(sum(x * x for x in halves), axis=1)
            inverse = lax.rsqrt(square * (1 / size) + eps)
            inverse = lax.broadcast_in_dim(inverse, shape, (0,))
            weights = [row_of(weight_ref.at[pl.ds(at, half)], shape) for at in (0, half)]
            # Rounded twice, as a norm and a product of this dtype would be.
            return [
                ((x * inverse).astype(dtype).astype(jnp.float32) * w).astype(dtype)
                for x, w in zip(halves, weights, strict=True)
            ]

        def turned(halves, norm):
            if norm_refs:
                halves = normed(halves, norm_refs[norm])
            left, right = (x.astype(jnp.float32) for x in halves)
            cos_row, sin_row = (row_of(ref.at[token], left.shape) for ref in (cos_ref, sin_ref))
            return [
                (left * cos_row - right * sin_row).astype(dtype),
                (right * cos_row + left * sin_row).astype(dtype),
            ]

        @pl.when(part < query_blocks)
        def _():
            first, count = part * config.query_heads, config.query_heads
            store(q_ref.at[token, pl.ds(first, count)], turned(load(first, count), 0))

        @pl.when(part >= query_blocks)
        def _():
            count = config.kv_heads
            group = part - query_blocks
            slot = slots_ref[token]
            page, offset = lax.div(slot, page_size), lax.rem(slot, page_size)

            @pl.when(group < kv_blocks)
            def _():
                first = group * count
                rows = k_ref.at[page, offset, pl.ds(first, count)]
                store(rows, turned(load(num_heads + first, count), 1))

            @pl.when(group >= kv_blocks)
            def _():
                first = (group - kv_blocks) * count
                rows = v_ref.at[page, offset, pl.ds(first, count)]
                store(rows, load(num_heads + kv_heads + first, count))

    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    q = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, num_heads, size), dtype),
        grid=(tokens * blocks,),
        grid_names=("block",),
        compiler_params=mosaic.WARPGROUP,
        kernel_name="rope_write",
        **({} if interpret is None else {"interpret": interpret}),
    )(qkv, cos, sin, slots, *norms, k_ref, v_ref)
    return q, jax.freeze(k_ref), jax.freeze(v_ref)
