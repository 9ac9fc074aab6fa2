"""Finds the unified values of asynchronous softmax from real prompts.

Runs each prompt through the model without an engine and looks at the attention scores of every
layer: the log-sum-exp of each softmax row, whose range gives phi, and a histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpd.errors import ConfigError
from jpd.layers.attention import causal_attend
from jpd.models import ModelConfig, Params, bind

HISTOGRAM_EDGES = np.linspace(-128, 128, 257)
"""Of scaled scores; the first and the last bin also hold what lies beyond them."""
_SMALLEST = 64


@dataclass(frozen=True)
class Observed:
    """What the scores of some prompts were."""

    lse_min: np.ndarray
    """`[L, Hq]` smallest log-sum-exp of a row of scaled scores."""
    lse_max: np.ndarray
    """`[L, Hq]` largest."""
    counts: np.ndarray
    """`[L, bins]` scores in each bin of `HISTOGRAM_EDGES`."""
    prompts: int
    tokens: int

    def phi(self) -> np.ndarray:
        """`[L, Hq]` middle of the range, from which both ends are equally far."""
        return ((self.lse_min + self.lse_max) / 2).astype(np.float32)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "lse_min": self.lse_min.tolist(),
            "lse_max": self.lse_max.tolist(),
            "prompts": self.prompts,
            "tokens": self.tokens,
            "histogram": {"edges": HISTOGRAM_EDGES.tolist(), "counts": self.counts.tolist()},
        }


@partial(jax.jit, static_argnums=0)
def _observe(config: ModelConfig, params: Params, tokens: jax.Array, length: jax.Array) -> Any:
    """Row log-sum-exp ranges `[L, Hq]` and histograms `[L, bins]` of `tokens[:length]`."""
    low, high, counts = [], [], []
    real = jnp.arange(tokens.shape[0]) < length
    bins = len(HISTOGRAM_EDGES) - 1
    start, width = HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0]

    def look(layer: int, scores: jax.Array, seen: jax.Array) -> None:
        del layer  # they come in order
        lse = jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)
        lse = lse.reshape(-1, tokens.shape[0])
        low.append(jnp.where(real, lse, jnp.inf).min(-1))
        high.append(jnp.where(real, lse, -jnp.inf).max(-1))
        index = jnp.clip(jnp.floor((scores - start) / width), 0, bins - 1).astype(jnp.int32)
        counted = jnp.broadcast_to(seen & real[:, None], scores.shape)
        index = jnp.where(counted, index, bins).reshape(-1)
        counts.append(jnp.zeros(bins, jnp.int32).at[index].add(1, mode="drop"))

    model = bind(config, params)
    model.hidden(tokens, jnp.arange(tokens.shape[0]), causal_attend(config, look))
    return jnp.stack(low), jnp.stack(high), jnp.stack(counts)


def observe(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    on_prompt: Callable[[], object] = lambda: None,
) -> Observed:
    """Looks at the scores of every prompt (token ids).

    Raises:
      ConfigError: no prompt has a token.
    """
    prompts = [np.asarray(p, np.int32) for p in prompts if len(p)]
    if not prompts:
        raise ConfigError("no prompt: calibration needs at least one token")
    shape = (config.num_layers, config.num_heads)
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    counts = np.zeros((config.num_layers, len(HISTOGRAM_EDGES) - 1), np.int64)
    for prompt in prompts:
        padded = np.zeros(max(_SMALLEST, 1 << (len(prompt) - 1).bit_length()), np.int32)
        padded[: len(prompt)] = prompt
        found = _observe(config, params, jnp.asarray(padded), np.int32(len(prompt)))
        one_low, one_high, one_counts = map(np.asarray, found)
        low, high = np.minimum(low, one_low), np.maximum(high, one_high)
        counts += one_counts
        on_prompt()
    return Observed(low, high, counts, len(prompts), sum(map(len, prompts)))


def plot(observed: Observed, path: Path) -> bool:
    """Draws each layer's scores as a row of densities; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    used = np.flatnonzero(observed.counts.sum(0))
    bins = slice(used[0], used[-1] + 1)
    share = observed.counts[:, bins] / observed.counts.sum(1, keepdims=True)
    layers = len(share)
    figure = Figure(figsize=(8, 2 + 0.18 * layers), layout="constrained")
    axes = figure.add_subplot()
    edges = HISTOGRAM_EDGES[bins.start : bins.stop + 1]
    image = axes.pcolormesh(
        edges, np.arange(layers + 1) - 0.5, np.log10(np.maximum(share, 1e-7)), cmap="viridis"
    )
    figure.colorbar(image, label="log10 of the share of scores")
    axes.set(xlabel="scaled attention score", ylabel="layer")
    axes.invert_yaxis()
    low, high = observed.lse_min.min(1), observed.lse_max.max(1)
    rows = np.arange(layers)
    axes.plot(low, rows, "w<", high, rows, "w>", markersize=3)
    axes.set_title("Scores, and the range of the rows' log-sum-exp (triangles)")
    figure.savefig(path)
    return True
