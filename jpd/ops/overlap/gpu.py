"""The implementation "overlap": collectives of finished groups while the GEMM computes the next.

The only caller of `native.overlap`, whose `Communicator.run` ties three things together in one
program: counters are zeroed, `signal_gemm` stores tiles and counts them, and XLA's stream waits for
a private one on which NCCL sends each group when its counter is full.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpd.errors import ConfigError
from jpd.ops import pallas, registry
from jpd.ops.overlap.axes import marked, names, varying
from jpd.ops.overlap.packed import Packed
from jpd.ops.overlap.settings import communicators_of, settings
from jpd.ops.overlap.tiles import Tiles, tiles_of
from jpd.overlap import Plan, PlanTable, Topology


def matmul_collective(
    op: str, x: jax.Array, w: jax.Array, axis_name: Any, plan: Plan | None, resident: bool
) -> Packed:
    """A signalling GEMM and one NCCL collective a group, on a stream of their own.

    Raises:
      NotImplementedError: why that cannot be, or should not, here: another device, no native part,
        a shape or dtype without a kernel, no plan, one that says that one after the other is
        faster or that takes more SMs than there are, or no communicator for the axis.
      ConfigError: the communicator has another number of ranks than the axis, or the plans are for
        another machine.
    """
    del resident  # w is read when all before start is complete, see `_signalled`
    _check_device()
    native = _native()
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x.dtype}: bfloat16 and float16 can be overlapped")
    (m, k), n, ranks = x.shape, w.shape[0], lax.axis_size(axis_name)
    comms = communicators_of(axis_name)
    # An engine has communicators where it has plans: without one, each reason is said only once,
    # not for every shape of its steps.
    what = f"{op} of {f'{m}x{n}x{k}' if comms else 'this shape'} on {ranks} ranks"
    if plan is None:
        table = _plans()
        plan = table.find(op, ranks, m, n, k)
        if plan is None:
            raise NotImplementedError(f"no plan near {what} for {table.topology.slug}")
    if not plan.overlap:
        raise NotImplementedError(f"{what}: its plan says not to overlap")
    if not leaves_room(plan):
        raise NotImplementedError(
            f"the plan takes {plan.sms} SMs and NCCL {plan.ctas}: there are {_sm_count()}, "
            "nothing would overlap"
        )
    comm = _fitting(comms, plan, ranks, axis_name)
    return _signalled(native, comm, op, x, w, axis_name, tiles_of(op, ranks, m, n, plan))


def topology() -> Topology:
    """What plans and curves go by, on this machine or the one that is traced for.

    The link is what `Settings.link` says; else "no_p2p" where `NCCL_P2P_DISABLE=1` keeps NCCL from
    it, and "nvlink", which GPUs of this kind have.

    Raises:
      NotImplementedError: no NCCL.
    """
    from pallas_kernels import dataflow

    native = _native()
    blocked = os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0")
    link = settings().link or ("no_p2p" if blocked else "nvlink")
    try:
        return Topology(dataflow.device_kind(), link, native.nccl_version())
    except native.OverlapError as error:
        raise NotImplementedError(f"no NCCL beside a running GEMM: {error}") from None


def leaves_room(plan: Plan) -> bool:
    """Whether a GEMM and NCCL fit on the SMs of this process side by side, as planned."""
    return plan.sms + plan.ctas <= _sm_count()


def _sm_count() -> int:
    from pallas_kernels import mosaic

    return mosaic.sm_count()


def _check_device() -> None:
    if registry.platform() != "gpu":
        raise NotImplementedError(f"GPUs can overlap, not {registry.platform()!r}")
    pallas.interpret_mode()  # refuses a GPU that the kernels are not written for


def _native() -> Any:
    try:
        from native import overlap
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"no NCCL beside a running GEMM: {error}") from None
    return overlap


def _plans() -> PlanTable:
    """The table of plans that holds here.

    Raises:
      ConfigError: that of `Settings.plans` is for another machine.
    """
    here, table = topology(), settings().plans
    if table is None:
        return PlanTable.shipped(here)
    if table.topology != here:
        raise ConfigError(f"the plans are for {table.topology}, this is {here}")
    return table


def _fitting(comms: Sequence[Any], plan: Plan, ranks: int, axis_name: Any) -> Any:
    """The communicator that takes the most SMs, but no more than the plan leaves to it."""
    if not comms:
        have = ", ".join(map(repr, settings().communicators)) or "none"
        raise NotImplementedError(
            f"no NCCL communicator for mesh axis {axis_name!r} (there are: {have}); see "
            "jpd.ops.overlap.using(communicators=...)"
        )
    for comm in comms:
        if comm.size != ranks:
            raise ConfigError(f"a communicator of {comm.size} ranks for an axis of {ranks}")
    fitting = [comm for comm in comms if comm.max_ctas and comm.max_ctas <= plan.ctas]
    if not fitting:
        have = ", ".join(str(comm.max_ctas) for comm in comms)
        raise NotImplementedError(
            f"the plan leaves NCCL {plan.ctas} SMs, the communicators have max_ctas of {have}"
        )
    return max(fitting, key=lambda comm: comm.max_ctas)


def _multiply(tiles: Tiles) -> Any:
    """The signalling GEMM of x, w and counters."""
    from pallas_kernels import signal_gemm

    return functools.partial(
        signal_gemm.signal_gemm,
        groups=tiles.groups,
        config=tiles.config,
        sms=tiles.sms,
        ranks=tiles.ranks,
    )


def product(x: jax.Array, w: jax.Array, tiles: Tiles) -> tuple[Packed, jax.Array]:
    """A rank's own product as the GEMM stores it, which is sent nowhere, and the counters.

    Args:
      x: `[M, K]`.
      w: `[N, K]`.
      tiles: of an all-reduce.
    """
    counters = jax.new_ref(jnp.zeros(len(tiles.groups), jnp.int32))
    data = _multiply(tiles)(x, w, counters)
    return Packed(data, tiles.layout), jax.freeze(counters)


def _signalled(
    native: Any, comm: Any, op: str, x: jax.Array, w: jax.Array, axis_name: Any, tiles: Tiles
) -> Packed:
    """The GEMM between start and done."""
    from pallas_kernels import signal_gemm

    spans = signal_gemm.group_spans(tiles.groups, tiles.config)
    shape = signal_gemm.packed_shape(x.shape[0], w.shape[0], tiles.config, tiles.ranks)
    groups = native.groups_of(spans, tiles.groups)
    transfer = native.Transfer(op, groups, shape, x.dtype, trace=settings().trace)
    # The kernel may refuse. It must do so now: what was started must be ended.
    jax.eval_shape(lambda x, w: product(x, w, tiles)[1], x, w)

    def gemm(packed: Any, counters: Any) -> None:
        _multiply(tiles)(x, w, counters, packed=packed)

    # Of w, too: the GEMM reads it early, and what start does keeps it behind all that came before.
    result = comm.run(transfer, gemm, after=[x, w])
    # To JAX the result of an FFI call differs along no axis.
    axes = varying(x, w) - (names(axis_name) if op == "all_reduce" else frozenset())
    return Packed(marked(result, axes), tiles.layout)
