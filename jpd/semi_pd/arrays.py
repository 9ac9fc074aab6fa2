"""Weights and KV pages as JAX arrays over blocks of memory; for processes that run JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jpd.checkpoint.tree import unflatten
from jpd.errors import ConfigError
from jpd.models import ModelConfig, Params, abstract_params
from jpd.models.family import flatten
from jpd.parallel import Placement
from jpd.semi_pd.layout import Layout
from native.memory import Block


def start_jax(places: Sequence[str]) -> list[jax.Device]:
    """Starts JAX in this process on the devices of blocks, and on no others.

    Args:
      places: for each rank "cpu" or "cuda:N", the device of its blocks. On a CPU each rank gets a
        device of its own, whatever the number of CPUs.

    Returns:
      The ranks' devices.

    Raises:
      ConfigError: jax does not find them.
    """
    on_cpu = places[0] == "cpu"
    if on_cpu and len(places) > 1:
        jax.config.update("jax_num_cpu_devices", len(places))
    elif not on_cpu:
        # A process may see other GPUs, to read their pages.
        ordinals = ",".join(place.removeprefix("cuda:") for place in places)
        jax.config.update("jax_cuda_visible_devices", ordinals)
    devices = jax.devices()[: len(places)]
    if on_cpu != (devices[0].platform == "cpu") or len(devices) < len(places):
        raise ConfigError(
            f"weights lie on {', '.join(places)}, but jax found only {devices}: "
            "a GPU needs jpd[cuda12] or jpd[cuda13]; JAX_PLATFORMS=cpu keeps all on the CPU"
        )
    return devices


def weights_layout(config: ModelConfig, dtype: str) -> Layout:
    """The parameters of a rank's model, in the order and under the paths of `abstract_params`."""
    leaves = flatten(abstract_params(config, dtype))
    return Layout.of((path, leaf.shape, str(leaf.dtype)) for path, leaf in leaves)


def params(blocks: Sequence[Block], layout: Layout, placement: Placement) -> Params:
    """Parameters for steps, over the ranks' blocks of a `weights_layout`."""
    parts = [_arrays(block, layout, d) for block, d in zip(blocks, placement.devices, strict=True)]
    return unflatten({path: placement.join(path, [p[path] for p in parts]) for path in parts[0]})


def kv_pages(
    blocks: Sequence[Block], layout: Layout, placement: Placement
) -> list[tuple[jax.Array, jax.Array]]:
    """K and V of every layer, over the ranks' blocks of a `pages_layout`.

    Pages that are donated to a step come back as its results: on a GPU over the same memory, on a
    CPU in new memory, from where the caller copies what is new into the blocks.
    """
    parts = [_arrays(block, layout, d) for block, d in zip(blocks, placement.devices, strict=True)]
    whole = {path: placement.join_pages([p[path] for p in parts]) for path in parts[0]}
    return [(whole[i, "k"], whole[i, "v"]) for i in range(len(whole) // 2)]


def addresses(tree: Any) -> list[int]:
    """Where the arrays of a tree lie, on each of their devices."""
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    ]


def _arrays(block: Block, layout: Layout, device: jax.Device) -> dict[tuple, jax.Array]:
    """The fields of a layout over one block."""
    return {f.path: block.jax_array(f.offset, f.shape, f.dtype, device) for f in layout.fields}
