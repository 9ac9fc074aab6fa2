"""Which kernel computes a product: the heuristic dataflow of FlashDecoding++ (section 5).

In the paper every [N, K] has two inflection points: below M1 rows a GEMV wins, from M1 the flat
GEMM, from M2 the dense one. Here `python -m pallas_kernels.tune` times these three and XLA at some
numbers of rows and stores the best kernel and configuration of each in `tuned/<gpu>.json`, with M1
and M2 for readers. What is fastest on all SMs is not on a share of them, so there are entries for
each SM count that was tuned. The choice is made while a program is traced, by the entry of the next
larger number of rows in `ROWS`. A GPU, an SM count, a shape or a number of rows without an entry
gets a rule, which never takes the GEMV, and `Choice.source` says so.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import mosaic
from pallas_kernels.checks import not_empty
from pallas_kernels.dense_gemm import DenseConfig, dense_gemm
from pallas_kernels.dense_gemm import default as default_dense
from pallas_kernels.flat_gemm import FlatConfig, flat_gemm
from pallas_kernels.flat_gemm import default as default_flat
from pallas_kernels.gemv import MAX_NORMED_ROWS, GemvConfig, gemv
from pallas_kernels.products import checked_shape

TUNED = Path(__file__).parent / "tuned"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of rows that a table may have entries for; each speaks for those down to the one before
it, the last one also for more."""
FEW_ROWS = 8
"""Up to here an entry speaks for all fewer rows that have none: wgmma's tile has 8 rows anyway."""
FLAT_ROWS = 64
"""The rule's M2: most rows that go to the flat GEMM where no table says otherwise."""
XLA_GAIN, XLA_GAIN_US = 1.1, 10.0
"""XLA is chosen where it is this much faster, or so many microseconds: it starts no kernel early,
and none after it does, which costs a long product no more than a short one. Both are guesses."""
CONFIGS = {"gemv": GemvConfig, "flat_gemm": FlatConfig, "dense_gemm": DenseConfig}
"""Our kernels, and the class of their configurations."""


@dataclass(frozen=True)
class Choice:
    """What computes a product."""

    kernel: str
    """`gemv`, `flat_gemm`, `dense_gemm` or `xla`."""
    config: GemvConfig | FlatConfig | DenseConfig | None
    """None for XLA."""
    source: str
    """`table` or `rule`."""

    def takes_norm(self, rows: int) -> bool:
        """Whether an RMS norm of so many activations costs the kernel no pass of its own."""
        return self.kernel == "gemv" and rows <= MAX_NORMED_ROWS


def slug(device_kind: str) -> str:
    """The name of a GPU as the table's file has it."""
    return device_kind.lower().replace(" ", "_")


def device_kind() -> str:
    """The GPU that kernels are traced for, or that this process sees; a Hopper card without any."""
    target = mosaic.TARGET.get()
    if target is not None:
        return target[0]
    if jax.default_backend() != "gpu":
        return "NVIDIA H200"
    return jax.local_devices(backend="gpu")[0].device_kind


@functools.cache
def load_table(
    kind: str, sms: int
) -> dict[tuple[int, int, bool], dict[int, dict[str, Any]]] | None:
    """Entries by (N, K, gated), then by rows; None without any for this GPU and SM count."""
    file = TUNED / f"{slug(kind)}.json"
    tables = json.loads(file.read_text())["products"] if file.exists() else {}
    if str(sms) not in tables:
        return None
    return {
        (p["n"], p["k"], p["gated"]): {int(rows): entry for rows, entry in p["rows"].items()}
        for p in tables[str(sms)]
    }


def coverage() -> str:
    """What the table has entries for on the GPU in use, in words."""
    kind, sms = device_kind(), mosaic.sm_count()
    file = TUNED / f"{slug(kind)}.json"
    if not file.exists():
        return f"none for {kind}: a rule decides"
    counts = ", ".join(sorted(json.loads(file.read_text())["products"], key=int))
    table = load_table(kind, sms)
    if table is None:
        return f"{file.name} is for {counts} SMs, here are {sms}: a rule decides"
    rows = sorted({rows for entries in table.values() for rows in entries})
    return (
        f"{file.name}, for {counts} SMs: {len(table)} products on {sms}, each with some of up to "
        f"{', '.join(map(str, rows))} rows; a rule decides all others"
    )


def entry_for(m: int, entries: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """What the table says of `m` rows, in a product's entries by rows."""
    first, *larger = [rows for rows in ROWS if rows >= m] or ROWS[-1:]
    speaking = [first, *(rows for rows in larger if rows <= FEW_ROWS)]
    return next((entries[rows] for rows in speaking if rows in entries), None)


def rule(m: int, n: int, k: int, gated: bool = False) -> Choice:
    """The choice where no table has the shape."""
    if m <= FLAT_ROWS:
        return Choice("flat_gemm", default_flat(m, n // (1 + gated), gated), "rule")
    return Choice("dense_gemm", default_dense(m, n, k, mosaic.sm_count(), gated=gated), "rule")


def choose(
    m: int, n: int, k: int, *, gated: bool = False, pallas_only: bool = False, kind: str = ""
) -> Choice:
    """What computes `[m, k] x [n, k]`.

    Args:
      m: rows of activations.
      n: rows of the weight; both halves of a gated one.
      k: inputs.
      gated: silu(gate) * up as epilogue.
      pallas_only: XLA is no choice.
      kind: device kind of the GPU; the one in use when not given.

    Raises:
      NotImplementedError: an axis is empty.
    """
    not_empty(M=m, N=n, K=k)
    table = load_table(kind or device_kind(), mosaic.sm_count())
    entries = (table or {}).get((n, k, gated), {})
    entry = entry_for(m, entries)
    if entry is None:
        return rule(m, n, k, gated)
    xla_us = entry.get("xla_us")
    if not pallas_only and xla_us is not None and _with_gaps(xla_us) < entry["us"]:
        return Choice("xla", None, "table")
    return Choice(entry["kernel"], CONFIGS[entry["kernel"]](**entry["config"]), "table")


def _with_gaps(xla_us: float) -> float:
    return min(xla_us * XLA_GAIN, xla_us + XLA_GAIN_US)


def linear(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    norm: tuple[jax.Array, float] | None = None,
    pallas_only: bool = False,
    interpret: Any = None,
) -> jax.Array:
    """x w^T (+ bias) (+ residual) or its gated form, by the kernel that `choose` names.

    Arguments as for `pallas_kernels.flat_gemm`, w as `[N, K]`, and `norm` as for
    `pallas_kernels.gemv`.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: XLA is the choice, no kernel takes the shape, or the choice no norm.
    """
    m, n, k = checked_shape(x, w, bias, residual, gated, "nk")
    choice = choose(m, n, k, gated=gated, pallas_only=pallas_only)
    if norm is not None and not choice.takes_norm(m):
        raise NotImplementedError(f"M, N, K = {m}, {n}, {k}: {choice.kernel} takes no norm")
    operands = {"bias": bias, "residual": residual, "gated": gated, "interpret": interpret}
    match choice.kernel:
        case "gemv":
            return gemv(x, w, **operands, norm=norm, config=choice.config)
        case "flat_gemm":
            return flat_gemm(x, w, **operands, config=choice.config)
        case "dense_gemm":
            return dense_gemm(x, w, **operands, config=choice.config)
    raise NotImplementedError(f"M, N, K = {m}, {n}, {k}: XLA is faster here")
