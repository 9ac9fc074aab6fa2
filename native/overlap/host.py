"""Overlap driven from Python, with cupy's streams and NCCL: for comparison and debugging.

The same waits and collectives as `Communicator`'s, without XLA's FFI: the host launches the GEMM,
fills the private streams while it runs, and waits for them. One process, several GPUs; nothing of
it can be part of a jitted program. NCCL takes its settings from the environment here
(NCCL_CGA_CLUSTER_SIZE=0 is needed for any overlap on Hopper, NCCL_MAX_CTAS for the SMs it takes),
read once in a process.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from native.overlap.library import OverlapError
from native.overlap.transfer import Transfer

_NCCL_TYPES = {"int32": 2, "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
_SUM = 0
_GREATER_OR_EQUAL = 0
_PRIORITY = -5
"""The highest there is; CUDA takes the nearest it has."""
_ABORT_S = 10.0


class HostCommunicator:
    """NCCL ranks and a private stream for each of this process's GPUs.

    Args:
      devices: `jax.Device`s in the order of ranks.
      timeout_s: How long one call may take.
      libcuda: Path or name of the driver's library.

    Raises:
      ImportError: cupy is not installed.
    """

    def __init__(
        self,
        devices: Sequence[Any],
        *,
        timeout_s: float = 60.0,
        libcuda: str = "libcuda.so.1",
    ) -> None:
        import cupy
        from cupy.cuda import nccl

        self._cupy, self._nccl = cupy, nccl
        self.devices = tuple(devices)
        self.size = len(self.devices)
        self.timeout_s = timeout_s
        self._ordinals = [device.local_hardware_id for device in self.devices]
        self._comms = nccl.NcclCommunicator.initAll(self._ordinals)
        self._streams = []
        for ordinal in self._ordinals:
            with cupy.cuda.Device(ordinal):
                self._streams.append(cupy.cuda.Stream(non_blocking=True, priority=_PRIORITY))
        self._wait_value = ctypes.CDLL(libcuda).cuStreamWaitValue32_v2
        pointer = ctypes.c_void_p
        self._wait_value.argtypes = [pointer, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]

    def run(
        self,
        transfer: Transfer,
        gemm: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
        packed: jax.Array,
        counters: jax.Array,
        result: jax.Array | None = None,
    ) -> jax.Array:
        """A GEMM and its collective, overlapped; returns when both are complete.

        What goes wrong between the GEMM's launch and the end of the collectives aborts the ranks.

        Args:
          transfer: What each device sends; `enqueue` and `trace` do not matter.
          gemm: Fills the buffers and raises the counters, in place: a jitted function that donates
            both and returns both, launched without waiting.
          packed: `[ranks, ...]`, a shard of `[1, *transfer.shape]` on each device, in their order.
          counters: `[ranks, groups]` int32 zeros, likewise.
          result: For all but an all-reduce, `[ranks, ...]` likewise of the result's shape, that
            nobody has read: JAX keeps what it has read.

        Returns:
          The result: `packed` as the GEMM returned it, or `result`.

        Raises:
          ValueError: a buffer is not of the transfer, or not on these devices.
          OverlapError: time-out, an earlier call has aborted the ranks, or the GEMM did not work in
            place.
        """
        if not self._comms:
            raise OverlapError("the communicator is closed, or was aborted after a failure")
        shape = transfer.result_shape(self.size)
        buffers = {
            "packed": (packed, transfer.shape),
            "counters": (counters, (len(transfer.groups),)),
        }
        if transfer.collective != "all_reduce":
            if result is None:
                raise ValueError(f"{transfer.collective} needs a result")
            buffers["result"] = (result, shape)
        at = {name: self._addresses(name, *buffer) for name, buffer in buffers.items()}
        jax.block_until_ready([array for array, _ in buffers.values()])
        filled, raised = gemm(packed, counters)
        try:
            for i, group in enumerate(transfer.groups):
                for rank in range(self.size):
                    self._wait(rank, at["counters"][rank] + 4 * i, group.tiles)
                self._send(transfer, group, at)
            self._finish(transfer)
        except BaseException:  # also Ctrl-C: the buffers are freed when this is left
            self._abort(at["counters"], len(transfer.groups))
            raise
        after = {"packed": filled, "counters": raised}
        for name, array in after.items():
            if self._addresses(name, array, buffers[name][1]) != at[name]:
                raise OverlapError(f"{name} moved: the GEMM must donate its buffers")
        return filled if result is None else result

    def close(self) -> None:
        """Ends the ranks."""
        for comm in self._comms:
            comm.destroy()
        self._comms = []

    def __enter__(self) -> HostCommunicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _addresses(self, name: str, array: jax.Array, shape: tuple[int, ...]) -> list[int]:
        shards = {shard.device: shard.data for shard in array.addressable_shards}
        if set(shards) != set(self.devices) or array.shape != (self.size, *shape):
            raise ValueError(f"{name} is {array.shape} on {list(shards)}, not {shape} on each GPU")
        return [shards[device].unsafe_buffer_pointer() for device in self.devices]

    def _wait(self, rank: int, address: int, tiles: int) -> None:
        with self._cupy.cuda.Device(self._ordinals[rank]):
            stream = self._streams[rank].ptr
            error = self._wait_value(stream, address, tiles, _GREATER_OR_EQUAL)
        if error:
            raise OverlapError(f"cuStreamWaitValue32 failed with {error}")

    def _send(self, transfer: Transfer, group: Any, at: dict[str, list[int]]) -> None:
        kind, item = _NCCL_TYPES[transfer.dtype.name], transfer.dtype.itemsize
        share = group.count // self.size
        self._nccl.groupStart()  # of all devices: this is one thread
        try:
            for rank, (comm, stream) in enumerate(zip(self._comms, self._streams, strict=True)):
                source = at["packed"][rank] + group.offset * item
                if transfer.collective == "all_reduce":
                    comm.allReduce(source, source, group.count, kind, _SUM, stream.ptr)
                elif transfer.collective == "reduce_scatter":
                    target = at["result"][rank] + group.offset // self.size * item
                    comm.reduceScatter(source, target, share, kind, _SUM, stream.ptr)
                else:
                    target = at["result"][rank] + group.offset * item
                    for peer in range(self.size):
                        part = peer * share * item
                        comm.send(source + part, share, kind, peer, stream.ptr)
                        comm.recv(target + part, share, kind, peer, stream.ptr)
        finally:
            self._nccl.groupEnd()

    def _finish(self, transfer: Transfer) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not all(stream.done for stream in self._streams):
            if time.monotonic() > deadline:
                raise OverlapError(
                    f"{transfer.collective} is not complete after {self.timeout_s:g} s; the ranks "
                    "are aborted"
                )
            time.sleep(5e-5)

    def _abort(self, counters: list[int], groups: int) -> None:
        """Ends what is on the streams: counters to 0x7f7f7f7f, then collectives."""
        streams = list(self._streams)
        for ordinal, address in zip(self._ordinals, counters, strict=True):
            with self._cupy.cuda.Device(ordinal):
                rescue = self._cupy.cuda.Stream(non_blocking=True, priority=_PRIORITY)
                self._cupy.cuda.runtime.memsetAsync(address, 0x7F, 4 * groups, rescue.ptr)
                streams.append(rescue)
        for comm in self._comms:
            comm.abort()
        self._comms = []
        # The buffers are the caller's again when this returns.
        deadline = time.monotonic() + _ABORT_S
        while not all(stream.done for stream in streams) and time.monotonic() < deadline:
            time.sleep(1e-3)
