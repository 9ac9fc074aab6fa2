"""Are the tokens that a benchmark generated those of the model?

Random weights make many near ties, so greedy tokens of 16-bit arithmetic cannot be compared one by
one. Instead a float32 pass over prompt and output, without a cache, says how much worse than its
own best token each generated token is. Arithmetic that is right picks tokens about as good as
those of a plain 16-bit pass; a wrong page, position or weight picks tokens that are several
standard deviations worse.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpd import models
from jpd.engine.build import Engine

MAX_RATIO = 2.0
"""Regret that is allowed, in units of the 16-bit pass's own relative error."""


class Check(NamedTuple):
    """What was found over all tokens looked at."""

    regret: float
    """Mean of (best logit - logit of the token), in units of the logits' root mean square."""
    noise: float
    """Relative error of the logits of a pass without a cache, in the engine's own dtype."""

    @property
    def ok(self) -> bool:
        """The tokens are as good as the dtype allows."""
        return self.regret <= MAX_RATIO * self.noise


def check_tokens(engine: Engine, sequences: list[tuple[list[int], list[int]]]) -> Check:
    """Compares generated tokens with a float32 pass.

    Args:
      engine: whose parameters made them.
      sequences: prompt and greedy output of each, token ids; the longer, the more memory.
    """
    params = engine.executor.params
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    regrets, errors = [], []
    for prompt, output in sequences:
        tokens = np.array(prompt + output, np.int32)
        before = slice(len(prompt) - 1, len(tokens) - 1)
        want = np.asarray(models.logits(engine.model_config, exact, tokens)[before])
        plain = np.asarray(models.logits(engine.model_config, params, tokens)[before])
        scale = np.sqrt(np.mean(want**2, axis=-1))
        chosen = want[np.arange(len(output)), output]
        regrets.append((want.max(-1) - chosen) / scale)
        errors.append(np.linalg.norm(plain - want) / np.linalg.norm(want))
    return Check(float(np.mean(np.concatenate(regrets))), float(np.mean(errors)))
