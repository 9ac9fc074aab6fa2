"""How long do prefill and decode steps take under each SM share, alone and side by side?

One engine of semi-PD, whose executors of all shares are ready. Decode: `rows` sequences whose
contexts begin with so many tokens each. Prefill: prompts of so many tokens, one in a step (cut into
chunks where `max_num_batched_tokens` is less), one always waiting. Each alone, and side by side
under each pair of shares.

A row is one kind of step under one pair of shares. `seconds` is the median on the executor's
device, `other_busy` the part of a step's time, 0..1, in which the other phase ran one too (mean);
`tokens` and `context` are the prompt chunk and where it ends, or what each decoding sequence began
with, `beside` is what the other phase was given (null: nothing); the other columns are those of
`jpd.simulate.fit.MeasuredStep`. `sm_mhz` and `watts` are the clock of the SMs and the power of the
board while the configuration ran, from a second after its begin on, for which it goes on if its
steps take less (null without nvidia-smi): two phases side by side may draw what the card is limited
to, and are clocked down then. A file of those, `sm_share_surface_steps.json`, is what
`jpd simulate` fits its latency model to; it has no overheads of the host, which are not measured
here.

The files are written after every configuration (a pair of shares and what each phase is given);
with `--seconds N` none begins that may not end in time, `--missing` measures those that the file
lacks, and `--seconds 0 --merge FILE ...` merges files of one model, writes both files and draws the
chart.

The summary has the errors |predicted / measured - 1| of what is fitted to these rows, mean and
largest. `prefill_model` and `decode_model` are those of `jpd/semi_pd/share_models.py`, a fit for
each size of step since they know only how its time depends on shares (and decode's on rows);
`paper_prefill` and `paper_decode` are the paper's Eq. 4 (arXiv 2504.19867 §5) on the steps that ran
alone, as it takes no account of the other phase. `prefill_max_slowdown_clock_ratio` is the clock
alone over that side by side where prefill is slowed down most.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options, topologies
from benchmarks.budget import Budget
from benchmarks.curves import write_svg
from benchmarks.engine_load import Load, LoadRequest, LoggedStep, StepLog
from benchmarks.gpu_clock import GpuClock
from benchmarks.report import Report, add_arguments
from benchmarks.rows import load
from benchmarks.share_fits import (
    Key,
    Size,
    clock_ratio,
    fields_of,
    panels,
    steps_of,
    summarise,
)
from benchmarks.stopping import end_on_sigterm, say
from jpd.engine.build import Engine
from jpd.engine.shapes import shape_table
from jpd.semi_pd.controller import Shares
from jpd.semi_pd.slo_controller import DEFAULT_SHARES
from jpd.simulate.fit import MeasuredStep, StepTimes
from jpd.simulate.latency import Overheads, StepWork

IMPL = "jpd"
WARM_STEPS = 2
"""Steps of each phase that are passed over in each configuration."""
SETTLE_S, SAMPLE_S = 1.0, 0.5
"""The clock is sampled for so long, so long after the begin of a configuration: power is a mean
over a second."""


def busy_part(step: LoggedStep, others: Sequence[LoggedStep]) -> float:
    """Part of a step's time in which one of the others ran; those do not overlap one another."""
    overlaps = (min(step.ended_s, o.ended_s) - max(step.begun_s, o.begun_s) for o in others)
    return min(1.0, sum(max(0.0, overlap) for overlap in overlaps) / step.seconds)


class Bench:
    """Runs one configuration after another on an engine and gathers its steps.

    Args:
        engine: of semi-PD, with the prefix cache: the prompts that decode begins with are computed
            once.
        steps: of each phase, for each configuration.
        clock: of the GPU.
    """

    def __init__(self, engine: Engine, steps: int, clock: GpuClock) -> None:
        self._engine = engine
        self._clock = clock
        self.clock_means = clock.means(0, 0)
        """Of the last configuration."""
        self._steps = steps
        self._random = np.random.default_rng([0, 1])
        self._prompts: dict[tuple[int, int], list[list[int]]] = {}
        config = engine.config
        self._shapes = {
            "prefill": shape_table(config, decode=False),
            "decode": shape_table(config, prefill=False),
        }

    def measure(
        self, shares: Shares, decode: tuple[int, int] | None, prompt_tokens: int | None
    ) -> dict[Key, list[MeasuredStep]]:
        """Runs decode steps, prefill steps, or both side by side.

        Args:
            shares: of both phases.
            decode: rows, and tokens that each begins with; None runs none.
            prompt_tokens: of each prompt; None runs none.
        """
        self._switch(shares)
        rows = decode[0] if decode else 0
        load = Load(self._engine.coordinator, self._requests(decode, prompt_tokens or 1), rows)
        while load.num_decoding < rows:
            load.step()
        begun_s = time.monotonic()
        with StepLog() as log:
            if prompt_tokens is not None:
                # One after the other: two that come at once would go into one step, and on so.
                for _ in range(2):
                    load.at_once += 1
                    load.step()
            wanted, found = self._steps + WARM_STEPS, {}
            while min(map(len, found.values()), default=0) < self._steps:
                while not self._enough(log.steps, rows, prompt_tokens, wanted):
                    load.step()
                found = self._measured(log.steps, decode, prompt_tokens, shares)
                wanted += self._steps  # of some it is not known what ran beside them
        sampled_s = begun_s + SETTLE_S
        while self._clock.running and time.monotonic() < sampled_s + SAMPLE_S:
            load.step()
        self.clock_means = self._clock.means(sampled_s, time.monotonic())
        load.abort()
        beside = {
            "prefill": f"{decode[0]} x {decode[1]}" if decode else None,
            "decode": None if prompt_tokens is None else str(prompt_tokens),
        }
        measured: dict[Key, list[MeasuredStep]] = defaultdict(list)
        for phase, steps in found.items():
            for size, step in steps:
                measured[Key(size, shares, beside[phase])].append(step)
        return measured

    def _switch(self, shares: Shares) -> None:
        """Waits until the idle engine has the shares."""
        self._engine.topology.shares = shares
        while self._engine.topology.shares != shares:
            self._engine.coordinator.step()
            time.sleep(1e-3)

    def _requests(
        self, decode: tuple[int, int] | None, prompt_tokens: int
    ) -> Iterator[LoadRequest]:
        """Those that decode, always the same for a size, then endless new prompts."""
        if decode is not None:
            if decode not in self._prompts:
                self._prompts[decode] = [self._prompt(decode[1]) for _ in range(decode[0])]
            room = self._engine.config.max_model_len - decode[1]
            yield from (LoadRequest(prompt, room) for prompt in self._prompts[decode])
        while True:
            yield LoadRequest(self._prompt(prompt_tokens), 1)

    def _prompt(self, tokens: int) -> list[int]:
        return self._random.integers(self._engine.model_config.vocab_size, size=tokens).tolist()

    def _enough(
        self, steps: Sequence[LoggedStep], rows: int, prompt_tokens: int | None, wanted: int
    ) -> bool:
        ran = [step for step in steps if step.ended_s is not None]
        chunks = sum(bool(step.plan.chunks) for step in ran)
        return (prompt_tokens is None or chunks >= wanted) and (
            rows == 0 or len(ran) - chunks >= wanted
        )

    def _measured(
        self,
        steps: Sequence[LoggedStep],
        decode: tuple[int, int] | None,
        prompt_tokens: int | None,
        shares: Shares,
    ) -> dict[str, list[tuple[Size, MeasuredStep]]]:
        """Steps of each phase of which it is known what ran beside them."""
        ran = [step for step in steps if step.ended_s is not None]
        by_phase = {
            "prefill": [step for step in ran if step.plan.chunks],
            "decode": [step for step in ran if not step.plan.chunks],
        }
        known_s = min(of[-1].ended_s for of in by_phase.values() if of)
        found: dict[str, list[tuple[Size, MeasuredStep]]] = {}
        if decode is not None:
            size = Size(decode[0], decode[1], decode[1])
            whole = (s for s in by_phase["decode"][WARM_STEPS:] if len(s.plan.rows) == decode[0])
            found["decode"] = [
                (size, self._step("decode", step, by_phase["prefill"], shares))
                for step in whole
                if step.ended_s <= known_s
            ]
        if prompt_tokens is not None:
            single = (s for s in by_phase["prefill"][WARM_STEPS:] if len(s.plan.chunks) == 1)
            found["prefill"] = [
                (
                    Size(0, len(step.plan.chunks[0].tokens), step.plan.chunks[0].end),
                    self._step("prefill", step, by_phase["decode"], shares),
                )
                for step in single
                if step.ended_s <= known_s
            ]
        return found

    def _step(
        self, phase: str, step: LoggedStep, others: Sequence[LoggedStep], shares: Shares
    ) -> MeasuredStep:
        return MeasuredStep(
            **dataclasses.asdict(StepWork.of(step.plan, self._shapes[phase])),
            prefill_share=shares.prefill,
            decode_share=shares.decode,
            other_busy=busy_part(step, others),
            seconds=step.seconds,
        )


# --- command ---------------------------------------------------------------------------------


def rows_by_tokens(text: str) -> tuple[int, int]:
    """`32x1024` as rows and tokens."""
    rows, tokens = map(int, text.split("x"))
    return rows, tokens


class Configuration(NamedTuple):
    """What each phase is given, and under which shares."""

    shares: Shares
    decode: tuple[int, int] | None
    prompt_tokens: int | None

    def __str__(self) -> str:
        decode = "-" if self.decode is None else f"{self.decode[0]}x{self.decode[1]}"
        return f"{self.shares} decode {decode} prompts {self.prompt_tokens or '-'}"


def configurations(
    pairs: Sequence[Shares], decodes: Sequence[tuple[int, int]], prompts: Sequence[int]
) -> list[Configuration]:
    """What is measured, with few switches: by pair; alone once for each share of a phase."""
    found: list[Configuration] = []
    seen: set[tuple[str, int]] = set()
    for shares in pairs:
        if ("decode", shares.decode) not in seen:
            found += [Configuration(shares, decode, None) for decode in decodes]
        if ("prefill", shares.prefill) not in seen:
            found += [Configuration(shares, None, prompt) for prompt in prompts]
        seen |= {("decode", shares.decode), ("prefill", shares.prefill)}
        sizes = itertools.product(decodes, prompts)
        found += [Configuration(shares, *each) for each in sizes]
    return found


def write(report: Report) -> None:
    """Writes the rows, and the steps among them for the simulator."""
    report.save()
    env = load(report.path)["env"]  # of who measured: rows may be merged elsewhere
    device = env["gpu"] or env["cpu"]
    source = f"{report.summary['model']} on {device}, benchmarks/sm_share_surface.py"
    steps = list(steps_of(report.all_rows()).values())
    StepTimes(source, Overheads(), steps).write(report.folder / "sm_share_surface_steps.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sm_share_surface")
    add_arguments(parser)
    topologies.add_arguments(parser)
    parser.add_argument(
        "--pairs", nargs="+", type=options.shares, metavar="X,Y", help="prefill,decode shares"
    )
    parser.add_argument("--decode", nargs="+", type=rows_by_tokens, metavar="ROWSxTOKENS")
    parser.add_argument("--prompts", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--steps", type=int, help="of each configuration [20; 5 with --quick]")
    options.add_seconds(parser)
    options.add_merge_arguments(parser)
    args = parser.parse_args()
    end_on_sigterm()
    report = Report(
        "sm_share_surface",
        "How long do prefill and decode steps take under each SM share, alone and side by side?",
        out=args.out,
    )
    report.summarise = lambda rows: summarise(steps_of(rows)) | clock_ratio(rows)
    model, sizes = topologies.sizes(args, report.env)
    options.merge_of_one_model(parser, report, args, model)
    if args.seconds != 0:
        measure(args, parser, report, model, sizes)
    report.show()
    write(report)
    chart = panels(steps_of(report.all_rows()))
    write_svg(report.path.with_suffix(".svg"), report.question, chart)
    print(f"wrote {report.path}")
    sys.exit(report.failures > 0)


def measure(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    report: Report,
    model: str,
    sizes: Mapping[str, Any],
) -> None:
    """Measures what the command line asks for and there is time for."""
    budget = Budget(args.seconds)
    small = model != "llama31-8b"
    pairs = args.pairs or ([Shares(100, 100), Shares(50, 50)] if small else DEFAULT_SHARES)
    decodes = args.decode or (
        [(2, 64), (6, 64)] if small else [(8, 1024), (64, 1024), (128, 1024), (32, 4096)]
    )
    prompts = args.prompts or ([64, 128] if small else [512, 2048])
    most = sizes["max_num_seqs"] - 2  # two prompts may be under way
    if max(rows for rows, _ in decodes) > most:
        parser.error(f"--decode takes at most {most} rows with this model")
    wanted = configurations(pairs, decodes, prompts)
    if args.missing:
        have = {row.get("configuration") for row in report.all_rows()}
        wanted = [each for each in wanted if str(each) not in have]
    kept = {"kept_shares": [(shares.prefill, shares.decode) for shares in pairs]}
    say(f"starting {model}")
    arguments = topologies.engine_args(
        model, "semi_pd", **sizes, semi_pd=kept, compile_sampled_steps=False
    )
    engine = topologies.build(**arguments)
    with contextlib.closing(engine.coordinator), GpuClock() as clock:
        bench = Bench(engine, args.steps or (5 if args.quick else 20), clock)
        for configuration in wanted:
            if not budget.enough():
                break
            with budget.case():
                measured = bench.measure(*configuration)
            for key, steps in measured.items():
                fields = fields_of(key, steps) | bench.clock_means
                report.add(key.case, IMPL, configuration=str(configuration), **fields)
            write(report)
            say(f"{configuration}: {budget.longest_s:.1f} s at most so far")


if __name__ == "__main__":
    main()
