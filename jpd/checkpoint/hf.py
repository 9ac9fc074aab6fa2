"""Hugging Face safetensors folders: find every fault, then stream parameter by parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jpd.checkpoint.config import read_json
from jpd.checkpoint.faults import Faults
from jpd.checkpoint.safetensors import DTYPES, StoredTensor, open_file, read_into
from jpd.checkpoint.tree import ParamPath, unflatten
from jpd.errors import ConfigError
from jpd.models import ModelConfig, Params, abstract_params, family_of
from jpd.models.family import checkpoint_names, flatten
from jpd.parallel import Placement

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class _Part:
    """What one checkpoint tensor must be: a range of rows of a parameter."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Folder:
    """What a folder's safetensors files hold by their headers."""

    tensors: dict[str, StoredTensor]
    promised: dict[str, str]
    """Tensor name -> file name by the index; empty without one."""
    unreadable: set[str]
    """File names, of the index or the folder, whose tensors nobody knows."""


def load_safetensors(
    folder: Path, config: ModelConfig, dtype: str, *, placement: Placement, show_progress: bool
) -> Params:
    """Reads a folder's safetensors files onto devices; every byte of them once.

    Host memory beside the result: the parameter that is read and the one still on its way to the
    device (on a CPU the result is host memory too).

    Raises:
      CheckpointError: with every fault found in the folder; nothing was loaded then.
    """
    leaves = dict(flatten(abstract_params(config, dtype)))
    parts = {path: _parts(config, path, leaf.shape) for path, leaf in leaves.items()}
    tensors = _checked(folder, config, [part for group in parts.values() for part in group])
    stored = {path: [tensors[part.name] for part in group] for path, group in parts.items()}
    # File by file, front to back: what spinning and network disks are fast at.
    order = sorted(stored, key=lambda path: (stored[path][0].file, stored[path][0].offset))
    arrays: dict[ParamPath, jax.Array] = {}
    before = None
    with tqdm(
        total=sum(t.nbytes for group in stored.values() for t in group),
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        disable=not show_progress,
    ) as bar:
        for path in order:
            array = placement.put(path, _read(stored[path], leaves[path], bar.update))
            if before is not None:
                before.block_until_ready()
            before = arrays[path] = array
    return jax.block_until_ready(unflatten(arrays))


def _read(
    stored: list[StoredTensor], leaf: jax.ShapeDtypeStruct, on_bytes: Callable[[int], object]
) -> np.ndarray:
    """One parameter from its parts. The buffer is never used again: on a CPU JAX may keep it."""
    host = np.empty(leaf.shape, leaf.dtype)
    row = 0
    for tensor in stored:
        rows = tensor.shape[0]
        read_into(tensor, host[row : row + rows].reshape(-1), on_bytes)
        row += rows
    return host


def _parts(config: ModelConfig, path: ParamPath, shape: tuple[int, ...]) -> list[_Part]:
    """The checkpoint tensors that are stacked along axis 0 to the parameter at `path`."""
    names = checkpoint_names(family_of(config), path)
    if "qkv" in path:
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        rows = [n * config.head_dim for n in heads]
    else:
        rows = [shape[0] // len(names)] * len(names)
    return [_Part(name, (n, *shape[1:])) for name, n in zip(names, rows, strict=True)]


def _checked(folder: Path, config: ModelConfig, parts: list[_Part]) -> dict[str, StoredTensor]:
    """The folder's tensors by name, all of `parts` among them and all as they must be."""
    faults = Faults(f"{folder} cannot be loaded")
    found = _scan(folder, faults)
    required = {part.name: part for part in parts}
    # Without an index nobody knows what an unreadable file held: then more may be there than seen.
    unknown = bool(found.unreadable) and not found.promised
    missing = "missing tensors (some may be in the damaged files)" if unknown else "missing tensors"
    for name in dict.fromkeys([*required, *found.promised]):
        if name not in found.tensors and found.promised.get(name) not in found.unreadable:
            place = found.promised.get(name)
            faults.add(missing, f"{name}, not in {place} as indexed" if place else name)
    for name, tensor in found.tensors.items():
        part = required.get(name)
        if part is None:
            if not _is_ignored(name, config):
                faults.add("unexpected tensors", f"{name} {list(tensor.shape)}")
            continue
        if tensor.shape != part.shape:
            faults.add(
                "wrong shapes",
                f"{name}: {list(tensor.shape)}, config.json makes it {list(part.shape)}",
            )
        if tensor.dtype not in DTYPES:
            faults.add(
                "unsupported dtypes", f"{name}: {tensor.dtype}, allowed: {', '.join(DTYPES)}"
            )
    faults.check()
    return found.tensors


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that some writers store although they follow from the config or from others."""
    tied_copy = config.tie_embeddings and name == "lm_head.weight"
    return tied_copy or fnmatchcase(name, "*.rotary_emb.inv_freq")


def _scan(folder: Path, faults: Faults) -> _Folder:
    """Reads the headers of all files that make up the checkpoint."""
    promised = {}
    if (folder / _SINGLE).is_file():
        files = [_SINGLE]
    elif (folder / _INDEX).is_file():
        promised = _read_index(folder / _INDEX, faults)
        files = sorted(set(promised.values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            nothing = f"{_SINGLE}, {_INDEX} or any *.safetensors{_others(folder)}"
            faults.add("missing files", nothing)
            faults.check()
    tensors: dict[str, StoredTensor] = {}
    unreadable = set()
    copies: Counter[str] = Counter()
    for name in files:
        if not (folder / name).is_file():
            count = sum(file == name for file in promised.values())
            faults.add("missing files", f"{name}, which the index names for {count} tensors")
            unreadable.add(name)
            continue
        file = open_file(folder / name)
        if file.fault:
            faults.add("damaged files", file.fault)
        if file.tensors is None:
            unreadable.add(name)
            continue
        copies.update(file.tensors.keys())
        tensors |= file.tensors
    for name, count in copies.items():
        if count > 1:
            faults.add("tensors in more than one file", f"{name}, in {count} files")
    return _Folder(tensors, promised, unreadable)


def _read_index(path: Path, faults: Faults) -> dict[str, str]:
    """Tensor name -> file name. A damaged index ends the search: it names what to look into."""
    try:
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ConfigError(f"{path} has no weight_map")
        for file in names.values():
            # A name with a folder in it would read from outside of the checkpoint.
            ok = isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
            if not ok:
                raise ConfigError(f"{path} names {file!r}, not a safetensors file of the folder")
    except ConfigError as error:
        faults.add("damaged files", str(error))
        faults.check()
    return names


def _others(folder: Path) -> str:
    """What lies there instead, if it is weights in a format that jpd does not read."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if not pickles:
        return ""
    return f"; {', '.join(pickles)} could run code when read: convert to safetensors first"
