"""What is lost when executors are killed under load, and how long does it take to go on?

Requests are kept running on an engine of semi-PD while executors are killed (SIGKILL) after a
random number of engine steps, one of each phase in random order and so on; the next one when the
phase serves again and the executors to be kept ready are (until then those that run come to their
end). Then the same engine, undisturbed, checks all tokens. With `--seconds` there are as many kills
of each kind as its part of the time allows, and at least one.

`ms` is the recovery time: from the kill to the first token that another executor of that phase
computed (a first token of prefill, any other of decode) and that was published. `cold`: nobody is
kept ready, so a process has to start; `warm`: executors of other shares are ready and take over.
`lost` requests did not give all their tokens, `leaked_pages` are held by nobody when all requests
have ended, and identical, ties and wrong are as in `benchmarks/token_parity.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options, topologies
from benchmarks.budget import Budget
from benchmarks.engine_load import Load, LoadRequest, LoggedStep, StepLog, random_requests, seats
from benchmarks.report import Report, add_arguments
from benchmarks.stopping import end_on_sigterm, say
from benchmarks.token_parity import BF16_TIE, Parity, reference, verify
from jpd.engine.build import Engine

PHASES = ("prefill", "decode")
KINDS: dict[str, tuple[tuple[int, int], ...]] = {"cold": (), "warm": ((100, 100), (50, 50))}
"""Shares that are kept ready."""
MOST_STEPS = 200
"""Engine steps between the recovery from one kill and the next kill, at most."""
RECOVERY_TIMEOUT_S = 180.0


class Kill(NamedTuple):
    """An executor was killed."""

    phase: str
    pid: int
    killed_s: float
    recovered_s: float


def _recovery_ms(kill: Kill) -> float:
    return 1e3 * (kill.recovered_s - kill.killed_s)


@dataclass
class CrashRun:
    """What became of a run with kills."""

    kills: list[Kill] = field(default_factory=list)
    requests: list[LoadRequest] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    leaked_pages: int = 0

    @property
    def lost(self) -> int:
        """Requests that did not give exactly the tokens that were asked for."""
        pairs = zip(self.requests, self.tokens, strict=True)
        return sum(len(tokens) != request.output_tokens for request, tokens in pairs)


def gives_token(step: LoggedStep, phase: str) -> bool:
    """Whether a step publishes tokens of a phase."""
    if phase == "decode":
        return len(step.plan.rows) > 0
    return any(chunk.last for chunk in step.plan.chunks)


def _kill(load: Load, log: StepLog, phase: str, engine: Engine) -> Kill:
    """Kills who serves in a phase, and goes on until somebody else does."""
    pid = seats(engine)[phase].executor.pid
    begin = len(log.steps)
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while True:
        load.step()
        new = (s for s in log.steps[begin:] if s.pid != pid and s.published_s is not None)
        published = [s.published_s for s in new if gives_token(s, phase)]
        if published:
            return Kill(phase, pid, killed_s, min(published))
        if time.monotonic() - killed_s > RECOVERY_TIMEOUT_S:
            raise TimeoutError(
                f"the {phase} executor was killed and nobody served for {RECOVERY_TIMEOUT_S:g} s"
            )


def run(engine: Engine, load: Load, kills: int, rng: random.Random, budget: Budget) -> CrashRun:
    """Kills executors under a load that does not end before, then lets all requests end.

    Args:
        engine: serves the load.
        load: does not end.
        kills: how often, at most.
        rng: says who is killed, and when.
        budget: of the kills; one is made in any case.
    """
    done, at_once = CrashRun(), load.at_once
    phases: list[str] = []  # that are still to be hit before one is hit again
    with StepLog() as log:
        while len(done.kills) < kills and (budget.enough() or not done.kills):
            with budget.case():
                # Else a slow start of an executor would be a long run of requests.
                load.at_once = 0
                while any(seat.pool.num_starting for seat in seats(engine).values()):
                    load.step()
                    if not engine.coordinator.has_work:
                        time.sleep(0.01)
                load.at_once = at_once
                if not phases:
                    phases = rng.sample(PHASES, len(PHASES))
                phase = phases[-1]
                for _ in range(rng.randint(1, MOST_STEPS)):
                    load.step()
                # One that has not served yet would count as a failed start, of which few are
                # allowed.
                executor = seats(engine)[phase].executor
                if executor is None or not executor.num_steps:
                    phases.reverse()  # perhaps the other one, if it is still to be hit
                else:
                    done.kills.append(_kill(load, log, phases.pop(), engine))
                    say(f"kill {len(done.kills)}: {phase}, {_recovery_ms(done.kills[-1]):.0f} ms")
    load.stop()
    load.finish()
    done.requests, done.tokens = load.sent, load.tokens
    done.leaked_pages = leaked_pages(engine)
    return done


def leaked_pages(engine: Engine) -> int:
    """Pages of an idle engine that are not free."""
    scheduler = engine.coordinator.scheduler
    scheduler.check_integrity()
    return scheduler.pool.num_usable - scheduler.pool.num_free


def undisturbed(engine: Engine, done: CrashRun, tie_below: float) -> Parity:
    """Checks all tokens, and reads no page that was written before."""
    engine.coordinator.forget_prefixes()
    again = reference(engine.coordinator, engine.config.max_num_seqs)
    return verify(again, done.requests, done.tokens, tie_below)


def add_rows(report: Report, case: str, kind: str, done: CrashRun, parity: Parity) -> None:
    """A row for each phase that was hit, and one for the requests."""
    for phase in PHASES:
        times = [_recovery_ms(kill) for kill in done.kills if kill.phase == phase]
        if times:
            p99 = float(np.percentile(times, 99))
            report.add(f"{case} {phase}", kind, times, "ms", p99_ms=p99, max_ms=max(times))
    found = {
        "kills": len(done.kills),
        "requests": len(done.requests),
        "lost": done.lost,
        "leaked_pages": done.leaked_pages,
        "identical": parity.identical,
        "ties": parity.ties,
        "wrong": parity.wrong,
    }
    bad = [f"{found[key]} {key}" for key in ("lost", "leaked_pages", "wrong") if found[key]]
    if bad:
        reason = ", ".join(bad) + (f"; {parity.named}" if parity.faults else "")
        report.fail(f"{case} requests", kind, reason, **found)
    else:
        report.add(f"{case} requests", kind, **found)


def summarise(rows: Sequence[dict[str, Any]], recoveries_ms: dict[str, list[float]]) -> dict:
    """Counts over all kinds; recovery times for each kind, over both phases and of each.

    Args:
        rows: of the report.
        recoveries_ms: for each kind.
    """
    names = {
        "kills": "kills",
        "lost": "requests_lost",
        "leaked_pages": "pages_leaked",
        "ties": "ties",
        "wrong": "wrong",
    }
    summary: dict[str, Any] = {
        name: sum(row.get(key, 0) for row in rows) for key, name in names.items()
    }
    for kind, times in recoveries_ms.items():
        for p in (50, 99):
            summary[f"{kind}_recovery_p{p}_ms"] = float(np.percentile(times, p))
    for row in rows:
        if "max_ms" in row:
            name = f"{row['impl']}_{row['case'].split()[-1]}_recovery"
            summary |= {f"{name}_p50_ms": row["ms"], f"{name}_max_ms": row["max_ms"]}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semi_pd_crash")
    add_arguments(parser)
    topologies.add_arguments(parser)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS], help="[both]")
    parser.add_argument("--kills", type=int, help="of each kind [20; 3 with --quick]")
    parser.add_argument("--running", type=int, help="requests at once [64; 8 with --quick]")
    parser.add_argument("--seed", type=int, default=0, help="of the kills [%(default)s]")
    options.add_seconds(
        parser,
        "begin no kill that may not end within its kind's part of N s, but at least one of each",
    )
    args = parser.parse_args()
    end_on_sigterm()
    report = Report(
        "semi_pd_crash",
        "What is lost when executors are killed under load, and how long does it take to go on?",
        out=args.out,
    )
    model, sizes = topologies.sizes(args, report.env)
    kills = args.kills or (3 if args.quick else 20)
    running = args.running or (8 if args.quick else 64)
    seconds = None if args.seconds is None else args.seconds / len(args.kinds)
    tie_below = 0.0 if sizes.get("dtype") == "float32" else BF16_TIE
    case, recoveries_ms = f"{model} running={running}", {}
    longest = topologies.typical_length(sizes)
    for kind in args.kinds:
        try:
            say(f"{kind}: starting {model}")
            kept = {"kept_shares": KINDS[kind]}
            arguments = topologies.engine_args(model, "semi_pd", **sizes, semi_pd=kept)
            engine = topologies.build(**arguments)
            with contextlib.closing(engine.coordinator):
                requests = random_requests(
                    args.seed,
                    engine.model_config.vocab_size,
                    (longest // 16, longest // 4),
                    (longest // 8, longest // 4),
                    common_tokens=longest // 8,
                )
                load = Load(engine.coordinator, requests, running)
                done = run(engine, load, kills, random.Random(args.seed), Budget(seconds))
                say(f"{kind}: {len(done.requests)} requests are checked, undisturbed")
                parity = undisturbed(engine, done, tie_below)
        except Exception as error:  # one kind must not cost the other
            report.fail(f"{case} requests", kind, error)
        else:
            add_rows(report, case, kind, done, parity)
            recoveries_ms[kind] = list(map(_recovery_ms, done.kills))
        report.summary |= summarise(report.rows, recoveries_ms)
        report.save()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
