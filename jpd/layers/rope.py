"""Rotary position embedding in the half-rotation form of Hugging Face checkpoints."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotation; the fields after `factor` belong to "llama3" scaling."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each rotated pair, `[D / 2]` float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freq = (1.0 / np.float32(config.theta) ** exponent).astype(np.float32)
    if config.kind == "linear":
        freq = freq / np.float32(config.factor)
    elif config.kind == "llama3":
        # Llama 3.1: long waves are slowed down by `factor`, short ones kept, the rest blended.
        wavelength = 2 * math.pi / freq
        turns = config.original_max_position / wavelength
        low, high = config.low_freq_factor, config.high_freq_factor
        blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
        freq = (1 - blend) * freq / config.factor + blend * freq
    return freq.astype(np.float32)


def angles(config: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[T, D / 2]` float32 for positions `[T]`; `jpd.ops` does the rotation."""
    phase = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config, head_dim)
    return jnp.cos(phase), jnp.sin(phase)
