"""Checkpoints: from a folder on disk to a `ModelConfig` and a tree of arrays on a device.

Three formats, one result (the tree of `jpd.models.abstract_params`):

* safetensors: a Hugging Face folder. `config.json` and either `model.safetensors`, or shards listed
  by `model.safetensors.index.json`, or several `*.safetensors` without an index; looked for in this
  order. Tensors of float32, float16 or bfloat16 are converted to the asked dtype while they are
  read, one parameter at a time, so that the host needs room for two parameters beside the model.
* orbax: what `save_orbax` writes. A Hugging Face folder whose weights lie in `orbax/`, an Orbax
  checkpoint of one flat dict from dotted parameter paths ("layers.0.mlp.down.weight") to arrays:
  q, k, v and gate, up are already stacked, so that nothing is rearranged on loading.
* dummy: `config.json` alone. Random weights made on the device, for benchmarks at real scale.

Every fault of a checkpoint is found before its first weight is read, and all of them are in one
`CheckpointError`. Nothing in a folder is ever executed: pickles (`*.bin`, `*.pt`), Python files and
`auto_map` are not looked at. The network is used by `resolve_folder` alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp

from jpd.checkpoint import dummy, hf, orbax
from jpd.checkpoint.config import read_config, resolve_folder
from jpd.checkpoint.faults import Faults
from jpd.checkpoint.orbax import save_orbax
from jpd.checkpoint.phi import load_phi, save_phi
from jpd.checkpoint.tree import dotted
from jpd.config import Dtype, LoadFormat, require
from jpd.models import ModelConfig, Params, abstract_params
from jpd.models.family import flatten
from jpd.parallel import OneDevice, Placement

__all__ = [
    "load",
    "load_phi",
    "param_bytes",
    "read_config",
    "resolve_folder",
    "save_orbax",
    "save_phi",
]

_DTYPES = ("float32", "bfloat16", "float16")


def load(
    folder: str | Path,
    *,
    dtype: Dtype = "auto",
    load_format: LoadFormat = "auto",
    seed: int = 0,
    show_progress: bool = True,
    device: jax.Device | None = None,
    placement: Placement | None = None,
) -> tuple[ModelConfig, Params]:
    """Reads a model folder.

    Args:
      folder: A folder on disk, see `resolve_folder` for Hugging Face names.
      dtype: Of every parameter; "auto" takes what `config.json` says.
      load_format: "auto" takes Orbax where the folder has it, and safetensors otherwise.
      seed: Of "dummy" weights.
      show_progress: A bar of the bytes read, on stderr.
      device: Where the parameters go; JAX's default device when not given.
      placement: Where they go if they are cut over several, see `jpd.parallel`. Each rank's part is
        sent to its device alone.

    Returns:
      The config as the folder has it, and the tree of `abstract_params(config, dtype)` with a
      `jax.Array` in every leaf, all of them ready. Packed weights are in the order of `placement`.

    Raises:
      ConfigError: no usable `config.json`, or an argument that is not allowed.
      CheckpointError: the weights are not those that `config.json` promises.
    """
    folder = Path(folder)
    require(
        load_format in LoadFormat.__args__,
        "load_format",
        load_format,
        f"one of {list(LoadFormat.__args__)}",
    )
    config = read_config(folder)
    dtype = config.dtype if dtype == "auto" else dtype
    require(dtype in _DTYPES, "dtype", dtype, f"one of {list(_DTYPES)}")
    if placement is None:
        if device is None:
            (device,) = jnp.zeros(()).devices()
        placement = OneDevice(device)
    if load_format == "dummy":
        return config, dummy.make_params(config, dtype, seed=seed, placement=placement)
    if load_format == "orbax" or (load_format == "auto" and orbax.holds_orbax(folder)):
        params = orbax.load_orbax(folder, config, dtype, placement=placement)
    else:
        params = hf.load_safetensors(
            folder, config, dtype, placement=placement, show_progress=show_progress
        )
    if dtype == "float16":
        _check_finite(folder, params)
    return config, params


def _check_finite(folder: Path, params: Params) -> None:
    """float16 ends at 65504; the other types hold whatever the checkpoint's type held."""
    faults = Faults(f"{folder} cannot be loaded as float16")
    for path, leaf in flatten(params):
        if not jnp.isfinite(leaf).all():
            faults.add("parameters with values that float16 cannot hold", dotted(path))
    faults.check()


def param_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes that the parameters take on the device."""
    leaves = jax.tree.leaves(abstract_params(config, dtype))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
