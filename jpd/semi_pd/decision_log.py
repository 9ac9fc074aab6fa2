"""What a controller was shown and what it said, in a file: to look at, and to ask another one.

A log is JSON lines, one a call of `decide`, each with all that was observed. What a controller sees
while one executor serves (`decide_mode`) is not in it. Asking another controller with it
(`answers`) is an open loop: its answers change nothing of what is observed next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jpd.errors import ConfigError
from jpd.semi_pd.controller import Controller, Observation, Shares

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """One call of a controller."""

    observation: Observation
    current: Shares
    """What served."""
    wanted: Shares
    """The answer."""
    reason: str
    """The controller's own word, "" if it gives none."""


class LoggedController:
    """A controller whose calls are written to a file as they come.

    Args:
        inner: decides. Its `reason`, if it has one, is written too.
        path: of the log; a file that is there is replaced, with the first call. Where it cannot be
          written there is a warning, and no log from there on.
    """

    def __init__(self, inner: Controller, path: str | Path) -> None:
        self.inner = inner
        self._path: Path | None = Path(path)
        self._mode = "w"

    def __getattr__(self, name: str) -> Any:
        """All else is the other one's, as `decide_mode`."""
        if name == "inner":  # not made yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    def decide(self, observation: Observation, current: Shares) -> Shares:
        """What the other one says."""
        wanted = self.inner.decide(observation, current)
        reason = str(getattr(self.inner, "reason", ""))
        line = asdict(Decision(observation, current, wanted, reason))
        self._write(json.dumps(line, default=list) + "\n")
        return wanted

    def _write(self, line: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open(self._mode) as file:
                file.write(line)
            self._mode = "a"
        except OSError as error:  # a full disk must not end the engine
            logger.warning("%s: %s; no more decisions are written", self._path, error)
            self._path = None


def read(path: str | Path) -> list[Decision]:
    """The calls of a log, in their order.

    Raises:
        ConfigError: a line is no decision; the message names it.
    """
    decisions = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            decisions.append(_decision(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: no decision: {error}") from error
    return decisions


def answers(controller: Controller, decisions: Iterable[Decision]) -> Iterator[Shares]:
    """What a controller would have said at each call, had it been shown the same."""
    for decision in decisions:
        yield controller.decide(decision.observation, decision.current)


def _decision(fields: dict[str, Any]) -> Decision:
    return Decision(
        observation=Observation(**fields["observation"]),
        current=Shares(**fields["current"]),
        wanted=Shares(**fields["wanted"]),
        reason=fields["reason"],
    )
