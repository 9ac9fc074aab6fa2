"""The GPUs of an overlap benchmark, or devices of a CPU in their place: before jax starts."""

from __future__ import annotations

import os

from benchmarks.overlap_cases import ALONE, LINKS, RANKS
from benchmarks.report import Report

HOST_DEVICES = 4
_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",  # no multicast
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75",  # NCCL's buffers are not XLA's
}


def set_up(report: Report, ranks: int | None) -> tuple[str, int]:
    """What joins the devices, `ALONE` for one, "host" without a GPU, and how many there are.

    Args:
      report: says which GPUs there are.
      ranks: number of devices; None is as many of `RANKS` as there are GPUs for, or one.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    here = max((r for r in (1, *RANKS) if r <= report.env["gpu_count"]), default=HOST_DEVICES)
    ranks = ranks or here
    if report.env["gpu"]:
        return link_here() if ranks > 1 else ALONE, ranks
    flags = os.environ.get("XLA_FLAGS", "")  # devices of a CPU, to see that everything works
    if "xla_force_host_platform_device_count" not in flags:
        count = f"--xla_force_host_platform_device_count={ranks}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
    return "host", ranks


def link_here() -> str:
    """What joins the GPUs of this process."""
    return LINKS[os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0")]
