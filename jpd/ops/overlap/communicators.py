"""Which products of a model overlap, and the NCCL communicators that their plans ask for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import jax

from jpd.ops.overlap import gpu
from jpd.overlap import Plan

logger = logging.getLogger(__name__)

Product = tuple[int, int, int]
"""M, N and K on a rank of a product whose results are summed over the ranks."""


def planned(ranks: int, products: Iterable[Product]) -> dict[Product, Plan]:
    """The plans of those products that are planned to overlap on this machine.

    None where nothing can: on other devices, and without NCCL or a compiler for what drives it,
    which is said once. The op may still refuse a product when it is traced, and then says so.
    """
    try:
        gpu._check_device()
        if not _has_native():
            return {}
        table = gpu._plans()
    except NotImplementedError:
        return {}  # the op says so itself, when it is traced
    found = {product: table.find("all_reduce", ranks, *product) for product in products}
    return {
        product: plan
        for product, plan in found.items()
        if plan and plan.overlap and gpu.leaves_room(plan)
    }


def communicators(
    mesh: jax.sharding.Mesh, axis: str, products: Iterable[Product]
) -> dict[str, list[Any]]:
    """For `using(communicators=...)`: one for each number of SMs that plans leave to NCCL.

    Args:
      mesh: of the program.
      axis: of the mesh.
      products: of the program.

    Returns:
      The communicators by the axis; none where nothing can be, or is planned to be, overlapped.
    """
    ctas = sorted({plan.ctas for plan in planned(mesh.shape[axis], products).values()})
    made = [comm for n in ctas if (comm := _communicator(mesh, axis, n)) is not None]
    return {axis: made} if made else {}


@functools.cache
def _has_native() -> bool:
    """Whether the native part is built and has NCCL. Asked once: a compiler takes its time."""
    native = gpu._native()
    try:
        native.start()
    except (native.OverlapError, native.BuildError) as error:
        _warn(error)
        return False
    return True


@functools.cache
def _communicator(mesh: jax.sharding.Mesh, axis: str, max_ctas: int) -> Any:
    """Made once, and kept until the process ends, as are the programs that were traced with it."""
    native = gpu._native()
    try:
        return native.Communicator.for_axis(mesh, axis, max_ctas=max_ctas)
    except (native.OverlapError, native.BuildError) as error:
        _warn(error)
        return None


def _warn(error: Exception) -> None:
    logger.warning("sums over ranks do not overlap with products: %s", error)
