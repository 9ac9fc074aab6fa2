"""Which part of a model each rank has: arithmetic on the sizes of axes, no arrays on devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jpd.config import require
from jpd.errors import ConfigError
from jpd.models import ModelConfig, abstract_params
from jpd.models.family import flatten
from jpd.parallel.rules import AXES, MESH_AXIS, RULES, Axis

Path = tuple[Any, ...]
"""Of a parameter in the tree, such as `("layers", 3, "mlp", "down", "weight")`."""

_FIELDS = {
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "ffn": "ffn_size",
    "vocab": "vocab_size",
}
"""Logical axes that may be cut, and the field of `ModelConfig` with their size."""
_CHECKPOINT_NAMES = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut."""

    axis: int
    """Of the array; the others are whole on every rank."""
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    """For each rank, the (start, stop) along the axis of what it has, in its order."""

    @cached_property
    def order(self) -> np.ndarray:
        """Positions in the whole parameter of what all ranks have, rank after rank."""
        runs = [np.arange(start, stop) for rank in self.ranges for start, stop in rank]
        return np.concatenate(runs)

    @cached_property
    def in_order(self) -> bool:
        """The parts one after the other are the whole parameter."""
        return np.array_equal(self.order, np.arange(self.order.max() + 1))

    def part(self, whole: np.ndarray, rank: int) -> np.ndarray:
        """What a rank has of the parameter; a view where it lies in one piece."""
        before = (slice(None),) * self.axis
        pieces = [whole[(*before, slice(*run))] for run in self.ranges[rank]]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)


@dataclass(frozen=True)
class Split:
    """A model split over ranks.

    Args:
      model: the whole model.
      ranks: how many there are.
      axes, rules: see `jpd.parallel.rules`; the tables there when not given.

    Raises:
      ConfigError: the model cannot be split so, or the tables do not fit it.
    """

    model: ModelConfig
    ranks: int
    axes: Mapping[str, tuple[Axis, ...]] = field(default_factory=lambda: dict(AXES))
    rules: Mapping[str, str | None] = field(default_factory=lambda: dict(RULES))

    def __post_init__(self) -> None:
        if self.ranks == 1:
            return
        self._check_rules()
        for name in filter(self.cut_axes.__contains__, self.rules):
            require(
                self._fits(name, self.ranks),
                "tensor_parallel_size",
                self.ranks,
                f"it must divide the model's {_CHECKPOINT_NAMES[name]}={self._size(name)}"
                f"{' or be a multiple of it' if name == 'kv_heads' else ''}; this model takes "
                f"{', '.join(map(str, self._allowed()))}",
            )
        self._check_axes()

    @cached_property
    def cut_axes(self) -> frozenset[str]:
        """Logical axes of which each rank has a part only."""
        if self.ranks == 1:
            return frozenset()
        return frozenset(name for name, over in self.rules.items() if over == MESH_AXIS)

    @cached_property
    def rank_model(self) -> ModelConfig:
        """The model as one rank has it: the same with fewer heads, channels and tokens."""
        return self.model.replace(
            **{
                _FIELDS[name]: stop - start
                for name in self.cut_axes
                for start, stop in [self._run(name, 0)]
            }
        )

    def cut(self, path: Path) -> Cut | None:
        """How the parameter at `path` is cut; None if every rank has all of it.

        Raises:
          ConfigError: the table names no axes for it.
        """
        axes = self._axes_of(path)
        for number, axis in enumerate(axes):
            names = (axis,) if isinstance(axis, str) else axis
            if self.cut_axes & set(names):
                return Cut(number, tuple(self._ranges(names, rank) for rank in range(self.ranks)))
        return None

    def _axes_of(self, path: Path) -> tuple[Axis, ...]:
        template = ".".join("{i}" if isinstance(key, int) else key for key in path)
        if template not in self.axes:
            raise ConfigError(f"jpd.parallel.AXES has no entry {template!r}")
        return self.axes[template]

    def _size(self, name: str) -> int:
        """Heads, channels or tokens along a logical axis that may be cut."""
        return getattr(self.model, _FIELDS[name])

    def _unit(self, name: str) -> int:
        """Numbers that stay together."""
        return self.model.head_dim if name in ("heads", "kv_heads") else 1

    def _length(self, axis: Axis) -> int:
        """Numbers along an axis of a whole parameter."""
        names = (axis,) if isinstance(axis, str) else axis
        other = {"width": self.model.hidden_size, "head_dim": self.model.head_dim}
        return sum(other.get(n) or self._size(n) * self._unit(n) for n in names)

    def _run(self, name: str, rank: int) -> tuple[int, int]:
        """Which heads, channels or tokens a rank has.

        Where there are more ranks than KV heads, each head is on several, as in vLLM.
        """
        size = self._size(name)
        if size % self.ranks:
            start = rank * size // self.ranks
            return start, start + 1
        return rank * (size // self.ranks), (rank + 1) * (size // self.ranks)

    def _ranges(self, names: tuple[str, ...], rank: int) -> tuple[tuple[int, int], ...]:
        runs, offset = [], 0
        for name in names:
            unit = self._unit(name)
            start, stop = self._run(name, rank)
            runs.append((offset + start * unit, offset + stop * unit))
            offset += self._size(name) * unit
        return tuple(runs)

    def _fits(self, name: str, ranks: int) -> bool:
        size = self._size(name)
        return size % ranks == 0 or (name == "kv_heads" and ranks % size == 0)

    def _allowed(self) -> list[int]:
        most = min(self._size(name) for name in self.cut_axes - {"kv_heads"})
        fits = range(1, most + 1)
        return [n for n in fits if all(self._fits(name, n) for name in self.cut_axes)]

    def _check_rules(self) -> None:
        for name, over in self.rules.items():
            ok = over is None or (over == MESH_AXIS and name in _FIELDS)
            can = f"None, or {MESH_AXIS!r} for {', '.join(_FIELDS)}"
            require(ok, f"jpd.parallel.RULES[{name!r}]", over, can)
        if self.rules.get("heads") != self.rules.get("kv_heads"):
            raise ConfigError(
                "jpd.parallel.RULES: heads and kv_heads go together, as a query head reads the "
                "KV head of its group"
            )

    def _check_axes(self) -> None:
        """Every parameter: its axes have its shape, and the parts that the rank's layers expect."""
        parts = dict(flatten(abstract_params(self.rank_model, self.model.dtype)))
        for path, leaf in flatten(abstract_params(self.model, self.model.dtype)):
            axes, name = self._axes_of(path), ".".join(map(str, path))
            lengths = tuple(map(self._length, axes))
            if lengths != leaf.shape:
                raise ConfigError(f"jpd.parallel.AXES makes {name} {lengths}, it is {leaf.shape}")
            cut = self.cut(path)
            if cut is not None and cut.axis > 0 and not cut.in_order:
                raise ConfigError(f"jpd.parallel.AXES: {name} can be stacked along its first axis")
            part = list(leaf.shape)
            if cut is not None:
                part[cut.axis] = len(cut.order) // self.ranks
            if tuple(part) != parts[path].shape:
                raise ConfigError(
                    f"jpd.parallel: a rank's part of {name} is {tuple(part)} by AXES and RULES, "
                    f"its layer expects {parts[path].shape}"
                )
