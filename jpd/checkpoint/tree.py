"""Parameter trees by path and by dotted name; `jpd.models.family.flatten` is the way there."""

from __future__ import annotations

from typing import Any

from jpd.models import Params

ParamPath = tuple[Any, ...]


def unflatten(leaves: dict[ParamPath, Any]) -> Params:
    """The nested dict whose leaves stand at these paths."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def dotted(path: ParamPath) -> str:
    """A path as one name, `("layers", 3, "mlp", "down", "weight")` as "layers.3.mlp..."."""
    return ".".join(map(str, path))
