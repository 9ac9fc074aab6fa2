"""How much faster is a model on several GPUs whose sums hide behind the products that make them?

The shape of Llama-3-70B with random weights, split over 2 or 4 GPUs of one host: the prefill of one
prompt of 4k, 8k and 16k tokens, and the training step (forward and backward) of one of its MLPs
with sequence parallelism. A case is `LINK tpRANKS prefill|mlp TOKENS`; LINK is "no_p2p" under
``NCCL_P2P_DISABLE=1``, else "nvlink". One run is for one link and one number of GPUs; ``--merge``
makes one result of several. All implementations run in turns in one process, on the same weights:

- ``jpd``: FlashOverlap (`jpd.ops.overlap`) by the plans of ``benchmarks.overlap --tune``; the norm
  after a sum reads the tiles where they lie. ``jpd_gather``: XLA puts them in order in its program
  of sum and norm. ``jpd_alone``: they are put in order ahead of the norm.
- ``jpd_cublas``: as ``jpd``, but cuBLAS computes the products that nothing is summed of.
- ``jpd_sequential``: the kernels of ``jpd``, each sum after its product.
- ``xla``: plain tensor parallelism, products by cuBLAS and sums by `psum` or `psum_scatter`.
  ``xla_latency_hiding``: with ``--xla_gpu_enable_latency_hiding_scheduler``.

Attention, norms and all else are the same kernels everywhere. A prefill's `rel_err` is the
difference of its last logits from those of ``xla``, or of the first that ran if that did not; that
of ``jpd_sequential`` says how much rounding makes, and a row with more than three times as much, or
more than 0.3, fails. A training step is compared with float32. A row is the time of the slowest
GPU, under sustained load.

``layers`` says how many layers were run, and ``layers_of_model`` how many there are: all of them
unless they do not fit, or ``--layers`` says so. Nothing is extrapolated: times, and the summary's
``tpN_speedup_*``, are of the layers that were run; ``tpN_layers`` names these.
Speed-ups are against the faster of ``xla`` and ``jpd_sequential``. ``tpN_speedup_*`` that name no
implementation are those of ``jpd``, which is what jpd does where nothing is set; no other stands in
for it. Two pairs differ in nothing but the products that are summed, and their sums: ``jpd`` and
``jpd_sequential``, ``jpd_cublas`` and ``xla``. ``tpN_overlap_kernels_geomean`` and
``tpN_overlap_cublas_geomean`` are what overlapping gains in each::

    python -m benchmarks.overlap_model --ranks 4 --seconds 300 --missing
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.budget import Budget
from benchmarks.models import MODELS
from benchmarks.options import add_bounds, planned
from benchmarks.overlap import TIMEOUT_S, TUNED
from benchmarks.overlap_cases import ALONE, LINKS, RANKS, Shape
from benchmarks.overlap_devices import set_up
from benchmarks.ratios import put, speedups
from benchmarks.report import Report, add_arguments

QUESTION = "How much faster is a model on several GPUs whose sums hide behind their products?"
MODEL = "llama3-70b"
TOKENS = (4096, 8192, 16384)
QUICK_TOKENS = (136,)
KINDS = ("prefill", "mlp")
OPS = {"prefill": "all_reduce", "mlp": "reduce_scatter"}
SEQUENTIAL = ("xla", "jpd_sequential")
"""Product, then collective: the faster of these is what speed-ups are against."""
OVERLAPPED = ("jpd", "jpd_cublas", "jpd_gather", "jpd_alone")
SAME_BUT_SUMS = {"kernels": ("jpd", "jpd_sequential"), "cublas": ("jpd_cublas", "xla")}
"""By what computes the products that nothing is summed of: with and without overlap."""
SAMPLES = 4
SAMPLE_S, MOST_RUNS = 0.15, 12
"""XLA lets the host run ahead by 32 programs."""
NOISE_FACTOR, LEAST_REL_ERR = 3.0, 0.01
MOST_REL_ERR = 0.3
"""More than rounding makes; of logits that have nothing in common it is 1.4."""
MLP_REL_ERR = 0.02


class Case(NamedTuple):
    """What is timed."""

    link: str
    ranks: int
    kind: str
    tokens: int

    @property
    def name(self) -> str:
        """As in result rows."""
        return f"{self.link} tp{self.ranks} {self.kind} {self.tokens}"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap_model")
    add_arguments(parser)
    add_bounds(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="GPUs [4 if there are, else 2]")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help=f"[{TOKENS}]")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="[both]")
    parser.add_argument("--layers", type=int, metavar="N", help="[all that fit]")
    parser.add_argument("--impls", nargs="+", metavar="IMPL", help="only these [all]")
    parser.add_argument("--tuned", type=Path, metavar="DIR", default=TUNED, help=f"[{TUNED}]")
    return parser.parse_args(argv)


def cases_of(link: str, ranks: int, tokens: Sequence[int], kinds: Sequence[str]) -> list[Case]:
    """Cases of one link and number of GPUs."""
    return [Case(link, ranks, kind, count) for kind in kinds for count in tokens]


def everything() -> list[Case]:
    """All cases of the benchmark."""
    return [
        case for link in LINKS for ranks in RANKS for case in cases_of(link, ranks, TOKENS, KINDS)
    ]


def variants(kind: str, on_gpu: bool) -> dict[str, Any]:
    """The implementations of a kind of case, by name, in the order of measuring."""
    from benchmarks.overlap_impls import LATENCY_HIDING
    from benchmarks.overlap_prefill import Variant

    found = {
        "xla": Variant("xla", "xla"),
        "jpd_sequential": Variant(sums="xla"),
        "jpd": Variant(),
        "jpd_cublas": Variant("xla"),
        "xla_latency_hiding": Variant("xla", "xla", options=LATENCY_HIDING),
    }
    if kind == "prefill":
        found |= {"jpd_gather": Variant(reorder="xla"), "jpd_alone": Variant(reorder="alone")}
    if not on_gpu:
        found["grouped"] = Variant(sums="grouped")
    return found


class Bench:
    """Everything that the cases of a run share.

    Args:
      report: gets the rows.
      args: of the command line.
      link: of the GPUs.
      ranks: how many.
      tokens: of the longest prompt.
    """

    def __init__(
        self, report: Report, args: argparse.Namespace, link: str, ranks: int, tokens: int
    ) -> None:
        from benchmarks import overlap_prefill, overlap_time
        from jpd.models import config_from_hf

        self._report, self._only = report, args.impls
        self._link, self._ranks, self._tokens = link, ranks, tokens
        self._mesh = overlap_time.mesh_of(ranks)
        self._gpu = overlap_time.on_gpu()
        hf = MODELS["tiny" if args.quick else MODEL] | {"architectures": ["LlamaForCausalLM"]}
        self._whole = config_from_hf(hf | {"torch_dtype": "bfloat16"})
        layers = args.layers or self._whole.num_layers
        if self._gpu:
            limit = self._mesh.devices.flat[0].memory_stats()["bytes_limit"]
            fits = overlap_prefill.layers_that_fit(self._whole, ranks, tokens, limit)
            if args.layers is not None and args.layers > fits:
                raise ValueError(f"--layers {args.layers}: there is room for {fits}")
            layers = min(layers, fits)
        if not 1 <= layers <= self._whole.num_layers:
            raise ValueError(f"--layers {layers}: the model has {self._whole.num_layers}")
        self._config = self._whole.replace(num_layers=layers, windows=self._whole.windows[:layers])
        self._model: Any = None
        self._communicators: dict[int, Any] = {}
        self._plans: Any = None
        if self._gpu:
            from jpd.ops.overlap import topology
            from jpd.overlap import PlanTable

            self._plans = PlanTable.shipped(topology(), args.tuned)

    def names(self, kind: str) -> list[str]:
        """Implementations that are to be measured."""
        found = variants(kind, self._gpu)
        return [name for name in found if self._only is None or name in self._only]

    def run(self, case: Case) -> None:
        """Measures one case and adds its rows."""
        if case.kind == "prefill":
            self._prefill(case)
        else:
            self._training(case)
        for most, communicator in list(self._communicators.items()):
            try:
                communicator.check()
            except Exception as error:  # rows say it already
                print(f"communicator of {most} CTAs: {error}; the next case makes a new one")
                self._communicators.pop(most).close()

    def close(self) -> None:
        """Ends communicators."""
        for communicator in self._communicators.values():
            communicator.close()

    def _prefill(self, case: Case) -> None:
        from benchmarks.overlap_prefill import Model, difference

        if self._model is None:
            devices = list(self._mesh.devices.flat)
            self._model = Model(self._config, devices, self._tokens)
        model = self._model
        flops = prefill_flops(self._config, case.tokens)
        layers = {
            "layers": self._config.num_layers,
            "layers_of_model": self._whole.num_layers,
        }
        plans = self._planned(case, model.products(case.tokens))
        programs = self._compiled(case, plans, lambda: model.lower(case.tokens))
        ids = model.prompt(case.tokens)
        logits, errors = {}, {}

        def check(name: str, out: Any) -> float | None:
            logits[name] = out
            first = next(iter(logits))
            if name == first:
                return None
            error, limit = difference(out, logits[first]), most_rel_err(name, errors)
            if not error <= limit:
                raise RuntimeError(f"relative error {error:.2e} > {limit:.2e}")
            errors[name] = error
            return error

        run = lambda program: model.run(program, ids)  # noqa: E731
        self._time(case, plans, programs, run, check, flops, layers, model.renew_pages)

    def _training(self, case: Case) -> None:
        from benchmarks.overlap_prefill import Training, Variant, difference

        self._model = None  # its memory; prefills come first
        training = Training(self._config, self._mesh, case.tokens)
        plans = self._planned(case, training.products())
        programs = self._compiled(case, plans, training.lower)
        exact = Variant("xla", "xla")
        with exact.tracing(None, ()):
            reference = exact.compile(training.lower("float32"))
        want = reference(*training.arrays)

        def check(name: str, out: Any) -> float:
            error = difference(out, want)
            if not error <= MLP_REL_ERR:
                raise RuntimeError(f"{name}: relative error {error:.2e} > {MLP_REL_ERR:.2e}")
            return error

        # Forward once and backward twice, a multiply-add as two, of three products.
        flops = 3 * 3 * 2 * case.tokens * self._config.hidden_size * self._config.ffn_size
        run = lambda program: program(*training.arrays)  # noqa: E731
        self._time(case, plans, programs, run, check, flops, {})

    def _planned(self, case: Case, products: Mapping[str, Shape]) -> dict[str, Any]:
        """The plan of each product, None where there is none near; communicators are made."""
        from benchmarks import overlap_cases, overlap_runs
        from jpd.overlap import PlanTable, Topology

        op = OPS[case.kind]
        cases = {
            name: overlap_cases.Case(case.link, case.ranks, op, shape)
            for name, shape in products.items()
        }
        if not self._gpu:
            plans = {name: overlap_runs.cpu_plan(case) for name, case in cases.items()}
            self._plans = PlanTable(Topology("none", "host", "none"), plans.values())
            return plans
        plans = {name: self._plans.find(op, case.ranks, *shape) for name, shape in products.items()}
        self._connect({plan.ctas for plan in plans.values() if plan and plan.overlap})
        return plans

    def _connect(self, ctas: set[int]) -> None:
        from jpd.parallel import MESH_AXIS
        from native.overlap import Communicator

        for most in sorted(ctas - set(self._communicators)):
            self._communicators[most] = Communicator.for_axis(
                self._mesh, MESH_AXIS, max_ctas=most, timeout_s=TIMEOUT_S
            )

    def _compiled(
        self, case: Case, plans: Mapping[str, Any], lower: Callable[[], Any]
    ) -> dict[str, Any]:
        """Compiled programs by implementation; one that fails is its exception."""
        found: dict[str, Any] = {}
        known = variants(case.kind, self._gpu)
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
            for name in self.names(case.kind):
                variant = known[name]
                try:
                    communicators = self._communicators.values()
                    with variant.tracing(self._plans, list(communicators)) as taken:
                        lowered = lower()
                    if name in OVERLAPPED and self._gpu:
                        must_overlap(taken, plans)
                        must_reorder(taken, getattr(variant, "reorder", "auto"))
                    found[name] = pool.submit(variant.compile, lowered)
                except Exception as error:  # one must not cost the others
                    found[name] = error
        done = {}
        for name, future in found.items():
            failure = future if isinstance(future, Exception) else future.exception()
            done[name] = failure or future.result()
        return done

    def _time(
        self,
        case: Case,
        plans: Mapping[str, Any],
        programs: Mapping[str, Any],
        run: Callable[[Any], Any],
        check: Callable[[str, Any], float | None],
        flops: int,
        extra: Mapping[str, Any],
        recover: Callable[[], None] = lambda: None,
    ) -> None:
        """Checks and times each program, and adds its row; `recover` is for after one failed."""
        import jax

        from benchmarks.overlap_runs import describe

        for name, program in programs.items():
            try:
                if isinstance(program, Exception):
                    raise program
                jax.block_until_ready(run(program))
                start = time.perf_counter()
                # The second run is checked, whose buffers the first one has used.
                out = jax.block_until_ready(run(program))
                one_s = time.perf_counter() - start
                error = check(name, out)
                del out
                samples = sustained_us(lambda p=program: run(p), one_s)
            except Exception as error:  # one implementation must not cost the others
                self._report.fail(case.name, name, error, **extra)
                recover()
                continue
            more = dict(extra)
            if name in OVERLAPPED:
                for product, plan in plans.items():
                    more[f"{product}_plan"] = describe(plan) if self._gpu else "XLA: no GPU"
            self._report.add(case.name, name, samples, "us", flops=flops, rel_err=error, **more)


def most_rel_err(name: str, errors: Mapping[str, float]) -> float:
    """The largest relative error of a prefill's logits that passes.

    Args:
      name: of the implementation.
      errors: of those that have passed before it.
    """
    if name == "jpd_sequential":  # the measure of rounding itself
        return MOST_REL_ERR
    noise = errors.get("jpd_sequential", 0.0)
    return min(MOST_REL_ERR, max(LEAST_REL_ERR, NOISE_FACTOR * noise))


def must_overlap(taken: Sequence[Any], plans: Mapping[str, Any]) -> None:
    """Raises RuntimeError unless sums were traced as planned; a plan may say not to overlap."""
    if not any(plans.values()):
        raise RuntimeError(f"no plan near {', '.join(plans)}: benchmarks.overlap --tune finds some")
    sums = [choice for choice in taken if choice.op.startswith("matmul_")]
    overlapped = [choice for choice in sums if choice.taken == "overlap"]
    wanted = [name for name, plan in plans.items() if plan is not None and plan.overlap]
    # Each product is traced alike wherever it is: none may fall back that has a plan.
    other = {choice.reasons for choice in sums if choice.taken != "overlap"}
    if (wanted and not overlapped) or (len(wanted) == len(plans) and other):
        raise RuntimeError(f"planned to overlap: {wanted}; instead: {other or 'no sum at all'}")


def must_reorder(taken: Sequence[Any], reorder: str) -> None:
    """Raises RuntimeError unless sums were added and put in order as selected, where any were."""
    wanted = "pallas" if reorder == "auto" else reorder
    other = {c for c in taken if c.op == "rms_norm_residual" and c.taken != wanted}
    if other:
        raise RuntimeError(f"sums were to be added by {wanted!r}: {other}")


def prefill_flops(config: Any, tokens: int) -> int:
    """Of the layers for one prompt, on all GPUs together; a multiply-add counts as two.

    Products with weights, and causal attention, half of a square. The logits are of a few tokens.
    """
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    weights = width * (2 * heads + 2 * kv) + 3 * width * config.ffn_size
    return config.num_layers * (2 * tokens * weights + 2 * tokens * tokens * heads)


def sustained_us(run: Callable[[], Any], one_s: float, samples: int = SAMPLES) -> list[float]:
    """Times of runs that follow each other without a pause, each to the end of the slowest GPU.

    For programs of many milliseconds, which the host enqueues while others run. A sample is as many
    runs as take `SAMPLE_S`, after one such sample that does not count.

    Args:
      run: enqueues one run, and gives its results.
      one_s: seconds of a run, roughly.
      samples: number of samples.
    """
    import jax

    runs = max(1, min(MOST_RUNS, round(SAMPLE_S / one_s)))
    ends, waiting = [], []
    for _ in range(1 + samples):
        for _ in range(runs):
            out = run()
        waiting.append(out)
        if len(waiting) > 1:  # one sample is always enqueued
            jax.block_until_ready(waiting.pop(0))
            ends.append(time.perf_counter())
    jax.block_until_ready(waiting)
    ends.append(time.perf_counter())
    return [(end - start) / runs * 1e6 for start, end in pairwise(ends)]


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary's numbers from all rows."""
    summary: dict[str, Any] = {}
    links = dict.fromkeys(row["case"].split()[0] for row in rows)
    for link in links:
        for ranks in RANKS:
            start = f"{link} tp{ranks}"
            prefix = f"tp{ranks}" if link != "no_p2p" else f"no_p2p_tp{ranks}"
            some = [row for row in rows if row["case"].startswith(f"{start} prefill ")]
            ratios = speedups(some, "jpd", SEQUENTIAL)
            summary |= _extremes(f"{prefix}_speedup", ratios)
            cublas = speedups(some, "jpd_cublas", SEQUENTIAL)
            summary |= _extremes(f"{prefix}_speedup_jpd_cublas", cublas)
            for name in ("jpd_gather", "jpd_alone"):
                put(summary, f"{prefix}_speedup_{name}_geomean", speedups(some, name, SEQUENTIAL))
            for products, (name, peer) in SAME_BUT_SUMS.items():
                put(summary, f"{prefix}_overlap_{products}_geomean", speedups(some, name, [peer]))
            hiding = speedups(some, "jpd", ["xla_latency_hiding"])
            put(summary, f"{prefix}_vs_xla_latency_hiding_geomean", hiding)
            layers = {
                f"{row['layers']} of {row['layers_of_model']}"
                for row in some
                if row["impl"] == "jpd" and row["status"] == "ok"
            }
            if layers:
                summary[f"{prefix}_layers"] = ", ".join(sorted(layers))
            mlps = [row for row in rows if row["case"].startswith(f"{start} mlp ")]
            summary |= _extremes(f"{prefix}_mlp_speedup", speedups(mlps, "jpd", SEQUENTIAL))
    return summary


def _extremes(name: str, ratios: Mapping[str, float]) -> dict[str, float]:
    if not ratios:
        return {}
    found = {f"{name}_max": max(ratios.values()), f"{name}_min": min(ratios.values())}
    return found | {f"{name}_at_{case.split()[-1]}": ratio for case, ratio in ratios.items()}


def main() -> None:
    args = parse_args()
    budget = Budget(args.seconds)
    report = Report("overlap_model", QUESTION, out=args.out)
    link, ranks = set_up(report, args.ranks)
    if link == "host" and not args.quick and args.seconds != 0:
        sys.exit("this model needs GPUs; --quick runs a tiny one here")
    if link == ALONE and args.seconds != 0:
        sys.exit("one GPU has no sums to hide: 2 or 4 are needed")
    tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    cases = cases_of(link, ranks, tokens, args.kinds) if args.seconds != 0 else []
    every = [] if args.quick else everything()
    cases = planned(report, args, cases, every, once=())
    cases.sort(key=lambda case: KINDS.index(case.kind))
    report.summarise = summarise
    if cases and args.seconds != 0:
        bench = Bench(report, args, link, ranks, max(case.tokens for case in cases))
        report.expect((case.name, name) for case in cases for name in bench.names(case.kind))
        for case in cases:
            if not budget.enough():
                break
            with budget.case():
                try:
                    bench.run(case)
                except Exception as error:  # too little memory, say: other cases may do
                    for name in bench.names(case.kind):
                        if all((r["case"], r["impl"]) != (case.name, name) for r in report.rows):
                            report.fail(case.name, name, error)
            report.save()
        bench.close()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
