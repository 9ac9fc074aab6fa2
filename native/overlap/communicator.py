"""NCCL ranks of a mesh axis, and the start/done pair that makes them part of a jitted program."""

from __future__ import annotations

import atexit
import ctypes
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from native.devices import ordinal
from native.overlap import library
from native.overlap import trace as traces
from native.overlap.library import OverlapError
from native.overlap.primitives import done_p, start_p
from native.overlap.transfer import Transfer

_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


class Buffers(NamedTuple):
    """What `start` hands to the GEMM and `done` takes back."""

    packed: jax.Array
    """For the GEMM to fill."""
    counters: jax.Array
    """`[groups]` int32 zeros, for the GEMM to raise."""
    result: jax.Array | None
    """Where the collectives write; None for an all-reduce, which is in place."""


class Communicator:
    """NCCL ranks of the devices along one mesh axis.

    Inside `shard_map(..., check_vma=False)` under `jit`, `start` zeroes counters on XLA's stream,
    a GEMM fills a packed buffer and raises them (with release at system scope), and `done` makes
    XLA's stream wait for a private stream of high priority, on which for each group a wait on its
    counter (cuStreamWaitValue32) stands before a stock NCCL call: FlashOverlap (arXiv 2504.19519,
    section 3.2.4). The three are tied by their buffers, which XLA neither moves nor copies; C++
    checks that it did not.

    By default `done` fills the private stream, on the host right after XLA launched the GEMM.
    `Transfer(enqueue="start")` does it before. Then whatever makes the GEMM's launch wait for
    that stream is a deadlock: a kernel that is loaded lazily, a hardware queue that two streams
    share, or a program in which XLA puts start A, start B, GEMM B, done B before GEMM A.

    Every rank must run the same calls in the same order, as with any collective. What it cannot
    overlap with is a GEMM on all SMs: leave `max_ctas` of them free.

    A failure of NCCL or CUDA, or a collective that is not complete `timeout_s` after its turn came,
    ends all of this communicator's ranks in the process: results under way are filled with NaN,
    and `check` and every later call raise. A new communicator can then be made.

    Args:
      cliques: devices that form a ring each, in the order of ranks; all of the same length. A mesh
        axis of a mesh with other axes has several, see `for_axis`. In a program of several
        processes, each names all devices, makes the communicator at the same point, and has the
        ranks of its own devices.
      min_ctas: fewest blocks that NCCL takes for a collective; None: NCCL's choice.
      max_ctas: most blocks, an SM each; None: NCCL's choice.
      cga_cluster_size: blocks of NCCL that must find room together; 0 is what overlaps with a
        GEMM, NCCL's own default on Hopper is 4.
      timeout_s: how long a collective may take once its inputs are there.
      connect_timeout_s: how long the ranks may take to find each other.
      warm_up_bytes: size of a first call of each collective, which connects the ranks and loads
        NCCL's kernels; twice as much memory is taken for that moment. 0: none.
      exchange: gives every process the bytes that process 0 passes; None: by
        `multihost_utils.broadcast_one_to_all` where there are several.

    Raises:
      ValueError: no or uneven cliques.
      OverlapError: NCCL is missing or cannot connect.
      BuildError: the C++ part cannot be built.
    """

    def __init__(
        self,
        cliques: Sequence[Sequence[Any]],
        *,
        min_ctas: int | None = None,
        max_ctas: int | None = None,
        cga_cluster_size: int = 0,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 120.0,
        warm_up_bytes: int = 1 << 23,
        exchange: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.id = 0
        self.cliques = tuple(tuple(clique) for clique in cliques)
        sizes = {len(clique) for clique in self.cliques}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"cliques must be of one length, at least 1: {self.cliques}")
        self.size = sizes.pop()
        for name, value in (("min_ctas", min_ctas), ("max_ctas", max_ctas)):
            if value is not None and not 1 <= value <= 64:
                raise ValueError(f"{name}={value} is not allowed: 1 to 64")
        if min_ctas is not None and max_ctas is not None and min_ctas > max_ctas:
            raise ValueError(f"min_ctas={min_ctas} is more than max_ctas={max_ctas}")
        if timeout_s <= 0 or connect_timeout_s <= 0:
            raise ValueError(f"{timeout_s=} and {connect_timeout_s=} must be positive")
        self.timeout_s = timeout_s
        self.max_ctas = max_ctas
        library.start()
        ids = self._exchange_ids(exchange)
        process = jax.process_index()
        ranks = [
            (ordinal(device), rank, clique_id)
            for clique, clique_id in zip(self.cliques, ids, strict=True)
            for rank, device in enumerate(clique)
            if device.process_index == process
        ]
        devices = [device for device, _, _ in ranks]
        if not ranks or len(set(devices)) != len(devices):
            raise ValueError(f"each process needs devices, each in one clique: {self.cliques}")
        array = ctypes.c_int * len(ranks)
        self.id = library.call(
            "create",
            len(ranks),
            array(*devices),
            array(*(rank for _, rank, _ in ranks)),
            array(*[self.size] * len(ranks)),
            b"".join(clique_id for _, _, clique_id in ranks),
            cga_cluster_size,
            min_ctas or 0,
            max_ctas or 0,
            timeout_s,
            connect_timeout_s,
            warm_up_bytes,
        )
        _open.add(self)

    @classmethod
    def for_axis(cls, mesh: jax.sharding.Mesh, axis: str, **options: Any) -> Self:
        """The communicator of one axis of a mesh: a clique for each place on the other axes.

        Raises:
          ValueError: the mesh has no such axis.
        """
        if axis not in mesh.axis_names:
            raise ValueError(f"axis={axis!r} is none of the mesh's: {mesh.axis_names}")
        along = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1)
        return cls(along.reshape(-1, along.shape[-1]).tolist(), **options)

    def start(self, transfer: Transfer, after: Sequence[jax.Array] = ()) -> Buffers:
        """Begins a transfer on this device: buffers for the GEMM, counters zero.

        Args:
          transfer: What is sent.
          after: Arrays that must be there first; pass what the GEMM reads. XLA may otherwise run
            this long before the GEMM, and with `enqueue="start"` in another order than the GEMMs.
        """
        transfer.result_shape(self.size)  # before anything is traced: it may not be possible
        # Fresh results and not arguments in place: nothing has to be filled before.
        made = start_p.bind(*after, transfer=transfer, communicator=self.id, size=self.size)
        return Buffers(*made, *[None] * (3 - len(made)))

    def done(self, transfer: Transfer, buffers: Buffers) -> tuple[jax.Array, jax.Array]:
        """Ends a transfer: what follows on the device has the result.

        Args:
          transfer: That of `start`.
          buffers: Those of `start` after the GEMM, in place.

        Returns:
          The result, of `transfer.result_shape(size)`, and the counters as the GEMM left them.
        """
        given = [buffer for buffer in buffers if buffer is not None]
        after = done_p.bind(*given, transfer=transfer, communicator=self.id)
        return after[0 if transfer.collective == "all_reduce" else 2], after[1]

    def run(
        self,
        transfer: Transfer,
        gemm: Callable[[Any, Any], None],
        after: Sequence[jax.Array] = (),
    ) -> jax.Array:
        """A GEMM and its collective, overlapped.

        Args:
          transfer: What is sent.
          gemm: Gets the packed buffer and the counters as `jax.Ref`s, fills the one and raises
            the others.
          after: See `start`.

        Returns:
          The result, see `done`.
        """
        buffers = self.start(transfer, after)
        packed, counters = jax.new_ref(buffers.packed), jax.new_ref(buffers.counters)
        gemm(packed, counters)
        filled = buffers._replace(packed=jax.freeze(packed), counters=jax.freeze(counters))
        return self.done(transfer, filled)[0]

    def check(self) -> None:
        """Says what went wrong; call it after a step, whose results are NaN if something did.

        Raises:
          OverlapError: NCCL or CUDA failed, or a collective was stuck.
        """
        library.call("check", self.id)

    def wait(self) -> None:
        """Waits until every collective that was put on the private streams is complete.

        Raises:
          OverlapError: one of them failed or is stuck.
        """
        while not library.call("idle", self.id):
            time.sleep(1e-3)

    def trace(self) -> Sequence[traces.CallTrace]:
        """Calls with `Transfer(trace=True)` since the last time, of this process's devices.

        The newest 512 of each device are kept.

        Raises:
          OverlapError: see `check`.
        """
        self.wait()
        library.call("trace", self.id)
        return traces.parse(library.message())

    def close(self) -> None:
        """Ends the ranks; waits for what is under way, at most `timeout_s`. May be called twice."""
        if self.id and self in _open:
            _open.discard(self)
            library.call("close", self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange_ids(self, exchange: Callable[[bytes], bytes] | None) -> list[bytes]:
        count, length = len(self.cliques), library.ID_BYTES
        several = jax.process_count() > 1 or exchange is not None
        first = jax.process_index() == 0
        own = [library.unique_id() if first else bytes(length) for _ in range(count)]
        if not several:
            return own
        shared = (exchange or _broadcast)(b"".join(own))
        if len(shared) != count * length:
            raise OverlapError(
                f"exchange gave {len(shared)} bytes, not {count * length}: do all processes make "
                "the same communicator?"
            )
        return [shared[i * length : (i + 1) * length] for i in range(count)]


def _broadcast(data: bytes) -> bytes:
    from jax.experimental import multihost_utils

    return bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8)).astype("u1"))


@atexit.register
def _close_all() -> None:
    for communicator in list(_open):
        communicator.close()
