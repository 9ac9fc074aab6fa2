"""Reader of one safetensors file that checks it first and then reads it in small pieces.

The format: 8 bytes little-endian header length, the header (a JSON object: tensor name -> dtype,
shape, begin and end in the data), then the data without holes. Own code because the library's NumPy
side lacks bfloat16, reports one fault at a time, and maps files into memory, where a file cut short
during the read kills the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jpd.errors import CheckpointError

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What can be read; safetensors' name -> NumPy's."""

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
_BITS |= {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8}
_BITS |= {"BOOL": 8}

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PIECE_BYTES = 1 << 24  # room for conversion: large enough for full disk speed


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` from `offset` on in `file`, as `dtype` (a safetensors name)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class StoredFile:
    """One file; `tensors` is None if its header is damaged, so that nobody knows what it held."""

    tensors: dict[str, StoredTensor] | None
    fault: str | None


def open_file(path: Path) -> StoredFile:
    """Reads and checks the header of a file; what is wrong with it is said in `fault`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"{size} bytes, too few for its header: cut short or not one")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("header is not a JSON object")
        header.pop("__metadata__", None)
        tensors = {n: _tensor(path, n, entry, 8 + length) for n, entry in header.items()}
        end = _end(tensors, 8 + length)
    except (OSError, ValueError, RecursionError) as error:
        return StoredFile(None, f"{path.name}: {error}")
    if size < end:
        return StoredFile(tensors, f"{path.name}: cut short, {size} of {end} bytes")
    if size > end:
        return StoredFile(tensors, f"{path.name}: {size - end} bytes after its last tensor")
    return StoredFile(tensors, None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


def _tensor(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One entry of a header, checked by itself; `data` is where the data of the file starts."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        if not (whole and isinstance(dtype, str) and begin <= end):
            raise ValueError("negative or not a number")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"header entry of {name!r} is malformed: {entry!r}") from error
    if dtype in _BITS and math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise ValueError(f"{name!r}: {dtype} of shape {list(shape)} in {end - begin} bytes")
    return StoredTensor(name, path, dtype, shape, data + begin, end - begin)


def _end(tensors: dict[str, StoredTensor], data: int) -> int:
    """Where the last tensor ends; raises ValueError where tensors overlap or leave holes."""
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != data:
            raise ValueError(f"{tensor.name!r} starts at byte {tensor.offset}, not {data}")
        data += tensor.nbytes
    return data


def read_into(tensor: StoredTensor, out: np.ndarray, on_bytes: Callable[[int], object]) -> None:
    """Reads a tensor into the contiguous `out` `[n]`, converted to its dtype, nearest even.

    Args:
      tensor: Its dtype is one of `DTYPES`.
      out: As many numbers as the tensor has.
      on_bytes: Called with the bytes read, piece by piece.

    Raises:
      CheckpointError: the file became shorter since `open_file`.
    """
    source = DTYPES[tensor.dtype]
    step = _PIECE_BYTES // source.itemsize
    same = source == out.dtype
    scratch = None if same else np.empty(min(step, out.size), source)
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, out.size, step):
            piece = out[start : start + step]
            raw = piece if same else scratch[: piece.size]
            _fill(file, raw, tensor)
            if not same:
                with np.errstate(over="ignore"):  # `load` looks for values beyond float16
                    piece[...] = raw
            on_bytes(raw.nbytes)


def _fill(file: FileIO, out: np.ndarray, tensor: StoredTensor) -> None:
    view = memoryview(out.view(np.uint8))
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{tensor.file} was cut short while {tensor.name} was read")
        view = view[count:]
