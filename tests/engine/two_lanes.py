"""Two executors on one pool of pages, with no order between them, that come and go."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jpd.engine.lane import ExecutorLostError, Lane, PagesLostError
from jpd.engine.plan import Admission, StepPlan, StepResult
from jpd.engine.recent import Recent
from tests.engine.fake_device import GARBAGE, FakeDevice, run_alone, sequence_prompt


@dataclass(slots=True)
class LateStep:
    """A step that runs when its result is asked for, and perhaps in part at its launch."""

    plan: StepPlan
    executor: LateExecutor

    def result(self) -> StepResult:
        """Runs the step, unless the executor dies now."""
        if self.executor.dead:
            raise ExecutorLostError("killed")
        return StepResult(self.executor.run(self.plan), None)


@dataclass(slots=True)
class LateExecutor(FakeDevice):
    """An executor in a process of its own: it has a history and knows rows of its own.

    It touches the pages at any time from the launch of a step to its end.
    """

    random: random.Random = field(default_factory=random.Random)
    dead: bool = False
    target: FakeDevice | None = None
    """To whose pages it sends what it computes of prompts."""
    serials: dict[int, int] = field(default_factory=dict)
    queue: list[StepPlan] = field(default_factory=list)

    def share_pages(self, other: FakeDevice) -> LateExecutor:
        """Maps the pages of another."""
        self.chains, self.versions, self.admitted_at = (
            other.chains,
            other.versions,
            other.admitted_at,
        )
        return self

    def admit(self, admissions: list[Admission]) -> None:
        """Takes rows in, before steps that hold them."""
        self.serials |= {a.row: a.serial for a in admissions}
        self.load_history(admissions)

    def launch(self, plan: StepPlan) -> LateStep:
        """Takes a step in."""
        if self.dead:
            raise ExecutorLostError("killed before the launch")
        self.remember(plan)
        self.serials |= {a.row: a.serial for a in plan.admissions}
        rows = [*zip(plan.rows.tolist(), plan.serials.tolist(), strict=True)]
        for row, serial in rows + [(c.row, c.serial) for c in plan.chunks]:
            assert self.serials[row] == serial, "a row that the executor was not told of"
        self.queue.append(plan)
        if self.queue[0] is plan and self.random.random() < 0.5:
            self.load_history(plan.admissions)
            self.write(self.unpack(plan)[1])
            self.send(plan)
        return LateStep(plan, self)

    def send(self, plan: StepPlan) -> None:
        """Writes pages to the other device as they are now."""
        size = self.page_size
        for copy in plan.copies:
            for source, target in zip(copy.source, copy.target, strict=True):
                of, to = (slice(page * size, (page + 1) * size) for page in (source, target))
                self.target.chains[to] = self.chains[of]
                self.target.versions[to] = self.versions[of]

    def load_history(self, admissions: list[Admission]) -> None:
        """Tokens of new rows, after the steps before it."""
        for new in admissions:
            self.history[new.row] = GARBAGE
            if new.tokens is not None:
                self.history[new.row, : len(new.tokens)] = new.tokens

    def run(self, plan: StepPlan):
        """All of a step."""
        assert self.queue.pop(0) is plan, "steps run in the order of their launch"
        self.load_history(plan.admissions)
        batch, work = self.unpack(plan)
        self.write(work)
        self.send(plan)
        ends = [(c.sequence, c.row, c.end) for c in plan.chunks if c.last]
        rows = zip(plan.sequences, plan.rows.tolist(), (plan.positions + 1).tolist(), strict=True)
        for sequence, row, count in [*rows, *ends]:
            if sequence.params.uses_penalties:
                want, _ = run_alone(tuple(sequence_prompt(sequence)), self.max_model_len)
                got = self.history[row, :count].tolist()
                assert got == list(want[:count]), "penalties of other tokens than its own"
        return self.sample(plan, batch, work)

    def die(self) -> None:
        """Its kernels may have done anything up to now, and do nothing from now on."""
        if self.queue and self.random.random() < 0.5:
            self.load_history(self.queue[0].admissions)
            self.write(self.unpack(self.queue[0])[1])
            self.send(self.queue[0])
        self.queue.clear()


class TwoLanes:
    """A topology whose executors finish, die, are replaced and change phases at random."""

    def __init__(
        self,
        sizes: dict,
        rng: random.Random,
        *,
        deaths: float,
        switches: float,
        faults: float,
        mode_changes: float,
        two_pools: bool,
    ) -> None:
        self.recompiles = 0
        self.break_even_estimate = None
        self.seen: Counter[str] = Counter()
        self._random = rng
        self._sizes = sizes
        self._deaths, self._switches, self._faults = deaths, switches, faults
        self._mode_changes, self._unified = mode_changes, False
        self._memory = self._decode_memory = FakeDevice(**sizes)
        if two_pools:
            self._decode_memory = FakeDevice(**sizes)
            self._decode_memory.admitted_at = self._memory.admitted_at
        rows = sizes["rows"]
        self.lanes = [
            Lane(self._start(0), rows, depth=2, decode=False),
            Lane(self._start(1), rows, depth=2, prefill=False),
        ]
        self._following: list[LateExecutor | None] = [None, None]

    def _start(self, lane: int) -> LateExecutor:
        executor = LateExecutor(**self._sizes, random=self._random, target=self._decode_memory)
        return executor.share_pages((self._memory, self._decode_memory)[lane])

    def tend(self, recent: Callable[[], Recent]) -> None:
        """Brings executors back, and switches those that are between steps."""
        if self._random.random() < self._faults:
            self.seen["fault"] += 1
            for lane in self.lanes:
                if lane.executor is not None:
                    lane.executor.die()
            raise PagesLostError
        for i, lane in enumerate(self.lanes):
            self._tend(i, lane)
        if self._decode_memory is not self._memory:
            return
        if self._random.random() < self._mode_changes:
            self._unified = not self._unified
            self.seen["mode"] += 1
        prefill, decode = self.lanes
        unified = self._unified and decode.executor is not None
        prefill.prefill, prefill.decode = not unified, decode.executor is None
        decode.prefill = unified or prefill.executor is None

    def _tend(self, i: int, lane: Lane) -> None:
        following = self._following[i]
        if lane.executor is None and self._random.random() < 0.3:
            lane.executor, self._following[i] = following or self._start(i), None
        elif lane.executor is None:
            return
        elif following is not None and not lane.in_flight:
            lane.executor, self._following[i] = following, None
            self.seen["handed over"] += 1
        elif following is not None and self._random.random() < 0.3:
            lane.release()
            self._following[i] = None
            self.seen["stayed"] += 1
        elif not lane.in_flight:
            if self._random.random() < self._switches:
                lane.executor = self._start(i)
                self.seen["switched"] += 1
        elif self._switches and self._random.random() < self._switches:
            self._following[i] = self._start(i)
            lane.hold(self._following[i])

    def wait(self, patience_s: float = math.inf) -> Lane | None:
        """Any lane may be first."""
        running = [lane for lane in self.lanes if lane.in_flight]
        if not running:
            return None
        lane = self._random.choice(running)
        plan, *after = (step.plan for step in lane.in_flight)
        ended = [chunk.row for chunk in plan.chunks if chunk.last]
        self.seen["decodes on"] += sum(int(np.isin(ended, p.rows).sum()) for p in after)
        self.seen["copied"] += sum(len(c.source) for c in lane.in_flight[0].plan.copies)
        if self._random.random() < self._deaths:
            lane.executor.dead = True
        return lane

    def lost(self, lane: Lane, error: ExecutorLostError) -> bool:
        """Its last writes are done when this returns."""
        self.seen["lost " + ("decode" if lane is self.lanes[1] else "prefill")] += 1
        lane.executor.die()
        return True

    @property
    def num_lost(self) -> int:
        """Executors that died."""
        return sum(count for name, count in self.seen.items() if name.startswith("lost"))

    def renew(self) -> None:
        """All pages hold garbage."""
        self._memory.chains[:] = self._decode_memory.chains[:] = GARBAGE
        self._following = [None, None]
        for i, lane in enumerate(self.lanes):
            lane.executor = self._start(i)

    def close(self) -> None:
        """Nothing is left."""
