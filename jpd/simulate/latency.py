"""How long a step takes: a linear model of its work, what SM shares do to it, and the host.

What shares and the other phase do are the curves of `jpd.semi_pd.share_models`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jpd.config import require
from jpd.engine.plan import StepPlan
from jpd.engine.shapes import ShapeTable
from jpd.semi_pd.controller import Shares
from jpd.semi_pd.share_models import (
    H200,
    Interference,
    decode_curve,
    overlap_wait,
    prefill_beside,
    prefill_curve,
)

_TILE_ROWS = 256
"""Of the tiles that products of more rows are computed in, see `pallas_kernels.dense_gemm`; fewer
rows have smaller ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step computes, and what it is padded to: products work on padded rows and tokens."""

    rows: int
    """Decoding rows."""
    context_tokens: int
    """Keys that those rows attend to, all together."""
    prompt_tokens: int
    pairs: int
    """Pairs of a prompt token and a key that it attends to."""
    padded_rows: int
    padded_tokens: int
    """Prompt tokens."""
    padded_context: int
    """Keys that a page table row covers."""

    @classmethod
    def of(cls, plan: StepPlan, shapes: ShapeTable) -> StepWork:
        """Of a planned step, on an executor with these shapes."""
        tokens = sum(len(chunk.tokens) for chunk in plan.chunks)
        shape = shapes.pick(len(plan.rows), tokens, plan.context_tokens, plan.plain_greedy)
        return cls(
            rows=len(plan.rows),
            context_tokens=int(plan.positions.sum()) + len(plan.rows),
            prompt_tokens=tokens,
            pairs=sum(len(c.tokens) * (c.start + 1 + c.end) // 2 for c in plan.chunks),
            padded_rows=shape.batch,
            padded_tokens=shape.tokens,
            padded_context=shape.context,
        )


@dataclass(frozen=True, kw_only=True)
class _LinearTime:
    """Seconds of a step on the whole GPU: the sum of coefficients times counts."""

    @cached_property
    def coefficients(self) -> tuple[float, ...]:
        """In the order of `counts`."""
        return dataclasses.astuple(self)

    @staticmethod
    def counts(work: StepWork) -> tuple[float, ...]:
        """What each coefficient is multiplied with."""
        raise NotImplementedError

    def seconds(self, work: StepWork) -> float:
        """Of a step."""
        return math.sumprod(self.coefficients, self.counts(work))


@dataclass(frozen=True, kw_only=True)
class DecodeTime(_LinearTime):
    """Of a step of decoding rows alone."""

    step_s: float = 0.0
    row_s: float = 0.0
    """For each padded row."""
    context_token_s: float = 0.0
    """For each key attended to."""
    padded_context_token_s: float = 0.0
    """For each key that padded rows could attend to."""

    @staticmethod
    def counts(work: StepWork) -> tuple[float, ...]:
        rows = work.padded_rows
        return 1.0, rows, work.context_tokens, rows * work.padded_context


@dataclass(frozen=True, kw_only=True)
class PromptTime(_LinearTime):
    """Of a step with prompt tokens; decoding rows may ride along (chunked prefill)."""

    step_s: float = 0.0
    token_s: float = 0.0
    """For each padded prompt token and padded row, if more than 256 then filled up to a multiple of
    256: products compute whole tiles."""
    pair_s: float = 0.0
    """For each prompt token and key that it attends to."""
    padded_pair_s: float = 0.0
    """For each padded prompt token and key that it could attend to."""
    context_token_s: float = 0.0
    """For each key that rows attend to."""
    padded_context_token_s: float = 0.0
    """For each key that padded rows could attend to."""

    @staticmethod
    def counts(work: StepWork) -> tuple[float, ...]:
        rows, tokens = work.padded_rows, work.padded_tokens
        computed = tokens + rows
        if computed > _TILE_ROWS:
            computed = -(-computed // _TILE_ROWS) * _TILE_ROWS
        return (
            1.0,
            computed,
            work.pairs,
            tokens * work.padded_context,
            work.context_tokens,
            rows * work.padded_context,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What the host adds to a step. The coordinator does one thing at a time."""

    launch_s: float = 0.0
    """The coordinator plans a step and launches it."""
    deliver_s: float = 0.0
    """It takes in a step that has run."""
    deliver_token_s: float = 0.0
    """More for each token of the step."""
    message_s: float = 0.0
    """From the coordinator to an executor in another process, or back."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            require(0 <= value < math.inf, f.name, value, "seconds, at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """Seconds of everything that a simulated engine does."""

    source: str
    """Where the numbers come from."""
    tensor_parallel_size: int = 1
    """GPUs that each step runs on, one rank on each."""
    decode: DecodeTime
    prompt: PromptTime
    overheads: Overheads = field(default_factory=Overheads)
    parallel: float = 0.55
    """Of `prefill_curve`: 0..1."""
    prefill_at: tuple[tuple[int, float], ...] = ()
    """What prefill's time at 100 % is multiplied with at other shares that were measured: (percent,
    factor). The curve is bent to go through them, and between and below them as much. Products run
    in waves of tiles, so the real one is like stairs."""
    knee: float = 40.0
    """Of `decode_curve`, percent of the SMs, for a step of no rows: its reads need so many."""
    knee_row: float = 0.1
    """More for each padded row, whose products need SMs. Both are fitted to steps of 32 and 64 rows
    at 20, 30 and 40 %, whose times alone are within 4 % of it
    (`benchmarks/results/h200/sm_share_surface.json`); fewer and more rows were not measured with
    the table of products of then."""
    interference: Interference = H200
    turns: float | None = None
    """Decode steps that run in the time of a prefill step where both have all SMs, and take turns
    kernel by kernel: a step has as many kernels whatever its tokens or rows. So a prefill step
    takes longer by the time of so many decode steps alone, and a decode step by that part of the
    prefill step. None: what they do to each other is in `interference` there too."""
    page_copy_s: float = 0.0
    """For each KV page that a step of `topology="disaggregated"` sends to the other GPU, beside
    what it computes."""
    start_s: float = 15.0
    """From the start of an executor's process until it can serve: the background switch's delay."""

    def __post_init__(self) -> None:
        for time in (self.decode, self.prompt):
            for name, value in dataclasses.asdict(time).items():
                name = f"{type(time).__name__}.{name}"
                require(0 <= value < math.inf, name, value, "seconds, at least 0")
        require(
            self.tensor_parallel_size >= 1,
            "tensor_parallel_size",
            self.tensor_parallel_size,
            "at least 1",
        )
        require(0 <= self.parallel <= 1, "parallel", self.parallel, "0..1")
        for percent, factor in self.prefill_at:
            require(1 <= percent < 100, "prefill_at", percent, "shares of 1..99 percent")
            require(factor >= 1, "prefill_at", factor, "factors of at least 1")
        for name in ("knee", "knee_row"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0 percent")
        ok = self.turns is None or 0 < self.turns < math.inf
        require(ok, "turns", self.turns, "finite, above 0, or None")
        for name in ("page_copy_s", "start_s"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "seconds, at least 0")

    def full_s(self, work: StepWork) -> float:
        """Seconds of a step that has the whole GPU."""
        return (self.prompt if work.prompt_tokens else self.decode).seconds(work)

    def stretch(
        self, has_prompt: bool, share: int, other_share: int | None, padded_rows: int = 0
    ) -> float:
        """What the time on the whole GPU is multiplied with, `wait_s` apart.

        Args:
          has_prompt: the step has prompt tokens.
          share: of the executor, in percent of the SMs.
          other_share: of the executor whose step runs at the same time; None if none does.
          padded_rows: of the step; of no account if it has prompt tokens.
        """
        if has_prompt:
            alone = self._prefill_alone(share)
            if other_share is None:
                return alone
            return alone * prefill_beside(Shares(share, other_share), self.interference)
        # The curve counts from unlimited SMs, `full_s` from 100 %.
        knee = self.knee + self.knee_row * padded_rows
        alone = decode_curve(share, knee) / decode_curve(100, knee)
        return alone if other_share is None else self.interference.decode_slowdown * alone

    def _prefill_alone(self, share: int) -> float:
        measured = sorted({**dict(self.prefill_at), 100: 1.0}.items())
        percents = [percent for percent, _ in measured]
        bends = [factor / prefill_curve(percent, self.parallel) for percent, factor in measured]
        return prefill_curve(share, self.parallel) * float(np.interp(share, percents, bends))

    def in_turns_s(self, has_prompt: bool, full_s: float, other_full_s: float) -> float:
        """Seconds of a step while one of the other phase runs, by `turns`, which must be known.

        Args:
          has_prompt: the step has prompt tokens, and the other one none; or the other way round.
          full_s: of the step on the whole GPU.
          other_full_s: of the other one.
        """
        assert self.turns is not None
        return full_s + other_full_s * (self.turns if has_prompt else 1 / self.turns)

    def wait_s(self, has_prompt: bool, share: int, other_share: int | None) -> float:
        """Seconds more, for SMs that the other executor holds; arguments as of `stretch`."""
        if has_prompt or other_share is None:
            return 0.0
        return overlap_wait(Shares(other_share, share), self.interference) * self.decode.step_s
