"""Shapes of real models, for lowering and for looking at the machine code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_attention.config import candidates, default

MODELS = {
    # name: query heads, key heads, head size, keyword arguments
    "llama-2-7b": (32, 32, 128, {}),
    "llama-3.1-8b": (32, 8, 128, {}),
    "qwen2.5-7b": (28, 4, 128, {}),
    "qwen2.5-32b": (40, 8, 128, {}),
    "llama-3.2-1b": (32, 8, 64, {}),
    "phi-3-mini": (32, 32, 96, {"window": 2047}),
    "mistral-7b": (32, 8, 128, {"window": 4096}),
    "gemma-2-9b": (16, 8, 256, {"window": 4096, "soft_cap": 50.0}),
}


def arguments(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    page_size: int = 16,
    sequences: int = 8,
    context: int = 8192,
    dtype: Any = jnp.bfloat16,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of prefill_attention's arguments."""
    shape = jax.ShapeDtypeStruct
    width = context // page_size
    pages = shape((2 * width, page_size, kv_heads, head_dim), dtype)
    numbers = shape((sequences,), jnp.int32)
    return (
        shape((tokens, heads, head_dim), dtype),
        pages,
        pages,
        shape((sequences, width), jnp.int32),
        numbers,
        numbers,
        numbers,
    )


def sass_cases(*, all_candidates: bool = False) -> list[tuple[str, Callable, tuple]]:
    """(name, function, argument shapes) of what must compile without spilling registers."""
    cases = []
    for name, (heads, kv_heads, head_dim, options) in MODELS.items():
        configs = candidates(head_dim, 16, heads) if all_candidates else [default(head_dim)]
        for config in configs:
            function = functools.partial(prefill_attention, config=config, **options)
            label = f"prefill_attention {name} {config}"
            cases.append((label, function, arguments(8192, heads, kv_heads, head_dim)))
    return cases
