"""Implementations of a product and its collective: what a chain calls, and XLA's options for it.

All of them get one GPU's x `[M, K]` and w `[N, K]` (``xla_windowed`` the whole matrices) and give
what `lax.psum`, `lax.psum_scatter` or `lax.all_to_all` of the product gives, perhaps in another
order or in parts: `Implementation.ordered` puts it right for the check, untimed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.overlap_cases import GEMM, Case
from benchmarks.overlap_time import AXIS, GPU_OPTIONS, Operation, on_gpu
from jpd.ops import overlap
from jpd.ops.linear import linear_xla
from jpd.ops.overlap.plain import collective
from jpd.ops.overlap.tiles import tiles_of
from jpd.overlap import Plan

NEEDS_GPUS = "needs GPUs"
OPS = {
    "all_reduce": overlap.matmul_all_reduce,
    "reduce_scatter": overlap.matmul_reduce_scatter,
    "all_to_all": overlap.matmul_all_to_all,
}
RANKS = P(AXIS)
# XLA flags of peers, given for one program: all run in one process, in turns.
CHUNKED = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Or what was split would be sent together after all.
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
    # And computed together.
    "xla_gpu_dot_merger_threshold_mb": 0,
}
WINDOWED = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_threshold_for_windowed_einsum_mib": 0,
    # Two sums travel at once, each behind the product that is added to the other.
    "xla_gpu_multi_streamed_windowed_einsum": True,
    # Unrolls that loop, whose counter goes up by two, as if it went up by one (jaxlib 0.11.2): from
    # 4 ranks on, parts of other rows are added and the result is wrong.
    "xla_disable_hlo_passes": "windowed-einsum-handler",
    # Or the two are sent together, and computed together.
    "xla_gpu_collective_permute_combine_threshold_bytes": 0,
    "xla_gpu_dot_merger_threshold_mb": 0,
}
LATENCY_HIDING = {"xla_gpu_enable_latency_hiding_scheduler": True}


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case."""

    operation: Operation
    options: Mapping[str, Any] = field(default_factory=dict)
    """Compiler options besides `GPU_OPTIONS`."""
    ordered: Callable[[Any], Any] | None = None
    """From what one GPU got (results of `call` as arrays on it) to the rows it should have."""
    result_spec: P = RANKS
    """Which part of the result each GPU has."""
    launches: int = 3
    """Kernels, waits and events of one call on a GPU, roughly."""
    x_columns: int | None = None
    """Columns of x where it is not K."""
    checked: bool = True
    verify: Callable[[], None] = lambda: None
    """Raises if something went wrong that results need not show."""
    plan: Plan | None = None

    def compiler_options(self) -> dict[str, Any]:
        """For `Lowered.compile`; XLA takes GPU options on a CPU too, which have no effect there."""
        return {**GPU_OPTIONS, **self.options} if on_gpu() else dict(self.options)


def chunked(op: str, parts: int) -> Implementation:
    """The product in parts, each sent while the next is computed; the "decomposition" class.

    Along M for an all-reduce, like in the paper, else along N: parts of M would give each rank
    rows of every part, not one block. The parts are not put together again.
    """

    def call(x: jax.Array, w: jax.Array) -> list[jax.Array]:
        if op == "all_reduce":
            products = [linear_xla(part, w) for part in jnp.split(x, parts)]
        else:
            products = [linear_xla(x, part) for part in jnp.split(w, parts)]
        return [collective(op, y, AXIS) for y in products]

    axis = 0 if op == "all_reduce" else 1
    return Implementation(
        Operation(call),
        CHUNKED,
        ordered=functools.partial(jnp.concatenate, axis=axis),
        launches=3 * parts,
    )


def windowed(op: str, mesh: Mesh) -> Implementation:
    """XLA's own: the partitioner makes a loop of small products and sends of a sharded product.

    It does so for rows of the sum that stay on their rank; an all-reduce is that and a gather. The
    pass that puts these products on streams of their own is left out: see `WINDOWED`.
    """

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        y = lax.with_sharding_constraint(linear_xla(x, w), NamedSharding(mesh, P(AXIS)))
        if op == "all_reduce":
            y = lax.with_sharding_constraint(y, NamedSharding(mesh, P()))
        return y

    return Implementation(
        Operation(call, whole=True),
        WINDOWED,
        result_spec=P() if op == "all_reduce" else RANKS,
        launches=6 * mesh.size,
    )


def sequential(op: str, options: Mapping[str, Any] | None = None) -> Implementation:
    """XLA's product and XLA's collective: cuBLAS and NCCL in one program."""
    return Implementation(
        Operation(lambda x, w: collective(op, linear_xla(x, w), AXIS)), options or {}
    )


def ours(
    case: Case,
    plan: Plan | None,
    communicators: Sequence[Any] = (),
    *,
    implementation: str = "auto",
    packed: bool = False,
    trace: bool = False,
) -> Implementation:
    """jpd's op.

    Args:
        case: what is computed.
        plan: of this shape; None or one not to overlap: one after the other.
        communicators: of `native.overlap`.
        implementation: of `jpd.ops.overlap.Settings`.
        packed: the result stays as it was sent, for the next op to read it there.
        trace: times of every group are recorded.
    """
    plan = plan if plan is not None and plan.overlap else None
    if plan is None and implementation == "auto":
        implementation = "xla"

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        options = {"plan": plan, "packed": packed, "implementation": implementation}
        y = OPS[case.op](x, w, AXIS, **options, resident=True)
        return y.data if isinstance(y, overlap.Packed) else y

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        with overlap.using(communicators={AXIS: list(communicators)}, trace=trace):
            yield

    ordered, launches = None, 4
    if plan is not None:
        tiles = tiles_of(case.op, case.ranks, case.shape.m, case.shape.n, plan)
        launches = 6 + 3 * len(tiles.groups)
        if packed:
            ordered = functools.partial(_unpack, tiles.layout)

    def verify() -> None:
        for communicator in communicators:
            communicator.check()

    return Implementation(
        Operation(call, scope=scope),
        ordered=ordered,
        launches=launches,
        verify=verify,
        plan=plan,
    )


def _unpack(layout: Any, data: jax.Array) -> jax.Array:
    return overlap.unpack(overlap.Packed(data, layout))


def signal_gemm(
    case: Case, config: Any, sms: int | None, groups: Sequence[int] | None, ranks: int = 1
) -> Implementation:
    """The signalling GEMM alone; without groups one for each wave.

    Args:
        case: what is computed.
        config: a `SignalConfig`.
        sms: SMs; None for all.
        groups: tiles of each group.
        ranks: receivers of a tile: 1 for an all-reduce.
    """
    from pallas_kernels import mosaic
    from pallas_kernels import signal_gemm as gemms

    sms = sms or mosaic.sm_count()
    m, n, _ = case.shape
    tiles = gemms.tile_count(m, n, config, ranks)
    groups = tuple(groups or gemms.groups_of_waves([1] * gemms.waves_of(tiles, sms), tiles, sms))

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        counters = jax.new_ref(jnp.zeros(len(groups), jnp.int32))
        return gemms.signal_gemm(x, w, counters, groups=groups, config=config, sms=sms, ranks=ranks)

    def ordered(data: jax.Array) -> jax.Array:
        many = {"groups": groups, "ranks": ranks} if ranks > 1 else {}
        return gemms.unpack(data, m, n, config, **many)

    return Implementation(Operation(call), ordered=ordered, launches=2)


def dense_gemm(config: Any) -> Implementation:
    """The kernel that the signalling GEMM is made of, without signals and with rows in order."""
    from pallas_kernels.dense_gemm import dense_gemm as kernel

    return Implementation(Operation(lambda x, w: kernel(x, w, config=config)), launches=2)


def product_of() -> Implementation:
    """XLA's product alone: cuBLAS."""
    return Implementation(Operation(linear_xla), launches=2)


def collective_of(op: str, columns: int) -> Implementation:
    """XLA's collective alone, of a matrix `[M, N]` in x's place."""
    call = Operation(lambda x, w: collective(op, x, AXIS))
    return Implementation(call, x_columns=columns, checked=False)


def in_jax(
    case: Case, mesh: Mesh, plan: Plan | None, communicators: Sequence[Any]
) -> dict[str, Implementation | str]:
    """Everything that this process times for a case: by name, or why it cannot.

    The order is that of measuring: all in turns, in one run.
    """
    if case.op == GEMM:
        found: dict[str, Implementation | str] = {"cublas": product_of()}
        if not on_gpu():
            return found | dict.fromkeys(("signal_gemm", "dense_gemm"), NEEDS_GPUS)
        from pallas_kernels import mosaic
        from pallas_kernels import signal_gemm as gemms

        config = gemms.default(*case.shape, mosaic.sm_count())
        found["signal_gemm"] = signal_gemm(case, config, None, None)
        found["dense_gemm"] = dense_gemm(config.dense)
        return found
    # A plan that overlaps must be followed: a fall-back would be timed under the wrong name.
    how = {"implementation": "overlap"} if on_gpu() and plan is not None and plan.overlap else {}
    chosen = plan if how else None
    found = {
        "xla": sequential(case.op),
        "jpd": ours(case, chosen, communicators, packed=True, **how),
        "jpd_rows": ours(case, chosen, communicators, **how),
        "jpd_sequential": ours(case, None),
        "xla_latency_hiding": sequential(case.op, LATENCY_HIDING),
        "xla_chunks2": chunked(case.op, 2),
        "xla_chunks4": chunked(case.op, 4),
    }
    if case.op != "all_to_all":
        found["xla_windowed"] = windowed(case.op, mesh)
    found["collective"] = collective_of(case.op, case.shape.n)
    if not on_gpu():
        found["grouped"] = ours(case, plan, implementation="grouped", packed=True)
        found["cupy"] = NEEDS_GPUS
    return found
