"""What a model family brings: architecture names, a config reader and a weight-name table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jpd.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """One file a family; `jpd.models` finds it by the architecture that `config.json` names."""

    name: str
    architectures: tuple[str, ...]
    from_hf: Callable[[dict[str, Any]], ModelConfig]
    names: dict[str, tuple[str, ...]]
    """Parameter path with `{i}` for the layer -> checkpoint names, stacked along axis 0."""


def flatten(tree: dict[Any, Any], prefix: tuple[Any, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    """Yields (path, leaf) of a nested dict, in its own order."""
    for key, value in tree.items():
        path = (*prefix, key)
        if isinstance(value, dict):
            yield from flatten(value, path)
        else:
            yield path, value


def checkpoint_names(family: Family, path: tuple[Any, ...]) -> tuple[str, ...]:
    """Checkpoint names of the parameter at `path`, e.g. `("layers", 3, "mlp", "down", "weight")`.

    Raises:
      KeyError: the family's table does not hold the path.
    """
    layer = next((p for p in path if isinstance(p, int)), None)
    template = ".".join("{i}" if isinstance(p, int) else p for p in path)
    return tuple(name.format(i=layer) for name in family.names[template])
