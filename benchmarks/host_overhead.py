"""What does planning and committing one decode step cost on the host?

The scheduler runs alone, on this CPU, with 256 running sequences; the tokens are made up. Cases:

``steady``
    all sequences decode; pages are added as they fill, full pages are named for the prefix cache.
``churn``
    lengths from the Azure conversation trace: sequences end and others are admitted, so some steps
    hold prompt chunks too.

Implementations: ``plan``, ``commit``, ``plan + commit`` (a step's total), ``pack`` (the plan as
one padded array) and, with the tokenizer of the model in the box, ``deliver`` (tokens to text of
all sequences, done while the device computes).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict

import numpy as np

from benchmarks.report import Report, add_arguments
from benchmarks.workloads import azure_conv
from jpd import SamplingParams, box
from jpd.engine import batch as batches
from jpd.engine.output import append_token, make_request
from jpd.engine.plan import StepResult
from jpd.engine.scheduler import Scheduler
from jpd.engine.sequence import Sequence
from jpd.engine.shapes import ShapeTable
from jpd.text import Tokenizer

SEQUENCES = 256
VOCAB = 4096
LIMITS = {"max_num_seqs": SEQUENCES, "max_num_batched_tokens": 2048, "max_model_len": 4096}
PAGE_SIZE = 16
CHUNKS = 8


class Bench:
    """A scheduler with requests, and the times of its parts in milliseconds."""

    def __init__(self, lengths: list[tuple[int, int]], tokenizer: Tokenizer) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.scheduler = Scheduler(
            **LIMITS,
            max_prefills_per_step=CHUNKS,
            num_pages=SEQUENCES * LIMITS["max_model_len"] // PAGE_SIZE + 1,
            page_size=PAGE_SIZE,
            max_stop_ids=32,
            enable_prefix_caching=True,
        )
        self._shapes = ShapeTable(**LIMITS, page_size=PAGE_SIZE)
        self._random = np.random.default_rng(0)
        self._requests = {}
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, stop="\x00")
        for i, (prompt, output) in enumerate(lengths):
            tokens = self._random.integers(3, VOCAB, prompt, np.int32)
            sequence = Sequence(str(i), 0, tokens, params, (0, i), prompt + output)
            self._requests[str(i)] = make_request(
                str(i), None, tokens.tolist(), params, tokenizer, 0.0
            )
            self.scheduler.add(sequence)

    def _timed(self, name, function, *args):
        start = time.perf_counter()
        out = function(*args)
        self.times[name].append((time.perf_counter() - start) * 1e3)
        return out

    def _pack(self, plan):
        tokens = sum(len(c.tokens) for c in plan.chunks)
        shape = self._shapes.pick(len(plan.rows), tokens, plan.context_tokens, True)
        return batches.pack(plan, shape, chunks=CHUNKS, page_size=PAGE_SIZE, unowned_row=SEQUENCES)

    def _deliver(self, committed, result):
        rows = zip(committed.sequences, committed.tokens, committed.result_rows, strict=True)
        for sequence, token, row in rows:
            append_token(self._requests[sequence.request_id], sequence, token, row, result, 0.0)

    def run(self, steps: int, ready) -> None:
        """Times `steps` steps, from when `ready` holds; one step is always in flight."""
        in_flight, counted = None, 0
        while counted < steps and self.scheduler.has_work:
            if not counted and ready(self.scheduler):
                self.times.clear()
                counted = 1
            plan = self._timed("plan", self.scheduler.plan)
            if plan is not None:
                self._timed("pack", self._pack, plan)
            if in_flight is not None:
                size = len(in_flight.rows) + len(in_flight.chunks)
                tokens = self._random.integers(3, VOCAB, size, np.int32)
                done = self._timed("commit", self.scheduler.commit, in_flight, tokens)
                self._timed("deliver", self._deliver, done, StepResult(tokens, None))
                if plan is not None:
                    total = self.times["plan"][-1] + self.times["commit"][-1]
                    self.times["plan + commit"].append(total)
            in_flight = plan
            counted += counted > 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_overhead")
    add_arguments(parser)
    args = parser.parse_args()
    report = Report(
        "host_overhead",
        "What does planning and committing one decode step of 256 sequences cost on the host?",
        out=args.out,
        host_only=True,
    )
    steps = 200 if args.quick else 3000
    tokenizer = Tokenizer.load(box.path())
    random = np.random.default_rng(1)
    steady = [(int(n), 3900) for n in random.integers(16, 160, SEQUENCES)]
    trace = azure_conv(256 if args.quick else 4000, max_total=LIMITS["max_model_len"]).requests
    churn = [(r.prompt_tokens, r.output_tokens) for r in trace]

    def all_decode(scheduler: Scheduler) -> bool:
        return int(scheduler.table.decoding.sum()) == SEQUENCES

    def full(scheduler: Scheduler) -> bool:
        return scheduler.num_running == SEQUENCES

    for case, lengths, ready in (("steady", steady, all_decode), ("churn", churn, full)):
        bench = Bench(lengths, tokenizer)
        gc.collect()
        gc.freeze()  # as in a server that has finished its start
        bench.run(steps, ready)
        gc.unfreeze()
        for name, times in bench.times.items():
            p99 = float(np.percentile(times, 99))
            report.add(case, name, times, "ms", p99=p99, max=max(times))
        total = bench.times["plan + commit"]
        report.summary[f"{case}_median_ms"] = float(np.median(total))
        report.summary[f"{case}_p99_ms"] = float(np.percentile(total, 99))
    report.finish()


if __name__ == "__main__":
    main()
