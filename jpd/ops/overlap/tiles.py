"""Between plans and tiles: how a product is cut up, grouped, sent and put together again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jpd.ops.overlap.packed import Layout
from jpd.overlap import BandwidthCurve, Contention, Option, Plan, Tiling, Work


@dataclass(frozen=True)
class Tiles:
    """One rank's product as the signalling GEMM computes it."""

    config: Any
    """The `SignalConfig`."""
    sms: int
    groups: tuple[int, ...]
    """Tiles of each group, in the order of completion."""
    ranks: int
    """Receivers of a tile: 1 for an all-reduce."""
    layout: Layout
    """Of the result."""


def tiles_of(op: str, ranks: int, m: int, n: int, plan: Plan) -> Tiles:
    """What a plan, perhaps for a shape nearby, makes of this one.

    Raises:
      NotImplementedError: a number of ranks that tiles cannot be shared out to.
    """
    from pallas_kernels import signal_gemm

    config = signal_gemm.SignalConfig(**asdict(plan.tiling))
    receivers = 1 if op == "all_reduce" else ranks
    tiles = signal_gemm.tile_count(m, n, config, receivers)
    waves = plan.waves_for(signal_gemm.waves_of(tiles, plan.sms))
    groups = signal_gemm.groups_of_waves(waves, tiles, plan.sms)
    layout = Layout(
        m=m // ranks if op == "reduce_scatter" else m,
        n=n,
        part_m=config.part_m(receivers),
        config=config,
        groups=groups,
        ranks=ranks if op == "all_to_all" else 1,
    )
    return Tiles(config, plan.sms, groups, receivers, layout)


def option_of(
    op: str,
    ranks: int,
    m: int,
    n: int,
    config: Any,
    *,
    sms: int,
    ctas: int,
    gemm_s: float,
    curve: BandwidthCurve,
    itemsize: int = 2,
    fixed_s: float = 0.0,
    contention: Contention | None = None,
) -> Option:
    """What `jpd.overlap.search` needs of one configuration of the GEMM.

    Args:
      op: one of `jpd.overlap.OPS`.
      ranks: GPUs that take part.
      m: rows of the product on each.
      n: columns.
      config: a `pallas_kernels.signal_gemm.SignalConfig`.
      sms: SMs of the GEMM.
      ctas: thread blocks of NCCL.
      gemm_s: measured seconds of `signal_gemm` with these, alone.
      curve: the collective with so many blocks.
      itemsize: bytes of an element.
      fixed_s: see `Work`.
      contention: see `Work`; None for none.
    """
    from pallas_kernels import signal_gemm

    work = Work(
        tiles=signal_gemm.tile_count(m, n, config, 1 if op == "all_reduce" else ranks),
        sms=sms,
        tile_bytes=config.tile_m * config.tile_n * itemsize,
        gemm_s=gemm_s,
        collective_s=curve,
        fixed_s=fixed_s,
        contention=contention or Contention(),
    )
    return Option(Tiling(**asdict(config)), ctas, work)
