"""How fast do the topologies serve, and how much load do they bear within an SLO?

Open loop (`jpd/bench/client.py`), greedy, lengths and arrivals of `jpd/bench/traces.py`, prefix
cache off, the same number of KV pages for all. Every point is one rate, one seed and one topology;
topologies of a workload run one engine after the other, in turns, in one run.

1. On `chunked`, the reference, requests alone give the SLOs: 7.5 times (tight) and 10 times (loose)
   their mean TTFT and TPOT. All at once they give its `capacity` in requests/s: what is finished
   while as many as fit run. `load` is a rate over that.
2. Each point sends rate times `--point-seconds` requests, and waits for the last one. A row has
   `slo.summarize`'s numbers, and the part of the requests within the SLOs (`tight`, `loose`: both
   latencies; `tight_ttft` ...: one of them).
3. The engine `semi_pd` is measured as three. `semi_pd_100_100` leaves both phases all SMs;
   `semi_pd_dynamic` lets jpd's `SloController` choose among shares that are kept ready, aiming at
   the tight SLO; `auto` is that with `topology="auto"`, which serves with one executor below
   `--break-even`, a ratio (see `jpd/semi_pd/mode.py`). The other two are held on two executors.

A run too long for one call is cut into several: `--merge` keeps the rows of earlier ones, with
their SLOs and capacities, `--missing` measures what they lack, and `--cases N` that many rates and
seeds at most. All topologies of a case are measured in one run.

The summary has for each workload, over the means of its seeds:

- `mean_e2e_speedup_max`, `mean_e2e_speedup_at_80pct_load`: mean E2E of the better one of the two
  unified policies over that of `semi_pd_dynamic`; at the rate where it is largest, and at load 0.8
  (interpolated between rates);
- `goodput_vs_...`: the rate at which 90 % keep the tight SLO, of `semi_pd_dynamic` over that of
  another (`per_gpu`: over half of it, since it has two); `loose` has the same for the loose SLO.
  Where a curve never crosses 90 % the ratio is a bound, see `relations`;
- `break_even_rate`: the highest rate at which the mean E2E of the better unified policy is as good
  as that of `semi_pd_dynamic`, interpolated between the two measured rates around it; `>=`: it is
  still better at the highest; null: at none. `break_even_ratio` is what `--break-even` should be,
  by this workload: requests that decode for each one that waits for its first token, while prompts
  are computed, on that policy at that rate (rows: `decoding_per_waiting`);
- `auto_vs_better_min`: mean E2E of the best of the unified policies and `semi_pd_dynamic` over that
  of `auto`, at the rate where it is smallest; 1 where `auto` took the better one everywhere;
- `seed_spread`: largest difference between seeds of a point's mean E2E, over their mean;
- `null_because`: why a number is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from benchmarks import topologies
from benchmarks.curves import write_svg
from benchmarks.options import add_merge_arguments
from benchmarks.render import print_table
from benchmarks.report import Report, add_arguments
from benchmarks.serving_summary import (
    AUTO,
    DYNAMIC,
    SLOS,
    STATIC,
    panels,
    points_of,
    summarise_workload,
)
from jpd import AsyncLLM
from jpd.bench import client, slo, traces
from jpd.bench.slo import RequestRecord, Slo
from jpd.bench.workload import Workload, retime
from jpd.config import BREAK_EVEN
from jpd.semi_pd import controller as controllers
from jpd.semi_pd.controller import Observation, Shares
from jpd.semi_pd.mode import BreakEven, Mode
from jpd.semi_pd.slo_controller import SloController

REFERENCE = "chunked"
IMPLS = {
    "chunked": ("chunked",),
    "prefill_first": ("prefill_first",),
    "semi_pd": (STATIC, DYNAMIC, AUTO),
    "time_slices": ("time_slices",),
    "disaggregated": ("disaggregated",),
}
"""What each engine is measured as."""
KEPT = {
    "llama31-8b": ((100, 100), (80, 100), (70, 30), (60, 40), (50, 50), (40, 60)),
    "tiny": ((100, 100), (50, 50)),
}
"""Shares that the controller may choose, for each model."""
SHOWN = ("case", "impl", "load", "num_prompts", "failed", "tight", "loose", "switches", "mode")


class Case(NamedTuple):
    """One rate and seed of a workload."""

    workload: str
    rate: float
    """Requests/s."""
    seed: int

    @property
    def name(self) -> str:
        """As in result rows."""
        return f"{self.workload} {self.rate:g}/s seed {self.seed}"


def unloaded_case(workload: str) -> str:
    """Name of the row with a workload's SLOs and capacity."""
    return f"{workload} unloaded"


# --- in the engine's process -----------------------------------------------------------------


class Steering:
    """A controller or mode policy that another one can be put into, between two points."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def decide(self, observation: Observation, current: Any) -> Any:
        """What the other one says."""
        return self.inner.decide(observation, current)


class Held:
    """A mode policy that stays with two executors."""

    def decide(self, observation: Observation, current: Mode) -> Mode:
        """Whatever is seen."""
        return "semi_pd"


def make_llm(steered: bool, **args: Any) -> AsyncLLM:
    """An engine; if `steered`, with `Steering` for its controller and its mode policy."""
    if steered:
        steering = {
            "controller": Steering(controllers.StaticController()),
            "break_even": Steering(Held()),
        }
        args["semi_pd"] = args["semi_pd"] | steering
    return AsyncLLM(**args)


def send(llm: AsyncLLM, workload: Workload, seed: int, alone: bool) -> list[RequestRecord]:
    """Sends the requests at their times, or one at a time."""
    options = client.ClientOptions(num_warmups=min(2, len(workload)), seed=seed)
    run = client.run_alone if alone else client.run
    return asyncio.run(run(llm, workload, options))


def run_point(
    llm: AsyncLLM,
    workload: Workload,
    seed: int,
    target: Slo | None,
    break_even: float | None,
) -> tuple[list[RequestRecord], dict[str, Any]]:
    """Runs one point; records of the requests, and what the engine counted.

    Args:
        llm: the engine.
        workload: its requests.
        seed: of the prompts.
        target: what a controller is to aim at; None leaves both phases all SMs.
        break_even: from which load on two executors are to serve; None: from the least.
    """
    options, coordinator = llm.config.semi_pd, llm._engine.coordinator
    steered = isinstance(options.controller, Steering)
    if steered:
        options.controller.inner = controllers.StaticController()
        if target is not None:
            aim = controllers.Slo(ttft_s=target.ttft_s, tpot_s=target.tpot_s)
            allowed = [Shares(*pair) for pair in options.kept_shares]
            options.controller.inner = SloController(slo=aim, allowed=allowed)
        options.break_even.inner = Held() if break_even is None else BreakEven(ratio=break_even)
    before = _counts(llm)
    if not steered:
        coordinator.recent()  # of earlier points
    records = send(llm, workload, seed, alone=False)
    fields = {name: count - before[name] for name, count in _counts(llm).items()}
    if steered:  # whoever steers takes what is recent
        return records, fields | {"mode": llm.stats.mode}
    recent = coordinator.recent()
    return records, fields | {
        "decoding_per_waiting": recent.decoding_beside / recent.waiting_beside
    }


def _counts(llm: AsyncLLM) -> dict[str, int]:
    stats, topology = llm.stats, llm._engine.topology
    counts = {name: getattr(stats, name) for name in ("preemptions", "recompiles")}
    if hasattr(topology, "shares"):
        for name in ("executors_lost", "mode_changes"):
            counts[name] = getattr(stats, name)
        counts["switches"] = len(topology.prefill.switches) + len(topology.decode.switches)
    return counts


# --- measuring -------------------------------------------------------------------------------


def calibrate(
    process: topologies.EngineProcess, name: str, limit: int, alone: int, at_once: int
) -> dict[str, float]:
    """SLOs and capacity of a workload: fields of its `unloaded` row."""
    requests = traces.make(name, rate=1.0, n=alone, seed=0, max_total_tokens=limit)
    records = process.call(send, requests, 0, True)
    fields: dict[str, float] = {}
    for scale, factor in SLOS.items():
        limits = slo.slo_from_unloaded(records, factor)
        fields |= {f"{scale}_{key}": value for key, value in asdict(limits).items()}
    requests = traces.make(name, rate=1.0, n=at_once, seed=1, max_total_tokens=limit)
    records = process.call(send, retime(requests, np.zeros(at_once)), 1, False)
    done = slo.summarize(records)
    if done["completed"] != at_once:
        raise RuntimeError(f"{at_once - done['completed']} of {at_once} requests at once failed")
    return fields | {
        "capacity": done["request_throughput"],
        "mean_prompt_tokens": float(requests.prompt_tokens.mean()),
        "mean_output_tokens": float(requests.output_tokens.mean()),
    }


def slos_of(unloaded: Mapping[str, Any]) -> dict[str, Slo]:
    """The SLOs of a workload's `unloaded` row."""
    return {s: Slo(unloaded[f"{s}_ttft_s"], unloaded[f"{s}_tpot_s"]) for s in SLOS}


def point_fields(records: Sequence[RequestRecord], slos: Mapping[str, Slo]) -> dict[str, Any]:
    """Fields of a point's row that its requests decide."""
    fields = slo.summarize(records)
    for scale, limits in slos.items():
        kept = slo.attainment(records, limits)
        fields |= {scale: kept.joint, f"{scale}_ttft": kept.ttft, f"{scale}_tpot": kept.tpot}
    return fields


def measure_engine(
    report: Report,
    process: topologies.EngineProcess,
    engine: str,
    cases: Iterable[Case],
    unloaded: Mapping[str, Mapping[str, Any]],
    *,
    limit: int,
    seconds: float,
    break_even: float,
) -> None:
    """Adds the rows of an engine.

    Args:
        report: gets the rows.
        process: the engine's.
        engine: its name in `IMPLS`.
        cases: to measure.
        unloaded: row of each workload.
        limit: most tokens of a request.
        seconds: in which a point's requests are sent.
        break_even: of `auto`.
    """
    for case in cases:
        n = max(4, round(case.rate * seconds))
        requests = traces.make(
            case.workload, rate=case.rate, n=n, seed=case.seed, max_total_tokens=limit
        )
        slos = slos_of(unloaded[case.workload])
        for impl in IMPLS[engine]:
            fields = {
                "workload": case.workload,
                "rate": case.rate,
                "load": case.rate / unloaded[case.workload]["capacity"],
                "seed": case.seed,
            }
            target = slos["tight"] if impl in (DYNAMIC, AUTO) else None
            even = break_even if impl == AUTO else None
            try:
                records, counts = process.call(run_point, requests, case.seed, target, even)
                fields |= point_fields(records, slos) | counts | {"left_out": requests.left_out}
            except Exception as error:  # one point must not cost the others
                report.fail(case.name, impl, error, **fields)
            else:
                report.add(case.name, impl, **fields)
                print(
                    f"{case.name} {impl}: E2E {fields['mean_e2el_ms']:.0f} ms, within the tight "
                    f"SLO {fields['tight']:.0%}",
                    flush=True,
                )


# --- command ---------------------------------------------------------------------------------


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of each workload."""
    return {workload: summarise_workload(of) for workload, of in points_of(rows).items()}


def show(report: Report) -> None:
    """Prints the columns that fit on a screen; the file has all."""
    columns = (*SHOWN, *(f"{p}_{t}_ms" for t in ("ttft", "tpot", "e2el") for p in ("mean", "p99")))
    document = report.document()
    rows = [{key: row.get(key) for key in (*columns, "status")} for row in document["rows"]]
    print_table(document | {"rows": rows})
    print(f"wrote {report.path}")


def all_cases(args: argparse.Namespace, unloaded: Mapping[str, Mapping[str, Any]]) -> list[Case]:
    """By seed, then workload, then rate."""
    cases = []
    for seed in args.seeds:
        for workload in args.workloads:
            capacity = unloaded[workload]["capacity"]
            rates = args.rates or [float(f"{capacity * load:.3g}") for load in args.loads]
            cases += [Case(workload, rate, seed) for rate in rates]
    return cases


def choose_cases(
    args: argparse.Namespace, report: Report, unloaded: Mapping[str, Mapping[str, Any]]
) -> list[Case]:
    """What is to be measured in this call; the report expects it."""
    chosen = all_cases(args, unloaded)
    if args.missing:
        chosen = [case for case in chosen if report.lacks(case.name)]
    chosen = chosen[: args.cases]
    impls = [impl for engine in args.topologies for impl in IMPLS[engine]]
    report.expect((case.name, impl) for case in chosen for impl in impls)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semi_pd_serving")
    add_arguments(parser)
    topologies.add_arguments(parser)
    parser.add_argument("--workloads", nargs="+", choices=traces.NAMES, help="[all]")
    parser.add_argument(
        "--topologies",
        nargs="+",
        choices=[*IMPLS],
        default=["chunked", "prefill_first", "semi_pd"],
        help="engines [%(default)s]",
    )
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--loads", nargs="+", type=float, help="of the capacity [0.4 0.6 0.8 1.0]")
    rates.add_argument("--rates", nargs="+", type=float, help="requests/s, for all workloads")
    parser.add_argument("--point-seconds", type=float, help="of sending [20; 2 with --quick]")
    parser.add_argument(
        "--break-even", type=float, default=BREAK_EVEN, help="ratio, of auto [%(default)s]"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="[0 1; 0 with --quick]")
    parser.add_argument("--cases", type=int, help="rates and seeds in this call, at most [all]")
    add_merge_arguments(parser)
    args = parser.parse_args()
    quick = args.quick
    args.workloads = args.workloads or (["azure_conv"] if quick else [*traces.NAMES])
    args.loads = args.loads or ([0.5, 1.0] if quick else [0.4, 0.6, 0.8, 1.0])
    args.seeds = args.seeds or ([0] if quick else [0, 1])
    seconds = args.point_seconds or (2.0 if quick else 20.0)
    alone, at_once = (3, 16) if quick else (16, 256)
    model, sizes = topologies.sizes(args)
    limit = sizes["max_model_len"]
    report = Report(
        "semi_pd_serving",
        "How fast do the topologies serve, and how much load do they bear within an SLO?",
        out=args.out,
    )
    report.summary["model"], report.summarise = model, summarise
    files = args.merge or [file for file in [report.path] if file.exists()]
    if files and (args.merge is not None or args.missing):
        report.merge(files)
        if report.earlier("model") != model:
            parser.error(f"--merge: results of {report.earlier('model')}, not of {model}")
    known = {row["case"]: row for row in report.all_rows() if row["status"] == "ok"}
    unloaded = {
        name: known[unloaded_case(name)] for name in args.workloads if unloaded_case(name) in known
    }
    # The reference comes first: it says how fast to send.
    order = sorted({REFERENCE, *args.topologies}, key=[*IMPLS].index)
    cases: list[Case] = []
    for engine in order:
        calibrated = engine != REFERENCE or len(unloaded) == len(args.workloads)
        if engine == REFERENCE and calibrated:
            cases = choose_cases(args, report, unloaded)
        if calibrated and not (cases and engine in args.topologies):
            continue
        kept = {"semi_pd": {"kept_shares": KEPT[model]}} if engine == "semi_pd" else {}
        arguments = topologies.engine_args(
            model,
            "auto" if engine == "semi_pd" else engine,
            **sizes,
            **kept,
            enable_prefix_caching=False,
        )
        arguments["steered"] = engine == "semi_pd"
        with topologies.EngineProcess(make_llm, arguments) as process:
            if not calibrated:
                for name in args.workloads:
                    if name not in unloaded:
                        fields = calibrate(process, name, limit, alone, at_once)
                        unloaded[name] = report.add(unloaded_case(name), REFERENCE, **fields)
                cases = choose_cases(args, report, unloaded)
            if engine in args.topologies:
                measure_engine(
                    report,
                    process,
                    engine,
                    cases,
                    unloaded,
                    limit=limit,
                    seconds=seconds,
                    break_even=args.break_even,
                )
        report.save()
    report.save()
    show(report)
    write_svg(report.path.with_suffix(".svg"), report.question, panels(report.all_rows()))
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
