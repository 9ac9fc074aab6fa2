"""Which sequence brings executors down? Those that were in the lost steps, tried one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jpd.engine.sequence import Sequence

_TRIED_ALONE = 2
_GIVEN_UP = 3


class Suspects:
    """Sequences in whose step an executor was lost, again and again.

    One step that fails may be anybody's fault, or nobody's. A sequence that was in two of them,
    with no token in between, has a step for itself from then on, every other step. Whoever was in
    three is given up, so that the others are served.
    """

    def __init__(self) -> None:
        self._suspects: set[Sequence] = set()
        self._alone: dict[tuple[bool, bool], bool] = {}

    def turns(self, prefill: bool, decode: bool) -> Iterator[bool]:
        """Whether the next step is a suspect's alone; the other answer where that is empty.

        Steps of other phases, which another lane asks for in between, take turns of their own.

        Args:
          prefill, decode: what the step may hold.
        """
        if not self._suspects:
            yield False
            return
        phases = prefill, decode
        alone = self._alone[phases] = not self._alone.get(phases, False)
        yield alone
        yield not alone

    def allows(self, sequence: Sequence, alone: bool) -> bool:
        """The sequence may be in a step of that kind."""
        return (sequence in self._suspects) == alone

    def __bool__(self) -> bool:
        return bool(self._suspects)

    def blame(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """The executor that ran these was lost; returns those to give up."""
        given_up = []
        for sequence in sequences:
            sequence.num_losses += 1
            if sequence.num_losses >= _GIVEN_UP:
                given_up.append(sequence)
            elif sequence.num_losses >= _TRIED_ALONE:
                self._suspects.add(sequence)
        return given_up

    def clear(self, sequence: Sequence) -> None:
        """Its step has run, or it has ended."""
        sequence.num_losses = 0
        self._suspects.discard(sequence)
