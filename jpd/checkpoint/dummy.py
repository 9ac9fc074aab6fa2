"""Random weights made on the device: benchmarks at real scale need no checkpoint on disk."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jpd.checkpoint.tree import unflatten
from jpd.models import ModelConfig, Params, abstract_params
from jpd.models.family import flatten


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    # One over the root of the inputs keeps the variance of activations at any width, so that no
    # dtype overflows (0.016 at width 4096, near the 0.02 that models start their training from).
    # Drawn in float32: the weights are then the same in every dtype, up to its rounding.
    return (jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5).astype(dtype)


def make_params(config: ModelConfig, dtype: str, *, seed: int, device: jax.Device) -> Params:
    """Normal matrices, norms of ones, biases of zeros; the same for the same seed and device kind.

    Nothing passes through the host. One small program is compiled per distinct shape.
    """
    arrays = {}
    with jax.default_device(device):
        # "rbg" is XLA's own generator: one operation, quick to compile at any size.
        root = jax.random.key(seed, impl="rbg")
        for number, (path, leaf) in enumerate(flatten(abstract_params(config, dtype))):
            if len(leaf.shape) > 1:
                array = _normal(jax.random.fold_in(root, number), leaf.shape, leaf.dtype)
            else:
                array = jnp.full(leaf.shape, 0 if path[-1] == "bias" else 1, leaf.dtype)
            arrays[path] = jax.device_put(array, device)
    return jax.block_until_ready(unflatten(arrays))
