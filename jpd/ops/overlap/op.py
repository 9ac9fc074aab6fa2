"""The ops' entries in the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpd.errors import ConfigError
from jpd.ops import registry
from jpd.ops.overlap.settings import settings


class OverlapOp(registry.Op):
    """An op that a field of `Settings` selects the implementation of, else one of KernelConfig.

    `kernels.pallas_only` does not exclude "xla" here: the product of a collective op is the op
    `linear`, which keeps to kernels itself.

    Args:
      name: of the op.
      field: of `Settings`.
      implementations: in the order in which "auto" tries them.
      on_request: those of them that "auto" does not try.
    """

    def __init__(
        self,
        name: str,
        field: str,
        implementations: Mapping[str, Callable[..., Any]],
        on_request: Sequence[str] = (),
    ) -> None:
        # Not super().__init__: others cannot register implementations.
        self.name = name
        self.implementations = dict(implementations)
        self._field = field
        self._on_request = on_request

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        name = implementation or getattr(settings(), self._field)
        if name == "auto":
            name = getattr(registry.selection(), self.name, name)
        return super().__call__(*args, implementation=name, **kwargs)

    def candidates(self, name: str, *, pallas_only: bool = False) -> list[str]:
        """The implementations that a selection by `name` tries.

        Raises:
          ConfigError: there is none of that name.
        """
        del pallas_only
        if name == "auto":
            return [known for known in self.implementations if known not in self._on_request]
        if name not in self.implementations:
            known = ", ".join(self.implementations)
            raise ConfigError(f"{self._field}={name!r} of {self.name}; known: auto, {known}")
        return [name]
