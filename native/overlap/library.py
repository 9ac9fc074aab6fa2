"""The built library in this process: loaded, given libcuda and libnccl, known to XLA."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

from native import build

SOURCE = Path(__file__).with_name("overlap.cc")
START, DONE = "jpd_overlap_start", "jpd_overlap_done"
"""Names of the XLA FFI targets."""

ID_BYTES = 128
"""Length of ncclUniqueId."""

_lock = threading.RLock()
_nccl: str | None = None
"""Path or name of the libnccl that `start` took."""


class OverlapError(RuntimeError):
    """NCCL or CUDA failed, a collective is stuck, or a communicator cannot be made or used."""


@functools.cache
def handle() -> ctypes.CDLL:
    """The library, built on first use; its FFI targets are registered.

    Raises:
      BuildError: it cannot be built.
    """
    import jax

    with _lock:
        lib = ctypes.CDLL(str(build.build(SOURCE)))
        lib.jpd_overlap_message.restype = ctypes.c_char_p
        for name, arguments in {
            "load": [ctypes.c_char_p, ctypes.c_char_p],
            "unique_id": [ctypes.c_char_p],
            "create": [
                ctypes.c_int,
                *[ctypes.POINTER(ctypes.c_int)] * 3,
                ctypes.c_char_p,
                *[ctypes.c_int] * 3,
                *[ctypes.c_double] * 2,
                ctypes.c_uint64,
            ],
            "check": [ctypes.c_int64],
            "idle": [ctypes.c_int64],
            "fail": [ctypes.c_int64, ctypes.c_char_p],
            "trace": [ctypes.c_int64],
            "close": [ctypes.c_int64],
        }.items():
            function = getattr(lib, f"jpd_overlap_{name}")
            function.restype, function.argtypes = ctypes.c_int64, arguments
        for target, symbol in ((START, "JpdOverlapStart"), (DONE, "JpdOverlapDone")):
            for platform, suffix in (("CUDA", ""), ("cpu", "Cpu")):
                capsule = jax.ffi.pycapsule(getattr(lib, symbol + suffix))
                jax.ffi.register_ffi_target(target, capsule, platform=platform)
        return lib


def message() -> str:
    """What the last call that failed in this thread, or `trace`, left."""
    return handle().jpd_overlap_message().decode(errors="replace")


def call(name: str, *arguments: Any) -> int:
    """Calls `jpd_overlap_<name>`.

    Raises:
      OverlapError: it failed.
    """
    result = getattr(handle(), f"jpd_overlap_{name}")(*arguments)
    if result < 0:
        raise OverlapError(message())
    return result


def start(cuda: str | None = None, nccl: str | None = None) -> None:
    """Gives the library libcuda and libnccl; the first call in a process counts.

    Args:
      cuda: path or name of libcuda; None: "libcuda.so.1".
      nccl: path or name of libnccl; None: the one that this process has loaded already (XLA's),
        else that of the nvidia-nccl wheel, else what the dynamic linker finds.

    Raises:
      OverlapError: one of them is not there, or too old.
    """
    global _nccl
    with _lock:
        if _nccl is None:
            path = nccl or nccl_library()
            call("load", (cuda or "libcuda.so.1").encode(), path.encode())
            _nccl = path


def nccl_library() -> str:
    """Path or name of the NCCL library that `start` takes by itself."""
    name = "libnccl.so.2"
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        return name
    except OSError:
        pass
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        spec = None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "lib", name)
        if path.exists():
            return str(path)
    return name


def nccl_version() -> str:
    """Version of the NCCL library in use, or of the one that `start` would take: e.g. "2.28.9".

    No GPU is needed for it, and no compiler.

    Raises:
      OverlapError: there is none.
    """
    path, version = _nccl or nccl_library(), ctypes.c_int()
    try:
        ctypes.CDLL(path).ncclGetVersion(ctypes.byref(version))
    except OSError as error:
        raise OverlapError(f"cannot load {path}: {error}") from error
    return f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"


def unique_id() -> bytes:
    """A new ncclUniqueId; this process serves it until its ranks have connected."""
    start()
    made = ctypes.create_string_buffer(ID_BYTES)
    call("unique_id", made)
    return made.raw
