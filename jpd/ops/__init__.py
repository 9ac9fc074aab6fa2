"""The only door from models to kernels: ops with implementations chosen at trace time."""

from jpd.ops.attention import DecodeAttention, decode_attention, prefill_attention
from jpd.ops.linear import gated_linear, linear
from jpd.ops.norm import rms_norm
from jpd.ops.normed import Unnormed, gated_linear_of, linear_of, normed
from jpd.ops.pallas import describe as describe_kernels
from jpd.ops.pallas import kernels_without_gpu, may_run, workspace
from jpd.ops.ranks import (
    Ranks,
    Stream,
    embedding,
    gathered_logits,
    normed_stream,
    over_ranks,
    summed_linear,
)
from jpd.ops.registry import check, choices, implementations, register, using
from jpd.ops.rope import HeadNorms, rope_write, rotate, split_heads

__all__ = [
    "DecodeAttention",
    "HeadNorms",
    "Ranks",
    "Stream",
    "Unnormed",
    "check",
    "choices",
    "decode_attention",
    "describe_kernels",
    "embedding",
    "gated_linear",
    "gated_linear_of",
    "gathered_logits",
    "implementations",
    "kernels_without_gpu",
    "linear",
    "linear_of",
    "may_run",
    "normed",
    "normed_stream",
    "over_ranks",
    "prefill_attention",
    "register",
    "rms_norm",
    "rope_write",
    "rotate",
    "split_heads",
    "summed_linear",
    "using",
    "workspace",
]
