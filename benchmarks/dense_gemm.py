"""How fast are products of 256 to 8192 rows with a weight, against cuBLAS?

bf16 weights `[N, K]` of the layers of Llama-2-7B and Llama-3.1-8B, with M rows as in prefill.
``jpd`` is what the table of `pallas_kernels.dataflow` chooses for the shape, as in the models
(``--impl dense_gemm``: that kernel with its default configuration). Peer: ``cublas``
(`torch.nn.functional.linear`).

Times are device times (`benchmarks/device_time.py`) on random values: cuBLAS and ours are both
faster on zeros. `rel_err` is the worst of 64 rows against float32; above 4e-3 the case fails.
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
from benchmarks.ratios import put, speedups
from benchmarks.report import Report, add_arguments

OURS = "jpd"
MODELS = ("llama2-7b", "llama31-8b")
ROWS = (256, 512, 1024, 2048, 4096, 8192)
QUICK_ROWS = (128,)


def summarise(rows: Sequence[dict[str, Any]], cases: Sequence[Gemm]) -> dict[str, Any]:
    """The summary's numbers; adds `tflops` to the rows.

    Args:
        rows: of the report.
        cases: all that the benchmark has.
    """
    for row in rows:
        if row["status"] == "ok" and row.get("us") and row["flops"]:
            row["tflops"] = row["flops"] / row["us"] / 1e6
    summary: dict[str, Any] = {}
    versus = speedups(rows, OURS, ["cublas"])
    put(summary, "geomean_vs_cublas", versus, low="min_vs_cublas", of=len(cases))
    for m in sorted({case.rows for case in cases}):
        of_m = {case.name for case in cases if case.rows == m}
        chosen = {name: ratio for name, ratio in versus.items() if name in of_m}
        put(summary, f"geomean_vs_cublas_m{m}", chosen, of=len(of_m))
    summary["cases_with_cublas"] = len(versus)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense_gemm")
    add_arguments(parser)
    add_variants(parser)
    add_bounds(parser)
    add_lowering(parser)
    parser.add_argument("--models", nargs="+", choices=[*LAYERS], help=f"[{MODELS}]")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxK", help="[all]")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help=f"[{ROWS}]")
    parser.add_argument("--impl", default="table", choices=("table", "dense_gemm"))
    parser.add_argument("--no-peers", action="store_true", help="no torch")
    args = parser.parse_args()
    budget = Budget(args.seconds)
    known = shapes(*(args.models or (["tiny"] if args.quick else MODELS)))
    rows = args.rows or spread(QUICK_ROWS if args.quick else ROWS)
    chosen = in_rounds([s for s in args.shapes or known if s in known], rows)
    if not chosen:
        parser.error(f"--models has none of --shapes: it has {known}")
    everything = [] if args.quick else [Gemm(m, *s) for s in shapes(*MODELS) for m in ROWS]
    report = Report(
        "dense_gemm", "How fast are products of many rows, against cuBLAS?", out=args.out
    )
    cases = planned(report, args, chosen, everything, order_named=True)
    counted = list(dict.fromkeys([*everything, *chosen]))

    def kernels() -> Chains:
        return gemm_chains({case: [args.impl] for case in cases}, gemm_calls(cases))

    if args.lower_for is not None:
        sys.exit(fill(args, kernels()))
    keep_one_impl(parser, report, args.impl)
    report.summarise = lambda rows: summarise(rows, counted)
    report.expect((case.name, OURS) for case in cases)
    with start_lowering(args, budget, kernels) as lowering:
        if not args.no_peers:  # first, while the device's memory is all free
            options = ["--case", *(":".join(map(str, case)) for case in cases)]
            expected = [(case.name, "cublas") for case in cases]
            limit = args.peer_seconds
            run_peer(report, "torch_gemm", options, expected, timeout_s=limit, budget=budget)
        if cases and budget.enough():
            import jax

            from benchmarks import gemm_runs

            on_cpu = jax.default_backend() != "gpu"
            gemm_runs.run(
                report,
                cases,
                lambda case: (args.impl, "xla") if on_cpu else (args.impl,),
                names={args.impl: OURS},
                budget=budget,
                calls=1 if on_cpu else None,
                variants=args.variants,
                lowering=lowering,
            )
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
