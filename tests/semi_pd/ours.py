"""jpd's controller on a GPU where shares that overlap in part pay: it has more to choose from."""

from __future__ import annotations

from typing import Any

from jpd.semi_pd.controller import Shares
from jpd.semi_pd.share_models import Interference
from jpd.semi_pd.slo_controller import SloController

PAYS = Interference(
    prefill_slowdown=1.18,
    prefill_pull=0.36,
    decode_slowdown=1.2,
    overlap_wait=17.5,
    overlap_offset=7.9,
)
SHARES = (
    *(Shares(x, 100 - x) for x in (30, 40, 50, 60, 70, 80)),
    *(Shares(x, 100) for x in (80, 90, 95, 100)),
)


def ours(**options: Any) -> SloController:
    """The controller, which knows the GPU."""
    return SloController(**{"allowed": SHARES, "interference": PAYS} | options)
