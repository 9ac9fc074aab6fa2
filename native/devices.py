"""How XLA counts devices where it calls native code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax


def ordinal(device: jax.Device) -> int:
    """The device's number in its process, as XLA gives it to FFI handlers."""
    import jax

    if device.platform == "cpu":
        return jax.local_devices(backend="cpu").index(device)
    return device.local_hardware_id
