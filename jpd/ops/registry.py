"""Ops with several implementations, chosen by name when a program is traced.

An implementation raises `NotImplementedError` to say "not for these shapes or this device"; with
"auto" the next candidate is then tried. Any other error is a bug and surfaces. Every choice is
recorded, so that a fall-back can be seen (`jpd.ops.choices()`); with `kernels.pallas_only` there
is none, and what no kernel takes is an error that names op and shapes.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from jpd.config import KernelConfig
from jpd.errors import ConfigError

logger = logging.getLogger(__name__)

_OPS: dict[str, Op] = {}
_WARNED: set[tuple[str, str]] = set()
_CHOICES: Counter[tuple[str, str]] = Counter()
_RECORDINGS: ContextVar[tuple[list[Choice], ...]] = ContextVar("jpd_recordings", default=())
_SELECTION: ContextVar[KernelConfig | None] = ContextVar("jpd_kernels", default=None)
_PLATFORM: ContextVar[str | None] = ContextVar("jpd_platform", default=None)


class Choice(NamedTuple):
    """What an op took while a program was traced."""

    op: str
    taken: str
    reasons: str
    """Why a kernel was passed over on a GPU; "" if none was."""


def _note(choice: Choice) -> None:
    """Counts a choice, and says once for each reason that a kernel was passed over."""
    _CHOICES[choice.op, choice.taken] += 1
    for recorded in _RECORDINGS.get():
        recorded.append(choice)
    if choice.reasons and (choice.op, choice.reasons) not in _WARNED:
        _WARNED.add((choice.op, choice.reasons))
        logger.warning("%s runs on %r: %s", choice.op, choice.taken, choice.reasons)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collects what ops take in programs that are traced inside the block, by this thread."""
    recorded: list[Choice] = []
    token = _RECORDINGS.set((*_RECORDINGS.get(), recorded))
    try:
        yield recorded
    finally:
        _RECORDINGS.reset(token)


def replay(choices: Iterable[Choice]) -> None:
    """Counts and warns as if the program had been traced here."""
    for choice in choices:
        _note(choice)


class Op:
    """A named op: a public function whose body is one of its registered implementations."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.implementations: dict[str, Callable[..., Any]] = {}
        _OPS[name] = self

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        selected = selection()
        name = implementation or getattr(selected, self.name)
        errors = []
        for candidate in self.candidates(name, pallas_only=selected.pallas_only):
            try:
                out = self.implementations[candidate](*args, **kwargs)
            except NotImplementedError as error:
                # Its traceback holds this frame and its callers', in a cycle: what they hold, such
                # as an engine's pages, would stay until the collector comes.
                errors.append(error.with_traceback(None))
                continue
            reasons = "; ".join(map(str, errors)) if platform() == "gpu" else ""
            _note(Choice(self.name, candidate, reasons))
            return out
        if selected.pallas_only:
            reasons = "; ".join(map(str, errors)) or "none is registered"
            raise ConfigError(
                f"kernels.pallas_only=True, but no kernel takes "
                f"{self.name}({_describe(args, kwargs)}): {reasons}"
            )
        raise ExceptionGroup(f"no implementation of {self.name!r} takes these arguments", errors)

    def candidates(self, name: str, *, pallas_only: bool = False) -> list[str]:
        """The implementations that a selection by `name` tries, in their order.

        Raises:
          ConfigError: there is none of that name, or it is XLA's where only kernels may run.
        """
        if name == "auto":
            return [n for n in self.implementations if not (pallas_only and n == "xla")]
        if name == "xla" and pallas_only:
            raise ConfigError(f"kernels.{self.name}='xla' contradicts kernels.pallas_only=True")
        if name not in self.implementations:
            raise ConfigError(
                f"kernels.{self.name}={name!r} is not registered; "
                f"known: auto, {', '.join(self.implementations)}"
            )
        return [name]


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return f"{value.dtype}{list(value.shape)}"
        return repr(value)

    named = [f"{k}={one(v)}" for k, v in kwargs.items() if v is not None]
    return ", ".join([*map(one, args), *named])


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
        op.candidates(getattr(kernels, name), pallas_only=kernels.pallas_only)


@contextlib.contextmanager
def using(kernels: KernelConfig, platform: str | None = None) -> Iterator[None]:
    """Selects implementations for the programs traced inside the block.

    Args:
      kernels: the selection.
      platform: what the programs will run on, such as "gpu"; jax's default when not given.
    """
    selected, target = _SELECTION.set(kernels), _PLATFORM.set(platform)
    try:
        yield
    finally:
        _SELECTION.reset(selected)
        _PLATFORM.reset(target)


def selection() -> KernelConfig:
    """What `using` selected, or the defaults."""
    return _SELECTION.get() or KernelConfig()


def platform() -> str:
    """What the program that is being traced will run on."""
    return _PLATFORM.get() or jax.default_backend()


def ops() -> dict[str, Op]:
    """Every op by its name."""
    return dict(_OPS)


def choices() -> dict[tuple[str, str], int]:
    """How often each (op, implementation) was traced in this process."""
    return dict(_CHOICES)
