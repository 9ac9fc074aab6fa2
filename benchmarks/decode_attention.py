"""How fast is decode attention over paged keys and values, against the best of its peers?

One new token for each sequence; bf16, head size 128, pages of 16 tokens in random order. Ours:
``jpd_async`` (asynchronous softmax with a unified value, FlashDecoding++ §3), ``jpd_sync`` and
``jpd_lazy``, the same kernel otherwise; `default` in the summary names the one that a call without
`softmax=` takes, and that is held against the peers. ``jpd_async_by_head`` takes a unified value
for each head, as a model with `jpd_phi.json` does. (On a CPU ``--quick`` interprets ``jpd_async``
alone, beside jpd's ``xla``.) Peers: ``torch_sdpa`` (no pages: cases of one length only),
``flashinfer``, and ``jax_triton``, jax's own `paged_attention`.

Ours run as from the second layer of a model's step on: with `early`, after the first call of a
program (the row says so). A call then reads its first keys and values before the kernel ahead has
ended, which is the call before, over other pools; in a step it is the kernel that writes the newest
tokens, and those are not read early. FlashInfer's kernels overlap their launches too, by default.

Times are device times over rotated pools (`benchmarks/device_time.py`), and every implementation
reads the same bytes. `rel_err` is the worst row's against float32; above 4e-3 the case fails.
`recomputed` counts rows that the guard of ``async`` did again. `profiled_us` (``--profile``) is the
kernel alone, by the profiler. The bound is the bytes over the rate of a device copy, measured here.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.attention_cases import (
    DECODE,
    HEAD_SIZE,
    MAX_REL_ERR,
    PAGE_TOKENS,
    QUICK_DECODE,
    Decode,
    Pages,
    select,
)
from benchmarks.attention_chains import (
    SCALE,
    decode_chain,
    decode_triton_chain,
    decode_xla_chain,
)
from benchmarks.baselines import torch_attention
from benchmarks.budget import Budget
from benchmarks.lower_ahead import add_lowering, fill, start_lowering
from benchmarks.lowered import Lowering
from benchmarks.options import add_bounds, add_variants, planned
from benchmarks.peers import run_peer
from benchmarks.ratios import fill_bounds, put, speedups, times
from benchmarks.report import Report, add_arguments

PEERS = ("torch_sdpa", "flashinfer", "jax_triton")
SOFTMAX = ("async", "async_by_head", "sync", "lazy")
LARGE_KV_BYTES = 500_000_000


def ours(name: str) -> str:
    """Name of our rows."""
    return f"jpd_{name}"


def calls_of(case: Decode, quick_cpu: bool) -> int:
    """Calls of a program."""
    from benchmarks.device_time import rotations

    return 1 if quick_cpu else rotations(case.kv_bytes, least=case.least_calls)


def chains_of(
    cases: Sequence[Decode], softmax: Sequence[str], quick_cpu: bool
) -> dict[tuple[str, str], partial[Any]]:
    """What makes the chains, by case and implementation."""
    chains: dict[tuple[str, str], partial[Any]] = {}
    for case in cases:
        calls = calls_of(case, quick_cpu)
        for kind in SOFTMAX[:1] if quick_cpu else softmax:
            chains[case.name, ours(kind)] = partial(decode_chain, case, kind, calls)
        if quick_cpu:
            chains[case.name, "xla"] = partial(decode_xla_chain, case, calls)
        else:
            chains[case.name, "jax_triton"] = partial(decode_triton_chain, case, calls)
    return chains


def shapes_of(case: Decode) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of queries, of a pool of keys or values, and of the page table."""
    pages = Pages.shuffled(case.lengths)
    pool = (pages.count, PAGE_TOKENS, case.kv_heads, HEAD_SIZE)
    return (case.batch, case.q_heads, HEAD_SIZE), pool, pages.table.shape


def beside(case: Decode) -> list[partial[Any]]:
    """What compiles the programs that a case needs beside its chains."""
    import jax.numpy as jnp

    from benchmarks.attention_reference import rows_program
    from benchmarks.device_time import random_program

    query, pool, table = shapes_of(case)
    return [
        partial(random_program, pool, jnp.bfloat16),
        partial(random_program, query, jnp.bfloat16),
        partial(rows_program, query, pool, table, SCALE),
    ]


def run_ours(
    report: Report,
    cases: Sequence[Decode],
    args: argparse.Namespace,
    budget: Budget,
    lowering: Lowering | None,
) -> None:
    """Adds all rows that are made with JAX, as long as there is time."""
    import jax

    from benchmarks import device_time

    quick_cpu = args.quick and jax.default_backend() != "gpu"
    chains = chains_of(cases, args.softmax, quick_cpu)
    report.expect(chains)
    with device_time.CompileAhead(
        chains, args.variants, lowering=lowering, beside={c.name: beside(c) for c in cases}
    ) as compiled:
        for case in cases:
            if not budget.enough():
                return
            with budget.case():
                programs = {i: compiled.take((c, i)) for c, i in chains if c == case.name}
                _run_case(report, case, calls_of(case, quick_cpu), programs, args.profile)
            report.save()


def _run_case(
    report: Report, case: Decode, calls: int, programs: dict[str, Any], pattern: str | None
) -> None:
    """Adds the rows of one case; compiled programs by implementation."""
    import jax
    import jax.numpy as jnp

    from benchmarks import device_time
    from benchmarks.attention_reference import rows_program, worst_row_error
    from benchmarks.gemm_impls import mode

    turn = jax.jit(lambda x: jnp.transpose(x, (2, 0, 1, 3)))
    pages = Pages.shuffled(case.lengths)
    shapes = query, pool, _ = shapes_of(case)
    arrays = device_time.random_arrays(pool, jnp.bfloat16, 2 * calls)
    pools = list(zip(arrays[::2], arrays[1::2], strict=True))
    (q,) = device_time.random_arrays(query, jnp.bfloat16, 1)
    table, lengths = jnp.asarray(pages.table), jnp.asarray(case.lengths)
    want = np.asarray(rows_program(*shapes, SCALE)(q, *pools[0], table, lengths))
    del arrays
    for impl, program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            carried, rotated = (q, table, lengths), pools
            if impl == "jax_triton":
                carried = ((q.astype(jnp.float32) * SCALE).astype(q.dtype), table, lengths)
                rotated = [(turn(k), turn(v)) for k, v in pools]
            out, recomputed = program.first_output(carried, rotated)
            extra: dict[str, Any] = {"early": calls > 1} if impl.startswith("jpd_") else {}
            if recomputed is not None:
                extra["recomputed"] = int(np.sum(np.asarray(recomputed)))
            error = worst_row_error(out, want)
            del out, recomputed
            # The scaled query of the Triton kernel is rounded once more than ours.
            if not error <= MAX_REL_ERR * (2 if impl == "jax_triton" else 1):
                raise RuntimeError(f"relative error {error:.2e} > {MAX_REL_ERR:.0e}")
            timing = device_time.measure(program, carried, rotated)
            if pattern and impl.startswith("jpd_"):
                found = device_time.profiled_us(program, carried, rotated, pattern)
                extra["profiled_us"] = found
            report.add(
                case.name,
                impl,
                timing.samples,
                "us",
                nbytes=case.nbytes,
                flops=case.flops,
                rel_err=error,
                mode=mode(impl, timing.launch),
                **extra,
            )
            del rotated
        except Exception as error:  # one implementation must not cost the others
            report.fail(case.name, impl, error)


def default_softmax() -> str:
    """What a call of the kernel without `softmax=` does."""
    from pallas_kernels.decode_attention import decode_attention

    return inspect.signature(decode_attention).parameters["softmax"].default


def summarise(
    rows: Sequence[dict[str, Any]], cases: Sequence[Decode], default: str = "async"
) -> dict[str, Any]:
    """The summary's numbers from all rows.

    Args:
        rows: of the report.
        cases: all that the benchmark has.
        default: our implementation that is held against the peers.
    """
    summary: dict[str, Any] = {"default": default}
    best = speedups(rows, ours(default), PEERS)
    put(summary, "geomean_vs_best_peer", best, low="min_vs_best_peer", of=len(cases))
    for peer in PEERS:
        put(summary, f"geomean_vs_{peer}", speedups(rows, ours(default), [peer]))
    large = {c.name for c in cases if c.kv_bytes >= LARGE_KV_BYTES}
    rates = [
        row["pct_of_bound"]
        for row in rows
        if row["case"] in large and row["impl"] == ours(default) and row["pct_of_bound"] is not None
    ]
    if rates:
        if len(rates) < len(large):
            summary["pct_of_bw_large_over"] = f"{len(rates)} of {len(large)}"
        summary["pct_of_bw_large"] = sum(rates) / len(rates)
        summary["pct_of_bw_large_min"] = min(rates)
    against = (
        ("sync", "async_speedup"),
        ("lazy", "async_vs_lazy"),
        ("async_by_head", "async_vs_by_head"),
    )
    for other, key in against:
        ratios = speedups(rows, ours("async"), [ours(other)])
        put(summary, f"{key}_geomean", ratios)
        if ratios:
            summary[f"{key}_max"] = max(ratios.values())
    summary["cases_measured"] = len(times(rows, ours(default)))
    summary["cases_with_a_peer"] = len(best)
    return summary


def run_peers(
    report: Report, cases: Sequence[Decode], args: argparse.Namespace, budget: Budget
) -> None:
    """Adds the rows of torch and FlashInfer."""
    limit = {"timeout_s": args.peer_seconds, "budget": budget}
    names = [case.name for case in cases]
    uniform = [case.name for case in cases if torch_attention.applies(case)]
    if uniform:
        options = ["--kind", "decode", "--cases", *uniform]
        expected = [(n, "torch_sdpa") for n in uniform]
        run_peer(report, "torch_attention", options, expected, **limit, share=1 / 3)
    options = ["--kind", "decode", "--cases", *names]
    if args.flashinfer_modes:
        options += ["--modes", *args.flashinfer_modes]
    run_peer(report, "flashinfer_attention", options, [(n, "flashinfer") for n in names], **limit)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_attention")
    add_arguments(parser)
    add_variants(parser)
    add_bounds(parser)
    add_lowering(parser)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names or their beginnings")
    parser.add_argument("--softmax", nargs="+", choices=SOFTMAX, default=SOFTMAX, help="[all]")
    parser.add_argument("--no-peers", action="store_true", help="no torch, no FlashInfer")
    parser.add_argument("--flashinfer-modes", nargs="+", help="see the baseline's --modes")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="(?i)attention|mosaic",
        metavar="REGEX",
        help="time our kernel by the profiler too, by this name",
    )
    args = parser.parse_args()
    budget = Budget(args.seconds)
    report = Report(
        "decode_attention",
        "How fast is decode attention over paged KV, against the best of its peers?",
        out=args.out,
    )
    known = QUICK_DECODE if args.quick else DECODE
    chosen = select(known, args.cases)
    cases = planned(report, args, chosen, known, order_named=args.cases is not None)
    if args.lower_for is not None:
        sys.exit(fill(args, chains_of(cases, args.softmax, quick_cpu=False)))
    default = default_softmax()

    def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
        fill_bounds(report.rows, report.summary.get("copy_bytes_per_s"))
        return summarise(rows, known, default)

    report.summarise = summary
    report.expect((case.name, ours(s)) for case in cases for s in args.softmax if not args.quick)
    with start_lowering(args, budget, lambda: chains_of(cases, args.softmax, False)) as lowering:
        if cases and not args.no_peers:  # first, while the device's memory is all free
            run_peers(report, cases, args, budget)
        if cases and budget.enough():
            from benchmarks.device_time import copy_bytes_per_s

            rate = copy_bytes_per_s((1 << 26) if args.quick else (1 << 32))
            report.summary["copy_bytes_per_s"] = rate
            run_ours(report, cases, args, budget, lowering)
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
