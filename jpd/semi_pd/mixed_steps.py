"""How long requests take on one executor that computes prompts and decodes in the same steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jpd.semi_pd.flow import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedSteps:
    """Chunked prefill, as `jpd.semi_pd.flow.follow` asks for it.

    A step of c prompt tokens beside n decoding rows takes `decode_s(n) + c * token_s`: its tokens
    find the weights already read for the rows. A step takes the prompts that came during the one
    before it, one prompt at least and `most_tokens` at most, so it is the longer the more come, and
    the fewer steps a token waits for.
    """

    load: Load
    """The requests that are here, and those that come."""
    decode_s: Callable[[float], float]
    """Seconds of a step without prompts, from the rows."""
    token_s: float
    """Seconds by which a prompt token makes a step longer."""
    most_tokens: float
    """Prompt tokens of a step."""

    def tokens(self, decoding: float) -> float:
        """Prompt tokens of a step that has some, beside so many decoding rows."""
        load = self.load
        spare = 1 - load.tokens_per_s * self.token_s  # of the time, for what a step costs besides
        come = load.tokens_per_s * self.decode_s(decoding) / spare if spare > 0 else math.inf
        return min(self.most_tokens, max(load.prompt_tokens, load.waiting_tokens, come))

    def prompt_token_s(self, decoding: float) -> float:
        """Seconds until the next prompt token is computed: its part of the whole step."""
        return self.token_s + self.decode_s(decoding) / self.tokens(decoding)

    def least_token_s(self, decoding: float) -> float:
        """Seconds of a prompt token in a step that is full: what decides how many can come."""
        return self.token_s + self.decode_s(decoding) / self.most_tokens

    def step_s(self, decoding: float, busy: float) -> float:
        """Mean seconds between two tokens of a request, where steps with prompts take the part
        `busy`, 0..1, of the time."""
        alone_s = self.decode_s(decoding)
        with_prompts_s = alone_s + self.tokens(decoding) * self.token_s
        return 1 / ((1 - busy) / alone_s + busy / with_prompts_s)
