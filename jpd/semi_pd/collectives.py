"""Collectives of two processes that share the same GPUs by MPS: why neither can block the other.

The blocks of a collective stay on their SMs until those of its other ranks have come. So two
processes could each hold what the other's collective waits for, one the SMs of the first GPU and
one those of the second. What rules that out:

* Two executors at most run steps at the same time, one of each phase; others may be starting, and
  compare their sums with a reference. Each has one collective at a time on a GPU, in the order of
  its program, which is the same on all of them.
* A collective of XLA's takes at most `MOST_SMS` SMs, one that overlaps with a GEMM those that its
  plan leaves it, no executor has fewer than `MOST_SMS`, and there are at most `MOST_EXECUTORS`.
  All of them together fit on a GPU, so that each finds room as soon as other kernels make it.
* Other kernels end by themselves once they have SMs. Those of `pallas_kernels` meet by tickets:
  who comes last does what is left, nobody waits. One that starts early waits for the kernel before
  it, all of whose blocks have their SMs by then.

Where processes share GPUs without MPS they take turns, and a kernel that waits is interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from jpd.config import require
from jpd.errors import ConfigError

MOST_SMS = 16
"""Channels of NCCL, an SM each."""
MOST_EXECUTORS = 7
"""So many times `MOST_SMS` are fewer than the 114 SMs of an H100 PCIe; other Hoppers have more."""
_NCCL_VARIABLES = ("NCCL_MAX_CTAS", "NCCL_MIN_CTAS", "NCCL_MIN_NCHANNELS")
"""By which a user may ask NCCL for more, whatever XLA says."""


def environment(devices: Sequence[str]) -> dict[str, str]:
    """Variables for an executor that has a share of the SMs of each of its devices.

    Args:
      devices: of the ranks, "cpu" or "cuda:N".

    Raises:
      ConfigError: a variable asks NCCL for more SMs.
    """
    if len(devices) == 1 or devices[0] == "cpu":
        return {}
    for name in _NCCL_VARIABLES:
        value = os.environ.get(name, "0")
        fits = value.isdecimal() and int(value) <= MOST_SMS
        require(fits, name, value, f"at most {MOST_SMS} where two phases share several GPUs")
    limit = f"--xla_gpu_nccl_collective_max_nchannels={MOST_SMS}"
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {limit}".strip()}


def check_executors(devices: Sequence[str], count: int) -> None:
    """Raises `ConfigError` if so many executors share several GPUs that collectives may not fit."""
    if len(devices) > 1 and devices[0] != "cpu" and count > MOST_EXECUTORS:
        raise ConfigError(
            f"{count} executors, those for kept_shares and for switches included, are not allowed "
            f"with tensor_parallel_size={len(devices)}: at most {MOST_EXECUTORS}"
        )


def check_sms(devices: Sequence[str], sms: int) -> None:
    """Raises `ConfigError` if an executor has too few SMs of each device for a collective."""
    if len(devices) > 1 and sms < MOST_SMS:
        raise ConfigError(
            f"a share of {sms} SMs is not allowed with tensor_parallel_size={len(devices)}: at "
            f"least {MOST_SMS}, which a collective takes"
        )
