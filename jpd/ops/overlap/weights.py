"""Products with weights that the program itself may compute.

Most kernels read weights before the kernel ahead of them is complete, by programmatic dependent
launch (`pallas_kernels.mosaic.wait_for_previous`). That is right for parameters, which were there
before the program began, and not for what that kernel may have just computed.
"""

from __future__ import annotations

import contextlib
import dataclasses

import jax

from jpd.errors import ConfigError
from jpd.ops import registry
from jpd.ops.linear import linear


def computed_weights() -> contextlib.AbstractContextManager[None]:
    """Products traced inside the block are XLA's, unless they overlap.

    Those wait for what is ahead of them, and XLA's also reads a transposed weight as it lies.
    """
    selected = registry.selection()
    changed = dataclasses.replace(selected, linear="xla", pallas_only=False)
    return registry.using(changed, registry.platform())


def product(x: jax.Array, w: jax.Array, *, resident: bool) -> jax.Array:
    """`linear(x, w)`, by XLA unless w is resident.

    Args:
      x: `[M, K]`.
      w: `[N, K]`.
      resident: w was complete before the program began.

    Returns:
      `[M, N]`.

    Raises:
      ConfigError: only kernels may run, and w is not resident.
    """
    if resident:
        return linear(x, w)
    if registry.selection().pallas_only:
        raise ConfigError(
            "kernels.pallas_only=True, but no kernel takes linear(x, w) where the program may "
            "compute w: resident=True says that it does not"
        )
    with computed_weights():
        return linear(x, w)
