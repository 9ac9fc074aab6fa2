"""What does a change of SM shares cost running requests, and the hand-over from prefill to decode?

One engine of semi-PD keeps a fixed number of requests running; when one ends, the next one comes.

``hand-over``
    with fixed shares. `ms` is the time from the end of a request's last prefill step (on the
    device) to the launch of its first decode step; `to_start_*` counts to the moment at which the
    device begins it, so the decode step that runs meanwhile is included. `message_bytes` is what
    is sent to the decode executor with that step, for all its rows; `kv_bytes` are the keys and
    values that the request has by then. `kv_bytes_copied` are those that went from one phase's
    memory to the other's, as executors count them (`jpd/semi_pd/page_push.py`): none, since what is
    handed over are page ids. On a GPU each executor runs its steps once at its start and sees that
    they leave the pages where they are (one on several GPUs, or that sends pages, does not; here is
    none such). On a CPU XLA cannot write them in place, so each step copies back what it
    wrote (`jpd/semi_pd/host_pages.py`), in either phase; that is `kv_bytes_copied_back`, counted
    from the steps.
``pool``
    shares change between two pairs whose executors are kept ready.
``background``
    they change to pairs that nobody keeps: both executors are started while the old ones serve.
    Each pair was started once before, so that its steps are compiled (`first_serve_ms` is how long
    that took at most). With `--seconds` there are as many switches, of this and of `pool`, as
    there is time for, and at least one.

For the last two, `ms` is the pause of a switch: the largest gap between two tokens of a running
request from the moment at which the shares were asked for until `SETTLE_STEPS` steps after the
switch, less the median gap of the case. For `background` that includes what the start of a process
costs those that run, and the end of the old ones. `at_switch_*` looks at the gaps around the
hand-over of the decode lane alone (`at_switch_n`: how often a request was decoded there), and
`serve_*` is the time from asking until both phases run on their new shares.

A pause has other causes than the switch: decode steps are slow beside a long prefill step, and the
largest of many gaps is above their median whatever happens. So each switch is followed by a
control: as long a time on the shares that it led to, without a switch, under the same load. The
rows `pool control` and `background control` hold the same numbers of these (`at_switch_*`: of as
long a time, as long after the beginning, as the hand-over took in the switch), and the rows
`... control X,Y` those of them on one pair of shares. `..._added_p50_ms` and `..._added_p99_ms` in
the summary are what a switch adds: the quantile over switches less the same quantile over controls.
That is not the quantile of a difference, since a switch and its control see other prompts, and it
can be negative; of few switches a p99 is the longest one, and the difference mostly chance.

`gap_beside_prefill_*` and `gap_alone_*` divide all gaps in the time of a row by whether a prefill
step ran on the device meanwhile, if only for a part of the gap; `beside_prefill_part` is how many
of them, 0..1. They are whole gaps: no median is taken off.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options, topologies
from benchmarks.budget import Budget
from benchmarks.engine_load import Load, LoggedStep, StepLog, random_requests, seats
from benchmarks.report import Report, add_arguments
from benchmarks.stopping import end_on_sigterm, say
from jpd.engine.build import Engine
from jpd.engine.lane import Switch
from jpd.semi_pd.controller import Shares

POOL = (Shares(100, 100), Shares(50, 50))
BACKGROUND = (Shares(60, 60), Shares(70, 70))
SETTLE_STEPS = 50
"""Engine steps after a switch before the next one is asked for."""

Gaps = tuple[np.ndarray, np.ndarray]
"""Times of neighbouring tokens of a request, `[n]` each: the earlier and the later."""


class HandOver(NamedTuple):
    """Of one request, from prefill to decode."""

    launch_s: float
    """From the end of its last prefill step to the launch of its first decode step."""
    start_s: float
    """To the moment at which the device could begin that."""
    context_tokens: int
    """Whose keys and values were handed over."""
    decode: LoggedStep
    """Its first decode step."""


def hand_overs(steps: Iterable[LoggedStep]) -> list[HandOver]:
    """Of every request whose last prefill step and first decode step have run."""
    prefilled: dict[int, tuple[LoggedStep, int]] = {}
    found = []
    for step in steps:
        if step.begun_s is None:
            continue
        for sequence in step.plan.sequences:
            before = prefilled.pop(id(sequence), None)
            if before is not None:
                prefill, tokens = before
                ended_s = prefill.ended_s
                found.append(
                    HandOver(step.launched_s - ended_s, step.begun_s - ended_s, tokens, step)
                )
        for chunk in step.plan.chunks:
            if chunk.last:
                prefilled[id(chunk.sequence)] = step, chunk.end
    return found


def kv_token_bytes(engine: Engine) -> int:
    """Keys and values of one token in all layers."""
    from jax.numpy import dtype

    model = engine.model_config
    values = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return values * dtype(engine.config.dtype).itemsize


def measure_hand_overs(engine: Engine, load: Load, count: int, *, on_gpu: bool) -> dict[str, Any]:
    """Runs the load until `count` requests have been handed over; the row's fields."""
    with StepLog() as log:
        done: list[HandOver] = []
        while len(done) < count:
            for _ in range(SETTLE_STEPS):
                load.step()
            done = hand_overs(log.steps)
    token_bytes = kv_token_bytes(engine)
    copied = sum(seat.pool.copied_bytes for seat in seats(engine).values())
    written = sum(step.plan.num_tokens for step in log.steps if step.begun_s is not None)
    launch_ms, start_ms = (
        1e3 * np.array([getattr(d, name) for d in done]) for name in ("launch_s", "start_s")
    )
    messages = [len(pickle.dumps(d.decode.plan.without_sequences())) for d in done]
    return {
        "samples": launch_ms,
        "p50_ms": float(np.percentile(launch_ms, 50)),
        "p99_ms": float(np.percentile(launch_ms, 99)),
        "to_start_p50_ms": float(np.percentile(start_ms, 50)),
        "to_start_p99_ms": float(np.percentile(start_ms, 99)),
        "message_bytes": float(np.median(messages)),
        "kv_bytes": token_bytes * float(np.median([d.context_tokens for d in done])),
        "kv_bytes_copied": copied,
        "kv_bytes_copied_back": 0 if on_gpu else token_bytes * written,
    }


class Span(NamedTuple):
    """Times of `time.monotonic`."""

    begun_s: float
    ended_s: float

    def later(self, seconds: float) -> Span:
        """As long, but so much later."""
        return Span(self.begun_s + seconds, self.ended_s + seconds)


class Window(NamedTuple):
    """A time in which the gaps of running requests are looked at."""

    shares: Shares
    """At its end."""
    whole: Span
    hand_over: Span
    """Part of it: the hand-over of the decode lane, or what a control has in its place."""


class Switched(NamedTuple):
    """A change of both shares."""

    prefill: Switch
    decode: Switch
    settled_s: float
    """Some steps later."""

    @property
    def asked_s(self) -> float:
        return min(self.prefill.asked_s, self.decode.asked_s)

    @property
    def done_s(self) -> float:
        return max(self.prefill.done_s, self.decode.done_s)

    @property
    def window(self) -> Window:
        """From asking until some steps after the switch."""
        hand_over = Span(self.decode.held_s, self.decode.done_s)
        shares = Shares(self.prefill.share, self.decode.share)
        return Window(shares, Span(self.asked_s, self.settled_s), hand_over)


def switch(engine: Engine, load: Load, shares: Shares) -> Switched:
    """Changes both shares under load, waits until they serve, and goes on for a while.

    Raises:
        RuntimeError: a phase did not switch once: it had its share before, or lost an executor.
    """
    both = seats(engine).values()
    before = [len(seat.switches) for seat in both]
    engine.topology.shares = shares
    while engine.topology.shares != shares:
        load.step()
    for _ in range(SETTLE_STEPS):
        load.step()
    new = [seat.switches[n:] for seat, n in zip(both, before, strict=True)]
    if any(len(of) != 1 for of in new):
        raise RuntimeError(f"{[len(of) for of in new]} switches to {shares}, not one a phase")
    return Switched(*(of[0] for of in new), time.monotonic())


def control(load: Load, like: Window) -> Window:
    """Goes on for as long as a switch took, without one, with the shares that it led to."""
    later_s = time.monotonic() - like.whole.begun_s
    found = Window(like.shares, like.whole.later(later_s), like.hand_over.later(later_s))
    while time.monotonic() < found.whole.ended_s:
        load.step()
    return found


def largest_gaps_s(gaps: Gaps, spans: Iterable[Span]) -> np.ndarray:
    """For each span, of the gaps between two tokens of a request that have a moment in common with
    it, the largest; spans in which no request was decoded have none."""
    before, after = gaps
    inside = ((after >= begin_s) & (before <= end_s) for begin_s, end_s in spans)
    return np.array([(after - before)[some].max() for some in inside if some.any()])


def touching(gaps: Gaps, spans: Sequence[Span]) -> np.ndarray:
    """`[n]` bool: which gaps have a moment in common with some span; those come one after the
    other."""
    before, after = gaps
    following = np.searchsorted([span.ended_s for span in spans], before)
    return np.array([*(span.begun_s for span in spans), np.inf])[following] <= after


def prefill_spans(steps: Iterable[LoggedStep]) -> list[Span]:
    """When steps with prompt chunks ran on the device."""
    return [Span(step.begun_s, step.ended_s) for step in steps if step.plan.chunks]


def quantiles_ms(name: str, values_ms: np.ndarray) -> dict[str, float | None]:
    """Median and p99 as fields of a row; None where there are no values."""
    return {
        f"{name}_p{q}_ms": float(np.percentile(values_ms, q)) if len(values_ms) else None
        for q in (50, 99)
    }


def window_fields(windows: Sequence[Window], gaps: Gaps, prefills: Sequence[Span]) -> dict:
    """Fields of a row.

    Args:
        windows: of the row, in their order.
        gaps: all of the case.
        prefills: when prefill steps ran during the windows, in their order.

    Raises:
        ValueError: no request was decoded in one of the windows.
    """
    median_s = float(np.median(gaps[1] - gaps[0]))
    pause_ms, at_switch_ms = (
        1e3 * (largest_gaps_s(gaps, spans) - median_s)
        for spans in ([w.whole for w in windows], [w.hand_over for w in windows])
    )
    if len(pause_ms) < len(windows):
        raise ValueError(f"no request was decoded in {len(windows) - len(pause_ms)} windows")
    gap_ms = 1e3 * (gaps[1] - gaps[0])
    inside = touching(gaps, [w.whole for w in windows])
    beside = touching(gaps, prefills)
    return {
        "samples": pause_ms,
        "p99_ms": float(np.percentile(pause_ms, 99)),
        "max_ms": float(pause_ms.max()),
        "at_switch_n": len(at_switch_ms),
        **quantiles_ms("at_switch", at_switch_ms),
        "median_gap_ms": 1e3 * median_s,
        "beside_prefill_part": float(beside[inside].mean()),
        **quantiles_ms("gap_beside_prefill", gap_ms[inside & beside]),
        **quantiles_ms("gap_alone", gap_ms[inside & ~beside]),
    }


def measure_switches(
    engine: Engine, load: Load, pairs: Sequence[Shares], count: int, budget: Budget, *, kept: bool
) -> dict[str, dict[str, Any]]:
    """Switches between the pairs, `count` times or as long as there is time, each with a control.

    Args:
        engine: serves the load.
        load: does not end.
        pairs: of shares.
        count: how often, at most.
        budget: of the run.
        kept: executors of the pairs are ready.

    Returns:
        The fields of rows: "" of switches, "control" of controls, "control X,Y" of those with one
        pair of shares.
    """
    first = {} if kept else {"first_serve_ms": max(_first_serve_ms(engine, load, pairs))}
    switches: list[Switched] = []
    controls: list[Window] = []
    prefills: list[Span] = []

    def settle() -> None:
        for _ in range(SETTLE_STEPS):
            load.step()

    with StepLog() as log:
        begun_s = time.monotonic()
        settle()
        while len(switches) < count and (budget.enough() or not switches):
            with budget.case():
                switches.append(switch(engine, load, pairs[len(switches) % len(pairs)]))
                controls.append(control(load, switches[-1].window))
            prefills += prefill_spans(log.take())
        settle()  # until it is known what ran beside the last gaps
        prefills += prefill_spans(log.take())
    gaps = load.gaps(begun_s)
    serve_ms = 1e3 * np.array([s.done_s - s.asked_s for s in switches])
    windows = {"": [s.window for s in switches], "control": controls}
    for pair in pairs:
        windows[f"control {pair.prefill},{pair.decode}"] = [w for w in controls if w.shares == pair]
    fields = {name: window_fields(of, gaps, prefills) for name, of in windows.items() if of}
    fields[""] |= quantiles_ms("serve", serve_ms) | first
    return fields


def _first_serve_ms(engine: Engine, load: Load, pairs: Sequence[Shares]) -> Iterator[float]:
    """From asking until each pair served for the first time."""
    for shares in pairs:
        first = switch(engine, load, shares)
        yield 1e3 * (first.done_s - first.asked_s)


def summarise(report: Report, case: str) -> None:
    """Fills the summary from the rows."""
    for impl in ("pool", "background"):
        row, still = report.find(case, impl), report.find(case, f"{impl} control")
        if row is None or still is None:
            continue
        report.summary |= {
            f"{impl}_pause_p50_ms": row["ms"],
            f"{impl}_pause_p99_ms": row["p99_ms"],
            f"{impl}_control_pause_p50_ms": still["ms"],
            f"{impl}_control_pause_p99_ms": still["p99_ms"],
            f"{impl}_added_p50_ms": row["ms"] - still["ms"],
            f"{impl}_added_p99_ms": row["p99_ms"] - still["p99_ms"],
            f"{impl}_at_switch_p99_ms": row["at_switch_p99_ms"],
            f"{impl}_serve_p99_ms": row["serve_p99_ms"],
            f"{impl}_switches": row["n"],
        }
        for key in ("at_switch_p50_ms", "at_switch_p99_ms"):
            if row[key] is not None and still[key] is not None:
                report.summary[f"{impl}_added_{key}"] = row[key] - still[key]
        for kind in ("gap_alone", "gap_beside_prefill"):
            for quantile in ("p50_ms", "p99_ms"):
                name = f"{kind}_{quantile}"
                report.summary[f"{impl}_control_{name}"] = still[name]
    row = report.find(case, "hand-over")
    if row is not None:
        report.summary |= {
            "hand_over_p50_ms": row["p50_ms"],
            "hand_over_p99_ms": row["p99_ms"],
            "hand_over_to_start_p50_ms": row["to_start_p50_ms"],
            "hand_over_to_start_p99_ms": row["to_start_p99_ms"],
            "hand_over_kv_bytes_copied": row["kv_bytes_copied"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semi_pd_switch")
    add_arguments(parser)
    topologies.add_arguments(parser)
    parser.add_argument("--switches", type=int, help="to kept shares [100; 10 with --quick]")
    parser.add_argument(
        "--background-switches", type=int, help="to shares not kept [100; 2 with --quick]"
    )
    parser.add_argument("--hand-overs", type=int, help="at least [200; 20 with --quick]")
    parser.add_argument("--running", type=int, help="requests at once [64; 6 with --quick]")
    options.add_seconds(
        parser, "begin no switch that may not end within N s, but at least one of each kind"
    )
    args = parser.parse_args()
    end_on_sigterm()
    budget = Budget(args.seconds)
    report = Report(
        "semi_pd_switch",
        "What does a change of SM shares cost running requests, and the hand-over from prefill to "
        "decode?",
        out=args.out,
    )
    on_gpu = topologies.on_gpu(report.env)
    model, sizes = topologies.sizes(args, report.env)
    running = args.running or (6 if args.quick else 64)
    kept = {"kept_shares": [(pair.prefill, pair.decode) for pair in POOL]}
    say(f"starting {model}")
    arguments = topologies.engine_args(
        model, "semi_pd", **sizes, semi_pd=kept, compile_sampled_steps=False
    )
    engine = topologies.build(**arguments)
    say("the engine is ready")
    longest = topologies.typical_length(sizes)
    requests = random_requests(
        0,
        engine.model_config.vocab_size,
        (longest // 8, longest // 2),
        (longest // 4, longest // 2),
    )
    load = Load(engine.coordinator, requests, running)
    case = f"{model} running={running}"
    few = args.hand_overs or (20 if args.quick else 200)
    switches = args.switches or (10 if args.quick else 100)
    more = args.background_switches or (2 if args.quick else 100)
    cases = {
        "hand-over": lambda: {"": measure_hand_overs(engine, load, few, on_gpu=on_gpu)},
        "pool": lambda: measure_switches(engine, load, POOL[::-1], switches, budget, kept=True),
        "background": lambda: measure_switches(engine, load, BACKGROUND, more, budget, kept=False),
    }
    with contextlib.closing(engine.coordinator):
        while load.num_decoding < running // 2:
            load.step()
        for impl, measure in cases.items():
            try:
                rows = measure()
            except Exception as error:  # one case must not cost the others
                report.fail(case, impl, error)
            else:
                for name, fields in rows.items():
                    row_name = f"{impl} {name}".rstrip()
                    report.add(case, row_name, fields.pop("samples"), "ms", **fields)
            summarise(report, case)
            report.save()
            say(f"{impl}: {report.rows[-1]['status']}")
        load.abort()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
