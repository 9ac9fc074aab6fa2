"""What does it cost a norm to put a sum over GPUs in order while it reads it?

FlashOverlap reorders what was sent in the operator that follows (arXiv 2504.19519, section 3.3.5):
here the RMSNorm that adds the residual (`pallas_kernels.rms_norm_residual`). ``rows`` reads a sum
in order, ``tiles`` the same sum as the signalling GEMM leaves it, under the tilings that plans for
the H200 have. One GPU is enough: the sum is made, packed and not sent. Both results of `tiles` must
equal those of `rows` to the last bit, or the row fails.

The bound is the bytes of both inputs and both outputs, without padding, over the rate of a device
copy. `slowdown` in the summary is the time of `tiles` over that of `rows`, mean and largest.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any, NamedTuple

from benchmarks.report import Report, add_arguments
from benchmarks.rows import bound_ms

SHAPES = ((4096, 8192), (16384, 8192))
"""Tokens and width: Llama-3-70B's."""
QUICK_SHAPES = ((24, 384),)
TILINGS = ((256, 128, 4, "m", "m", 8), (128, 256, 4, "m", "m", 16), (256, 192, 3, "m", "m", 8))
"""`SignalConfig`s of the plans in `jpd/overlap/tuned`."""


class Case(NamedTuple):
    """A sum, and how the product that made it was cut up."""

    m: int
    width: int
    tiling: Any

    @property
    def name(self) -> str:
        """As in result rows."""
        cut = self.tiling
        return f"{self.m}x{self.width} in {cut.tile_m}x{cut.tile_n} by {cut.grid_tile_width}"


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary's numbers."""
    times = {(row["case"], row["impl"]): row["us"] for row in rows if row["status"] == "ok"}
    slower = [us / times[case, "rows"] for (case, impl), us in times.items() if impl == "tiles"]
    if not slower:
        return {}
    return {"slowdown": sum(slower) / len(slower), "slowdown_max": max(slower)}


def run_case(report: Report, case: Case, rate: float) -> None:
    """Adds the rows of one case.

    Args:
        report: gets them.
        case: to measure.
        rate: of a device copy, bytes/s.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks import device_time
    from benchmarks.gemm_impls import interpreted
    from pallas_kernels.rms_norm import rms_norm_residual
    from pallas_kernels.signal_gemm import pack

    on_gpu = jax.default_backend() == "gpu"
    nbytes = 4 * 2 * case.m * case.width
    calls = device_time.rotations(nbytes // 2, least=2) if on_gpu else 1
    shape = (case.m, case.width)
    sums = device_time.random_arrays(shape, jnp.bfloat16, calls, seed=0)
    residuals = device_time.random_arrays(shape, jnp.bfloat16, calls, seed=1)
    weight = device_time.random_arrays((case.width,), jnp.bfloat16, 1, seed=2)[0]
    packed = [jax.jit(partial(pack, config=case.tiling))(y) for y in sums]
    chains, operands = {}, {"rows": sums, "tiles": packed}
    for impl, ys in operands.items():
        tiling = case.tiling if impl == "tiles" else None

        def op(shared: Any, own: Any, tiling: Any = tiling) -> Any:
            options = {"eps": 1e-5, "tiling": tiling, **interpreted()}
            return rms_norm_residual(own["y"], own["residual"], shared["weight"], **options)

        own = {"y": ys[0], "residual": residuals[0]}
        chains[impl] = partial(device_time.Chain, op, {"weight": weight}, own, calls)
    compiled = device_time.compile_chains(chains, ["stream"])
    want = None
    for impl, program in compiled.items():
        try:
            if isinstance(program, Exception):
                raise program
            rotated = [
                {"y": y, "residual": r} for y, r in zip(operands[impl], residuals, strict=True)
            ]
            got = program.first_output({"weight": weight}, rotated)
            want = want or got
            if not all(bool((a == b).all()) for a, b in zip(got, want, strict=True)):
                raise ArithmeticError("not what the norm of rows is")
            timing = device_time.measure(program, {"weight": weight}, rotated)
            bound = 1e3 * bound_ms(nbytes, 0, bytes_per_s=rate)
            report.add(case.name, impl, timing.samples, "us", nbytes=nbytes, bound=bound)
        except Exception as error:  # one must not cost the other
            report.fail(case.name, impl, error)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed_norm")
    add_arguments(parser)
    args = parser.parse_args()
    from benchmarks.device_time import copy_bytes_per_s
    from pallas_kernels.signal_gemm import SignalConfig

    report = Report(
        "packed_norm",
        "What does it cost a norm to put a sum over GPUs in order while it reads it?",
        out=args.out,
    )
    report.summarise = summarise
    shapes = QUICK_SHAPES if args.quick else SHAPES
    cases = [Case(*shape, SignalConfig(*tiling)) for shape in shapes for tiling in TILINGS]
    report.expect((case.name, impl) for case in cases for impl in ("rows", "tiles"))
    rate = copy_bytes_per_s((1 << 26) if args.quick else (1 << 32))
    report.summary["copy_bytes_per_s"] = rate
    for case in cases:
        run_case(report, case, rate)
        report.save()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
