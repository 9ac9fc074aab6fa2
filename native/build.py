"""Builds a library of native code on first use, with the compiler of this machine.

It is kept in the user's cache folder under a name that is a hash of everything it depends on:
source, headers, flags, compiler and jaxlib, whose headers it is built against.
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

FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread")
_ROOT = Path(__file__).parents[1]
_HEADERS = Path(__file__).parent
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300


class BuildError(RuntimeError):
    """There is no C++ compiler, or it failed."""


def compiler(source: Path) -> list[str]:
    """The command of the C++ compiler: what CXX says, or the first that there is.

    Args:
      source: what it is for.

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
        f"a C++17 compiler is needed to build {source} once ({looked_for}); install g++ or set CXX"
    )


def cache_folder() -> Path:
    """Where built libraries are kept: `$XDG_CACHE_HOME/jpd/native`, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "jpd", "native")


def build(source: Path, extra_flags: Sequence[str] = ()) -> Path:
    """The library of one source file, built now unless it was before.

    Args:
      source: may include the headers in this folder, as "native/...", and jaxlib's.
      extra_flags: for the compiler, e.g. "-Wall".

    Raises:
      BuildError: there is no compiler, it failed, or the cache folder cannot be written.
    """
    import jax
    import jaxlib

    command = compiler(source)
    flags = (*FLAGS, *extra_flags)
    version = _output([*command, "--version"])
    texts = [path.read_text() for path in (source, *sorted(_HEADERS.glob("*.h")))]
    parts = (*texts, jaxlib.__version__, *command, *flags, version)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache_folder()
    library = folder / f"{source.stem}-{digest}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: another process sees the whole library or none.
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            made = Path(scratch, library.name)
            headers = ["-I", str(_ROOT), "-isystem", jax.ffi.include_dir()]
            _output([*command, *flags, *headers, str(source), "-o", str(made), "-ldl"])
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
