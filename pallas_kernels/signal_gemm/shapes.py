"""Shapes of real models, for checks that compile the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.signal_gemm import signal_gemm
from pallas_kernels.signal_gemm.config import SignalConfig, candidates, default
from pallas_kernels.signal_gemm.layout import tile_count
from pallas_kernels.signal_gemm.schedule import groups_of_waves, waves_of

ROW_PARALLEL = tuple(
    (n, k // ranks)
    for ranks in (2, 4)
    for n, k in ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
)
"""N and K on one of 2 or 4 GPUs: what ends attention and MLP in Llama-3-8B and 70B."""
SMS = 116
"""SMs that compute: 16 of an H200's 132 are left to the collective."""


def whole_waves(m: int, n: int, config: SignalConfig, sms: int, ranks: int = 1) -> tuple[int, ...]:
    """Groups of one wave each."""
    tiles = tile_count(m, n, config, ranks)
    return groups_of_waves([1] * waves_of(tiles, sms), tiles, sms)


def call(x: jax.Array, w: jax.Array, **static: Any) -> tuple[jax.Array, jax.Array]:
    """The packed buffer and the counters, which begin at zero."""
    counters = jax.new_ref(jnp.zeros(len(static["groups"]), jnp.int32))
    packed = signal_gemm(x, w, counters, **static)
    return packed, jax.freeze(counters)


def case(
    m: int, n: int, k: int, config: SignalConfig, ranks: int = 1
) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """The call for one shape, signalled wave by wave, and its arguments."""
    groups = whole_waves(m, n, config, SMS, ranks)
    shapes = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((n, k), jnp.bfloat16)
    return functools.partial(call, groups=groups, config=config, sms=SMS, ranks=ranks), shapes


def sass_cases() -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Name, function and arguments of what is compiled to sm_90a: no register may spill."""
    found = [
        (f"signal_gemm-{m}x{n}x{k}", *case(m, n, k, default(m, n, k, SMS)))
        for n, k in ROW_PARALLEL
        for m in (2048, 16384)
    ]
    for config in candidates(4096, 8192, 2048, SMS):
        for ranks in (1, 2, 4, 8):
            name = f"signal_gemm-{ranks}-{config}"
            found.append((name, *case(4096, 8192, 2048, config, ranks)))
    return found
