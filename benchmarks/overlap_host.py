"""Product, then NCCL from Python with cupy: the sequential peer without XLA's collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.overlap_cases import Case
from benchmarks.overlap_time import AXIS, GPU_OPTIONS


class HostSequential:
    """Our GEMM on all SMs, and one collective of cupy's NCCL when it is complete.

    Driven and waited for by the host, call by call: the host's part is in its time. NCCL takes its
    settings from the environment here, so that it has as many blocks as it likes.

    Args:
        communicator: a `native.overlap.host.HostCommunicator`.
        mesh: the GPUs.
        case: what is computed.
    """

    def __init__(self, communicator: Any, mesh: Mesh, case: Case) -> None:
        from native.overlap import Transfer, groups_of
        from pallas_kernels import mosaic
        from pallas_kernels import signal_gemm as gemms

        self._communicator, self._mesh = communicator, mesh
        (m, n, k), sms = case.shape, mosaic.sm_count()
        shares = 1 if case.op == "all_reduce" else case.ranks
        config = gemms.default(m, n, k, sms, ranks=shares)
        groups = (gemms.tile_count(m, n, config, shares),)
        spans = groups_of(gemms.group_spans(groups, config), groups)
        shape = gemms.packed_shape(m, n, config, shares)
        self._transfer = Transfer(case.op, spans, shape, jnp.bfloat16)
        many = {"groups": groups, "ranks": shares} if case.op == "all_to_all" else {}
        rows = m // case.ranks if case.op == "reduce_scatter" else m
        self.ordered: Callable[[Any], Any] = lambda data: gemms.unpack(
            data[0], rows, n, config, **many
        )

        def body(x: Any, w: Any, packed: Any, counters: Any) -> Any:
            packed, counters = jax.new_ref(packed[0]), jax.new_ref(counters[0])
            static = {"groups": groups, "config": config, "sms": sms, "ranks": shares}
            gemms.signal_gemm(x, w, counters, packed=packed, **static)
            return jax.freeze(packed)[None], jax.freeze(counters)[None]

        split, stacked = P(None, AXIS), P(AXIS)
        mapped = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(split, split, stacked, stacked),
            out_specs=(stacked, stacked),
            check_vma=False,
        )
        self._gemm = jax.jit(mapped, donate_argnums=(2, 3), compiler_options=dict(GPU_OPTIONS))
        place = NamedSharding(mesh, stacked)

        def zeros(shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
            return jax.jit(lambda: jnp.zeros((mesh.size, *shape), dtype), out_shardings=place)

        self._counters = zeros((1,), jnp.int32)
        self._packed = zeros(shape, jnp.bfloat16)()
        self._result = None
        if case.op != "all_reduce":
            self._result = zeros(self._transfer.result_shape(mesh.size), jnp.bfloat16)()

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """One call; the result is overwritten by the next."""

        def gemm(packed: Any, counters: Any) -> Any:
            self._packed, counters = self._gemm(x, w, packed, counters)
            return self._packed, counters

        return self._communicator.run(
            self._transfer, gemm, self._packed, self._counters(), self._result
        )
