"""Between one executor and two: what jpd's policy says of what it sees."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from jpd.config import BREAK_EVEN, EngineConfig, SemiPDConfig
from jpd.errors import ConfigError
from jpd.semi_pd import build
from jpd.semi_pd.controller import Observation
from jpd.semi_pd.mode import BreakEven, ForeseenMode, Mode, gaps_alone_s, phases_of
from native.mps import Mps, MpsError


def saw(now_s: float, decoding: float, waiting: float, held: float, mode: Mode) -> Observation:
    """A tenth of a second in which 100 prompt tokens were computed.

    Args:
        now_s: Its end.
        decoding: Requests that decode meanwhile.
        waiting: Requests that wait.
        held: Part of the time for which decode is held up if one executor serves.
        mode: What serves.
    """
    gaps = {}
    if mode == "unified" and held:  # ten steps of decode, the last of which has the prompt
        alone_s = 0.1 * (1 - held) / 10
        gaps = {"token_gap_s": [alone_s] * 9 + [0.1 - 9 * alone_s]}
        gaps["held_gap_s"] = gaps["token_gap_s"][-1:]
    return Observation(
        now_s=now_s,
        prefill_tokens=100,
        decoding_beside=round(100 * decoding),
        waiting_beside=round(100 * waiting),
        **gaps,
    )


def play(
    policy: BreakEven, *parts: tuple[float, float, float], held: float = 1.0, mode: Mode = "unified"
) -> list[tuple[float, Mode]]:
    """Parts of (seconds, decoding, waiting); the changes."""
    now_s, changes = 0.0, []
    for seconds, decoding, waiting in parts:
        for _ in range(round(seconds * 10)):
            now_s += 0.1
            seen = saw(now_s, decoding, waiting, held, mode)
            if not decoding and not waiting:
                seen = Observation(now_s=now_s)
            wanted = policy.decide(seen, mode)
            if wanted != mode:
                changes.append((round(now_s, 1), wanted))
                mode = wanted
    return changes


def test_two_executors_where_more_decode_than_wait() -> None:
    policy = BreakEven(ratio=2.0, hysteresis=2.0, window_s=4.0)
    changes = play(policy, (20, 1, 1), (20, 8, 1), (20, 0.5, 1), held=0.99)
    assert [mode for _, mode in changes] == ["semi_pd", "unified"]
    # More than 2 in the mean of 4 s, then less than 1.
    assert [at_s for at_s, _ in changes] == pytest.approx([20.7, 43.8], abs=0.2)
    assert policy.estimate == pytest.approx(0.5 * 0.98, rel=0.03)


@pytest.mark.parametrize(
    ("held", "decoding", "waiting", "estimate"),
    [
        (1.0, 12, 1, 12),
        (0.75, 12, 1, 6),  # one executor does 1 / 4 of the steps that would run alone, two 1 / 2
        (0.5, 12, 1, 0),
        (0.2, 40, 1, -24),  # very many decode, but they are hardly held up
        (0.75, 1, 4, 1 / 8),  # they are, but few decode for each that waits
    ],
)
def test_the_estimate(held: float, decoding: float, waiting: float, estimate: float) -> None:
    policy = BreakEven(ratio=4.0)
    changes = play(policy, (10, decoding, waiting), held=held)
    assert policy.estimate == pytest.approx(estimate, abs=0.2)
    assert [mode for _, mode in changes] == (["semi_pd"] if estimate > 4 else [])


def test_on_two_executors_it_goes_by_the_tokens_that_arrive() -> None:
    """Each holds one executor up for as long as it was last seen to."""
    policy = BreakEven(ratio=2.0, hysteresis=2.0)
    assert play(policy, (6, 8, 1), held=0.9) == [(0.2, "semi_pd")]
    for tenth in range(61, 121):  # a quarter of the tokens
        seen = saw(tenth / 10, 8, 1, 0.9, "semi_pd")
        seen = replace(seen, prefill_tokens=25, decoding_beside=200, waiting_beside=25)
        wanted = policy.decide(seen, "semi_pd")
    assert policy.estimate == pytest.approx(8 * (1 - 2 * (1 - 0.9 / 4)), rel=0.1)
    assert wanted == "unified"


def test_between_the_two_thresholds_it_stays() -> None:
    assert play(BreakEven(ratio=2.0), (60, 1.5, 1)) == []
    policy = BreakEven(ratio=2.0)
    assert play(policy, (10, 8, 1), (60, 0.5, 1)) == [(0.2, "semi_pd")]


def test_a_load_at_the_threshold_does_not_make_it_flap() -> None:
    parts = [(2, n, 1) for n in (2, 4.2, 1.2, 3.6) * 20]
    assert len(play(BreakEven(ratio=2.0), *parts)) <= 1
    # Without memory and hysteresis, it does.
    nervous = BreakEven(ratio=2.0, hysteresis=1.0, window_s=0.2, min_dwell_s=0.0)
    assert len(play(nervous, *parts)) > 40


def test_changes_have_their_time_between_them() -> None:
    parts = [(0.5, n, 1) for n in (9, 0.01) * 20]
    for dwell_s in (1.0, 3.0):
        policy = BreakEven(ratio=2.0, window_s=0.3, min_dwell_s=dwell_s)
        times = [at_s for at_s, _ in play(policy, *parts)]
        assert len(times) > 3
        assert min(b - a for a, b in pairwise(times)) >= dwell_s - 1e-9


def test_without_prompts_nothing_changes() -> None:
    policy = BreakEven(ratio=2.0)
    # Fewer and fewer in the window hold nobody up, and none say nothing.
    assert play(policy, (5, 9, 1), (60, 0, 0)) == [(0.2, "semi_pd"), (7.5, "unified")]
    assert policy.estimate is None


def test_steps_without_prompts() -> None:
    seen = [
        Observation(now_s=0.0, token_gap_s=[0.1, 0.2, 0.1, 0.5], held_gap_s=[0.1]),
        Observation(now_s=1.0, token_gap_s=[0.5, 0.3], held_gap_s=[0.5, 0.5]),  # of the one before
    ]
    assert sorted(gaps_alone_s(seen)) == [0.1, 0.2, 0.3]
    assert gaps_alone_s([]) == []


def test_it_goes_on_asking_while_the_change_is_under_way() -> None:
    """An executor on all SMs may have to be started first."""
    policy = BreakEven(ratio=2.0)
    asked = [policy.decide(saw(i / 10, 9, 1, 1.0, "unified"), "unified") for i in range(5)]
    assert asked == ["unified"] + 4 * ["semi_pd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "break_even.ratio=0.0 is not allowed: finite, above 0"),
        ({"hysteresis": 0.9}, "break_even.hysteresis=0.9 is not allowed: finite, at least 1"),
        ({"slowdown": 0.5}, "break_even.slowdown=0.5 is not allowed: finite, at least 1"),
        ({"window_s": -1.0}, "break_even.window_s=-1.0 is not allowed"),
        ({"min_dwell_s": float("inf")}, "break_even.min_dwell_s=inf is not allowed"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BreakEven(**options)


# --- as an option ----------------------------------------------------------------------------


@pytest.mark.parametrize("even", [0, -1.0, float("nan"), True, "3", [1], BreakEven])
def test_no_number_and_no_policy(even: object) -> None:
    with pytest.raises(ConfigError, match=r"break_even=.* a number above 0, or an object with"):
        SemiPDConfig(break_even=even)


def test_the_class_of_a_controller_is_none() -> None:
    with pytest.raises(ConfigError, match=r"controller=.* or an object with decide"):
        SemiPDConfig(controller=BreakEven)


def auto(**semi_pd: object) -> EngineConfig:
    return EngineConfig(model="none", topology="auto", semi_pd=SemiPDConfig(**semi_pd))


def test_who_decides() -> None:
    assert build.make_mode_policy(auto(), None).ratio == BREAK_EVEN == BreakEven().ratio
    assert build.make_mode_policy(auto(break_even=7.5), None).ratio == 7.5
    own = SimpleNamespace(decide=lambda observation, current: current)
    assert build.make_mode_policy(auto(break_even=own), None) is own
    assert build.make_mode_policy(EngineConfig(model="none", topology="semi_pd"), None) is None
    # Without a word of the user's, a controller that foresees one executor too.
    for name in ("slo", "mean"):
        config = auto(controller=name, ttft_slo_s=1.0, tpot_slo_s=0.1).replace(
            max_num_batched_tokens=512, max_num_mixed_tokens=256
        )
        controller = build.make_controller(config)
        assert controller.max_num_batched_tokens == 512
        assert controller.max_num_mixed_tokens == 256
        assert isinstance(build.make_mode_policy(config, controller), ForeseenMode)
        assert build.make_mode_policy(config.replace(topology="semi_pd"), controller) is None
        number = auto(controller=name, ttft_slo_s=1.0, tpot_slo_s=0.1, break_even=7.5)
        assert build.make_mode_policy(number, controller).ratio == 7.5
    paper = auto(controller="paper", ttft_slo_s=1.0, tpot_slo_s=0.1)
    assert build.make_mode_policy(paper, build.make_controller(paper)).ratio == BREAK_EVEN
    with pytest.raises(ConfigError, match="only with topology='auto'"):
        EngineConfig(model="none", topology="semi_pd", semi_pd=SemiPDConfig(break_even=9))


def test_auto_with_nothing_said_has_jpds_controller() -> None:
    kept = ((100, 100), (70, 30))
    options = build.decided(auto()).semi_pd
    assert (options.controller, options.kept_shares) == ("mean", kept)
    config = build.decided(auto(ttft_slo_s=1.0, tpot_slo_s=0.1))
    assert config.semi_pd.controller == "slo"
    assert build.num_executors(config) == 2 + 2
    config = config.replace(max_num_batched_tokens=512)
    assert isinstance(build.make_mode_policy(config, build.make_controller(config)), ForeseenMode)
    options = build.decided(auto(kept_shares=((60, 40),))).semi_pd
    assert (options.controller, options.kept_shares) == ("mean", ((60, 40),))
    with pytest.raises(ConfigError, match=r"tpot_slo_s=None .* like semi_pd.ttft_slo_s, or neith"):
        build.decided(auto(ttft_slo_s=1.0))


@pytest.mark.parametrize("changes", [{"topology": "semi_pd"}, {"prefill_policy": "first"}])
def test_slos_that_nobody_aims_at_are_warned_of(
    changes: dict, caplog: pytest.LogCaptureFixture
) -> None:
    build.decided(auto().replace(**changes))
    build.decided(auto(controller="slo", ttft_slo_s=1.0, tpot_slo_s=0.1).replace(**changes))
    assert not caplog.records
    build.decided(auto(tpot_slo_s=0.1).replace(**changes))
    assert "semi_pd.tpot_slo_s: nobody aims at it with semi_pd.controller='auto'" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"topology": "semi_pd"},
        {"prefill_policy": "first"},
        {"semi_pd": SemiPDConfig(break_even=3.0)},
        {"semi_pd": SemiPDConfig(prefill_share=70)},
        {"semi_pd": SemiPDConfig(decode_share=70)},
        {"semi_pd": SemiPDConfig(sm_shares=False)},
        {"semi_pd": SemiPDConfig(controller="static")},
    ],
)
def test_auto_with_something_said_does_as_it_is_told(changes: dict) -> None:
    config = auto().replace(**changes)
    assert build.decided(config) == config
    assert build.make_controller(config) is None
    assert not config.semi_pd.is_controlled


@pytest.mark.parametrize("name", ["slo", "mean"])
def test_a_controller_that_needs_the_size_of_steps_is_not_made_without(name: str) -> None:
    config = auto(controller=name, ttft_slo_s=1.0, tpot_slo_s=0.1)
    why = f"max_num_batched_tokens=None is not allowed: .*semi_pd.controller='{name}'"
    with pytest.raises(ConfigError, match=why):
        build.make_controller(config)


def test_who_is_kept_ready_and_what_for() -> None:
    pairs = ((60, 40), (80, 100))
    config = auto(prefill_share=70, decode_share=50, kept_shares=pairs)
    assert build.kept_shares(config, "prefill") == {60, 80}
    assert build.kept_shares(config, "decode") == {40, 50, 100}
    assert build.num_executors(config) == 3 + 3
    assert build.num_executors(auto()) == 2
    slo = {"ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
    # In each phase one that serves and one that is started; of decode's, two that are kept.
    moving = auto(prefill_share=70, decode_share=50, controller="paper", **slo)
    assert build.num_executors(moving) == 2 + 4
    assert build.num_executors(moving.replace(topology="semi_pd")) == 2 + 2
    among_kept = auto(decode_share=50, controller="slo", kept_shares=pairs, **slo)
    assert build.num_executors(among_kept) == 3 + 3
    assert build.num_executors(auto(decode_share=50, controller="mean", kept_shares=pairs)) == 3 + 3
    assert phases_of("auto", "decode", 100) == (True, True)
    assert phases_of("auto", "decode", 50) == phases_of("semi_pd", "decode", 100) == (False, True)
    assert phases_of("auto", "prefill", 100) == (True, False)


def test_without_mps_it_becomes_unified_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_daemon() -> Mps:
        raise MpsError("no nvidia-cuda-mps-control")

    monkeypatch.setattr(Mps, "start", no_daemon)
    monkeypatch.setattr(build, "_uses_gpu", lambda: True)
    monkeypatch.setattr(build.engine_build, "build", lambda config: config)
    with caplog.at_level(logging.WARNING):
        built = build.build(auto(prefill_share=80))
    assert (built.topology, built.semi_pd) == ("unified", SemiPDConfig())
    assert "topology='auto' becomes 'unified'" in caplog.text
    assert "no nvidia-cuda-mps-control" in caplog.text
    with pytest.raises(ConfigError, match="sm_shares=True is not possible here"):
        build.build(EngineConfig(model="none", topology="semi_pd"))
