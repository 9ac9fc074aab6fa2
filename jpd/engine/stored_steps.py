"""Lowered steps on disk, beside XLA's compilation cache, for the next start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from jpd.ops.registry import Choice

logger = logging.getLogger(__name__)

FOLDER = "jpd-steps"
"""Name of the folder within that of the compilation cache."""
UNUSED_DAYS = 30
"""Days after which a module that nobody read is deleted: each version of the code has its own."""


@dataclass(frozen=True)
class StoredStep:
    """A module, and what would have been noted if it had been traced here."""

    module: bytes
    """`jax.export.Exported.serialize`."""
    choices: tuple[Choice, ...]
    """What the ops took."""


def to_bytes(step: StoredStep) -> bytes:
    """A checksum, what was noted, and the module."""
    noted = json.dumps(step.choices)
    content = noted.encode() + b"\n" + step.module
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def from_bytes(content: bytes) -> StoredStep:
    """What `to_bytes` made.

    Raises:
      ValueError: it is something else, or not all of it.
    """
    checksum, _, content = content.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        raise ValueError("the checksum is wrong")
    text, _, module = content.partition(b"\n")
    return StoredStep(module, tuple(Choice(*choice) for choice in json.loads(text)))


class StepStore:
    """A folder of modules, which any number of processes read and write.

    Nothing here raises: where files cannot be read or written, steps are lowered at every start,
    and the log says so.

    Args:
      folder: is made when the first module is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writable = True

    def get(self, key: str) -> StoredStep | None:
        """The module of a key; None if it is not there or not whole."""
        file = self._file(key)
        try:
            step = from_bytes(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s is passed over and made anew: %s", file, error)
            return None
        with contextlib.suppress(OSError):  # somebody else's: it stays as old as it was
            os.utime(file)
        return step

    def put(self, key: str, step: StoredStep) -> None:
        """Keeps a module; whoever reads sees all of it or none."""
        if not self._writable:
            return
        file = self._file(key)
        draft = file.with_suffix(f".{uuid.uuid4().hex}")
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(to_bytes(step))
            draft.replace(file)
        except OSError as error:
            self._writable = False
            logger.warning("lowered steps are not kept in %s: %s", self._folder, error)
            with contextlib.suppress(OSError):
                draft.unlink()

    def prune(self) -> None:
        """Deletes what nobody used for `UNUSED_DAYS`."""
        oldest = time.time() - UNUSED_DAYS * 86_400
        with contextlib.suppress(OSError):
            for file in self._folder.iterdir():
                with contextlib.suppress(OSError):
                    if file.stat().st_mtime < oldest:
                        file.unlink()

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.step"
