"""Products followed by a collective that hides behind them: FlashOverlap (arXiv 2504.19519).

For `jax.jit` with `jax.shard_map`: weights are `[N, K]` like everywhere in jpd, results are those
of the product and then `lax.psum`, `lax.psum_scatter` or `lax.all_to_all`, and `jax.grad` works.
Implementations are chosen while a program is traced, like those of every op: "overlap" on Hopper
GPUs where there is a plan and a communicator (`using`), else "xla", and `jpd.ops.choices()` says
which. "grouped" is never chosen by itself: it sends the same groups of tiles as "overlap" with
XLA's collectives, on any device, for tests and to look at the method without a GPU.
"""

from jpd.ops.overlap.collectives import (
    matmul_all_reduce,
    matmul_all_to_all,
    matmul_reduce_scatter,
)
from jpd.ops.overlap.column import all_gather_matmul, replicated_matmul
from jpd.ops.overlap.gpu import topology
from jpd.ops.overlap.packed import Layout, Packed, rms_norm_residual, unpack
from jpd.ops.overlap.settings import Settings, using
from jpd.ops.overlap.tiles import option_of

__all__ = [
    "Layout",
    "Packed",
    "Settings",
    "all_gather_matmul",
    "matmul_all_reduce",
    "matmul_all_to_all",
    "matmul_reduce_scatter",
    "option_of",
    "replicated_matmul",
    "rms_norm_residual",
    "topology",
    "unpack",
    "using",
]
