"""How fast do the topologies serve, and how much load do they bear within an SLO?

Open loop (`jpd/bench/client.py`), greedy, lengths and arrivals of `jpd/bench/traces.py`, prefix
cache off, the same number of KV pages and the same kernels for all. Every point is one rate, one
seed and one implementation; those of one rate and seed, a case, come one after the other. Their
engines are started side by side before anything is measured, each in a process of its own: one that
waits for its turn takes memory and nothing else.

1. On `chunked`, the reference, requests alone give the SLOs: 7.5 times (tight) and 10 times (loose)
   their mean TTFT and TPOT. Their outputs are cut at 64 tokens: the next one does not take longer.
   Requests that come all at once, twice as many as run at a time, give its `capacity`: how many a
   second it finishes of the second quarter, while one takes the place of another; the others are
   aborted then. `load` is a rate over that, and may be above 1.
2. Each point sends rate times `--point-seconds` requests, and waits for the last one. A row has
   `slo.summarize`'s numbers (`..._lateness_ms`: how late they were sent), and the part of the
   requests within the SLOs (`tight`, `loose`: both latencies; `tight_ttft` ...: one of them).
   `kv_bytes_sent` are keys and values that went from prefill to decode (with `disaggregated`),
   `kv_wait_s` the time for which prompts that were computed waited for theirs to arrive.
3. One engine is measured as `chunked` and `prefill_first`, another as the rest: `semi_pd_100_100`
   leaves both phases all SMs, and `semi_pd_70_30` and others, measured only if they are asked for,
   divide them; `--kept` must have their shares;
   `semi_pd_dynamic` lets jpd's `SloController` choose among shares that are kept ready, aiming at
   the tight SLO, and `semi_pd_mean` at no SLO but the least mean E2E; `auto` is `semi_pd_dynamic`
   with `topology="auto"`, which serves with one executor where the controller foresees less cost
   or, with `--break-even`, below that ratio (both in `jpd/semi_pd/mode.py`), and `auto_mean`,
   measured only if it is asked for, `semi_pd_mean` with it. The others are held on two executors,
   and points with shares that change begin under (100, 100) with two. `chunked_1024`, `auto_512`
   and so on, measured only if they are asked for, are the same with so many `max_num_mixed_tokens`
   in place of all that a step may have. Each has a twin whose name ends with `_shortest`, measured
   only if it is asked for: the same with `scheduling_policy="shortest"` in place of "fcfs".

A run too long for one call is cut into several: with `--seconds N` no case begins that may not end
in time, `--merge` keeps the rows of earlier runs, with their SLOs and capacities, so that a load is
one and the same rate in all of them, and `--missing` measures the cases that they lack. The file is
written after every case, and a case is whole or missing. `--seconds 0 --merge FILE ...` measures
nothing: it merges files and draws the chart. With `--decisions FOLDER` what each controller was
shown and said while two executors served goes there, also those that never change their mind, a
file a point (`jpd/semi_pd/decision_log.py`).

The summary has for each workload, over the means of its seeds:

- `mean_e2e_speedup_max`, `mean_e2e_speedup_at_80pct_load`: mean E2E of the best of the unified
  policies (those with smaller steps, too, where they were measured) over that of `semi_pd_dynamic`;
  at the rate where it is largest, and at load 0.8 (interpolated between rates);
- `break_even_rate`: the highest rate at which the best unified policy is as good as
  `semi_pd_dynamic`, interpolated between the two measured rates around it; `>=`: it is still better
  at the highest; null: at none. Of `auto`s, which may be on one executor there, it says little.
  `break_even_ratio` is what the ratio of `jpd.semi_pd.mode.BreakEven` should be, by this workload:
  requests that two executors would save for each one that waits, by what that policy saw at that
  rate (rows: `saved_per_waiting`);
- `auto_vs_better_min`: mean E2E of the best of the unified policies and `semi_pd_dynamic` over that
  of `auto`, at the rate where it is smallest; 1 where `auto` took the better one everywhere;
- `goodput`: of each implementation, the rate and how it relates to the true one; `goodput_vs_...`:
  the rate at which 90 % keep the tight SLO, of `semi_pd_dynamic` over that of another (`per_gpu`:
  over half of it, since it has two; `best_unified`: the one of the unified policies, smaller steps
  included, that bears most); `loose` has the same for the loose SLO. Where a curve never crosses 90
  % the ratio is a bound, see `relations`;
- `without_slo`: the speed-ups and the break-even of `semi_pd_mean`;
- `auto_mean`, `auto_1024` and so on: these for it, if it was measured, goodput with the tight SLO,
  and whether it took the better one, judged by the unified policies and by the controller on two
  executors with the tight SLO; without an SLO by that without one, too, where it was measured;
- `fixed`: speed-ups, break-even and goodput of each that was measured with shares that divide the
  SMs, twins too (in `fixed` and those of `auto` `goodput_dynamic_vs_100_100` is not of
  `semi_pd_dynamic`, but of the one they are for);
- `shortest`: likewise for the twins of the controllers and of `auto`s, if one was measured,
  with `auto_vs_better_min` of `auto_shortest`; mean E2E against the best unified policy, twins
  included, goodput (tight) against the same others as above and, in `against_twins`, of
  `semi_pd_dynamic_shortest` against their twins;
- `seed_spread`: largest difference between seeds of a point's mean E2E, over their mean;
- `null_because`: why a number is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options, topologies
from benchmarks.budget import Budget
from benchmarks.curves import write_svg
from benchmarks.render import print_table
from benchmarks.report import Report, add_arguments
from benchmarks.serving_impls import (
    AUTO,
    AUTO_MEAN,
    CHUNKED,
    DYNAMIC,
    ENGINES,
    FIXED,
    MEAN,
    STATIC,
    UNIFIED,
    parts,
)
from benchmarks.serving_summary import SLOS, panels, points_of, summarise_workload
from benchmarks.stopping import end_on_sigterm, say
from jpd import AsyncLLM
from jpd.bench import client, slo, traces
from jpd.bench.slo import RequestRecord, Slo
from jpd.bench.workload import Workload
from jpd.semi_pd import controller as controllers
from jpd.semi_pd.controller import Observation, Shares
from jpd.semi_pd.decision_log import LoggedController
from jpd.semi_pd.mode import BreakEven, ForeseenMode, Mode, held_up_s, saved_per_waiting
from jpd.semi_pd.slo_controller import SloController

REFERENCE = CHUNKED
SHORT = Workload("short", [0.0], [16], [16], source="one request")
"""Sent between points, so that executors are steered."""
SETTLE_S = 30.0
"""Until which the shares of a point must serve."""
UNIFIED_MEMORY = "0.4"
"""Part of the GPU's memory that JAX takes for the unified engine; the rest is for its peers."""
UNLOADED_TOKENS = 64
"""Output of a request that runs alone, at most."""
KEPT = {
    "llama31-8b": ((100, 100), (70, 30), (60, 40)),
    "small": ((100, 100), (50, 50)),
    "tiny": ((100, 100), (50, 50)),
}
"""Shares that are kept ready and that controllers may choose, for each model, if `--kept` says
nothing else. (50, 50) beside them gained at most 3 % of the mean E2E on azure_conv and arxiv in
simulation, and every pair of executors takes long to start; the short prompts and long outputs of
sharegpt_like need decode to have more, azure_code prefill."""
LOADS = {
    "azure_conv": (0.6, 0.8, 1.0, 1.2),
    "azure_code": (0.1, 0.2, 0.4, 0.8),
    "sharegpt_like": (0.8, 1.0, 1.2, 1.4),
    "arxiv": (0.6, 0.8, 1.0, 1.4),
}
"""Of each workload, so that by `jpd simulate` all but `disaggregated` cross 90 % in between."""
SHOWN = ("case", "impl", "load", "num_prompts", "failed", "tight", "loose", "switches", "mode")
LATENESS = "p99_lateness_ms"


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


def settle(llm: AsyncLLM, impl: str, shares: Shares) -> None:
    """Has two executors serve under these shares, whatever the point before left.

    Raises:
        TimeoutError: they do not after a while.
    """
    options, topology = llm.config.semi_pd, llm._engine.topology
    options.controller.inner = controllers.StaticController(shares)
    options.break_even.inner = Held()
    end_s = time.monotonic() + SETTLE_S
    while (topology.shares, llm.stats.mode) != (shares, "semi_pd"):
        if time.monotonic() > end_s:
            now = f"{topology.shares}, {llm.stats.mode}"
            raise TimeoutError(f"{impl}: not under {shares} after {SETTLE_S:g} s but {now}")
        send(llm, impl, SHORT, 0, client.run)  # nobody is asked while nothing runs


def send(
    llm: AsyncLLM,
    impl: str,
    workload: Workload,
    seed: int,
    run: Callable[..., Coroutine[Any, Any, list[RequestRecord]]],
) -> list[RequestRecord]:
    """Sends the requests to the engine as an implementation, in the way of a client's function."""
    of, coordinator = parts(impl), llm._engine.coordinator
    coordinator.scheduling_policy = "shortest" if of.shortest else "fcfs"
    coordinator.max_num_mixed_tokens = of.mixed_tokens or llm.config.max_num_mixed_tokens
    if ENGINES[impl] == "unified":  # all of them have one engine
        coordinator.prefill_policy = topologies.TOPOLOGIES[of.plain]["prefill_policy"]
    options = client.ClientOptions(num_warmups=min(2, len(workload)), seed=seed)
    return asyncio.run(run(llm, workload, options))


def run_point(
    llm: AsyncLLM,
    workload: Workload,
    seed: int,
    impl: str,
    target: Slo,
    break_even: float | None,
    decisions: Path | None,
) -> tuple[list[RequestRecord], dict[str, Any]]:
    """Runs one point; records of the requests, and what the engine counted.

    Args:
        llm: the engine.
        workload: its requests.
        seed: of the prompts.
        impl: what it is measured as.
        target: what a controller aims at.
        break_even: ratio from which on two executors serve as `auto` and `auto_mean`; None: the
            controller says.
        decisions: file for what a controller is shown and says; None for none.
    """
    options, coordinator = llm.config.semi_pd, llm._engine.coordinator
    steered, of = isinstance(options.controller, Steering), parts(impl)
    if steered:
        settle(llm, impl, FIXED.get(impl, Shares(100, 100)))
        controller = options.controller.inner
        if impl not in FIXED:
            aim = controllers.Slo(ttft_s=target.ttft_s, tpot_s=target.tpot_s)
            allowed = [Shares(*pair) for pair in options.kept_shares]
            aimless = of.plain in (MEAN, AUTO_MEAN)
            controller = SloController(
                slo=None if aimless else aim,
                allowed=allowed,
                max_num_batched_tokens=llm.config.max_num_batched_tokens,
                max_num_mixed_tokens=of.mixed_tokens or llm.config.max_num_mixed_tokens,
            )
        options.controller.inner = (
            LoggedController(controller, decisions) if decisions else controller
        )
        if of.plain in (AUTO, AUTO_MEAN):
            options.break_even.inner = (
                ForeseenMode(controller) if break_even is None else BreakEven(ratio=break_even)
            )
    before = _counts(llm)
    if not steered:
        coordinator.recent()  # of earlier points
    records = send(llm, impl, workload, seed, client.run)
    fields = {name: count - before[name] for name, count in _counts(llm).items()}
    if steered:  # whoever steers takes what is recent
        kept = [list(pair) for pair in options.kept_shares]
        return records, fields | {"mode": llm.stats.mode, "kept_shares": kept}
    seen = [Observation(**asdict(coordinator.recent()))]
    # Of the time in which a gap between tokens passed, the part that prompts held up.
    held_up = held_up_s(seen) * seen[0].prefill_tokens / max(sum(seen[0].token_gap_s), 1e-9)
    saved = saved_per_waiting(seen, held_up, BreakEven().slowdown)
    return records, fields | {"saved_per_waiting": saved}


def _counts(llm: AsyncLLM) -> dict[str, float]:
    stats, topology = llm.stats, llm._engine.topology
    counts = {name: getattr(stats, name) for name in ("preemptions", "recompiles")}
    if hasattr(topology, "shares"):
        for name in ("executors_lost", "mode_changes"):
            counts[name] = getattr(stats, name)
        counts["switches"] = len(topology.prefill.switches) + len(topology.decode.switches)
        sender = topology.prefill.pool
        counts |= {"kv_bytes_sent": sender.copied_bytes, "kv_wait_s": sender.copy_wait_s}
    return counts


# --- measuring -------------------------------------------------------------------------------


def calibrate(
    process: topologies.EngineProcess, name: str, sizes: Mapping[str, Any], alone: int
) -> dict[str, float]:
    """SLOs and capacity of a workload: fields of its `unloaded` row."""
    limit, at_once = sizes["max_model_len"], 2 * sizes["max_num_seqs"]
    requests = traces.make(name, rate=1.0, n=alone, seed=0, max_total_tokens=limit)
    short = np.minimum(requests.output_tokens, UNLOADED_TOKENS)
    requests = replace(requests, output_tokens=short)
    records = process.call(send, REFERENCE, requests, 0, client.run_alone)
    fields: dict[str, float] = {}
    for scale, factor in SLOS.items():
        limits = slo.slo_from_unloaded(records, factor)
        fields |= {f"{scale}_{key}": value for key, value in asdict(limits).items()}
    requests = traces.make(name, rate=1.0, n=at_once, seed=1, max_total_tokens=limit)
    half = functools.partial(client.run_at_once, until=at_once // 2)
    records = process.call(send, REFERENCE, requests, 1, half)
    failed = sum(not record.ok for record in records)
    if failed:
        raise RuntimeError(f"{failed} of {len(records)} requests at once failed")
    return fields | {
        "capacity": second_half_per_s([record.finished_s for record in records]),
        "mean_prompt_tokens": float(requests.prompt_tokens.mean()),
        "mean_output_tokens": float(requests.output_tokens.mean()),
    }


def second_half_per_s(finished_s: Sequence[float]) -> float:
    """Requests/s between the ends of half and of all of the requests.

    Raises:
        ValueError: there are fewer than two, or those of the second half ended at one time.
    """
    times, half = sorted(finished_s), len(finished_s) // 2
    if half == 0:
        raise ValueError(f"{len(times)} requests have no second half: at least 2")
    begin_s, end_s = times[half - 1], times[2 * half - 1]
    if begin_s == end_s:
        raise ValueError(f"no time between half and all of the requests: both at {end_s} s")
    return half / (end_s - begin_s)


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


def measure_case(
    report: Report,
    engine_of: Callable[[str], topologies.EngineProcess],
    case: Case,
    impls: Iterable[str],
    unloaded: Mapping[str, Any],
    *,
    limit: int,
    seconds: float,
    break_even: float | None,
    decisions: Path | None,
) -> None:
    """Adds the rows of a case.

    Args:
        report: gets the rows.
        engine_of: gives the process of an implementation's engine, or raises.
        case: to measure.
        impls: in turns.
        unloaded: row of the workload.
        limit: most tokens of a request.
        seconds: in which a point's requests are sent.
        break_even: of `auto` and `auto_mean`.
        decisions: folder for what controllers are shown and say; None for none.
    """
    n = max(4, round(case.rate * seconds))
    requests = traces.make(
        case.workload, rate=case.rate, n=n, seed=case.seed, max_total_tokens=limit
    )
    slos = slos_of(unloaded)
    for impl in impls:
        fields = {
            "workload": case.workload,
            "rate": case.rate,
            "load": case.rate / unloaded["capacity"],
            "seed": case.seed,
        }
        log = decisions and decisions / f"{case.name} {impl}.jsonl".replace("/", " ")
        try:
            records, counts = engine_of(impl).call(
                run_point, requests, case.seed, impl, slos["tight"], break_even, log
            )
            fields |= point_fields(records, slos) | counts | {"left_out": requests.left_out}
        except Exception as error:  # one point must not cost the others
            report.fail(case.name, impl, error, **fields)
            say(f"{case.name} {impl}: failed: {error}")
        else:
            report.add(case.name, impl, **fields)
            say(
                f"{case.name} {impl}: {n} requests in {fields['duration']:.1f} s, E2E "
                f"{fields['mean_e2el_ms']:.0f} ms, TTFT p90 {fields['p90_ttft_ms']:.0f} ms, within "
                f"the tight SLO {fields['tight']:.0%}, sent {fields[LATENESS]:.1f} ms late (p99)"
            )


class Engines(contextlib.ExitStack):
    """The engines of a run, started side by side when one of them is first asked for.

    Args:
        model: an entry of `topologies.SIZES`.
        sizes: of each engine.
        kept: shares that are kept ready.
        impls: that are measured.
    """

    def __init__(
        self,
        model: str,
        sizes: Mapping[str, Any],
        kept: Sequence[tuple[int, int]],
        impls: Iterable[str],
    ) -> None:
        super().__init__()
        self._model, self._sizes, self._kept = model, sizes, kept
        self._wanted = [ENGINES[impl] for impl in impls]
        self._started: dict[str, topologies.EngineProcess | Exception] = {}

    def of(self, impl: str) -> topologies.EngineProcess:
        """The process of an implementation's engine, when no engine is being started.

        Raises:
            Exception: it could not be started, now or before.
        """
        engine = ENGINES[impl]
        if engine not in self._started:
            self._start(dict.fromkeys([engine, *self._wanted]))
        found = self._started[engine]
        if isinstance(found, Exception):
            raise found
        return found

    def _start(self, engines: Iterable[str]) -> None:
        begun = {name: self._process(name) for name in engines if name not in self._started}
        say(f"starting {', '.join(begun)}")
        for process in begun.values():
            self.push(process)
            process.begin()
        for name, process in begun.items():
            self._started[name] = process
            try:
                process.wait()
            except Exception as error:  # its peers can be measured without it
                self._started[name] = error
                say(f"{name} did not start: {error}")
            else:
                say(f"{name} is ready")

    def _process(self, engine: str) -> topologies.EngineProcess:
        topology = {"unified": REFERENCE, "semi_pd": "auto"}.get(engine, engine)
        kept = {"semi_pd": {"kept_shares": self._kept}} if engine == "semi_pd" else {}
        arguments = topologies.engine_args(
            self._model,
            topology,
            **self._sizes,
            **kept,
            enable_prefix_caching=False,
            compile_sampled_steps=False,
        )
        arguments["steered"] = engine == "semi_pd"
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": UNIFIED_MEMORY} if engine == "unified" else {}
        return topologies.EngineProcess(make_llm, arguments, **memory)


# --- command ---------------------------------------------------------------------------------


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of each workload."""
    return {workload: summarise_workload(of) for workload, of in points_of(rows).items()}


def show(report: Report) -> None:
    """Prints the columns that fit on a screen; the file has all."""
    times = (f"{p}_{t}_ms" for t in ("ttft", "tpot", "e2el") for p in ("mean", "p99"))
    columns = (*SHOWN, *times, LATENESS)
    document = report.document()
    rows = [{key: row.get(key) for key in (*columns, "status")} for row in document["rows"]]
    print_table(document | {"rows": rows})
    print(f"wrote {report.path}")


def stranger(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """A case measured by other SLOs and another capacity than its workload's row says, if any."""
    known = {row["case"]: row for row in rows if row["status"] == "ok"}
    for workload, points in points_of(rows).items():
        capacity = known[unloaded_case(workload)]["capacity"]
        for row in points:
            if not math.isclose(row["load"], row["rate"] / capacity):
                return row["case"]
    return None


def choices(rows: Iterable[Mapping[str, Any]]) -> dict[str, set[tuple[tuple[int, int], ...]]]:
    """Shares that each workload's controllers chose from; rows that do not say so are left out."""
    found: dict[str, set] = {}
    for workload, points in points_of(rows).items():
        chose = [row for row in points if row["impl"] not in FIXED and "kept_shares" in row]
        found[workload] = {tuple(map(tuple, row["kept_shares"])) for row in chose}
    return found


def cases_of(
    args: argparse.Namespace, report: Report, workload: str, seed: int, capacity: float
) -> list[Case]:
    """Those of a workload and seed that are to be measured."""
    loads = args.loads or LOADS[workload]
    rates = args.rates or [float(f"{capacity * load:.3g}") for load in loads]
    cases = [Case(workload, rate, seed) for rate in rates]
    return [case for case in cases if not args.missing or report.lacks(case.name)]


def turns(args: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Seeds and workloads: all workloads with the first seed come first."""
    yield from ((seed, workload) for seed in args.seeds for workload in args.workloads)


def measure(
    args: argparse.Namespace,
    report: Report,
    engines: Engines,
    budget: Budget,
    *,
    sizes: Mapping[str, Any],
    seconds: float,
) -> None:
    """Measures what the command line asks for and there is time for; saves after each case."""
    known = {row["case"]: row for row in report.all_rows() if row["status"] == "ok"}
    for seed, workload in turns(args):
        unloaded = known.get(unloaded_case(workload))
        if unloaded is None:
            if not budget.enough():
                return
            fields = calibrate(engines.of(REFERENCE), workload, sizes, 3 if args.quick else 16)
            unloaded = known[unloaded_case(workload)] = report.add(
                unloaded_case(workload), REFERENCE, **fields
            )
            report.save()
            say(f"{workload}: {unloaded['capacity']:.2f} requests/s kept up")
        cases = cases_of(args, report, workload, seed, unloaded["capacity"])
        report.expect((case.name, impl) for case in cases for impl in args.impls)
        for case in cases:
            if not budget.enough():
                return
            for impl in args.impls:  # a start is no part of a case
                with contextlib.suppress(Exception):
                    engines.of(impl)
            with budget.case():
                measure_case(
                    report,
                    engines.of,
                    case,
                    args.impls,
                    unloaded,
                    limit=sizes["max_model_len"],
                    seconds=seconds,
                    break_even=args.break_even,
                    decisions=args.decisions,
                )
            report.save()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semi_pd_serving")
    add_arguments(parser)
    topologies.add_arguments(parser)
    parser.add_argument("--workloads", nargs="+", choices=traces.NAMES, help="[all]")
    parser.add_argument(
        "--impls",
        nargs="+",
        choices=[*ENGINES],
        metavar="IMPL",
        default=[*UNIFIED, STATIC, DYNAMIC, MEAN, AUTO],
        help="what is measured, in turns, of %(choices)s; the memory must have room for all their "
        "engines [%(default)s]",
    )
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--loads", nargs="+", type=float, help="of the capacity [by the workload]")
    rates.add_argument("--rates", nargs="+", type=float, help="requests/s, for all workloads")
    parser.add_argument("--point-seconds", type=float, help="of sending [20; 2 with --quick]")
    parser.add_argument(
        "--break-even",
        type=float,
        help="ratio, of auto and auto_mean [the controller says]",
    )
    parser.add_argument(
        "--kept",
        nargs="+",
        type=options.shares,
        metavar="X,Y",
        help="shares that are kept ready, and that controllers may choose [by the model]",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="[0 1; 0 with --quick]")
    parser.add_argument("--decisions", type=Path, help="folder for what controllers see and say")
    options.add_seconds(parser)
    options.add_merge_arguments(parser)
    args = parser.parse_args()
    end_on_sigterm()
    quick = args.quick
    args.workloads = args.workloads or (["azure_conv"] if quick else [*traces.NAMES])
    args.loads = args.loads or ([0.5, 1.0] if quick else None)
    args.seeds = args.seeds or ([0] if quick else [0, 1])
    args.impls = [impl for impl in ENGINES if impl in args.impls]
    seconds = args.point_seconds or (2.0 if quick else 20.0)
    if args.decisions is not None:
        try:
            args.decisions.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--decisions: {error}")
    report = Report(
        "semi_pd_serving",
        "How fast do the topologies serve, and how much load do they bear within an SLO?",
        out=args.out,
    )
    report.summarise = summarise
    model, sizes = topologies.sizes(args, report.env)
    options.merge_of_one_model(parser, report, args, model)
    kept = [(s.prefill, s.decode) for s in args.kept] if args.kept else list(KEPT[model])
    if (100, 100) not in kept:
        parser.error(f"--kept: no 100,100, under which points begin, in {kept}")
    for impl in args.impls:
        shares = FIXED.get(impl)
        if shares is not None and (shares.prefill, shares.decode) not in kept:
            parser.error(f"--impls: {impl}: {shares} is not kept ready: {kept}")
        most, tokens = sizes["max_num_batched_tokens"], parts(impl).mixed_tokens
        if tokens is not None and tokens > most:
            parser.error(f"--impls: {impl}: steps have at most {most} tokens")
    if (case := stranger(report.all_rows())) is not None:
        parser.error(f"--merge: {case} was measured by another run's SLOs and capacity")
    chosen = choices(report.all_rows())
    one_chooses = any(ENGINES[impl] == "semi_pd" and impl not in FIXED for impl in args.impls)
    if one_chooses and args.seconds != 0:
        for workload in args.workloads:
            chosen.setdefault(workload, set()).add(tuple(kept))
    for workload, pairs in chosen.items():
        if len(pairs) > 1:
            parser.error(f"--merge: controllers of {workload} chose from {sorted(pairs)}")
    if args.seconds != 0:
        with Engines(model, sizes, kept, args.impls) as engines:
            measure(
                args,
                report,
                engines,
                Budget(args.seconds),
                sizes=sizes,
                seconds=seconds,
            )
        say("engines have ended")
    report.save()
    show(report)
    write_svg(report.path.with_suffix(".svg"), report.question, panels(report.all_rows()))
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
