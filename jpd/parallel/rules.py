"""The table of tensor parallelism: names for the axes of parameters, and which of them are cut.

Both tables are read when an engine is built, so that another split can be tried by changing an
entry before: `jpd.parallel.RULES["vocab"] = None` keeps embedding and logits whole on every rank.
"""

from __future__ import annotations

MESH_AXIS = "tp"
"""The axis of the device mesh."""

Axis = str | tuple[str, ...]
"""A logical axis, or several that are stacked along one axis of an array: each is then cut by
itself, and a rank has its part of the first, then its part of the second, and so on."""

AXES: dict[str, tuple[Axis, ...]] = {
    "embed.weight": ("vocab", "width"),
    "layers.{i}.attention_norm.weight": ("width",),
    "layers.{i}.attention.qkv.weight": (("heads", "kv_heads", "kv_heads"), "width"),
    "layers.{i}.attention.qkv.bias": (("heads", "kv_heads", "kv_heads"),),
    "layers.{i}.attention.q_norm.weight": ("head_dim",),
    "layers.{i}.attention.k_norm.weight": ("head_dim",),
    "layers.{i}.attention.out.weight": ("width", "heads"),
    "layers.{i}.attention.out.bias": ("width",),
    "layers.{i}.mlp_norm.weight": ("width",),
    "layers.{i}.mlp.gate_up.weight": (("ffn", "ffn"), "width"),
    "layers.{i}.mlp.gate_up.bias": (("ffn", "ffn"),),
    "layers.{i}.mlp.down.weight": ("width", "ffn"),
    "layers.{i}.mlp.down.bias": ("width",),
    "norm.weight": ("width",),
    "lm_head.weight": ("vocab", "width"),
}
"""Parameter path, with `{i}` for the layer -> its axes. `heads` and `kv_heads` count heads of
`head_dim` numbers each. KV pages `[P, S, Hkv, D]` follow `kv_heads`."""

RULES: dict[str, str | None] = {
    "heads": MESH_AXIS,
    "kv_heads": MESH_AXIS,
    "ffn": MESH_AXIS,
    # Cut, for three reasons: the two largest tensors are not kept whole on every device; with tied
    # embeddings one tensor is both, and this cut suits both; and each logit is computed on one
    # rank alone, so that all ranks sample from the same bits.
    "vocab": MESH_AXIS,
    "width": None,
    "head_dim": None,
}
"""Logical axis -> the mesh axis that it is cut over, or None: every rank has all of it."""
