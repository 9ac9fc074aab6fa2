"""What happened to requests since somebody last looked; for those who steer an engine. No jax."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial

from jpd.engine.plan import StepPlan

_Values = partial(deque, maxlen=10_000)
"""The newest, where nobody looks for long, or ever."""


@dataclass(slots=True)
class Recent:
    """Of the time since the last look, and what is there now."""

    ttft_s: deque[float] = field(default_factory=_Values)
    """TTFT of each request whose first token came."""
    tpot_s: deque[float] = field(default_factory=_Values)
    """TPOT of each request that ended with two tokens or more."""
    token_gap_s: deque[float] = field(default_factory=_Values)
    """For each decode step, the time since the one before it, where they have a row in common."""
    held_gap_s: deque[float] = field(default_factory=_Values)
    """Those of them in which the executor computed prompts too."""
    prefill_tokens: int = 0
    """Prompt tokens computed."""
    decoding_beside: int = 0
    """Sequences that decoded while a prompt token was computed, summed over those tokens."""
    waiting_beside: int = 0
    """Sequences without a first token meanwhile, its own included; summed likewise."""
    now_s: float = 0.0
    waiting_requests: int = 0
    """Sequences without a first token: in the queue or in prefill."""
    waiting_tokens: int = 0
    """Tokens of those that are still to be computed."""
    decoding_requests: int = 0
    """Sequences that decode."""
    free_pages_fraction: float = 1.0
    """Pages that nobody holds, 0..1 of all."""


class RecentSteps:
    """Gathers a `Recent` while steps are committed."""

    def __init__(self) -> None:
        self.recent = Recent()
        self._last_decode_s = 0.0
        self._last_serials: set[int] = set()
        self._prompts = False  # an executor that decodes computed some since the last decode step

    def committed(self, plan: StepPlan, now_s: float) -> None:
        """The tokens of a step are known."""
        self.recent.prefill_tokens += sum(len(chunk.tokens) for chunk in plan.chunks)
        self._prompts |= bool(plan.chunks)
        if len(plan.rows):
            serials = set(plan.serials.tolist())
            if not serials.isdisjoint(self._last_serials):
                gap_s = now_s - self._last_decode_s
                self.recent.token_gap_s.append(gap_s)
                if self._prompts:
                    self.recent.held_gap_s.append(gap_s)
            self._prompts = False
            self._last_serials, self._last_decode_s = serials, now_s

    def held_up(self, plan: StepPlan, decoding: int, waiting: int) -> None:
        """A step with prompt chunks has run; so many sequences decoded, or waited for a token."""
        tokens = sum(len(chunk.tokens) for chunk in plan.chunks)
        self.recent.decoding_beside += tokens * decoding
        self.recent.waiting_beside += tokens * waiting

    def take(self) -> Recent:
        """All since the last call."""
        taken, self.recent = self.recent, Recent()
        return taken
