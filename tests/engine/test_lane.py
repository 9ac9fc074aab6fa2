"""A lane that changes its executor."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from jpd.engine.lane import Lane
from jpd.engine.plan import Admission
from jpd.types import SamplingParams


class Recorder:
    """An executor that only remembers what it was told."""

    recompiles = 0

    def __init__(self) -> None:
        self.told: list[int] = []

    def admit(self, admissions: list[Admission]) -> None:
        self.told += [admission.row for admission in admissions]

    def launch(self, plan: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(plan=plan)


def plan(*serials: int) -> SimpleNamespace:
    """Decodes the first rows, which have these serials."""
    return SimpleNamespace(rows=np.arange(len(serials)), serials=np.array(serials), chunks=[])


def admissions(*serials: int) -> list[Admission]:
    """Of the rows of `plan`; the sampler looks at the tokens of row 1."""
    tokens = [np.zeros(3, np.int32) if row == 1 else None for row in range(len(serials))]
    params = SamplingParams()
    return [
        Admission(row, serial, params, None, 3, tokens[row]) for row, serial in enumerate(serials)
    ]


def test_who_takes_over_knows_the_rows_before_its_first_step() -> None:
    lane, following = Lane(Recorder(), 4, depth=2), Recorder()
    assert lane.unknown_rows(plan(5, 6, 7)) == [0, 1, 2]
    lane.launch(plan(5, 6, 7), admissions(5, 6, 7))
    assert lane.may_launch
    for _ in range(2):  # it is told once
        lane.hold(following)
    assert not lane.may_launch
    assert following.told == [0, 2]
    lane.in_flight.clear()
    lane.executor = following
    assert lane.may_launch
    # Row 1 has more tokens now, row 2 another sequence, row 3 is new.
    assert lane.unknown_rows(plan(5, 6, 8, 9)) == [1, 2, 3]


def test_only_who_was_to_take_over_knows_them() -> None:
    lane, following = Lane(Recorder(), 4, depth=2), Recorder()
    lane.launch(plan(5, 6, 7), admissions(5, 6, 7))
    lane.hold(Recorder())
    lane.in_flight.clear()
    lane.executor = following
    assert lane.unknown_rows(plan(5, 6, 7)) == [0, 1, 2]
    lane.launch(plan(5, 6, 7), admissions(5, 6, 7))
    lane.hold(Recorder())
    lane.release()
    assert lane.may_launch
    assert lane.unknown_rows(plan(5, 6, 7)) == []
