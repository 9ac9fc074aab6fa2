"""Do all topologies give the same greedy tokens, while shares switch and executors are killed?

The same requests, some with common beginnings and with the prefix cache on, run on one executor
with each policy, and on executors of semi-PD whose shares are switched every second (on a CPU at
every turn) while some of them are killed at random. With `--topologies auto` one executor and two
also take turns at random. Then the reference (one executor, chunked prefill) checks all their
tokens by its log-probabilities. Each engine has a process of its own.

In float32, on a CPU, tokens must be identical. In bfloat16 two correct runs may part where two
tokens tie: `benchmarks/token_parity.py` says what that is, and goes on after it. `wrong` must be 0.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import topologies
from benchmarks.engine_load import Load, LoadRequest, random_requests, seats
from benchmarks.models import MODELS
from benchmarks.report import Report, add_arguments
from benchmarks.stopping import end_on_sigterm, say
from benchmarks.token_parity import BF16_TIE, Parity, reference, verify
from jpd.engine.build import Engine
from jpd.semi_pd.controller import Observation, Shares
from jpd.semi_pd.mode import Mode

PAIRS = ((100, 100), (50, 50))
"""(prefill, decode) shares that are kept ready and switched between."""


def make_work(count: int, longest: int, vocab: int) -> list[LoadRequest]:
    """The same requests for every engine; prompt and output have at most `longest` tokens."""
    quarter = longest // 4
    requests = random_requests(
        0, vocab, (1, quarter), (quarter, longest // 2), common_tokens=quarter
    )
    return list(itertools.islice(requests, count))


class Disturbance:
    """Switches shares and kills executors between the steps of a run.

    Args:
        engine: of semi-PD, with `PAIRS` kept.
        total_tokens: of the run; kills come at random parts of it.
        kills: how many.
        switch_every_s: 0 asks for other shares at every turn.
        seed: of everything that is random.
    """

    def __init__(
        self, engine: Engine, total_tokens: int, kills: int, switch_every_s: float, seed: int = 0
    ) -> None:
        self.kills = 0
        self._engine = engine
        self._random = random.Random(seed)
        parts = sorted(self._random.uniform(0.05, 0.9) for _ in range(kills))
        self._kill_at = [part * total_tokens for part in parts]
        self._switch_every_s = switch_every_s
        self._switched_s = time.monotonic()

    def turn(self, num_tokens: int) -> None:
        """To be called between two steps, with the number of tokens that came so far."""
        now_s = time.monotonic()
        if now_s - self._switched_s >= self._switch_every_s:
            self._switched_s = now_s
            prefill, decode = self._random.choice(PAIRS)[0], self._random.choice(PAIRS)[1]
            self._engine.topology.shares = Shares(prefill, decode)
        if self.kills == len(self._kill_at) or num_tokens < self._kill_at[self.kills]:
            return
        executor = self._random.choice([*seats(self._engine).values()]).executor
        # One that has not served yet would count as a failed start, of which few are allowed.
        if executor is not None and executor.num_steps:
            os.kill(executor.pid, signal.SIGKILL)
            self.kills += 1


class AnyMode:
    """A mode policy that changes its mind at random."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def decide(self, observation: Observation, current: Mode) -> Mode:
        """Whatever is seen."""
        return self._random.choice(("unified", "semi_pd"))


def run_reference(
    engine: Engine, work: Sequence[LoadRequest], got: Sequence[Sequence[int]], tie_below: float
) -> Parity:
    """Checks the tokens that another engine gave for the requests."""
    return verify(reference(engine.coordinator, len(work)), work, got, tie_below)


def run_undisturbed(
    engine: Engine, work: Sequence[LoadRequest]
) -> tuple[list[list[int]], dict[str, int]]:
    """Runs the requests; returns tokens and counts."""
    load = Load(engine.coordinator, work, len(work))
    load.finish()
    stats = engine.coordinator.stats()
    counts = {"preemptions": stats.preemptions, "cached_tokens": stats.cached_tokens}
    return load.tokens, counts


def run_disturbed(
    engine: Engine, work: Sequence[LoadRequest], kills: int, switch_every_s: float
) -> tuple[list[list[int]], dict[str, int]]:
    """Runs the requests while shares switch and executors are killed; tokens and counts."""
    before = [len(seat.switches) for seat in seats(engine).values()]
    load = Load(engine.coordinator, work, len(work))
    total = sum(request.output_tokens for request in work)
    disturbance = Disturbance(engine, total, kills, switch_every_s)
    while load.running:
        disturbance.turn(load.num_tokens)
        load.step()
    load.finish()
    after = [len(seat.switches) for seat in seats(engine).values()]
    stats = engine.coordinator.stats()
    return load.tokens, {
        "preemptions": stats.preemptions,
        "cached_tokens": stats.cached_tokens,
        "switches": sum(after) - sum(before),
        "mode_changes": stats.mode_changes,
        "kills": disturbance.kills,
        "executors_lost": stats.executors_lost,
        "requeued": stats.requeued,
    }


def add_result(
    report: Report,
    case: str,
    topology: str,
    parity: Parity,
    counts: dict[str, int],
) -> None:
    """Adds the row of one engine; a wrong token makes it a failed one."""
    found = {
        "identical": parity.identical,
        "ties": parity.ties,
        "wrong": parity.wrong,
        "compared_tokens": parity.compared_tokens,
        **counts,
    }
    if parity.wrong:
        report.fail(case, topology, f"wrong tokens: {parity.named}", **found)
    else:
        report.add(case, topology, **found)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Counts of all topologies together, and engines that did not run."""
    keys = ("identical", "ties", "wrong", "compared_tokens", "switches", "mode_changes", "kills")
    summary = {key: sum(row.get(key, 0) for row in rows) for key in keys}
    return summary | {"not_run": sum("identical" not in row for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semi_pd_parity")
    add_arguments(parser)
    topologies.add_arguments(parser)
    parser.add_argument(
        "--topologies",
        nargs="+",
        choices=[*topologies.TOPOLOGIES],
        default=["chunked", "prefill_first", "semi_pd"],
        help="what is compared with the reference [%(default)s]",
    )
    parser.add_argument("--requests", type=int, help="[256; 40 with --quick]")
    parser.add_argument("--kills", type=int, default=4, help="executors to kill [%(default)s]")
    parser.add_argument("--switch-every-s", type=float, help="[1; 0, every turn, on a CPU]")
    parser.add_argument("--tie-below", type=float, help="[0.1 in bfloat16, 0 in float32]")
    args = parser.parse_args()
    end_on_sigterm()
    report = Report(
        "semi_pd_parity",
        "Do all topologies give the same greedy tokens, while shares switch and executors are "
        "killed?",
        out=args.out,
    )
    model, sizes = topologies.sizes(args, report.env)
    every_s, tie_below = args.switch_every_s, args.tie_below
    if every_s is None:
        every_s = 1.0 if topologies.on_gpu(report.env) else 0.0
    if tie_below is None:
        tie_below = 0.0 if sizes.get("dtype") == "float32" else BF16_TIE
    count = args.requests or (40 if args.quick else 256)
    work = make_work(count, topologies.typical_length(sizes), MODELS[model]["vocab_size"])
    case = f"{model} n={count}"

    runs = {}
    for topology in args.topologies:
        say(topology)
        disturbed = topologies.can_switch(topology)
        options = {"kept_shares": PAIRS} if disturbed else {}
        if topology == "auto":
            options["break_even"] = AnyMode()
        group = {"semi_pd": options} if options else {}
        arguments = topologies.engine_args(model, topology, **sizes, **group)
        try:
            with topologies.EngineProcess(topologies.build, arguments) as engine:
                if disturbed:
                    runs[topology] = engine.call(run_disturbed, work, args.kills, every_s)
                else:
                    runs[topology] = engine.call(run_undisturbed, work)
        except Exception as error:  # one engine must not cost the others
            report.fail(case, topology, error)
    say("reference")
    arguments = topologies.engine_args(model, "chunked", **sizes)
    with contextlib.ExitStack() as stack:
        try:
            process = topologies.EngineProcess(topologies.build, arguments)
            engine = stack.enter_context(process) if runs else None
        except Exception as error:  # nobody judges what the engines gave, but they ran
            while runs:
                topology, (_, counts) = runs.popitem()
                report.fail(case, topology, error, **counts)
        for topology, (tokens, counts) in runs.items():
            try:
                parity = engine.call(run_reference, work, tokens, tie_below)
            except Exception as error:  # what the others gave may still be judged
                report.fail(case, topology, error, **counts)
            else:
                say(f"{topology}: {parity}")
                add_result(report, case, topology, parity, counts)
            report.save()
    report.summary |= summarise(report.rows) | {"tie_below": tie_below}
    report.save()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
