"""CPU affinity in place of SM shares, where there is no GPU."""

from __future__ import annotations

import os
from typing import Literal, get_args

from native.shares import check_share

End = Literal["low", "high"]

SHARE_VARIABLE = "JPD_CPU_SHARE"


def visible_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def apply(share: int, end: End = "low") -> int:
    """Pins this process to a share of the CPUs that it may use now.

    Call it before jax starts, which sizes its thread pool once. `end` says where the share lies:
    shares at the two ends that sum to at most 100 have no CPU in common, unless there is one CPU.
    So a share gets at least one CPU, and one below 100 leaves at least one.

    Args:
        share: percent of the CPUs, 1 to 100; rounded to whole CPUs.
        end: which CPUs, by their numbers.

    Returns:
        CPUs that the process may use from now on.
    """
    check_share(share)
    if end not in get_args(End):
        raise ValueError(f"end is 'low' or 'high', not {end!r}")
    cpus = sorted(os.sched_getaffinity(0))
    # The boundary is rounded, not the size, so that shares of two ends never meet half a CPU.
    percent = share if end == "low" else 100 - share
    boundary = (2 * percent * len(cpus) + 100) // 200
    if share < 100 and len(cpus) > 1:
        boundary = min(max(boundary, 1), len(cpus) - 1)
    elif end == "low":
        boundary = len(cpus)
    else:
        boundary = 0
    chosen = cpus[:boundary] if end == "low" else cpus[boundary:]
    os.sched_setaffinity(0, chosen)
    return len(chosen)


def apply_environment() -> int:
    """Pins this process to the share that `CpuShares.environment` gave it, if it was given one.

    Returns:
        CPUs that the process may use from now on.

    Raises:
        ValueError: the variable holds no share.
    """
    text = os.environ.get(SHARE_VARIABLE)
    if text is None:
        return visible_cpus()
    share, _, end = text.partition(" ")
    if not share.isdecimal() or end not in get_args(End):
        raise ValueError(f"{SHARE_VARIABLE} is '<percent> low' or '<percent> high', not {text!r}")
    return apply(int(share), end)


class CpuShares:
    """`native.shares.SmShares` of CPUs, all from one end."""

    def __init__(self, end: End) -> None:
        self._end = end

    def environment(self, share: int) -> dict[str, str]:
        """Variables that `apply_environment` reads in the process."""
        check_share(share)
        return {SHARE_VARIABLE: f"{share} {self._end}"}

    def terminate_client(self, pid: int) -> None:
        """Nothing to do: a process that is killed on a CPU leaves nothing running."""
