"""Orbax: parameters as jpd arranges them, in a folder that is otherwise a Hugging Face one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jpd.checkpoint.config import read_json
from jpd.checkpoint.faults import Faults
from jpd.checkpoint.tree import dotted, unflatten
from jpd.errors import CheckpointError, ConfigError
from jpd.models import ModelConfig, Params, abstract_params
from jpd.models.family import flatten
from jpd.parallel import Placement
from jpd.text import TOKENIZER_FILES

SUBFOLDER = "orbax"
_MANIFEST = "orbax.json"  # sizes of files, shapes of parameters: what Orbax finds late or never


def holds_orbax(folder: Path) -> bool:
    """Whether the folder was written by `save_orbax`."""
    return (folder / SUBFOLDER).is_dir()


def save_orbax(config: ModelConfig, params: Params, folder: str | Path, source: str | Path) -> None:
    """Writes a model folder: the parameters, and the JSON and tokenizer files of `source`.

    `config.json` gets the dtype of the parameters, so that `load(folder)` gives the same bits.

    Args:
      config: The model's.
      params: Tree of `abstract_params`, all leaves of one dtype.
      folder: Must be new or empty.
      source: Model folder that the parameters were read from.

    Raises:
      ConfigError: `folder` has something in it, or `source` has no config.json.
      CheckpointError: `params` are not those of `config`.
    """
    folder, source = Path(folder).absolute(), Path(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; nothing is overwritten")
    hf_config = read_json(source / "config.json")
    dtype = str(params["embed"]["weight"].dtype)
    leaves = {dotted(path): leaf for path, leaf in flatten(params)}
    shapes = {name: list(leaf.shape) for name, leaf in leaves.items()}
    faults = Faults(f"these parameters cannot be saved to {folder}")
    _check_shapes(shapes, abstract_params(config, dtype), faults)
    for name, leaf in leaves.items():
        if str(leaf.dtype) != dtype:
            faults.add("mixed dtypes", f"{name}: {leaf.dtype}, embed.weight: {dtype}")
    faults.check()

    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / SUBFOLDER, leaves)
    _write(folder / _MANIFEST, {"files": _sizes(folder / SUBFOLDER), "parameters": shapes})
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    hf_config["dtype" if "dtype" in hf_config else "torch_dtype"] = dtype
    # Last: without it the folder is no model folder, should anything above be cut short.
    _write(folder / "config.json", hf_config)


def load_orbax(folder: Path, config: ModelConfig, dtype: str, *, placement: Placement) -> Params:
    """Restores what `save_orbax` wrote, as `dtype`, onto devices.

    Raises:
      CheckpointError: with every difference from what the config promises.
    """
    place = (folder / SUBFOLDER).absolute()
    if not place.is_dir():
        raise CheckpointError(f"{folder} has no Orbax checkpoint: no folder {SUBFOLDER!r} in it")
    tree = abstract_params(config, dtype)
    _check(folder, tree)
    paths = {dotted(path): path for path, _ in flatten(tree)}
    target = {
        dotted(path): jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=placement.in_checkpoint_order(path, leaf.shape)
        )
        for path, leaf in flatten(tree)
    }
    largest = max(math.prod(leaf.shape) * 4 for leaf in target.values())
    # Bounds the host memory in flight; Orbax refuses arrays above it, hence twice the largest.
    with ocp.StandardCheckpointer(restore_concurrent_gb=1 + (2 * largest >> 30)) as checkpointer:
        try:
            restored = checkpointer.restore(place, target)
        except jax.errors.JaxRuntimeError:
            raise  # the device's trouble, such as too little memory
        except Exception as error:  # whatever the storage library found: no common base class
            # The error itself is a page on the storage's settings, its cause is one line.
            raise CheckpointError(f"{place} cannot be read: {error.__cause__ or error}") from error
    # One by one, each let go of: the packed ones are there twice while they are rearranged.
    arrays = {path: placement.arrange(path, restored.pop(name)) for name, path in paths.items()}
    return jax.block_until_ready(unflatten(arrays))


def _sizes(place: Path) -> dict[str, int]:
    """Bytes of every file under a folder, by relative path."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): path.stat().st_size for path in files}


def _check(folder: Path, tree: Params) -> None:
    """Raises `CheckpointError` with every file that is not as written and every wrong parameter."""
    manifest = read_json(folder / _MANIFEST) if (folder / _MANIFEST).is_file() else {}
    sizes, shapes = manifest.get("files"), manifest.get("parameters")
    if not isinstance(sizes, dict) or not isinstance(shapes, dict):
        raise CheckpointError(
            f"{folder} was not written, or not to its end, by `jpd convert`: no whole {_MANIFEST}"
        )
    faults = Faults(f"{folder} cannot be loaded")
    found = _sizes(folder / SUBFOLDER)
    for name, size in sizes.items():
        if name not in found:
            faults.add("missing files", f"{SUBFOLDER}/{name}")
        elif found[name] != size:
            faults.add("damaged files", f"{SUBFOLDER}/{name}: {found[name]} of {size} bytes")
    _check_shapes(shapes, tree, faults)
    faults.check()


def _check_shapes(shapes: dict[str, list[int]], tree: Params, faults: Faults) -> None:
    """Notes parameters that only one side has, and shapes that differ."""
    wanted = {dotted(path): list(leaf.shape) for path, leaf in flatten(tree)}
    for name, shape in wanted.items():
        if name not in shapes:
            faults.add("missing parameters", name)
        elif shapes[name] != shape:
            faults.add("wrong shapes", f"{name}: {shapes[name]}, config.json makes it {shape}")
    for name in shapes:
        if name not in wanted:
            faults.add("unexpected parameters", name)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
