"""The only door from models to kernels: ops with implementations chosen at trace time."""

from jpd.ops.attention import decode_attention, prefill_attention, write_kv
from jpd.ops.linear import linear
from jpd.ops.registry import check, choices, implementations, register, using

__all__ = [
    "check",
    "choices",
    "decode_attention",
    "implementations",
    "linear",
    "prefill_attention",
    "register",
    "using",
    "write_kv",
]
