"""`jpd_phi.json` beside a checkpoint: the unified values of its asynchronous softmax.

FlashDecoding++ (arXiv 2311.01282, section 3) subtracts one value phi from the scores of a softmax
row in place of the row's maximum. Here phi belongs to a layer and a query head: the middle of the
log-sum-exps that `jpd calibrate` saw. A wrong phi gives no wrong result, only rows that are
computed twice, but it is a sign of a mistake; so the file names the checkpoint it was made from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from jpd.checkpoint.config import read_json
from jpd.checkpoint.orbax import SUBFOLDER
from jpd.errors import ConfigError
from jpd.models import ModelConfig

FILE = "jpd_phi.json"
_SAMPLE_BYTES = 1 << 16


def fingerprint(folder: str | Path) -> str:
    """A hash of a model folder's config.json and weights that reads little of them.

    SHA-256 over `config.json`, and of every weight file (`*.safetensors`, files under `orbax/`) its
    name, its size and 64 KiB each at its start (where safetensors describes the tensors), middle
    and end. Fine-tuned weights differ there, although their names and shapes do not.
    """
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files = [*folder.glob("*.safetensors"), *(folder / SUBFOLDER).rglob("*")]
    for path in sorted(p for p in files if p.is_file()):
        size = path.stat().st_size
        digest.update(f"\n{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for at in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def save_phi(folder: str | Path, phi: np.ndarray, observed: dict[str, Any]) -> Path:
    """Writes the file.

    Args:
      folder: the model's.
      phi: `[L, Hq]`.
      observed: what it was made from, kept for readers.

    Raises:
      ConfigError: a value is not finite, or the folder cannot be written to.
    """
    if not np.isfinite(phi).all():
        raise ConfigError("the scores of these prompts are not finite: a wider dtype may hold them")
    path = Path(folder) / FILE
    content = {"checkpoint_sha256": fingerprint(folder), "phi": phi.tolist(), **observed}
    try:
        path.write_text(json.dumps(content) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    return path


def load_phi(folder: str | Path, config: ModelConfig) -> np.ndarray | None:
    """`[L, Hq]` float32 of a model folder; None if it has no such file.

    Raises:
      ConfigError: the file belongs to another checkpoint, or does not hold such a table.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    found, want = content.get("checkpoint_sha256"), fingerprint(folder)
    remedy = f"run `jpd calibrate {folder} --prompts FILE` again, or delete the file"
    if found != want:
        raise ConfigError(
            f"{path} was made from another checkpoint (sha256 {found!r}, this one has {want!r}): "
            + remedy
        )
    try:
        phi = np.array(content.get("phi"), np.float32)
    except (TypeError, ValueError):
        phi = np.zeros(0, np.float32)
    shape = (config.num_layers, config.num_heads)
    if phi.shape != shape or not np.isfinite(phi).all():
        raise ConfigError(
            f"{path}: phi must be a finite table of {shape} (layers, heads): {remedy}"
        )
    return phi
