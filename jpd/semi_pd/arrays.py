"""Weights and KV pages as JAX arrays over blocks of memory; for processes that run JAX."""

from __future__ import annotations

import jax

from jpd.checkpoint.tree import unflatten
from jpd.models import ModelConfig, Params, abstract_params
from jpd.models.family import flatten
from jpd.semi_pd.layout import Layout
from native.memory import Block


def weights_layout(config: ModelConfig, dtype: str) -> Layout:
    """The parameters of a model, in the order and under the paths of `abstract_params`."""
    leaves = flatten(abstract_params(config, dtype))
    return Layout.of((path, leaf.shape, str(leaf.dtype)) for path, leaf in leaves)


def params(block: Block, layout: Layout) -> Params:
    """The tree of `weights_layout`, its leaves over the block's memory."""
    return unflatten({f.path: block.jax_array(f.offset, f.shape, f.dtype) for f in layout.fields})


def kv_pages(block: Block, layout: Layout) -> list[tuple[jax.Array, jax.Array]]:
    """K and V of every layer of a `pages_layout`, over the block's memory.

    Pages that are donated to a step come back as its results: on a GPU over the same memory, on a
    CPU in new memory, from where the caller copies what is new into the block.
    """
    arrays = {f.path: block.jax_array(f.offset, f.shape, f.dtype) for f in layout.fields}
    return [(arrays[i, "k"], arrays[i, "v"]) for i in range(len(arrays) // 2)]
