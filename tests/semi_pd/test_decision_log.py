"""Logs of a controller's calls: written as they come, read back, shown to another controller."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest

from jpd.errors import ConfigError
from jpd.semi_pd.controller import FULL, Controller, Observation, Shares, StaticController
from jpd.semi_pd.decision_log import Decision, LoggedController, answers, read
from jpd.semi_pd.replay import Arrival, Plant, replay
from tests.semi_pd.ours import SHARES, ours

ARRIVALS = [Arrival(at_s=i / 20, prompt_tokens=1000, output_tokens=200) for i in range(400)]


def play(controller: Controller) -> list[tuple[float, Shares]]:
    """The shares over time with the controller in charge."""
    return replay(controller, ARRIVALS, Plant(), start=FULL).shares


def test_a_log_has_every_call_and_changes_no_answer(tmp_path: Path) -> None:
    logged = LoggedController(ours(), tmp_path / "log.jsonl")
    served = play(logged)
    assert served == play(ours())
    decisions = read(tmp_path / "log.jsonl")
    assert [d.wanted for d in decisions] == [*answers(ours(), decisions)]
    changes = [d for d in decisions if d.wanted != d.current]
    assert [(d.observation.now_s, d.wanted) for d in changes] == served[1:]
    assert len(changes) > 0
    assert {d.reason for d in changes} <= {"mean latency", "a phase is idle"}
    others = [*answers(StaticController(SHARES[0]), decisions)]
    assert others == [SHARES[0]] * len(decisions)


def test_an_observation_comes_back_whole(tmp_path: Path) -> None:
    seen = Observation(
        now_s=1.5,
        ttft_s=deque([0.25, 0.5]),
        tpot_s=(0.125,),
        token_gap_s=[0.1],
        held_gap_s=[0.05],
        prefill_tokens=3,
        prefill_busy_s=0.2,
        decoding_beside=4,
        waiting_beside=5,
        waiting_requests=6,
        waiting_tokens=7,
        decoding_requests=8,
        free_pages_fraction=0.75,
    )
    path = tmp_path / "log.jsonl"
    path.write_text("an older log\n")
    LoggedController(StaticController(Shares(60, 40)), path).decide(seen, FULL)
    (decision,) = read(path)
    as_read = Observation(**{name: plain(getattr(seen, name)) for name in seen.__slots__})
    assert decision == Decision(as_read, FULL, Shares(60, 40), "")


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog) -> None:
    logged = LoggedController(StaticController(Shares(60, 40)), tmp_path / "no folder" / "log")
    for _ in range(2):
        assert logged.decide(Observation(now_s=0.0), FULL) == Shares(60, 40)
    assert [record.message.count("no more decisions") for record in caplog.records] == [1]


def plain(value: object) -> object:
    """As JSON has it."""
    return list(value) if isinstance(value, (deque, tuple)) else value


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "no JSON",
        '{"observation": {"now_s": 0}, "current": {"prefill": 0, "decode": 1}, "wanted": null}',
        '{"observation": {"now": 0}, "current": {"prefill": 1, "decode": 1}, "reason": ""}',
    ],
)
def test_what_is_no_log(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    LoggedController(StaticController(), path).decide(Observation(now_s=0.0), FULL)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=r"log\.jsonl, line 2: no decision"):
        read(path)
