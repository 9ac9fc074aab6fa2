"""Builds the C++ part on first use, with the compiler of this machine.

The library is kept in the user's cache folder under a name that is a hash of everything it depends
on: source, flags, compiler and jaxlib, whose headers it is built against.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("overlap.cc")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300


class BuildError(RuntimeError):
    """There is no C++ compiler, or it failed."""


def compiler() -> list[str]:
    """The command of the C++ compiler: what CXX says, or the first that there is.

    Raises:
      BuildError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    looked_for = f"CXX={os.environ['CXX']!r} is not there" if named else f"none of {_COMPILERS}"
    raise BuildError(
        "overlapped collectives need a C++17 compiler to build native/overlap/overlap.cc once "
        f"({looked_for}); install g++ or set CXX"
    )


def cache_folder() -> Path:
    """Where built libraries are kept: `$XDG_CACHE_HOME/jpd/native`, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "jpd", "native")


def build(extra_flags: Sequence[str] = ()) -> Path:
    """The library, built now unless it was before.

    Args:
      extra_flags: for the compiler, e.g. "-Wall".

    Raises:
      BuildError: there is no compiler, it failed, or the cache folder cannot be written.
    """
    import jax
    import jaxlib

    command = compiler()
    flags = (*FLAGS, *extra_flags)
    version = _output([*command, "--version"])
    parts = (SOURCE.read_text(), jaxlib.__version__, *command, *flags, version)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache_folder()
    library = folder / f"overlap-{digest}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: another process sees the whole library or none.
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            made = Path(scratch, library.name)
            headers = ["-isystem", jax.ffi.include_dir()]
            _output([*command, *flags, *headers, str(SOURCE), "-o", str(made), "-ldl"])
            made.replace(library)
    except OSError as error:
        raise BuildError(f"the library cannot be kept in {folder}: {error}") from error
    return library


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)} did not run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-4000:]}")
    return done.stdout
