"""Random weights made on the device: benchmarks at real scale need no checkpoint on disk."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jpd.checkpoint.tree import unflatten
from jpd.models import ModelConfig, Params, abstract_params
from jpd.models.family import flatten
from jpd.parallel import Placement


@partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, inputs: int) -> jax.Array:
    # One over the root of the inputs keeps the variance of activations at any width, so that no
    # dtype overflows (0.016 at width 4096, near the 0.02 that models start their training from).
    # Drawn in float32: the weights are then the same in every dtype, up to its rounding.
    return (jax.random.normal(key, shape, jnp.float32) * inputs**-0.5).astype(dtype)


def _drawn(key: jax.Array, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    """A matrix of which every device draws its own part; equal parts are drawn from equal keys."""
    places = sharding.devices_indices_map(leaf.shape)
    firsts = [
        tuple(run.indices(n)[0] for run, n in zip(index, leaf.shape, strict=True))
        for index in places.values()
    ]
    numbers = {first: number for number, first in enumerate(sorted(set(firsts)))}
    part = sharding.shard_shape(leaf.shape)
    arrays = []
    for device, first in zip(places, firsts, strict=True):
        own = key if len(numbers) == 1 else jax.random.fold_in(key, numbers[first])
        with jax.default_device(device):
            own = jax.device_put(own, device)
            arrays.append(_normal(own, part, leaf.dtype, leaf.shape[-1]))
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def make_params(config: ModelConfig, dtype: str, *, seed: int, placement: Placement) -> Params:
    """Normal matrices, norms of ones, biases of zeros; the same for the same seed, kind and number
    of devices.

    Nothing passes through the host. One small program is compiled per distinct shape.
    """
    arrays = {}
    with jax.default_device(placement.devices[0]):
        # "rbg" is XLA's own generator: one operation, quick to compile at any size.
        root = jax.random.key(seed, impl="rbg")
        for number, (path, leaf) in enumerate(flatten(abstract_params(config, dtype))):
            sharding = placement.in_checkpoint_order(path, leaf.shape)
            if len(leaf.shape) > 1:
                array = _drawn(jax.random.fold_in(root, number), leaf, sharding)
            else:
                array = jnp.full(leaf.shape, 0 if path[-1] == "bias" else 1, leaf.dtype)
                array = jax.device_put(array, sharding)
            arrays[path] = placement.arrange(path, array)
    return jax.block_until_ready(unflatten(arrays))
