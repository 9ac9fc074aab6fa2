"""The ops' entries in the registry."""

from __future__ import annotations

from typing import Any

from jpd.errors import ConfigError
from jpd.ops import registry
from jpd.ops.overlap.settings import settings

ON_REQUEST = ("grouped",)
"""Implementations that "auto" does not try."""


class CollectiveOp(registry.Op):
    """A product and a collective. `Settings.implementation` selects it, no field of KernelConfig.

    `kernels.pallas_only` does not exclude "xla" here: its product is the op `linear`, which keeps
    to kernels itself.
    """

    def __init__(self, name: str) -> None:
        # Not super().__init__: every op of the registry's table has a field in KernelConfig.
        self.name = name
        self.implementations = {}

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        name = implementation or settings().implementation
        return super().__call__(*args, implementation=name, **kwargs)

    def candidates(self, name: str, *, pallas_only: bool = False) -> list[str]:
        """The implementations that a selection by `name` tries.

        Raises:
          ConfigError: there is none of that name.
        """
        del pallas_only
        if name == "auto":
            return [known for known in self.implementations if known not in ON_REQUEST]
        if name not in self.implementations:
            known = ", ".join(self.implementations)
            raise ConfigError(f"implementation={name!r} of {self.name}; known: auto, {known}")
        return [name]
