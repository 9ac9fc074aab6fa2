"""The programs that benchmarks of attention time. JAX is imported when one is made."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.attention_cases import HEAD_SIZE, PAGE_TOKENS, Decode, Pages, Prefill

SCALE = HEAD_SIZE**-0.5
TRITON_SPLITS = (16, 8, 4, 2, 1)


def _paged(case: Decode, op: Callable[..., Any], calls: int, scope: Any) -> Any:
    """The program that calls `op(q, k_pages, v_pages, table, lengths)` over `calls` pools."""
    import jax
    import jax.numpy as jnp

    from benchmarks.device_time import Chain

    pages = Pages.shuffled(case.lengths)
    pool = (pages.count, PAGE_TOKENS, case.kv_heads, HEAD_SIZE)
    query = (case.batch, case.q_heads, HEAD_SIZE)
    spec = jax.ShapeDtypeStruct
    carried = (
        spec(query, jnp.bfloat16),
        spec(pages.table.shape, jnp.int32),
        spec(case.lengths.shape, jnp.int32),
    )

    def call(carried: Any, kv: Any) -> Any:
        q, table, lengths = carried
        return op(q, *kv, table, lengths)

    return Chain(call, carried, (spec(pool, jnp.bfloat16),) * 2, calls, scope)


def decode_chain(case: Decode, softmax: str, calls: int) -> Any:
    """Our kernel, which gives (out, recomputed); interpreted where there is no GPU.

    "async_by_head" is "async" with a unified value for each head in place of one number.
    """
    from benchmarks.gemm_impls import interpreted
    from pallas_kernels.decode_attention import decode_attention
    from pallas_kernels.workspace import workspace

    options: dict[str, Any] = {"scale": SCALE, "softmax": softmax, **interpreted()}
    if softmax == "async_by_head":
        options |= {"softmax": "async", "phi": np.zeros(case.q_heads, np.float32)}
    called: list[bool] = []

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        called.clear()
        with workspace():
            yield

    def attend(*args: Any) -> Any:
        early = bool(called)  # a program's first call may follow the kernel that makes its schedule
        called.append(True)
        result = decode_attention(*args, early=early, **options)
        return result.out, result.recomputed

    return _paged(case, attend, calls, scope)


def decode_xla_chain(case: Decode, calls: int) -> Any:
    """jpd's own XLA implementation: stands in for the kernels on a CPU. Gives (out, None)."""
    import jax

    from jpd.ops.attention import decode_attention_xla

    op = jax.jit(lambda *args: tuple(decode_attention_xla(*args, scale=SCALE)))
    return _paged(case, op, calls, contextlib.nullcontext)


def triton_splits(width: int) -> int:
    """Most splits of a page table row of this width that jax's kernel takes with 8 pages a step."""
    fits = (s for s in TRITON_SPLITS if width % s == 0 and (width // s) % min(8, width // s) == 0)
    return next(fits)


def decode_triton_chain(case: Decode, calls: int) -> Any:
    """jax's own kernel: pages `[Hkv, P, S, D]`, scores not scaled. Gives (out, None)."""
    import jax
    import jax.numpy as jnp

    from benchmarks.device_time import Chain

    with warnings.catch_warnings():  # deprecated, as everything that jax has in Triton
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    pages = Pages.shuffled(case.lengths)
    splits = triton_splits(pages.table.shape[1])
    spec = jax.ShapeDtypeStruct
    pool = spec((case.kv_heads, pages.count, PAGE_TOKENS, HEAD_SIZE), jnp.bfloat16)
    carried = (
        spec((case.batch, case.q_heads, HEAD_SIZE), jnp.bfloat16),
        spec(pages.table.shape, jnp.int32),
        spec(case.lengths.shape, jnp.int32),
    )

    def call(carried: Any, kv: Any) -> Any:
        q, table, lengths = carried
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return paged_attention(q, *kv, table, lengths, k_splits=splits), None

    return Chain(call, carried, (pool, pool), calls)


def prefill_chain(case: Prefill, impl: str, calls: int) -> Any:
    """The program of prompt chunks: our kernel, or "xla", jpd's own XLA implementation."""
    import jax
    import jax.numpy as jnp

    from benchmarks.device_time import Chain
    from benchmarks.gemm_impls import interpreted

    scope: Any = contextlib.nullcontext
    if impl == "xla":
        from jpd.ops.attention import prefill_attention_xla

        op = jax.jit(lambda *args: prefill_attention_xla(*args, scale=SCALE))
    else:
        from pallas_kernels.prefill_attention import prefill_attention
        from pallas_kernels.workspace import workspace

        options, scope = {"scale": SCALE, **interpreted()}, workspace
        op = lambda *args: prefill_attention(*args, **options)  # noqa: E731
    pages = Pages.shuffled(case.contexts)
    spec = jax.ShapeDtypeStruct
    index = spec((len(case.chunks),), jnp.int32)
    carried = (
        spec((case.tokens, case.q_heads, HEAD_SIZE), jnp.bfloat16),
        spec(pages.table.shape, jnp.int32),
        (index, index, index),
    )
    pool = spec((pages.count, PAGE_TOKENS, case.kv_heads, HEAD_SIZE), jnp.bfloat16)

    def call(carried: Any, kv: Any) -> Any:
        q, table, chunks = carried
        return op(q, *kv, table, *chunks)

    return Chain(call, carried, (pool, pool), calls, scope)
