"""A check for debugging that no page changes hands under a running step.

The coordinator counts in shared memory how often it handed out each page. A plan carries the counts
of its pages; they must be the same when the step is launched and when it has run.
"""

from __future__ import annotations

import numpy as np

from jpd.engine.plan import StepPlan


class OwnershipError(Exception):
    """A page of a step was given to another sequence before the step had run."""


class OwnershipCheck:
    """Compares plans with the coordinator's counts.

    Args:
      generations: `[P]` int64, changing under this process's eyes.
    """

    def __init__(self, generations: np.ndarray) -> None:
        self._generations = generations

    def check(self, plan: StepPlan, when: str) -> None:
        """Raises `OwnershipError` for the first page that is not the step's own any more."""
        parts = (
            (plan.page_table, plan.generations),
            (plan.chunk_page_table, plan.chunk_generations),
        )
        for table, expected in parts:
            found = self._generations[table]
            if not np.array_equal(found, expected):
                row, column = np.argwhere(found != expected)[0]
                raise OwnershipError(
                    f"page {table[row, column]} of a step was handed out again {when}: "
                    f"{found[row, column]} times, {expected[row, column]} when it was planned"
                )
