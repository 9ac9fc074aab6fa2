"""Collectives that hide behind the GEMM that makes their input (FlashOverlap, arXiv 2504.19519).

A GEMM stores its tiles so that groups of them are contiguous, and raises a counter for each group
(`pallas_kernels.signal_gemm` does). Beside it, on a private stream, stock NCCL calls send each
group as soon as its counter is full. `Communicator` makes this part of a jitted program, by two
XLA FFI handlers in C++ that are built on first use; `host` does the same from Python with cupy,
for comparison.

    comm = Communicator.for_axis(mesh, "tp", max_ctas=16)
    transfer = Transfer("all_reduce", groups_of(spans, tiles), packed_shape, "bfloat16")

    def body(x, w):                       # in shard_map(..., check_vma=False), under jit
        gemm = lambda packed, counters: signal_gemm(x, w, counters, packed=packed, sms=116, ...)
        return comm.run(transfer, gemm, after=[x])
"""

from native.build import BuildError
from native.overlap.communicator import Buffers, Communicator
from native.overlap.library import OverlapError, nccl_version, start
from native.overlap.trace import CallTrace, GroupTrace
from native.overlap.transfer import Collective, Group, Transfer, groups_of

__all__ = [
    "Buffers",
    "BuildError",
    "CallTrace",
    "Collective",
    "Communicator",
    "Group",
    "GroupTrace",
    "OverlapError",
    "Transfer",
    "groups_of",
    "nccl_version",
    "start",
]
