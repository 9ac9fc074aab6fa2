"""A link of this process: what to send, and whether it has arrived."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from native import build
from native.devices import ordinal
from native.kv_push.handlers import ENDED, FILLED

if TYPE_CHECKING:
    import jax

SOURCE = Path(__file__).with_name("kv_push.cc")


class LinkError(RuntimeError):
    """A link cannot be opened, was used wrongly, or a copy failed."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """All pages of a step are on the other device."""

    nbytes: int
    overlapped_bytes: int
    """Of layers that were there in full before the step's own last operation was over."""
    late_s: float
    """From that until the last page was there."""


class Link:
    """From the pages of one of this process's devices to those of another process.

    Args:
      device: that fills the pages; it has one link at a time.
      sources: addresses of keys and values, by layers `[2 L]`; the step's pages must lie there. 0
        where XLA gives them another place in each step, as on a CPU.
      targets: likewise, of the other's pages as this process maps them.
      pages: of each array.
      page_bytes: of one page of keys, and of values.
      libcuda: path or name of the driver's library; None takes "libcuda.so.1" for a GPU. A CPU
        needs none.

    Raises:
      ValueError: the arguments do not fit together.
      LinkError: the device has a link already, or CUDA failed.
      BuildError: there is no compiler.
    """

    def __init__(
        self,
        device: jax.Device,
        sources: Sequence[int],
        targets: Sequence[int],
        *,
        pages: int,
        page_bytes: int,
        libcuda: str | None = None,
    ) -> None:
        if len(sources) != len(targets) or not targets or len(targets) % 2:
            raise ValueError(
                f"{len(sources)} sources and {len(targets)} targets are not keys and values of the "
                "same layers"
            )
        for name, value in (("pages", pages), ("page_bytes", page_bytes)):
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed: at least 1")
        self._open = False
        self._device = ordinal(device)
        if libcuda is None and device.platform != "cpu":
            libcuda = "libcuda.so.1"
        path = None if libcuda is None else libcuda.encode()
        addresses = [np.asarray(each, np.uint64) for each in (sources, targets)]
        _call("open", self._device, path, len(targets) // 2, *addresses, pages, page_bytes)
        self._open = True

    def announce(self, source: Sequence[int], target: Sequence[int]) -> int:
        """Says what the step that is launched next sends; the k-th source page to the k-th target.

        Returns:
          A number to `wait` for.

        Raises:
          ValueError: not as many sources as targets.
          LinkError: a page is not there, or a copy has failed.
        """
        if len(source) != len(target):
            raise ValueError(f"{len(source)} pages cannot go to {len(target)}")
        pages = [np.asarray(each, np.int32) for each in (source, target)]
        return _call("announce", self._device, len(source), *pages)

    def wait(self, number: int) -> Arrival:
        """Waits until all pages of a step that has run are there; asked once for each.

        Raises:
          LinkError: it was not announced or has not run, or a copy failed.
        """
        found = np.zeros(3)
        _call("wait", self._device, number, found)
        return Arrival(int(found[0]), int(found[1]), float(found[2]))

    def close(self) -> None:
        """Lets go, when the copies under way are done. A second call does nothing."""
        if self._open:
            _call("close", self._device)
            self._open = False


_INT64, _POINTER = ctypes.c_int64, ctypes.c_void_p


@functools.cache
def _library() -> ctypes.CDLL:
    """The library, built on first use; its FFI targets are registered."""
    import jax

    lib = ctypes.CDLL(str(build.build(SOURCE)))
    lib.jpd_kv_message.restype = ctypes.c_char_p
    for name, arguments in {
        "open": [ctypes.c_int, ctypes.c_char_p, _INT64, _POINTER, _POINTER, _INT64, _INT64],
        "announce": [ctypes.c_int, _INT64, _POINTER, _POINTER],
        "wait": [ctypes.c_int, _INT64, _POINTER],
        "close": [ctypes.c_int],
    }.items():
        function = getattr(lib, f"jpd_kv_{name}")
        function.restype, function.argtypes = _INT64, arguments
    for target, symbol in ((FILLED, "JpdKvFilled"), (ENDED, "JpdKvEnded")):
        for platform, suffix in (("CUDA", ""), ("cpu", "Cpu")):
            capsule = jax.ffi.pycapsule(getattr(lib, symbol + suffix))
            jax.ffi.register_ffi_target(target, capsule, platform=platform)
    return lib


def _call(name: str, *arguments: Any) -> int:
    """Calls `jpd_kv_<name>`; arrays go as their addresses.

    Raises:
      LinkError: it failed.
    """
    lib = _library()
    plain = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    result = getattr(lib, f"jpd_kv_{name}")(*plain)
    if result < 0:
        raise LinkError(lib.jpd_kv_message().decode(errors="replace"))
    return result
