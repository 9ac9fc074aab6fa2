"""What the programs that are being traced overlap with: plans and communicators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jpd.overlap import PlanTable


@dataclass(frozen=True)
class Settings:
    """Settings of the ops in this package."""

    implementation: str = "auto"
    """"auto", "overlap", "xla" or "grouped", where a call names none."""
    reorder: str = "auto"
    """Who adds a sum over ranks to the residual stream where a norm follows, and puts it in order
    if it is packed: "pallas", the kernel of that norm; "xla", XLA's program of gather, sum and
    norm; "alone", gather and sum ahead of the op `rms_norm`; "auto", the first of them that can,
    and that the selection of `rms_norm` allows."""
    plans: PlanTable | None = None
    """Where a call without a plan looks for one; the table that comes with jpd for this GPU, link
    and version of NCCL when not given."""
    communicators: Mapping[str, Any] = field(default_factory=dict)
    """`native.overlap.Communicator`, or several with other `max_ctas`, by the mesh axis. They are
    made once: a program keeps those that it was traced with."""
    link: str | None = None
    """What joins the GPUs, for the look-up of plans; see `jpd.overlap.Topology`."""
    trace: bool = False
    """Record the times of every group, for `Communicator.trace` and `jpd.overlap.Trace`."""


_SETTINGS: ContextVar[Settings | None] = ContextVar("jpd_overlap", default=None)


def settings() -> Settings:
    """What `using` set, or the defaults."""
    return _SETTINGS.get() or Settings()


def communicators_of(axis_name: Any) -> Sequence[Any]:
    """Those of a mesh axis that `using` set."""
    found = settings().communicators.get(axis_name) or ()
    return found if isinstance(found, Sequence) else (found,)


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[None]:
    """Sets fields of `Settings` for the programs traced inside the block; others get defaults."""
    token = _SETTINGS.set(Settings(**changes))
    try:
        yield
    finally:
        _SETTINGS.reset(token)
