"""Tensor parallelism: one model on several devices, each with its part of every layer.

The split is Megatron-LM's (Shoeybi et al., arXiv 1909.08053, section 3): a layer that makes heads
or FFN channels is cut by its outputs, the layer that reads them by its inputs, and the partial sums
of the latter are added over the devices ("ranks"). Three parts, one idea each:

* `rules`: names of the axes of every parameter, and which of them are cut. The place to change.
* `split`: which numbers of a parameter belong to a rank. NumPy and arithmetic.
* `placement`: puts parameters on devices, a part at a time, and gives them back in whole order.

What a program does with its part is in `jpd.ops.ranks`.
"""

from jpd.parallel.placement import (
    ManyDevices,
    OneDevice,
    Placement,
    page_spec,
    param_specs,
    place,
)
from jpd.parallel.rules import AXES, MESH_AXIS, RULES
from jpd.parallel.split import Split

__all__ = [
    "AXES",
    "MESH_AXIS",
    "RULES",
    "ManyDevices",
    "OneDevice",
    "Placement",
    "Split",
    "page_spec",
    "param_specs",
    "place",
]
