"""The NCCL communicators that the plans of a mesh axis ask for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import jax

from jpd.ops.overlap import gpu
from jpd.overlap import PlanTable

logger = logging.getLogger(__name__)


def communicators(
    mesh: jax.sharding.Mesh, axis: str, products: Iterable[tuple[int, int, int]]
) -> dict[str, list[Any]]:
    """For `using(communicators=...)`: one for each number of SMs that plans leave to NCCL.

    Args:
      mesh: of the program.
      axis: of the mesh.
      products: M, N and K on a rank of the products whose results are summed along the axis.

    Returns:
      The communicators by the axis; none where nothing can be, or is planned to be, overlapped.
    """
    try:
        gpu._check_device()
        table = PlanTable.shipped(gpu.topology())
    except NotImplementedError:
        return {}  # the op says so itself, when it is traced
    plans = [table.find("all_reduce", mesh.shape[axis], *product) for product in products]
    ctas = sorted({plan.ctas for plan in plans if plan is not None and plan.overlap})
    made = [comm for n in ctas if (comm := _communicator(mesh, axis, n)) is not None]
    return {axis: made} if made else {}


@functools.cache
def _communicator(mesh: jax.sharding.Mesh, axis: str, max_ctas: int) -> Any:
    """Made once, and kept until the process ends, as are the programs that were traced with it."""
    native = gpu._native()
    try:
        return native.Communicator.for_axis(mesh, axis, max_ctas=max_ctas)
    except (native.OverlapError, native.BuildError) as error:
        logger.warning("sums over ranks do not overlap with products: %s", error)
        return None
