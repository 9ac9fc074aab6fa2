"""Kernels run for real where jax has a GPU, and in interpret mode where it has none."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu


def mode(*, races: bool = True) -> plgpu.InterpretGPUParams | None:
    """`interpret=` for a kernel under test; `races` finds data races in interpret mode."""
    if jax.default_backend() == "gpu":
        return None
    return plgpu.InterpretGPUParams(detect_races=races)


def lower(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """StableHLO of `jax.jit(function, **options)` for a GPU, with kernels lowered to MLIR."""
    lowered = jax.jit(function, **options).trace(*args).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "mosaic_gpu" in text
    return text


def run(function: Callable[..., Any], *args: Any, races: bool = True) -> Any:
    """`function(*args, interpret=...)`; without a GPU it is also lowered for one.

    Interpret mode takes kernels that Mosaic does not lower, so every case must pass both.
    """
    interpret = mode(races=races)
    if interpret is not None:
        lower(partial(function, interpret=None), *args)
    return jax.jit(partial(function, interpret=interpret))(*args)


def unexplained_races(printed: str, *places: str) -> list[str]:
    """What race detection printed, without the places where blocks meet.

    Interpret mode knows no atomics: tickets, and parts of sums that one block stores and another
    loads, look like races to it. These stand in `mosaic.py`; `places` names more.
    """
    known = ("(take_ticket)", "mosaic.py", *places)
    return [
        line
        for line in printed.splitlines()
        if line.startswith(("  read of", "  write of")) and not any(p in line for p in known)
    ]
