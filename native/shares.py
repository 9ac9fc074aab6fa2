"""SM shares of processes: what MPS on a GPU and affinity on a CPU have in common.

A share is a whole percentage of the processor, fixed when a process starts. Its units are SMs on a
GPU (`native.mps`) and CPUs without one (`native.affinity`).
"""

from __future__ import annotations

from typing import Protocol


class SmShares(Protocol):
    """Gives processes their shares. `native.mps.Mps` and `native.affinity.CpuShares` are such.

    The process itself says what it got: `native.mps.visible_sms`, or
    `native.affinity.apply_environment`, which also takes the share.
    """

    def environment(self, share: int) -> dict[str, str]:
        """Variables to add to the environment of a process that is to run on `share` percent."""
        ...

    def terminate_client(self, pid: int) -> None:
        """To be called before the process is killed; fine if it is already gone."""
        ...


def check_share(share: int) -> None:
    """Refuses what is no share.

    Raises:
        ValueError: `share` is not a whole number from 1 to 100.
    """
    if not isinstance(share, int) or not 1 <= share <= 100:
        raise ValueError(f"an SM share is a whole percentage from 1 to 100, not {share!r}")
