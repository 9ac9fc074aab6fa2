"""When and how to hide a collective behind its GEMM: FlashOverlap's tuning (arXiv 2504.19519).

Plain Python and NumPy; what is measured comes in as numbers. `BandwidthCurve` is how long a
collective takes, `Work` what the predictor knows of a GEMM and its collective, `search` finds the
`Plan` of a shape, a `PlanTable` stores plans, and a `Trace` says what a run then did. The ops that
use plans are in `jpd.ops.overlap`.
"""

from jpd.overlap.bandwidth import BandwidthCurve, CurveKey, load_curves, sample_sizes, save_curves
from jpd.overlap.partitions import Option, best_partition, exhaustive, search
from jpd.overlap.plan import OPS, Plan, PlanTable, Tiling, Topology
from jpd.overlap.predictor import Contention, Work, bound, predict, simulate
from jpd.overlap.trace import GroupEvents, Trace, plot

__all__ = [
    "OPS",
    "BandwidthCurve",
    "Contention",
    "CurveKey",
    "GroupEvents",
    "Option",
    "Plan",
    "PlanTable",
    "Tiling",
    "Topology",
    "Trace",
    "Work",
    "best_partition",
    "bound",
    "exhaustive",
    "load_curves",
    "plot",
    "predict",
    "sample_sizes",
    "save_curves",
    "search",
    "simulate",
]
