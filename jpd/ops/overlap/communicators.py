"""Which products of a model overlap, and the NCCL communicators that their plans ask for."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax

from jpd.ops.overlap import gpu
from jpd.overlap import Plan

logger = logging.getLogger(__name__)

Product = tuple[int, int, int]
"""M, N and K on a rank of a product whose results are summed over the ranks."""


@dataclass
class _Made:
    """What came of making a communicator, and who runs programs with it."""

    communicator: Any
    """None where it could not be made."""
    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


_MADE: dict[tuple[jax.sharding.Mesh, str, int], _Made] = {}
"""By mesh, axis and most SMs. Engines of one process on the same devices share them."""
_LOCK = threading.Lock()
"""Of `_MADE`."""


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
    mesh: jax.sharding.Mesh, axis: str, products: Iterable[Product], user: object = None
) -> dict[str, list[Any]]:
    """For `using(communicators=...)`: one for each number of SMs that plans leave to NCCL.

    They are made once and kept, also that one could not be, until `release`. Of one that failed
    since then, the ranks are ended, and a new one is made.

    Args:
      mesh: of the program.
      axis: of the mesh.
      products: of the program.
      user: who runs the program, for `release`. What has none is kept until one that was named for
        it, too, releases it.

    Returns:
      The communicators by the axis; none where nothing can be, or is planned to be, overlapped.
    """
    ctas = sorted({plan.ctas for plan in planned(mesh.shape[axis], products).values()})
    with _LOCK:
        made = [_kept((mesh, axis, n), user) for n in ctas]
    made = [communicator for communicator in made if communicator is not None]
    return {axis: made} if made else {}


def release(user: object) -> None:
    """Closes the communicators that no other user has, whose programs must not run any more."""
    alone = []
    with _LOCK:
        for key, made in list(_MADE.items()):
            if user in made.users:
                made.users.discard(user)
                if not made.users:
                    alone.append(_MADE.pop(key).communicator)
    for communicator in alone:
        if communicator is not None:
            _close(communicator)


def _close(communicator: Any) -> None:
    """Says so if it cannot be closed, on a broken device perhaps: whoever is done with it is."""
    try:
        communicator.close()
    except RuntimeError:
        logger.exception("an NCCL communicator could not be closed")


def _kept(key: tuple[jax.sharding.Mesh, str, int], user: object) -> Any:
    """The communicator of a mesh, an axis and a number of SMs; None if it cannot be made."""
    made = _MADE.get(key)
    if made is not None and made.communicator is not None:
        try:
            made.communicator.check()
        except RuntimeError as error:
            logger.warning("a new NCCL communicator is made, the old one failed: %s", error)
            _close(made.communicator)
            made = None
    if made is None:
        made = _MADE[key] = _Made(_make(*key))
    if user is not None:
        made.users.add(user)
    return made.communicator


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


def _make(mesh: jax.sharding.Mesh, axis: str, max_ctas: int) -> Any:
    """None if it cannot be made, which is said."""
    native = gpu._native()
    try:
        return native.Communicator.for_axis(mesh, axis, max_ctas=max_ctas)
    except (native.OverlapError, native.BuildError) as error:
        _warn(error)
        return None


def _warn(error: Exception) -> None:
    logger.warning("sums over ranks do not overlap with products: %s", error)
