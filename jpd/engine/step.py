"""The compiled step: store KV, attend over pages, sample. A pure function of arrays.

One step serves `B` decoding rows and `T` prompt tokens of up to `N` chunks together: all products
with weights run over `B + T` tokens, attention runs for each part with the op made for it.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jpd import ops
from jpd.engine import sampler
from jpd.engine.batch import Batch, unpack
from jpd.engine.shapes import StepShape
from jpd.models import ModelConfig, Params, bind

KVPages = list[tuple[jax.Array, jax.Array]]
"""For each layer, keys and values `[P, S, Hkv, D]`."""


class Progress(Protocol):
    """Told by a running step how far it is, for whoever waits for its pages. Can be pickled."""

    targets: tuple[str, ...]
    """XLA FFI targets that it calls."""

    def filled(
        self, layer: int, following: jax.Array, keys: jax.Array, values: jax.Array
    ) -> jax.Array:
        """All is written that the step writes to the pages of a layer.

        Returns `following`, unchanged, from which the step goes on.
        """

    def ended(self, last: jax.Array, kv: KVPages) -> jax.Array:
        """All is computed that `last`, which is returned unchanged, depends on."""


class PagedAttend:
    """The `attend` of a step: writes new keys and values into pages, then attends over them."""

    def __init__(
        self,
        config: ModelConfig,
        kv: KVPages,
        batch: Batch,
        page_size: int,
        phi: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.kv = list(kv)
        self._progress = progress
        self._recomputed: list[jax.Array] = []
        self._config = config
        self._phi = phi
        self._batch = batch
        self._lengths = batch.positions + 1
        self._attended: set[int | None] = set()
        decode_slots = self._slots(batch.positions, batch.page_table, page_size)
        rows = batch.chunk_page_table[batch.chunk_of_token] if len(batch.chunk_tokens) else None
        self._slots_of_tokens = (
            decode_slots
            if rows is None
            else jnp.concatenate(
                [decode_slots, self._slots(batch.chunk_positions, rows, page_size)]
            )
        )

    @staticmethod
    def _slots(positions: jax.Array, tables: jax.Array, page_size: int) -> jax.Array:
        """Flat positions in the pages; padding goes to page 0, which nobody reads."""
        at = jnp.maximum(positions, 0)
        page = jnp.take_along_axis(tables, (at // page_size)[:, None], axis=1)[:, 0]
        return jnp.where(positions < 0, 0, page * page_size + at % page_size)

    def recomputed_rows(self) -> jax.Array | None:
        """Softmax rows of all layers that were computed twice, int32; None if none can be.

        Summed once, at the end: a sum in each layer would stand between its kernels. XLA would make
        one of a sum over the stack, but for the barrier.
        """
        if not self._recomputed:
            return None
        return jax.lax.optimization_barrier(jnp.stack(self._recomputed)).sum()

    def __call__(
        self,
        layer: int,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        norms: ops.HeadNorms | None,
    ) -> jax.Array:
        b, batch, config = self._batch, len(self._batch.tokens), self._config
        q, *pages = ops.rope_write(
            qkv,
            cos,
            sin,
            *self.kv[layer],
            self._slots_of_tokens,
            num_heads=config.num_heads,
            norms=norms,
        )
        if self._progress is not None:
            q = self._progress.filled(layer, q, *pages)
        self.kv[layer] = tuple(pages)
        window = config.windows[layer]
        options = {"scale": q.shape[-1] ** -0.5, "window": window}
        parts = []
        if batch:
            # All but the newest token of a decoding row was written by earlier steps: by whole ones
            # of this executor, or by another's that had ended when the plan was made. So were the
            # pages that it found in the prefix cache, since it was admitted before its first chunk.
            # This step's chunks are written into pages that no decoding row has.
            decoded = ops.decode_attention(
                q[:batch],
                *pages,
                b.page_table,
                self._lengths,
                phi=None if self._phi is None else self._phi[layer],
                early=window in self._attended,
                **options,
            )
            self._attended.add(window)
            parts.append(decoded.out)
            if decoded.recomputed is not None:
                self._recomputed.append(decoded.recomputed)
        if len(b.chunk_tokens):
            parts.append(
                ops.prefill_attention(
                    q[batch:],
                    *pages,
                    b.chunk_page_table,
                    b.chunk_starts,
                    b.chunk_counts,
                    b.chunk_contexts,
                    **options,
                )
            )
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def step(
    config: ModelConfig,
    shape: StepShape,
    chunks: int,
    page_size: int,
    params: Params,
    kv: KVPages,
    history: jax.Array,
    packed: jax.Array,
    sampling: sampler.SamplingInputs | None,
    prompt_lengths: jax.Array | None,
    *,
    phi: np.ndarray | None = None,
    progress: Progress | None = None,
) -> tuple[KVPages, jax.Array, Any, jax.Array | None]:
    """Runs one step.

    Args:
      config, shape, chunks, page_size, phi, progress: static.
      params: the model's parameters.
      kv: pages, donated.
      history: `[rows + 1, max_model_len + 1]` int32 tokens of every row, donated. The newest token
        of a row is read from here when the host does not know it yet.
      packed: see `jpd.engine.batch`.
      sampling: None for a greedy shape, else `R = B + N` rows of sampling inputs.
      prompt_lengths: `[R]`, with `sampling`.
      phi: `[L, Hq]` float32, see `jpd.ops.decode_attention`.

    Returns:
      The pages, the history with the sampled tokens, tokens `[R]` or `Sampled`, and the number of
      softmax rows that were computed twice (None where none can be).
    """
    batch = unpack(packed, shape, chunks, page_size)
    positions = jnp.concatenate([batch.positions, batch.chunk_positions])
    newest = history[batch.rows, jnp.maximum(batch.positions, 0)]
    tokens = jnp.concatenate(
        [jnp.where(batch.tokens < 0, newest, batch.tokens), batch.chunk_tokens]
    )
    attend = PagedAttend(config, kv, batch, page_size, phi, progress)
    model = bind(config, params)
    rows, lengths = batch.rows, batch.positions + 1
    with ops.workspace():
        hidden = model.hidden(tokens, jnp.maximum(positions, 0), attend)
        if shape.tokens:
            last = jnp.maximum(batch.chunk_starts + batch.chunk_counts - 1, 0)
            hidden = jnp.concatenate([hidden[: shape.batch], hidden[shape.batch + last]])
            rows = jnp.concatenate([rows, batch.chunk_rows])
            lengths = jnp.concatenate([lengths, batch.chunk_contexts])
        logits = model.logits(hidden)
    if sampling is None:
        out = sampled = sampler.greedy(logits)
    else:
        out = sampler.sample(
            logits,
            sampling,
            history=history[rows],
            prompt_lengths=prompt_lengths,
            lengths=lengths,
        )
        sampled = out.tokens
    history = history.at[rows, lengths].set(sampled)
    if progress is not None:
        history = progress.ended(history, attend.kv)
    return attend.kv, history, out, attend.recomputed_rows()
