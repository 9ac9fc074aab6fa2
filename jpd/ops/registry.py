"""Ops with several implementations, chosen by name when a program is traced.

An implementation raises `NotImplementedError` to say "not for these shapes or this device"; with
"auto" the next candidate is then tried. Any other error is a bug and surfaces. Every choice is
recorded, so that a fall-back can be seen (`jpd.ops.choices()`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jpd.config import KernelConfig
from jpd.errors import ConfigError

_OPS: dict[str, Op] = {}
_CHOICES: Counter[tuple[str, str]] = Counter()
_SELECTION: ContextVar[KernelConfig | None] = ContextVar("jpd_kernels", default=None)


class Op:
    """A named op: a public function whose body is one of its registered implementations."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.implementations: dict[str, Callable[..., Any]] = {}
        _OPS[name] = self

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        name = implementation or getattr(_SELECTION.get(), self.name, "auto")
        errors = []
        for candidate in self._candidates(name):
            try:
                out = self.implementations[candidate](*args, **kwargs)
            except NotImplementedError as error:
                errors.append(error)
                continue
            _CHOICES[self.name, candidate] += 1
            return out
        raise ExceptionGroup(f"no implementation of {self.name!r} takes these arguments", errors)

    def _candidates(self, name: str) -> list[str]:
        if name == "auto":
            return list(self.implementations)
        if name not in self.implementations:
            raise ConfigError(
                f"kernels.{self.name}={name!r} is not registered; "
                f"known: auto, {', '.join(self.implementations)}"
            )
        return [name]


def register(op: str, name: str, fn: Callable[..., Any], *, first: bool = False) -> None:
    """Adds an implementation of an op, or replaces the one of that name.

    Args:
      op: one of `implementations()`.
      name: what `KernelConfig` or `implementation=` selects it by.
      fn: called with the op's arguments while a program is traced.
      first: "auto" tries it before the others.

    Raises:
      ConfigError: there is no such op.
    """
    if op not in _OPS:
        raise ConfigError(f"op {op!r} does not exist; known: {', '.join(_OPS)}")
    if name == "auto":
        raise ConfigError("name='auto' is taken: it means the first that fits")
    table = _OPS[op].implementations
    table.pop(name, None)
    if first:
        _OPS[op].implementations = {name: fn, **table}
    else:
        table[name] = fn


def implementations() -> dict[str, list[str]]:
    """Names of the implementations of every op, in the order that "auto" tries them."""
    return {name: list(op.implementations) for name, op in _OPS.items()}


def check(kernels: KernelConfig) -> None:
    """Raises `ConfigError` if a selected implementation is not registered."""
    for name, op in _OPS.items():
        op._candidates(getattr(kernels, name))


@contextlib.contextmanager
def using(kernels: KernelConfig) -> Iterator[None]:
    """Selects implementations for the programs traced inside the block."""
    token = _SELECTION.set(kernels)
    try:
        yield
    finally:
        _SELECTION.reset(token)


def choices() -> dict[tuple[str, str], int]:
    """How often each (op, implementation) was traced in this process."""
    return dict(_CHOICES)
