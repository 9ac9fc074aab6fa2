"""How long a run may take: begin no case that would not end in time. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence


class Budget:
    """The time of a run, which starts when this is made.

    ::

        for case in spread(cases):
            if not budget.enough():
                break
            with budget.case():
                ...

    Args:
        seconds: the run's; None for a run without a limit.
        clock: gives seconds.
    """

    def __init__(
        self, seconds: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = float("inf") if seconds is None else clock() + seconds
        self.longest_s = 0.0
        """What the longest case so far took."""

    @property
    def left_s(self) -> float:
        """Until the end; infinite without a limit, 0 after it."""
        return max(0.0, self._end - self._clock())

    def enough(self) -> bool:
        """Whether a case as long as the longest one would end in time."""
        return self.left_s > self.longest_s

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        """Times a case."""
        start = self._clock()
        try:
            yield
        finally:
            self.longest_s = max(self.longest_s, self._clock() - start)

    def limit_s(self, most_s: float, share: float = 1.0) -> float:
        """`most_s`, or this share of the time that is left if that is less."""
        return min(most_s, share * self.left_s)


def spread[T](values: Sequence[T]) -> list[T]:
    """The values in another order: any beginning of it covers their whole range.

    The first, the last, then always the middle of the widest gap. So a run that ends early has
    seen small cases and large ones.
    """
    if len(values) <= 2:
        return list(values)
    order, gaps = [0, len(values) - 1], [(0, len(values) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if middle in (low, high):
            continue
        order.append(middle)
        gaps += [(low, middle), (middle, high)]
    return [values[i] for i in order]
