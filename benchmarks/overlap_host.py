"""Product, then NCCL from Python with cupy: the sequential peer without XLA's collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.overlap_cases import Case
from benchmarks.overlap_time import AXIS, GPU_OPTIONS
from jpd.ops.linear import linear_xla


def product_in_place(x: jax.Array, w: jax.Array, y: jax.Array, counters: jax.Array) -> Any:
    """XLA's product of one GPU, in place of `y` `[1, M, N]`; the counter is raised when it is
    complete. Both are to be donated."""
    del y
    product, counters = lax.optimization_barrier((linear_xla(x, w), counters))
    return product[None], counters + 1


class HostSequential:
    """cuBLAS, and one collective of cupy's NCCL when it is complete.

    Driven and waited for by the host, call by call: the host's part is in its time. NCCL takes its
    settings from the environment here, so that it has as many blocks as it likes.

    Args:
        communicator: a `native.overlap.host.HostCommunicator`.
        mesh: the GPUs.
        case: what is computed.
    """

    def __init__(self, communicator: Any, mesh: Mesh, case: Case) -> None:
        from native.overlap import Group, Transfer

        self._communicator, (m, n, _) = communicator, case.shape
        self._transfer = Transfer(case.op, (Group(0, m * n, 1),), (m, n), jnp.bfloat16)
        split, stacked = P(None, AXIS), P(AXIS)
        mapped = jax.shard_map(
            product_in_place,
            mesh=mesh,
            in_specs=(split, split, stacked, stacked),
            out_specs=(stacked, stacked),
            check_vma=False,
        )
        self._product = jax.jit(
            mapped, donate_argnums=(2, 3), keep_unused=True, compiler_options=dict(GPU_OPTIONS)
        )
        place = NamedSharding(mesh, stacked)

        def zeros(shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
            return jax.jit(lambda: jnp.zeros((mesh.size, *shape), dtype), out_shardings=place)

        self._counters = zeros((1,), jnp.int32)
        self._sent = zeros((m, n), jnp.bfloat16)()
        self._result = None
        if case.op != "all_reduce":
            self._result = zeros(self._transfer.result_shape(mesh.size), jnp.bfloat16)()

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """One call; `[1, M, N]` of each GPU, which the next one overwrites."""

        def product(sent: Any, counters: Any) -> Any:
            self._sent, counters = self._product(x, w, sent, counters)
            return self._sent, counters

        return self._communicator.run(
            self._transfer, product, self._sent, self._counters(), self._result
        )
