"""Small problems for every kernel, with float32 results from the CPU. NumPy only.

Inputs are bf16. The results are computed once, by NumPy, so that nothing that runs on the GPU
vouches for anything else that does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from benchmarks.attention_cases import HEAD_SIZE, PAGE_TOKENS, Decode, Pages, Prefill

BF16 = ml_dtypes.bfloat16
EPS = 1e-5


class Problem(NamedTuple):
    """One kernel call: arrays in, and rows of its result."""

    arrays: dict[str, np.ndarray]
    rows: np.ndarray
    """Rows of the result that `want` holds."""
    want: np.ndarray
    """float32."""


def _random(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return (values * np.float32(scale)).astype(BF16)


def attention_rows(
    q: np.ndarray, k_pages: np.ndarray, v_pages: np.ndarray, table: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """q `[R, Hq, D]` over pages `[P, S, Hkv, D]`, table `[R, W]`; row r sees `seen[r]` tokens."""
    kv_heads, size = k_pages.shape[2:]
    out = np.empty(q.shape, np.float32)
    for row, length in enumerate(seen):
        used = table[row, : -(-int(length) // k_pages.shape[1])]
        k, v = (
            x[used].reshape(-1, kv_heads, size)[:length].astype(np.float32).transpose(1, 0, 2)
            for x in (k_pages, v_pages)
        )
        query = q[row].astype(np.float32).reshape(kv_heads, -1, size)
        scores = query @ k.transpose(0, 2, 1) * size**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[row] = (weights @ v).reshape(-1, size)
    return out


def gemm(rows: int, outputs: int, inputs: int) -> Problem:
    """x `[M, K]`, w `[N, K]`."""
    x, w = _random(1, rows, inputs), _random(2, outputs, inputs, scale=inputs**-0.5)
    checked = np.unique(np.linspace(0, rows - 1, 64).astype(np.int64))
    return Problem({"x": x, "w": w}, checked, x[checked].astype(np.float32) @ _f32(w).T)


def _f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _pools(count: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (count, PAGE_TOKENS, kv_heads, HEAD_SIZE)
    return _random(3, *shape), _random(4, *shape)


def decode(case: Decode) -> Problem:
    """q, k_pages, v_pages, table, lengths."""
    pages = Pages.shuffled(case.lengths)
    q = _random(5, case.batch, case.q_heads, HEAD_SIZE)
    k, v = _pools(pages.count, case.kv_heads)
    arrays = {"q": q, "k": k, "v": v, "table": pages.table, "lengths": case.lengths}
    want = attention_rows(q, k, v, pages.table, case.lengths)
    return Problem(arrays, np.arange(case.batch), want)


def prefill(case: Prefill) -> Problem:
    """q, k_pages, v_pages, table, starts, counts, contexts."""
    pages = Pages.shuffled(case.contexts)
    q = _random(5, case.tokens, case.q_heads, HEAD_SIZE)
    k, v = _pools(pages.count, case.kv_heads)
    rows = case.sample()
    owner, seen = case.owners(rows)
    arrays = {"q": q, "k": k, "v": v, "table": pages.table}
    arrays |= {"starts": case.starts, "counts": case.counts, "contexts": case.contexts}
    return Problem(arrays, rows, attention_rows(q[rows], k, v, pages.table[owner], seen))


def rms_norm(rows: int, width: int) -> Problem:
    """x `[M, E]`, weight `[E]`."""
    x, weight = _random(6, rows, width), _random(7, width)
    y = _f32(x)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + EPS)
    return Problem({"x": x, "weight": weight}, np.arange(rows), y * _f32(weight))


def rope_write(tokens: int, q_heads: int, kv_heads: int) -> Problem:
    """qkv, cos, sin, k_pages, v_pages, slots; the result is q, then k and v read from the pages."""
    qkv = _random(8, tokens, q_heads + 2 * kv_heads, HEAD_SIZE)
    k_pages, v_pages = _pools(-(-2 * tokens // PAGE_TOKENS), kv_heads)
    random = np.random.default_rng(9)
    slots = random.permutation(len(k_pages) * PAGE_TOKENS)[:tokens].astype(np.int32)
    angle = random.uniform(0, 6.3, (tokens, HEAD_SIZE // 2)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = _f32(qkv[:, : q_heads + kv_heads])
    left, right = np.split(turned, 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    turned = np.concatenate([left * c - right * s, right * c + left * s], axis=-1)
    want = np.concatenate([turned, _f32(qkv[:, q_heads + kv_heads :])], axis=1)
    arrays = {"qkv": qkv, "cos": cos, "sin": sin, "k": k_pages, "v": v_pages, "slots": slots}
    return Problem(arrays, np.arange(tokens), want)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "decode_attention B=16 32/8 S=2048": lambda: decode(Decode(16, 32, 8, 2048, ragged=True)),
    "decode_attention B=4 32/32 S=1024": lambda: decode(Decode(4, 32, 32, 1024)),
    "flat_gemm M=8 6144x4096": lambda: gemm(8, 6144, 4096),
    "flat_gemm M=64 4096x14336": lambda: gemm(64, 4096, 14336),
    "dense_gemm M=256 4096x4096": lambda: gemm(256, 4096, 4096),
    "dense_gemm M=2048 6144x4096": lambda: gemm(2048, 6144, 4096),
    "prefill_attention 32/8 T=1024": lambda: prefill(Prefill(32, 8, ((724, 0), (300, 500)))),
    "rms_norm 64x4096": lambda: rms_norm(64, 4096),
    "rope_write T=64 32/8": lambda: rope_write(64, 32, 8),
}
LAUNCHES = {"rope_write": 10}
"""Kernels that a call launches where these are more than one: before `rope_write` XLA copies the
pages, which are not donated here, and after it gathers what was stored. Its times hold all that."""
QUICK_PROBLEMS: dict[str, Callable[[], Problem]] = {
    "decode_attention quick": lambda: decode(Decode(2, 4, 2, 40, ragged=True)),
    "flat_gemm quick": lambda: gemm(8, 128, 128),
    "dense_gemm quick": lambda: gemm(128, 128, 128),
    "prefill_attention quick": lambda: prefill(Prefill(4, 2, ((20, 0), (33, 40)))),
    "rms_norm quick": lambda: rms_norm(3, 256),
    "rope_write quick": lambda: rope_write(3, 4, 2),
}


def save(problem: Problem, file: Path) -> None:
    """Writes a problem; bf16 as its bits, which NumPy can store."""
    bits = {k: a.view(np.uint16) if a.dtype == BF16 else a for k, a in problem.arrays.items()}
    # Not compressed: dozens of processes read it.
    np.savez(file, rows=problem.rows, want=problem.want, **{f"in_{k}": a for k, a in bits.items()})


def load(file: Path) -> Problem:
    """Reads a problem."""
    with np.load(file) as stored:
        arrays = {
            key.removeprefix("in_"): stored[key] for key in stored.files if key.startswith("in_")
        }
        rows, want = stored["rows"], stored["want"]
    bits = {k: a.view(BF16) if a.dtype == np.uint16 else a for k, a in arrays.items()}
    return Problem(bits, rows, want)


def kernel_of(name: str) -> str:
    """Name of the kernel that a problem is for."""
    return name.split()[0]


def call(name: str, interpreted: dict[str, Any]) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The kernel as a function of (the shared operands, the large ones), and the large ones' names.

    Raises:
        ImportError: the kernel is not there.
    """
    kernel = kernel_of(name)
    if kernel in ("flat_gemm", "dense_gemm"):
        if kernel == "flat_gemm":
            from pallas_kernels.flat_gemm import flat_gemm as product
        else:
            from pallas_kernels.dense_gemm import dense_gemm as product
        return lambda a, b: product(a["x"], b["w"], **interpreted), ("w",)
    options = {"scale": HEAD_SIZE**-0.5, **interpreted}
    if kernel == "decode_attention":
        from pallas_kernels.decode_attention import decode_attention

        def attend(a: Any, b: Any) -> Any:
            args = (a["q"], b["k"], b["v"], a["table"], a["lengths"])
            return decode_attention(*args, **options).out

        return attend, ("k", "v")
    if kernel == "prefill_attention":
        from pallas_kernels.prefill_attention import prefill_attention

        def attend_chunks(a: Any, b: Any) -> Any:
            chunks = (a["starts"], a["counts"], a["contexts"])
            return prefill_attention(a["q"], b["k"], b["v"], a["table"], *chunks, **options)

        return attend_chunks, ("k", "v")
    if kernel == "rms_norm":
        from pallas_kernels.rms_norm import rms_norm as norm

        return lambda a, b: norm(b["x"], a["weight"], eps=EPS, **interpreted), ("x",)
    if kernel == "rope_write":
        return _rope_write(interpreted), ("qkv",)
    raise ValueError(f"no such kernel: {kernel!r}")


def _rope_write(interpreted: dict[str, Any]) -> Callable[..., Any]:
    import jax.numpy as jnp

    from pallas_kernels.rope_write import rope_write as kernel

    def run(a: Any, b: Any) -> Any:
        heads = b["qkv"].shape[1] - 2 * a["k"].shape[2]
        q, k, v = kernel(
            b["qkv"], a["cos"], a["sin"], a["k"], a["v"], a["slots"], num_heads=heads, **interpreted
        )
        stored = [pages.reshape(-1, *pages.shape[2:])[a["slots"]] for pages in (k, v)]
        return jnp.concatenate([q, *stored], axis=1)

    return run
