"""How fast are torch's matrix products (cuBLAS), and gemlite's, for bf16?

Runs in a process of its own, `benchmarks/flat_gemm.py` and others start it::

    python -m benchmarks.baselines.torch_gemm --case 8:4096:4096 64:4096:4096 --json gemm.json
    python -m benchmarks.baselines.torch_gemm --layer llama2-7b:8 --json layer.json

``cublas`` is `torch.nn.functional.linear`, ``gemlite`` (`--gemlite`) gemlite's Triton kernels with
16-bit weights, as it chooses them but for one and two rows. There they are those of three: with one
row of 4096x4096 its GEMV takes 1,455 us on an H200, where its GEMM takes 26 with 64 (a trial). A
case is M:N:K; a layer is its four products one after another.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gemm_cases import LAYERS, Gemm
from benchmarks.rows import failed_row, make_row

if TYPE_CHECKING:
    import torch


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines.torch_gemm")
    parser.add_argument("--case", nargs="*", type=Gemm.parse, default=[], metavar="M:N:K")
    parser.add_argument("--layer", nargs="*", default=[], metavar="MODEL:M")
    parser.add_argument("--gemlite", action="store_true", help="time gemlite too, with M <= 64")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return parser.parse_args(argv)


def keys_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(case, impl) of every row."""
    keys = [(case.name, "cublas") for case in args.case]
    keys += [(case.name, "gemlite") for case in args.case if args.gemlite and case.rows <= 64]
    keys += [("{} M={}".format(*layer.split(":")), "cublas") for layer in args.layer]
    return keys


def cublas_products(weights: list[torch.Tensor]) -> list[Callable[[Any], Any]]:
    """A product for each weight, a function of activations."""
    import torch

    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]


def gemlite_products(weights: list[torch.Tensor]) -> list[Callable[[Any], Any]]:
    """A product for each weight, a function of activations."""
    from gemlite.core import DType, GemLiteLinearTriton, set_autotune

    set_autotune("fast")
    products = []
    for weight in weights:
        outputs, inputs = weight.shape
        layer = GemLiteLinearTriton(
            W_nbits=16,
            group_size=None,
            in_features=inputs,
            out_features=outputs,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        layer.pack(weight, scales=None, zeros=None, bias=None, contiguous=True)

        def product(x: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            return layer(x) if len(x) > 2 else layer.forward_manual(x, "GEMM_SPLITK")

        products.append(product)
    return products


PRODUCTS = {"cublas": cublas_products, "gemlite": gemlite_products}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from benchmarks.baselines.torch_time import Rows, call_us, relative_error, rotations

    keys = keys_of(args)
    rows = Rows("torch_gemm", keys, args.json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def attempt(case: Gemm, impl: str, x: torch.Tensor, products: Any, want: torch.Tensor) -> None:
        try:
            if isinstance(products, Exception):
                raise products
            error = relative_error(products[0](x)[:: max(1, case.rows // 64)], want)
            if not error <= 1e-2:
                raise RuntimeError(f"relative error {error:.2e}")
            samples = call_us([lambda p=p: p(x) for p in products])
            rows.set(
                make_row(
                    case.name,
                    impl,
                    samples,
                    "us",
                    nbytes=case.nbytes,
                    flops=case.flops,
                    rel_err=error,
                )
            )
        except Exception as problem:  # one case must not cost the others
            rows.set(failed_row(case.name, impl, problem))

    with torch.no_grad():
        # As given: a run that is stopped has done the first ones. gemlite tunes each for seconds.
        for impl in PRODUCTS:
            wanted = [case for case in args.case if (case.name, impl) in keys]
            for (outputs, inputs), group in itertools.groupby(wanted, lambda c: c[1:]):
                cases = list(group)
                weights = [random(outputs, inputs) for _ in range(rotations(cases[0].weight_bytes))]
                try:
                    products = PRODUCTS[impl](weights)
                except Exception as problem:
                    products = problem
                for case in cases:
                    x = random(case.rows, inputs)
                    want = x[:: max(1, case.rows // 64)].float() @ weights[0].float().T
                    attempt(case, impl, x, products, want)
                del weights, products
        for layer in args.layer:
            model, tokens = layer.split(":")
            name = f"{model} M={tokens}"
            try:
                gemms = [Gemm(int(tokens), n, k) for n, k in LAYERS[model].values()]
                count = rotations(sum(g.weight_bytes for g in gemms), least=4)
                xs = [random(g.rows, g.inputs) for g in gemms]
                pairs = [
                    (x, random(g.outputs, g.inputs))
                    for _ in range(count)
                    for x, g in zip(xs, gemms, strict=True)
                ]
                calls = [lambda x=x, w=w: torch.nn.functional.linear(x, w) for x, w in pairs]
                samples = [us * len(gemms) for us in call_us(calls)]
                rows.set(
                    make_row(
                        name,
                        "cublas",
                        samples,
                        "us",
                        nbytes=sum(g.nbytes for g in gemms),
                        flops=sum(g.flops for g in gemms),
                    )
                )
                del pairs, calls
            except Exception as problem:
                rows.set(failed_row(name, "cublas", problem))
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
