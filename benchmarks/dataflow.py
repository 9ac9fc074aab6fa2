"""What does choosing the kernel by shape gain over one kernel for everything?

The four products of a layer (qkv, o, gate and up, down), one after another, with 1 to 256 rows:
``table`` takes what `pallas_kernels.dataflow` chooses for each (FlashDecoding++ §5), the others are
static: ``flat_gemm`` only, ``dense_gemm`` only, ``xla`` only (`jpd.ops.linear.linear_xla`), and
``cublas`` only (torch, in a process of its own). A static implementation that does not take the
shapes fails. `gain_vs_static` in the summary is, for every M and model, the time of the fastest
static one over that of the table, and `min_gain_vs_static` the least of them.

Times are device times of a whole layer (`benchmarks/device_time.py`), over the weights of several
layers. Each product gets an input of its own, so that nothing else runs between them; the numbers
of each kernel are checked in `flat_gemm` and `dense_gemm`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.gemm_cases import LAYERS, Gemm
from benchmarks.options import add_variants
from benchmarks.peers import run_peer
from benchmarks.ratios import fill_bounds, geomean, speedups
from benchmarks.report import Report, add_arguments

MODELS = ("llama2-7b", "llama31-8b")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_ROWS = (1, 8)
OURS = "table"
STATIC = ("flat_gemm", "dense_gemm", "xla", "cublas")


def case_name(model: str, rows: int) -> str:
    """As in result rows."""
    return f"{model} M={rows}"


def products(model: str, rows: int) -> list[Gemm]:
    """The four products of a layer."""
    return [Gemm(rows, n, k) for n, k in LAYERS[model].values()]


def layer_chain(model: str, rows: int, impl: str, calls: int) -> Any:
    """The program that runs the products of `calls` layers."""
    import jax
    import jax.numpy as jnp

    from benchmarks import gemm_impls
    from benchmarks.device_time import Chain

    product = gemm_impls.product(impl)
    gemms = products(model, rows)
    xs = [jax.ShapeDtypeStruct((rows, g.inputs), jnp.bfloat16) for g in gemms]
    ws = [jax.ShapeDtypeStruct((g.outputs, g.inputs), jnp.bfloat16) for g in gemms]

    def layer(xs: list[Any], ws: list[Any]) -> list[Any]:
        ys: list[Any] = []
        for x, w in zip(xs, ws, strict=True):
            # Each product waits for the one before it, as in a layer.
            x, ys = jax.lax.optimization_barrier((x, ys))
            ys = [*ys, product(x, w)]
        return ys

    return Chain(layer, xs, ws, calls, lambda: gemm_impls.scope(impl))


def run_ours(
    report: Report,
    models: Sequence[str],
    rows: Sequence[int],
    impls: list[str],
    variants: Sequence[str],
) -> None:
    """Adds all rows that are made with JAX."""
    import jax
    import jax.numpy as jnp

    from benchmarks import device_time
    from benchmarks.gemm_impls import mode

    on_cpu = jax.default_backend() != "gpu"
    for model in models:
        layer_bytes = sum(g.weight_bytes for g in products(model, 1))
        calls = 1 if on_cpu else device_time.rotations(layer_bytes, least=4)
        chains: dict[Any, Callable[[], Any]] = {
            (m, impl): partial(layer_chain, model, m, impl, calls) for m in rows for impl in impls
        }
        compiled = device_time.compile_chains(chains, variants)
        shapes = [(g.outputs, g.inputs) for g in products(model, 1)]
        made = [device_time.random_arrays(s, jnp.bfloat16, calls, scale=0.02) for s in shapes]
        weights = [list(layer) for layer in zip(*made, strict=True)]
        del made
        for m in rows:
            gemms = products(model, m)
            xs = [device_time.random_arrays((m, g.inputs), jnp.bfloat16, 1)[0] for g in gemms]
            for impl in impls:
                program = compiled[m, impl]
                try:
                    if isinstance(program, Exception):
                        raise program
                    timing = device_time.measure(program, xs, weights)
                    report.add(
                        case_name(model, m),
                        impl,
                        timing.samples,
                        "us",
                        nbytes=sum(g.nbytes for g in gemms),
                        flops=sum(g.flops for g in gemms),
                        mode=mode(impl, timing.launch),
                    )
                except Exception as error:  # one implementation must not cost the others
                    report.fail(case_name(model, m), impl, error)
        del weights


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary's numbers from all rows."""
    gains = speedups(rows, OURS, STATIC)
    summary: dict[str, Any] = {"gain_vs_static": gains}
    if gains:
        summary["min_gain_vs_static"] = min(gains.values())
        summary["geomean_gain_vs_static"] = geomean(gains.values())
    for static in STATIC:
        ratios = speedups(rows, OURS, [static])
        if ratios:
            summary[f"geomean_vs_{static}"] = geomean(ratios.values())
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataflow")
    add_arguments(parser)
    add_variants(parser)
    parser.add_argument("--models", nargs="+", choices=[*LAYERS], help=f"[{MODELS}]")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help=f"[{ROWS}]")
    parser.add_argument("--impls", nargs="+", choices=[OURS, *STATIC[:-1]], help="[all]")
    parser.add_argument("--no-peers", action="store_true", help="no torch")
    args = parser.parse_args()
    models = args.models or (["tiny"] if args.quick else MODELS)
    rows = args.rows or (QUICK_ROWS if args.quick else ROWS)
    report = Report(
        "dataflow", "What does choosing the kernel by shape gain over one for all?", out=args.out
    )
    if not args.no_peers:  # first, while the device's memory is all free
        layers = [(model, m) for model in models for m in rows]
        options = ["--layer", *(f"{model}:{m}" for model, m in layers)]
        run_peer(report, "torch_gemm", options, [(case_name(*key), "cublas") for key in layers])
    from benchmarks.device_time import copy_bytes_per_s

    rate = copy_bytes_per_s((1 << 26) if args.quick else (1 << 32))
    run_ours(report, models, rows, args.impls or [OURS, *STATIC[:-1]], args.variants)
    fill_bounds(report.rows, rate)
    report.summary |= {"copy_bytes_per_s": rate, **summarise(report.rows)}
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
