"""Where parameters, pages and inputs of steps live: on one device, or cut over several.

Arrays have two orders. In the order of a checkpoint a packed weight is all of q, then all of k,
then all of v, however many ranks there are. On the devices each rank's part must lie in one piece:
its q, k and v, then those of the next rank. Both are global arrays, and both are cut over the
devices, so that no device ever holds a whole tensor of those that are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jpd.models import ModelConfig, Params
from jpd.parallel.rules import MESH_AXIS
from jpd.parallel.split import Cut, Path, Split


class Placement(Protocol):
    """What loaders and executors know about devices."""

    devices: Sequence[jax.Device]
    rank_model: ModelConfig | None
    """The model as each device has it; None if it is whole."""

    @property
    def everywhere(self) -> Sharding:
        """Of what every device has whole: inputs of steps, histories, results."""

    def pages(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Sharding]:
        """Shape and sharding of the pages of all devices, of which each has `shape`."""

    def of_rank(self, tree: Any, rank: int) -> Any:
        """What one device has of arrays, as arrays on that device."""

    def join(self, path: Path, parts: Sequence[jax.Array]) -> jax.Array:
        """A parameter for steps, of what each device has of it; nothing is copied."""

    def join_pages(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The pages of all devices, of those on each; nothing is copied."""

    def put(self, path: Path, whole: np.ndarray) -> jax.Array:
        """Sends a parameter from the host, which never changes the buffer again."""

    def in_checkpoint_order(self, path: Path, shape: tuple[int, ...]) -> Sharding:
        """How a parameter is cut while it is in the order of a checkpoint."""

    def arrange(self, path: Path, array: jax.Array) -> jax.Array:
        """A parameter for steps, of one that is placed as `in_checkpoint_order` says."""

    def accept(self, params: Params) -> Params:
        """Parameters for steps, of a tree in the order of a checkpoint that lies anywhere."""

    def show(self, params: Params) -> Params:
        """The inverse of `accept`: global arrays in the order of a checkpoint."""


class OneDevice:
    """All on one device, in the order of checkpoints."""

    rank_model = None

    def __init__(self, device: jax.Device) -> None:
        self.devices = (device,)
        self.everywhere = SingleDeviceSharding(device)

    def pages(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Sharding]:
        return shape, self.everywhere

    def of_rank(self, tree: Any, rank: int) -> Any:
        del rank
        return tree

    def join(self, path: Path, parts: Sequence[jax.Array]) -> jax.Array:
        del path
        (whole,) = parts
        return whole

    def join_pages(self, parts: Sequence[jax.Array]) -> jax.Array:
        (whole,) = parts
        return whole

    def put(self, path: Path, whole: np.ndarray) -> jax.Array:
        del path
        return jax.device_put(whole, self.devices[0])

    def in_checkpoint_order(self, path: Path, shape: tuple[int, ...]) -> Sharding:
        del path, shape
        return self.everywhere

    def arrange(self, path: Path, array: jax.Array) -> jax.Array:
        del path
        return array

    def accept(self, params: Params) -> Params:
        return jax.device_put(params, self.devices[0])

    def show(self, params: Params) -> Params:
        return params


class ManyDevices:
    """Rank r is on `devices[r]`.

    Args:
      split: the model's.
      devices: as many as the split has ranks.
    """

    def __init__(self, split: Split, devices: Sequence[jax.Device]) -> None:
        self.split = split
        self.rank_model = split.rank_model
        self.devices = tuple(devices)
        self.mesh = Mesh(np.array(self.devices), (MESH_AXIS,))
        self.everywhere = NamedSharding(self.mesh, P())
        self._programs: dict[Any, Callable[[jax.Array], jax.Array]] = {}

    def pages(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Sharding]:
        pages, tokens, heads, size = shape
        if "kv_heads" in self.split.cut_axes:
            heads *= len(self.devices)
        return (pages, tokens, heads, size), NamedSharding(self.mesh, page_spec(self.split))

    def of_rank(self, tree: Any, rank: int) -> Any:
        def part(array: jax.Array) -> jax.Array:
            (found,) = [
                shard.data
                for shard in array.addressable_shards
                if shard.device == self.devices[rank]
            ]
            return found

        return jax.tree.map(part, tree)

    def join(self, path: Path, parts: Sequence[jax.Array]) -> jax.Array:
        cut, shape = self.split.cut(path), list(parts[0].shape)
        if cut is not None:
            shape[cut.axis] = len(cut.order)
        sharding = NamedSharding(self.mesh, _spec(self.split, path))
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, list(parts))

    def join_pages(self, parts: Sequence[jax.Array]) -> jax.Array:
        return jax.make_array_from_single_device_arrays(*self.pages(parts[0].shape), list(parts))

    def put(self, path: Path, whole: np.ndarray) -> jax.Array:
        cut = self.split.cut(path)
        if cut is None:
            return jax.device_put(whole, self.everywhere)
        parts = [
            jax.device_put(cut.part(whole, rank), device)
            for rank, device in enumerate(self.devices)
        ]
        return self.join(path, parts)

    def in_checkpoint_order(self, path: Path, shape: tuple[int, ...]) -> Sharding:
        """As in steps where both orders are the same; else by columns, each rank some of all rows.

        Whole on every device is only what has no columns (a bias) or not as many for each rank.
        """
        cut = self.split.cut(path)
        if cut is None or cut.in_order:
            return NamedSharding(self.mesh, _spec(self.split, path))
        return NamedSharding(self.mesh, self._by_columns(shape))

    def _by_columns(self, shape: tuple[int, ...]) -> P:
        even = len(shape) == 2 and shape[1] % len(self.devices) == 0
        return P(None, MESH_AXIS) if even else P()

    def arrange(self, path: Path, array: jax.Array) -> jax.Array:
        cut = self.split.cut(path)
        if cut is None or cut.in_order:
            return array
        return self._program(_rows_of_rank, cut, self._by_columns(array.shape))(array)

    def accept(self, params: Params) -> Params:
        def one(path: Path, leaf: Any) -> jax.Array:
            target = self.in_checkpoint_order(path, leaf.shape)
            return self.arrange(path, jax.device_put(leaf, target))

        return _map(one, params)

    def show(self, params: Params) -> Params:
        """What is packed is copied; the rest is what the steps have."""

        def one(path: Path, leaf: jax.Array) -> jax.Array:
            cut = self.split.cut(path)
            if cut is None or cut.in_order:
                return leaf
            return self._program(_rows_of_all, cut, self._by_columns(leaf.shape))(leaf)

        return _map(one, params)

    def _program(
        self, body: Callable[..., jax.Array], cut: Cut, columns: P
    ) -> Callable[[jax.Array], jax.Array]:
        """`_rows_of_rank` or `_rows_of_all` on all devices; one for all layers."""
        key = (body, cut, columns)
        if key not in self._programs:
            specs = (columns, P(MESH_AXIS))  # what is packed is cut by its rows
            of, to = specs if body is _rows_of_rank else specs[::-1]
            mapped = jax.shard_map(
                partial(body, cut, columns != P()),
                mesh=self.mesh,
                in_specs=of,
                out_specs=to,
                check_vma=False,
            )
            self._programs[key] = jax.jit(mapped)
        return self._programs[key]


def _rows_of_rank(cut: Cut, columns: bool, x: jax.Array) -> jax.Array:
    """The rank's rows, of its columns of all rows; the ranks exchange blocks."""
    x = x[cut.order]
    if columns:
        return lax.all_to_all(x, MESH_AXIS, split_axis=0, concat_axis=1, tiled=True)
    rows = len(cut.order) // len(cut.ranges)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(MESH_AXIS) * rows, rows)


def _rows_of_all(cut: Cut, columns: bool, x: jax.Array) -> jax.Array:
    """The other way."""
    if columns:
        x = lax.all_to_all(x, MESH_AXIS, split_axis=1, concat_axis=0, tiled=True)
    else:
        x = lax.all_gather(x, MESH_AXIS, tiled=True)
    _, first = np.unique(cut.order, return_index=True)  # a KV head may be there several times
    return x[jnp.asarray(first)]


def _spec(split: Split, path: Path) -> P:
    """How a parameter is cut for steps."""
    cut = split.cut(path)
    return P() if cut is None else P(*(None,) * cut.axis, MESH_AXIS)


def param_specs(split: Split, params: Params) -> Any:
    """How every leaf of a tree of parameters is cut for steps."""
    return _map(lambda path, _: _spec(split, path), params)


def page_spec(split: Split) -> P:
    """How KV pages `[P, S, Hkv, D]` are cut: every rank has its heads of all pages."""
    return P(None, None, MESH_AXIS if "kv_heads" in split.cut_axes else None)


def _map(fn: Callable[[Path, Any], Any], params: Params) -> Any:
    """`fn` of path and leaf, over a tree of nested dicts."""

    def with_keys(path: Any, leaf: Any) -> Any:
        return fn(tuple(entry.key for entry in path), leaf)

    return jax.tree_util.tree_map_with_path(with_keys, params)


def place(split: Split, devices: Sequence[jax.Device]) -> Placement:
    """The placement of a model on as many devices as it is split over."""
    return OneDevice(devices[0]) if split.ranks == 1 else ManyDevices(split, devices)
