"""Blocks of memory that several processes map, on a GPU or on the host, read as arrays in place.

One process allocates a block and passes its handle on; others open it. Nothing has a name that
could stay behind: on a CPU a block is an anonymous file (memfd) that lives as long as some process
holds it, on a GPU an allocation of CUDA that ends with the process that made it.

    block = allocate(1 << 20, "cpu")
    child = subprocess.Popen(command, pass_fds=block.handle().fds)   # and send it the handle
    ...
    block = open_block(handle)                                       # in the child
    weights = block.jax_array(0, (1024, 512), "bfloat16")            # no copy

Arrays are views: what any process writes is what all see, in no order but that which the processes
agree on by other means. JAX takes its arrays for immutable, so a block may only be written while
no step that reads those bytes runs.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import weakref
from collections.abc import Sequence
from ctypes import c_char_p, c_uint8, c_void_p, py_object, pythonapi
from dataclasses import dataclass, replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import jax

ALIGNMENT_BYTES = 256
"""Offsets of arrays are multiples of this: what XLA, TMA and cudaMalloc want, or more."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_GPU_PAGE_BYTES = 2 << 20
"""What a GPU block's memory is a multiple of. Another process reads one that is not at half the
rate (1.95 in place of 4.0 TB/s on an H200, driver 580; a trial that is not kept), perhaps since it
is mapped by smaller pages."""


@dataclass(frozen=True)
class Handle:
    """What another process needs to open a block; can be pickled.

    The pickle of a CPU block names a file descriptor, which has to travel beside it: by
    `pass_fds=handle.fds` to a new process, by `send_handle` to a running one. It stays open until
    its process closes it or ends; `open_block` does not close it.
    """

    device: str
    """"cpu" or "cuda:N"."""
    nbytes: int
    maker: int
    """Process id of the process that allocated the block."""
    fd: int | None = None
    """Of the anonymous file, on a CPU."""
    ipc: bytes | None = None
    """CUDA's cudaIpcMemHandle_t, on a GPU."""

    @property
    def fds(self) -> tuple[int, ...]:
        """File descriptors that a new process must inherit."""
        return () if self.fd is None else (self.fd,)


class Block:
    """A block that this process maps; made by `allocate` or `open_block`."""

    def __init__(self, handle: Handle, memory: Any, own_fd: int | None = None) -> None:
        self.device = handle.device
        self.nbytes = handle.nbytes
        self._handle = handle
        self._memory = memory  # mmap.mmap or cupy.cuda.MemoryPointer; None once closed
        self._own_fd = own_fd

    def handle(self) -> Handle:
        """What to pass on, as long as the block is open."""
        self._check_open()
        return self._handle

    def array(self, offset: int, shape: Sequence[int], dtype: Any) -> Any:
        """A view of a part of the block, in C order.

        Args:
          offset: Bytes from the start of the block, a multiple of `ALIGNMENT_BYTES`.
          shape: Of the view.
          dtype: Anything that NumPy takes, and "bfloat16".

        Returns:
          A NumPy array on a CPU, a CuPy array on a GPU. CuPy has no bfloat16: there such a view is
          of uint16, the same bits.

        Raises:
          ValueError: the view does not lie in the block, or the block is closed.
        """
        self._check_open()
        dtype = np.dtype(dtype)
        shape = tuple(shape)
        if any(n < 0 for n in shape):
            raise ValueError(f"shape={shape} is not allowed: no dimension may be negative")
        if offset < 0 or offset % ALIGNMENT_BYTES:
            raise ValueError(
                f"offset={offset} is not allowed: a multiple of {ALIGNMENT_BYTES} bytes from 0 on"
            )
        end = offset + math.prod(shape) * dtype.itemsize
        if end > self.nbytes:
            raise ValueError(
                f"{dtype} of shape {shape} at offset={offset} ends at byte {end}; "
                f"the block has {self.nbytes}"
            )
        if self.device == "cpu":
            return np.ndarray(shape, dtype, self._memory, offset)
        import cupy

        stored = np.dtype(np.uint16) if dtype == _BFLOAT16 else dtype
        return cupy.ndarray(shape, stored, self._memory + offset)

    def jax_array(
        self, offset: int, shape: Sequence[int], dtype: Any, device: jax.Device | None = None
    ) -> jax.Array:
        """A `jax.Array` over a part of the block, without a copy; see `array`.

        It is committed to the device that the block lies on. Donated to a jitted function it is
        updated in place on a GPU; on a CPU the result lies in new memory.

        Args:
          offset, shape, dtype: See `array`.
          device: Where the array is to be: one of several devices that jax makes of a CPU, the
            block's own GPU; on a CPU the first when not given.

        Raises:
          ValueError: see `array`; or the block does not lie on `device`.
        """
        import jax

        view: Any = self.array(offset, shape, dtype)
        if self.device == "cpu" and device is not None:  # DLPack knows of one CPU only
            array = jax.device_put(view, device, may_alias=True)
            in_place = array.unsafe_buffer_pointer() == view.ctypes.data
        else:
            if np.dtype(dtype) == _BFLOAT16:
                view = _BFloat16Export(view.view(np.uint16))
            array = jax.dlpack.from_dlpack(view, copy=False)
            in_place = device is None or array.devices() == {device}
        if not in_place:
            raise ValueError(f"device={device} is not allowed: the block lies on {self.device}")
        return array

    def write(self, offset: int, values: jax.Array) -> None:
        """Copies an array to `offset`, see `array`, and waits until it is there."""
        view = self.array(offset, values.shape, values.dtype)
        if self.device == "cpu":
            view[...] = np.asarray(values)
            return
        from cupy.cuda import runtime

        values.block_until_ready()
        source = values.unsafe_buffer_pointer()
        with view.device:
            runtime.memcpy(view.data.ptr, source, values.nbytes, runtime.memcpyDefault)
            runtime.deviceSynchronize()

    def close(self) -> None:
        """Gives the block up; a second call does nothing.

        The memory goes back when the last view of it in this process is gone too (for an array of
        JAX's, at the latest when Python's garbage collector ran); no view may be
        used any more once the process that made the block has closed it on a GPU.
        """
        self._memory = None
        if self._own_fd is not None:
            os.close(self._own_fd)
            self._own_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._memory is None:
            raise ValueError(f"the block of {self.nbytes} bytes on {self.device} is closed")


def allocate(nbytes: int, device: str) -> Block:
    """Makes a block of zeros. On a CPU its pages take memory when they are first written.

    Args:
      nbytes: At least 1.
      device: "cpu" or "cuda:N".

    Raises:
      ValueError: an argument is not allowed.
      ImportError: a GPU is asked for and CuPy is not installed.
      MemoryError: the GPU has no room for it.
    """
    if nbytes < 1:
        raise ValueError(f"nbytes={nbytes} is not allowed: at least 1")
    ordinal = _ordinal(device)
    if ordinal is None:
        fd = os.memfd_create("shared-block")
        os.ftruncate(fd, nbytes)
        handle = Handle(device, nbytes, os.getpid(), fd=fd)
        return Block(handle, mmap.mmap(fd, nbytes), own_fd=fd)
    import cupy

    with cupy.cuda.Device(ordinal) as gpu:
        try:
            # Not from CuPy's pool, whose handles would be of an arena, and past its own limit.
            whole_pages = -(-nbytes // _GPU_PAGE_BYTES) * _GPU_PAGE_BYTES
            pointer = cupy.cuda.MemoryPointer(cupy.cuda.Memory(whole_pages), 0)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            free, total = cupy.cuda.runtime.memGetInfo()
            raise MemoryError(
                f"{nbytes} bytes cannot be allocated on {device}, which has {free} of {total} "
                f"bytes free: {error}"
            ) from error
        pointer.memset(0, nbytes)
        gpu.synchronize()
        ipc = cupy.cuda.runtime.ipcGetMemHandle(pointer.ptr)
    return Block(Handle(device, nbytes, os.getpid(), ipc=ipc), pointer)


def memory_of(device: str) -> tuple[int, int]:
    """Bytes of a device that are free, and all of them; on a CPU those that are available.

    Raises:
      ValueError: the device is not allowed.
      ImportError: it is a GPU and CuPy is not installed.
    """
    ordinal = _ordinal(device)
    if ordinal is None:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        free, total = (int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
        return free, total
    import cupy

    with cupy.cuda.Device(ordinal):
        return cupy.cuda.runtime.memGetInfo()


def open_block(handle: Handle, reader: str | None = None) -> Block:
    """Maps a block that another process made.

    Args:
      handle: Of the block.
      reader: The GPU, "cuda:N", whose kernels read and write the block; its own when not given.
        Another one reaches it as a peer.

    A process may open a handle several times; on a GPU CUDA counts, and every time gives the same
    address.

    Raises:
      ValueError: this process made the block itself. CUDA cannot open its own handles; the rule
        is the same on a CPU so that no mistake waits for a GPU.
      ImportError: the block lies on a GPU and CuPy is not installed.
    """
    if handle.maker == os.getpid():
        raise ValueError("this process made the block: open_block is for other processes")
    ordinal = _ordinal(handle.device)
    if ordinal is None:
        return Block(handle, mmap.mmap(handle.fd, handle.nbytes))
    import cupy

    if reader is not None:
        ordinal = _ordinal(reader)
    with cupy.cuda.Device(ordinal):
        address = cupy.cuda.runtime.ipcOpenMemHandle(handle.ipc)
    mapping = _Mapping()
    # Not at exit, when kernels may still run: the end of the process unmaps everything.
    weakref.finalize(mapping, _close_ipc, ordinal, address).atexit = False
    memory = cupy.cuda.UnownedMemory(address, handle.nbytes, mapping, ordinal)
    return Block(handle, cupy.cuda.MemoryPointer(memory, 0))


class _Mapping:
    """Held by every view of a block of another process on a GPU; the last one unmaps it."""


def _close_ipc(ordinal: int, address: int) -> None:
    import cupy

    with cupy.cuda.Device(ordinal):
        cupy.cuda.runtime.ipcCloseMemHandle(address)


def send_handle(connection: Connection, handle: Handle) -> None:
    """Sends a handle to a running process, with its file descriptor; see `receive_handle`."""
    connection.send(handle)
    for fd in handle.fds:
        reduction.send_handle(connection, fd, None)


def receive_handle(connection: Connection) -> Handle:
    """Receives what `send_handle` sent. The file descriptor is new, and the caller's to close."""
    handle = connection.recv()
    return replace(handle, fd=reduction.recv_handle(connection)) if handle.fds else handle


def _ordinal(device: str) -> int | None:
    """The number of a GPU; None for the CPU."""
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda:(\d+)", device)
    if match is None:
        raise ValueError(f"device={device!r} is not allowed: 'cpu' or 'cuda:N'")
    return int(match[1])


# DLPack's own struct, as far as needed: data pointer (8 bytes), device (4 + 4), ndim (4), dtype
# (code, bits: 1 byte each; lanes: 2).
_DTYPE_CODE_OFFSET = 20
_UINT, _BFLOAT = 1, 4
pythonapi.PyCapsule_GetPointer.restype = c_void_p
pythonapi.PyCapsule_GetPointer.argtypes = [py_object, c_char_p]


class _BFloat16Export:
    """A uint16 array of NumPy or CuPy, which export no bfloat16, exported as bfloat16."""

    def __init__(self, bits: Any) -> None:
        self._bits = bits

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._bits.__dlpack_device__()

    def __dlpack__(self, *, stream: Any = None) -> Any:
        # The capsule stays the exporter's, and with it the memory's lifetime: one byte changes.
        capsule = self._bits.__dlpack__(stream=stream)
        tensor = pythonapi.PyCapsule_GetPointer(capsule, b"dltensor")
        code = c_uint8.from_address(tensor + _DTYPE_CODE_OFFSET)
        if code.value != _UINT:
            raise RuntimeError(f"DLPack type code {code.value}, not {_UINT}: unknown layout")
        code.value = _BFLOAT
        return capsule
