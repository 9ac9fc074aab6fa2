"""What a traced step calls. The names alone go into its module, so any process may lower it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

FILLED, ENDED = TARGETS = ("jpd_kv_filled", "jpd_kv_ended")
"""Names of the XLA FFI targets."""


def filled(layer: int, following: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Says that all is written that a step writes to the pages of a layer.

    Args:
      layer: from 0; a step goes through all of them in order.
      following: what the next part of the step is computed from.
      keys, values: `[P, ...]` pages.

    Returns:
      `following`, in place: what reads it runs after the link was told.
    """
    import jax

    call = jax.ffi.ffi_call(FILLED, jax.typeof(following), input_output_aliases={0: 0})
    return call(following, keys, values, layer=np.int64(layer))


def ended(last: jax.Array, pages: Iterable[jax.Array]) -> jax.Array:
    """Says that the step ends.

    Args:
      last: depends on all that the step computes.
      pages: keys and values of all layers as `filled` was given them: they stay where they were.

    Returns:
      `last`, in place.
    """
    import jax

    call = jax.ffi.ffi_call(ENDED, jax.typeof(last), input_output_aliases={0: 0})
    return call(last, *pages)
