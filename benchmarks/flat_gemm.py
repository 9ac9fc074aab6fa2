"""How fast are products of 1 to 128 rows with a weight, against cuBLAS and XLA?

bf16 weights `[N, K]` of the layers of Llama-2-7B, Llama-3.1-8B, Llama-3-70B split in four, and
Qwen2.5-7B. ``jpd`` is what the table of `pallas_kernels.dataflow` chooses for the shape (column
`choice`), as in the models. Peers:
``cublas`` (`torch.nn.functional.linear`), ``xla`` (`jpd.ops.linear.linear_xla`, for the rows of
``--xla-m`` only: XLA tunes each product for seconds), ``gemlite`` with ``--gemlite``.

Times are device times over rotated weights (`benchmarks/device_time.py`). `rel_err` is the worst
row's against float32; above 4e-3 the case fails. The bound is the bytes over the rate of a device
copy, measured here. A mean over fewer cases than the benchmark has is marked by `NAME_over`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.budget import Budget, spread
from benchmarks.gemm_cases import LAYERS, Gemm, in_rounds, parse_shape, shapes
from benchmarks.gemm_chains import gemm_calls, gemm_chains
from benchmarks.lower_ahead import add_lowering, fill, start_lowering
from benchmarks.lowered import Chains
from benchmarks.options import add_bounds, add_variants, keep_one_impl, planned
from benchmarks.peers import run_peer
from benchmarks.ratios import fill_bounds, put, speedups, times
from benchmarks.report import Report, add_arguments

OURS = "jpd"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
XLA_ROWS = (1, 8, 64)
QUICK_ROWS = (1, 8)


def summarise(rows: Sequence[dict[str, Any]], cases: Sequence[Gemm]) -> dict[str, Any]:
    """The summary's numbers from all rows.

    Args:
        rows: of the report.
        cases: all that the benchmark has.
    """
    summary: dict[str, Any] = {}
    versus = speedups(rows, OURS, ["cublas"])
    small = {case.name for case in cases if case.rows <= 64}
    ratios = {name: ratio for name, ratio in versus.items() if name in small}
    low = "min_vs_cublas_m_le_64"
    put(summary, "geomean_vs_cublas_m_le_64", ratios, low=low, of=len(small))
    for m in sorted({case.rows for case in cases}):
        of_m = {case.name for case in cases if case.rows == m}
        chosen = {name: ratio for name, ratio in versus.items() if name in of_m}
        put(summary, f"geomean_vs_cublas_m{m}", chosen, of=len(of_m))
    for peer in ("xla", "gemlite"):
        put(summary, f"geomean_vs_{peer}", speedups(rows, OURS, [peer]), of=len(cases))
    summary["cases_measured"] = len(times(rows, OURS))
    summary["cases_with_cublas"] = len(versus)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flat_gemm")
    add_arguments(parser)
    add_variants(parser)
    add_bounds(parser)
    add_lowering(parser)
    parser.add_argument("--models", nargs="+", choices=[*LAYERS], help="[all but tiny]")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxK", help="[all]")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help=f"[{ROWS}]")
    parser.add_argument(
        "--xla-m", nargs="*", type=int, metavar="M", default=list(XLA_ROWS), help=f"[{XLA_ROWS}]"
    )
    impls = ("table", "gemv", "flat_gemm", "dense_gemm")
    parser.add_argument("--impl", default="table", choices=impls)
    parser.add_argument("--gemlite", action="store_true", help="time gemlite too")
    parser.add_argument("--no-peers", action="store_true", help="no torch")
    args = parser.parse_args()
    budget = Budget(args.seconds)
    every = [m for m in LAYERS if m != "tiny"]
    known = shapes(*(args.models or (["tiny"] if args.quick else every)))
    rows = args.rows or spread(QUICK_ROWS if args.quick else ROWS)
    everything = [Gemm(m, *shape) for shape in shapes(*every) for m in ROWS]
    chosen = in_rounds([s for s in args.shapes or known if s in known], rows)
    if not chosen:
        parser.error(f"--models has none of --shapes: it has {known}")
    report = Report(
        "flat_gemm", "How fast are products of few rows, against cuBLAS and XLA?", out=args.out
    )
    cases = planned(report, args, chosen, chosen if args.quick else everything, order_named=True)

    def kernels() -> Chains:
        return gemm_chains({case: [args.impl] for case in cases}, gemm_calls(cases))

    if args.lower_for is not None:
        sys.exit(fill(args, kernels()))
    keep_one_impl(parser, report, args.impl)
    counted = list(dict.fromkeys([*([] if args.quick else everything), *chosen]))

    def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
        fill_bounds(report.rows, report.summary.get("copy_bytes_per_s"))
        return summarise(rows, counted)

    report.summarise = summary
    with start_lowering(args, budget, kernels) as lowering:
        if not args.no_peers:  # first, while the device's memory is all free
            options = ["--case", *(":".join(map(str, case)) for case in cases)]
            options += ["--gemlite"] * args.gemlite
            expected = [(case.name, "cublas") for case in cases]
            limit = args.peer_seconds
            run_peer(report, "torch_gemm", options, expected, timeout_s=limit, budget=budget)
        report.expect((case.name, OURS) for case in cases)
        if cases and budget.enough():
            import jax

            from benchmarks import device_time, gemm_runs

            on_cpu = jax.default_backend() != "gpu"
            rate = device_time.copy_bytes_per_s((1 << 26) if args.quick else (1 << 32))
            report.summary["copy_bytes_per_s"] = rate
            impl = args.impl
            gemm_runs.run(
                report,
                cases,
                lambda case: (impl, "xla") if case.rows in args.xla_m or on_cpu else (impl,),
                names={impl: OURS},
                budget=budget,
                calls=1 if on_cpu else None,
                variants=args.variants,
                lowering=lowering,
            )
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
