"""Finds the fastest kernel and configuration of products on this GPU, for `dataflow`.

`python -m pallas_kernels.tune` times every candidate of every kernel for the products of common
models, with weights that rotate through more than the L2 holds, and writes `tuned/<gpu>.json`, for
the number of SMs that it sees: under an MPS share (`CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`) these.
XLA is timed without its own search for the fastest product, which would take seconds a shape, and
for one row with a sum over K, which is faster than its product.
What the stored table names, for this product and for others, is tried first: `--candidates` then
leaves out what is least likely to win. `--seconds` ends in time with the products done so far.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dataflow, dense_gemm, flat_gemm, gemv, mosaic, products
from pallas_kernels.timing import STREAM_OPTIONS, device_us

# N, K, gated: fused qkv, output, gate and up, down projection, and the logits.
MODELS = {
    "llama2-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)),
    "llama31-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "qwen25-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (152064, 3584)),
    "llama3-70b-tp4": ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)),
}
_GATED = {(22016, 4096), (28672, 4096), (37888, 3584), (14336, 8192)}
GEMV_ROWS = tuple(rows for rows in dataflow.ROWS if rows <= gemv.MAX_ROWS)
FLAT_ROWS = tuple(rows for rows in dataflow.ROWS if rows <= flat_gemm.MAX_ROWS)
DENSE_ROWS = tuple(rows for rows in dataflow.ROWS if rows > dataflow.FEW_ROWS)
_ROTATED_BYTES = 400_000_000
_CALLS = 24
_MOST_ERROR = 0.01
_AGAIN = 3
"""Of the fastest that are timed twice: another process may have disturbed one of the times."""
_TIE = 1.01
"""The rule's choice is taken if it is at most this much slower than the fastest."""
_MOST_DENSE = 5
_RUN = {
    "gemv": gemv.gemv,
    "flat_gemm": flat_gemm.flat_gemm,
    "dense_gemm": dense_gemm.dense_gemm,
}


def _xla(x, w, gated):
    if x.shape[0] == 1:
        y = (w.astype(jnp.float32) * x.astype(jnp.float32)).sum(-1)[None].astype(x.dtype)
    else:
        y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    if not gated:
        return y
    gate, up = jnp.split(y, 2, axis=1)
    return jax.nn.silu(gate) * up


Candidate = tuple[str, Any]
Shape = tuple[int, int, bool]
"""N, K, gated."""


def entry_candidate(entry: Mapping[str, Any]) -> Candidate | None:
    """What an entry of a table names; None if the kernel has other settings by now."""
    try:
        return entry["kernel"], dataflow.CONFIGS[entry["kernel"]](**entry["config"])
    except (KeyError, TypeError):
        return None


def winners(known: Sequence[Mapping[str, Any]], shape: Shape, rows: int) -> list[Candidate]:
    """What won before with so many rows: for this product, then for others, most often first."""
    own: list[Candidate] = []
    others: Counter[Candidate] = Counter()
    for product in known:
        entry = product["rows"].get(str(rows)) or product["rows"].get(rows)
        found = entry and entry_candidate(entry)
        if not found:
            continue
        if (product["n"], product["k"], product["gated"]) == shape:
            own.append(found)
        else:
            others[found] += 1
    return [*own, *(candidate for candidate, _ in others.most_common())]


def ranked(
    candidates: Iterable[Candidate], first: Sequence[Candidate], most: int | None
) -> list[Candidate]:
    """The candidates, those in `first` before the others; `most` of them, and XLA."""
    candidates = list(candidates)
    ours = [candidate for candidate in candidates if candidate[0] != "xla"]
    likely = [candidate for candidate in dict.fromkeys(first) if candidate in ours]
    ours = [*likely, *(candidate for candidate in ours if candidate not in likely)]
    return [*ours[:most], *(candidate for candidate in candidates if candidate[0] == "xla")]


class Product:
    """One [N, K] with weights to time it on."""

    def __init__(self, n: int, k: int, gated: bool, alone: AbstractContextManager[Any]) -> None:
        self.n, self.k, self.gated = n, k, gated
        count = max(2, min(_CALLS, -(-_ROTATED_BYTES // (2 * n * k))))

        def make():
            keys = jax.random.split(jax.random.key(n + k), count)
            return [jax.random.normal(key, (n, k), jnp.bfloat16) * k**-0.5 for key in keys]

        program = jax.jit(make).lower().compile()
        with alone:
            made = jax.block_until_ready(program())
        self.weights = (made * _CALLS)[:_CALLS]

    def candidates(self, rows: int) -> Iterable[Candidate]:
        """Names of kernels with a configuration each; last XLA, which has none."""
        if rows in DENSE_ROWS:
            sms = mosaic.sm_count()
            found = dense_gemm.candidates(rows, self.n, self.k, sms, gated=self.gated)
            # No clusters: pairs of blocks may find no room beside other kernels.
            for config in [c for c in found if not c.cluster][:_MOST_DENSE]:
                yield "dense_gemm", config
        outputs = self.n // (1 + self.gated)
        if rows in GEMV_ROWS:
            for config in gemv.candidates(rows, outputs, self.k, self.gated):
                yield "gemv", config
        if rows in FLAT_ROWS:
            for config in flat_gemm.candidates(rows, outputs, self.gated):
                yield "flat_gemm", config
        yield "xla", None

    def lower(self, rows: int, kernel: str, config: Any) -> tuple[Any, dict[str, Any]]:
        """A program that runs the product on all weights in turn, and its compile options."""

        def call(x, w):
            if kernel == "xla":
                return _xla(x, w, self.gated)
            return _RUN[kernel](x, w, gated=self.gated, config=config)

        # The library's own choice for XLA: a search of XLA's would take seconds for every shape.
        options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
        x = jax.ShapeDtypeStruct((rows, self.k), jnp.bfloat16)

        def chain(x, ws):
            ys = []
            for w in ws:  # one after another: XLA may make one kernel of sums that share an operand
                x, y = jax.lax.optimization_barrier((x, call(x, w)))
                ys.append(y)
            return ys

        lowered = jax.jit(chain).lower(x, self.weights)
        return lowered, STREAM_OPTIONS | (options if kernel == "xla" else {})

    def x(self, rows: int) -> jax.Array:
        """Activations."""
        values = np.random.default_rng(rows).standard_normal((rows, self.k), np.float32)
        return jnp.asarray(values.astype(jnp.bfloat16))

    def reference(self, rows: int) -> Any:
        """A program that computes the product of activations and the last weight in float32."""
        compute = functools.partial(products.reference, gated=self.gated)
        return jax.jit(compute).lower(self.x(rows), self.weights[-1]).compile()

    def time(self, rows: int, program: Any, expected: jax.Array) -> float:
        """Microseconds of one product.

        Raises:
          ArithmeticError: the numbers are wrong.
        """
        args = (self.x(rows), self.weights)
        out = program(*args)[-1].astype(jnp.float32)
        error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
        if not error <= _MOST_ERROR:
            raise ArithmeticError(f"relative error {error}")
        calls = len(self.weights)
        return min(device_us(program, args, calls, samples=3)) / calls


def _times(
    product: Product, rows: int, programs: Mapping[Candidate, Future[Any]], expected: jax.Array
) -> dict[Candidate, float]:
    """The least time of each candidate that is right, the fastest of them timed twice."""
    times: dict[Candidate, float] = {}

    def measure(case: Candidate) -> None:
        try:
            us = product.time(rows, programs[case].result(), expected)
        except Exception as error:  # one that fails must not lose the others
            kernel, config = case
            print(f"  {rows} {kernel} {config}: {type(error).__name__}: {error}"[:300])
            return
        times[case] = min(us, times.get(case, us))

    for case in programs:
        measure(case)
    for case in sorted(times, key=times.__getitem__)[:_AGAIN]:
        measure(case)
    return times


def tune(
    product: Product,
    row_counts: Iterable[int],
    alone: AbstractContextManager[Any],
    *,
    known: Sequence[Mapping[str, Any]],
    most: int | None = None,
    end: float = float("inf"),
) -> dict[str, Any]:
    """The entry of one product: the best Pallas kernel for every number of rows, and XLA's time.

    Args:
      product: with its weights.
      row_counts: of activations.
      alone: held while anything runs on the GPU: processes that share it take turns, and a kernel
        would be timed with another's.
      known: products of earlier runs, whose winners are tried first.
      most: candidates of our kernels that are tried for a number of rows; all for None.
      end: of the time on `time.monotonic`: no number of rows is begun that would need longer than
        the one before it.
    """
    entries = {}
    longest_s = 0.0
    for rows in row_counts:
        began = time.monotonic()
        if began + longest_s >= end:
            print(f"{product.n}x{product.k} M={rows}: out of time; no new entry", flush=True)
            continue
        chosen = dataflow.rule(rows, product.n, product.k, product.gated)
        shape = product.n, product.k, product.gated
        # Also with few candidates: what the rule would take without a table.
        first = [(chosen.kernel, chosen.config), *winners(known, shape, rows)]
        cases = ranked(product.candidates(rows), first, most)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            programs = {}
            for case in cases:  # lowered one by one: only the compiler is safe to run in threads
                lowered, options = product.lower(rows, *case)
                programs[case] = pool.submit(lowered.compile, options)
            reference = product.reference(rows)
            wait(programs.values())
        with alone:
            expected = reference(product.x(rows), product.weights[-1])
            times = _times(product, rows, programs, expected)
        longest_s = max(longest_s, time.monotonic() - began)
        xla_us = times.pop(("xla", None), None)
        if not times:
            print(f"{product.n}x{product.k} M={rows}: no candidate was right; no entry", flush=True)
            continue
        by_rule = chosen.kernel, chosen.config
        rule_us = times.get(by_rule)
        fastest = min(times, key=times.__getitem__)
        if rule_us is not None and rule_us <= _TIE * times[fastest]:
            fastest = by_rule
        (kernel, config), us = fastest, times[fastest]
        best = {
            name: min((us for case, us in times.items() if case[0] == name), default=None)
            for name in dataflow.CONFIGS
            if name != "gemv" or rows in GEMV_ROWS
        }
        entries[rows] = {
            "kernel": kernel,
            "config": asdict(config),
            "us": round(us, 2),
            "xla_us": xla_us and round(xla_us, 2),
            **{f"{name}_us": value and round(value, 2) for name, value in best.items()},
            "rule_us": rule_us and round(rule_us, 2),
        }
        shape = f"{product.n}x{product.k}{' gated' if product.gated else ''} M={rows}"
        others = f"XLA {xla_us or 0:.2f}, rule {rule_us or 0:.2f}"
        print(f"{shape}: {kernel} {us:.2f} us ({others}), {config}", flush=True)
    return {
        "n": product.n,
        "k": product.k,
        "gated": product.gated,
        "rows": {str(rows): entry for rows, entry in entries.items()},
    }


def inflection_points(entries: dict[int, dict[str, Any]]) -> dict[str, int | None]:
    """M1 and M2 of section 5: fewest rows at which the flat GEMM wins, and from where it loses.

    Rows for which nothing was timed count as the next more that was: M1 is 1 where the flat GEMM
    wins at the fewest rows that were.
    """
    wins = [
        rows
        for rows, entry in entries.items()
        if entry["kernel"] == "flat_gemm" and entry["us"] <= (entry["xla_us"] or float("inf"))
    ]
    if not wins:
        more = (rows for rows, entry in entries.items() if entry["kernel"] != "gemv")
        return {"m1": None, "m2": min(more, default=None)}
    m1 = 1 if min(wins) == min(entries) else min(wins)
    return {"m1": m1, "m2": min((rows for rows in entries if rows > max(wins)), default=None)}


def parse_shape(text: str) -> Shape:
    """Reads NxK, or NxK:gated, for `argparse`.

    Raises:
      ArgumentTypeError: it is not one of the products in `MODELS`.
    """
    known = {f"{n}x{k}" + ":gated" * gated: (n, k, gated) for n, k, gated in products_of(MODELS)}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
    return known[text]


def products_of(models: Iterable[str]) -> list[Shape]:
    """The different products of these models, plain ones first."""
    plain = dict.fromkeys(itertools.chain.from_iterable(MODELS[m] for m in models))
    return [(*shape, False) for shape in plain] + [(*s, True) for s in plain if s in _GATED]


def _tune_shape(
    shape: Shape,
    row_counts: list[int],
    lock: Any,
    known: list[dict[str, Any]],
    most: int | None,
    end: float,
) -> dict[str, Any]:
    n, k, gated = shape
    few = [rows for rows in row_counts if rows <= 256 or n * rows <= 2**27]
    if time.monotonic() >= end:
        few = []
        print(f"{n}x{k}{' gated' if gated else ''}: out of time; no new entry", flush=True)
    if not few:
        return {"n": n, "k": k, "gated": gated, "rows": {}}
    product = Product(n, k, gated, lock)
    return tune(product, few, lock, known=known, most=most, end=end)


def _read(file: Path) -> dict[str, Any]:
    """A stored table, or one without entries."""
    return json.loads(file.read_text()) if file.exists() else {"products": {}, "commands": []}


def _nearest(tables: Mapping[str, list[dict[str, Any]]], sms: int) -> list[dict[str, Any]]:
    """The products of the SM count that is nearest: their winners are tried first."""
    counts = sorted(tables, key=lambda count: abs(int(count) - sms))
    return tables[counts[0]] if counts else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--rows", nargs="+", type=int, choices=dataflow.ROWS, help="[all]")
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, metavar="NxK[:gated]", help="[all of the models]"
    )
    parser.add_argument(
        "--candidates", type=int, metavar="N", help="configurations to try for each [all]"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="begin nothing that may not end in N s"
    )
    parser.add_argument("--jobs", type=int, default=4, help="processes that compile [4]")
    parser.add_argument("--out", type=Path, help="file [tuned/<gpu>.json of the package]")
    args = parser.parse_args()
    end = float("inf") if args.seconds is None else time.monotonic() + args.seconds
    if args.candidates is not None and args.candidates < 1:
        parser.error(f"--candidates must be at least 1, got {args.candidates}")
    if jax.default_backend() != "gpu":
        sys.exit("python -m pallas_kernels.tune needs a GPU that jax sees")
    kind = dataflow.device_kind()
    out = args.out or dataflow.TUNED / f"{dataflow.slug(kind)}.json"
    stored = dataflow.TUNED / f"{dataflow.slug(kind)}.json"
    kept = _read(out)
    sms = str(mosaic.sm_count())
    known = _nearest(kept["products"] or _read(stored)["products"], int(sms))
    products = {(p["n"], p["k"], p["gated"]): p for p in kept["products"].get(sms, [])}
    command = f"python -m pallas_kernels.tune {' '.join(sys.argv[1:])}, on {sms} SMs"
    table = {
        "gpu": kind,
        "jax": jax.__version__,
        "commands": [*kept["commands"], command],
        "products": kept["products"],
    }
    row_counts = args.rows or dataflow.ROWS
    shapes = args.shapes or products_of(args.models)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Compiling takes the most time, and one process compiles little more than one at a time.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the GPU's memory
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        lock = manager.Lock()
        common = (row_counts, lock, known, args.candidates, end)
        started = [pool.submit(_tune_shape, shape, *common) for shape in shapes]
        for future in as_completed(started):
            done = future.result()
            if not done["rows"]:
                continue
            key = done["n"], done["k"], done["gated"]
            old = products.get(key, {"rows": {}})["rows"]
            done["rows"] = {int(rows): entry for rows, entry in (old | done["rows"]).items()}
            products[key] = done | inflection_points(done["rows"])
            table["products"] |= {sms: list(products.values())}
            part = out.with_suffix(".json.part")  # a run that is killed keeps what it has
            part.write_text(json.dumps(table, indent=1) + "\n")
            part.replace(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
