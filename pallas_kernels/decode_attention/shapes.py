"""Shapes that decode attention must lower and compile for: real models and the edges."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import decode_attention

# name: (B, Hq, Hkv, D, page size, W, options)
CASES: dict[str, tuple[int, int, int, int, int, int, dict[str, Any]]] = {
    "llama-2-7b B=1": (1, 32, 32, 128, 16, 256, {}),
    "llama-2-7b B=256 fp16": (256, 32, 32, 128, 16, 256, {"dtype": "float16"}),
    "llama-3.1-8b B=32": (32, 32, 8, 128, 16, 2048, {}),
    "llama-3.1-8b B=1 lse": (1, 32, 8, 128, 64, 512, {"return_lse": True}),
    "qwen2.5-7b B=8": (8, 28, 4, 128, 16, 2048, {}),
    "64/8 B=128": (128, 64, 8, 128, 32, 1024, {}),
    "multi-query": (4, 16, 1, 128, 64, 64, {}),
    "D=64, group of 5": (8, 40, 8, 64, 16, 64, {}),
    "D=96": (8, 32, 32, 96, 16, 64, {}),
    "D=96, group of 8": (8, 32, 4, 96, 16, 64, {}),
    "D=256, window, soft cap": (8, 16, 8, 256, 16, 64, {"window": 4096, "soft_cap": 50.0}),
    "D=256, group of 16": (8, 16, 1, 256, 32, 64, {}),
    "phi by head": (8, 32, 8, 128, 16, 64, {"phi": True}),
    "sync": (8, 32, 8, 128, 16, 64, {"softmax": "sync", "return_lse": True}),
    "lazy": (8, 28, 4, 128, 16, 64, {"softmax": "lazy"}),
    "llama-2-7b B=1 early": (1, 32, 32, 128, 16, 256, {"early": True}),
    "llama-3.1-8b B=1 early": (1, 32, 8, 128, 16, 512, {"early": True}),
    "llama-3.1-8b B=32 early": (32, 32, 8, 128, 16, 2048, {"early": True}),
    "qwen2.5-7b B=64 fp16 early": (64, 28, 4, 128, 16, 64, {"early": True, "dtype": "float16"}),
    "64/4 B=1, early": (1, 64, 4, 128, 16, 64, {"early": True}),
    "64/4 B=32, early": (32, 64, 4, 128, 16, 64, {"early": True}),
    "D=64, B=1, window, early": (1, 32, 4, 64, 16, 64, {"early": True, "window": 512}),
    "D=96, group of 16, early": (1, 32, 2, 96, 16, 64, {"early": True}),
    "D=256, group of 16, early": (8, 16, 1, 256, 32, 64, {"early": True}),
    "sync B=1 early": (1, 32, 8, 128, 16, 64, {"early": True, "softmax": "sync"}),
    "lazy 64/4 B=1": (1, 64, 4, 128, 16, 64, {"softmax": "lazy", "return_lse": True}),
    "sync D=256": (1, 32, 8, 256, 16, 64, {"softmax": "sync", "return_lse": True}),
}


def sass_cases() -> list[tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """(name, function, argument shapes) of every case."""
    cases = []
    for name, (batch, heads, kv_heads, size, page, width, options) in CASES.items():
        options = dict(options)
        dtype = jnp.dtype(options.pop("dtype", "bfloat16"))
        pool = jax.ShapeDtypeStruct((batch * width // 2 + 1, page, kv_heads, size), dtype)
        shapes = (
            jax.ShapeDtypeStruct((batch, heads, size), dtype),
            pool,
            pool,
            jax.ShapeDtypeStruct((batch, width), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        )
        if options.pop("phi", False):
            shapes = (*shapes, jax.ShapeDtypeStruct((heads,), jnp.float32))

            def function(*args: Any, options: dict[str, Any] = options) -> Any:
                return decode_attention(*args[:5], phi=args[5], **options)

        else:
            function = functools.partial(decode_attention, **options)
        cases.append((f"decode_attention {name}", function, shapes))
    return cases
