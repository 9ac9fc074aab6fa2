"""Latency models under SM shares: against the paper's fits and what the H200 took."""

from __future__ import annotations

import numpy as np
import pytest

from jpd.errors import ConfigError
from jpd.semi_pd.controller import FULL, Shares
from jpd.semi_pd.share_models import (
    H200,
    H200_SERVING,
    DecodeTimeModel,
    Interference,
    PrefillTimeModel,
    TpotModel,
    TtftModel,
    Work,
    decode_curve,
    overlap_wait,
    prefill_beside,
    prefill_curve,
)
from jpd.semi_pd.slo_controller import SloController

# One H200, Llama-3.1-8B, ms (benchmarks/results/h200/sm_share_surface.json): decode of so many rows
# x 1024 and a prompt chunk of 2048 alone under a share, then (x, y) side by side.
DECODE_ALONE = {
    64: {100: 6.64, 40: 8.49, 30: 10.53, 20: 15.77},
    32: {100: 5.34, 40: 6.50, 30: 8.32, 20: 11.60},
}
PREFILL_ALONE = {100: 47.30, 80: 54.87, 70: 56.22, 60: 66.43}
BESIDE = {  # rows, (x, y): prefill, decode
    (64, 100, 100): (56.83, 36.92),
    (64, 80, 20): (64.81, 19.69),
    (64, 70, 30): (71.64, 13.27),
    (64, 60, 40): (94.00, 11.13),
    (32, 100, 100): (54.39, 36.48),
    (32, 80, 20): (64.49, 14.13),
    (32, 70, 30): (70.67, 10.57),
    (32, 60, 40): (90.54, 8.48),
}


def close(modelled: list[float], measured: list[float], most: float) -> None:
    """A time is within `most`, and their mean error is 3 % at most."""
    assert modelled == pytest.approx(measured, rel=most)
    off = np.abs(np.divide(modelled, measured) - 1)
    assert off.mean() <= 0.03


def test_the_curves_follow_what_the_h200_took() -> None:
    for rows, alone in DECODE_ALONE.items():
        knee = 40 + 0.1 * rows  # of `LatencyModel`
        curve = [alone[100] * decode_curve(x, knee) / decode_curve(100, knee) for x in alone]
        close(curve, list(alone.values()), 0.04)
    curve = [PREFILL_ALONE[100] * prefill_curve(percent, 0.55) for percent in PREFILL_ALONE]
    close(curve, list(PREFILL_ALONE.values()), 0.04)


@pytest.mark.parametrize("rows", [32, 64])
def test_the_interference_follows_what_the_h200_took(rows: int) -> None:
    beside = {Shares(x, y): times for (r, x, y), times in BESIDE.items() if r == rows}
    prefills, decodes = map(list, zip(*beside.values(), strict=True))
    modelled = [PREFILL_ALONE[s.prefill] * prefill_beside(s, H200) for s in beside]
    close(modelled, prefills, 0.05)
    small, large = DECODE_ALONE[32][100], DECODE_ALONE[64][100]
    step_ms = 2 * small - large  # of a step without rows
    alone = [DECODE_ALONE[rows][s.decode] for s in beside]
    waits = [step_ms * overlap_wait(shares, H200) for shares in beside]
    modelled = [H200.decode_slowdown * a + w for a, w in zip(alone, waits, strict=True)]
    close(modelled, decodes, 0.05)


def test_disjoint_shares_never_wait_and_overlapping_ones_wait_more_for_a_larger_prefill() -> None:
    assert overlap_wait(Shares(70, 30), H200) == 0
    waits = [overlap_wait(Shares(x, 100), H200) for x in (10, 50, 80, 95, 100)]
    assert waits == sorted(waits)
    assert waits[0] > 0


def test_eq4_finds_the_papers_coefficients() -> None:
    """Fig. 10's fits, normalised: 0.6809 / (x - lambda) + 0.022 and 0.6284 / y + 0.3818."""
    ttft, tpot = TtftModel(), TpotModel()
    for share in (0.35, 0.4, 0.5, 0.6, 0.7):
        ttft.update(share, 0.6809 / (share - 0.2) + 0.022)
        tpot.update(share, 0.6284 / share + 0.3818)
    assert ttft.coefficients == pytest.approx({"a": 0.6809, "b": 0.022, "lambda": 0.2}, abs=0.05)
    assert tpot.coefficients == pytest.approx({"a": 0.6284, "b": 0.3818, "lambda": 0.0})
    assert ttft.r_squared == pytest.approx(1, abs=1e-3)
    assert tpot.r_squared == pytest.approx(1)
    assert ttft.predict(0.45) == pytest.approx(0.6809 / 0.25 + 0.022, rel=0.01)
    assert ttft.predict(0.1) == np.inf  # no share below lambda keeps the queue finite


@pytest.mark.parametrize(("model", "needed"), [(TtftModel, 3), (TpotModel, 2)])
def test_eq1_stands_in_until_eq4_can_be_fitted(model: type, needed: int) -> None:
    fit = model()
    with pytest.raises(ValueError, match="no latency has been observed"):
        fit.predict(0.5)
    for seen, share in enumerate((0.5, 0.4, 0.6)[:needed], start=1):
        fit.update(share, 1 / share + 1)
        fit.update(share, 1 / share + 1)  # the same share again is nothing new
        if seen < needed:
            assert fit.r_squared is None
            assert fit.predict(share / 2) == pytest.approx(2 * (1 / share + 1))
    assert fit.r_squared == pytest.approx(1, abs=1e-3)
    assert fit.predict(0.5) == pytest.approx(3, rel=1e-2)


def test_eq4_never_predicts_that_a_larger_share_is_slower() -> None:
    fit = TpotModel()
    for share, seconds in ((0.3, 1.0), (0.5, 2.0), (0.7, 3.0)):  # the load grew meanwhile
        fit.update(share, seconds)
    assert fit.predict(0.7) <= fit.predict(0.5) <= fit.predict(0.3)
    assert fit.coefficients is not None
    assert min(fit.coefficients.values()) >= 0


def test_eq4_forgets_old_windows() -> None:
    fit = TpotModel(max_points=4)
    for share in (0.3, 0.5, 0.6, 0.7):
        fit.update(share, 100.0)
    for share in (0.3, 0.5, 0.6, 0.7):
        fit.update(share, 1 / share)
    assert fit.predict(0.4) == pytest.approx(2.5)
    assert len(fit.points) == 4


def decode_times(knee: float, wait: float, half: float, scale_s: float):
    """A decode whose parameters are known: (work, seconds) under many shares and batches."""
    other = Interference(overlap_wait=H200.overlap_wait * wait)
    for shares in (FULL, Shares(90, 100), Shares(70, 30), Shares(50, 50), Shares(30, 70)):
        for sequences in (4, 40, 400):
            alone = (1 + sequences / half) * decode_curve(shares.decode, knee)
            beside = other.decode_slowdown * alone + overlap_wait(shares, other)
            seconds = scale_s / (0.5 / alone + 0.5 / beside)  # steps of both kinds in a time
            yield Work(shares=shares, other_busy=0.5, sequences=sequences), seconds


@pytest.mark.parametrize(("knee", "log2_wait"), [(35, 0), (60, 0), (20, 2), (90, -2)])
def test_the_decode_model_learns_knee_wait_and_batch(knee: float, log2_wait: float) -> None:
    model = DecodeTimeModel()
    times = list(decode_times(knee, 2**log2_wait, 64, 0.005))
    for work, seconds in times:
        model.update(0.0, work, seconds)
    assert model.coefficients["knee"] == pytest.approx(knee, abs=5)
    assert model.coefficients["log2_wait"] == log2_wait
    assert model.coefficients["log2_sequences"] == 6
    assert model.r_squared == pytest.approx(1, abs=0.01)
    assert len(model.points) == len(times)
    for work, seconds in times:
        assert model.predict(work) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("parallel", [0.3, 0.6, 1.0])
def test_the_prefill_model_learns_how_much_sms_help(parallel: float) -> None:
    model = PrefillTimeModel()
    for percent in (30, 60, 100):
        work = Work(shares=Shares(percent, 100), other_busy=1.0)
        model.update(0.0, work, 2e-5 * prefill_curve(percent, parallel) * H200.prefill_slowdown)
    assert model.coefficients["parallel"] == pytest.approx(parallel, abs=0.051)
    assert model.coefficients["scale_s"] == pytest.approx(2e-5, rel=0.1)


SERVED = [
    (1.8, 0.0, 4.35), (3.4, 0.4, 6.87), (8.0, 0.62, 9.57), (14.1, 0.76, 11.73), (25.2, 0.99, 25.66),
    (35.8, 0.99, 26.77), (45.1, 1.0, 31.7), (50.2, 1.0, 30.71), (50.3, 0.86, 21.32),
    (45.5, 0.85, 21.32), (42.0, 0.9, 21.21), (39.9, 0.93, 25.72), (43.0, 1.0, 33.79),
    (46.3, 0.99, 32.35), (50.0, 0.99, 31.14), (53.1, 0.99, 30.53), (56.9, 0.99, 29.88),
    (60.6, 0.95, 31.15), (65.0, 0.96, 28.05), (68.2, 1.0, 27.92), (70.2, 0.96, 26.66),
    (71.4, 0.95, 25.95), (71.9, 1.0, 27.18), (70.7, 0.98, 31.25), (71.1, 0.99, 31.47),
    (70.6, 1.0, 34.18), (72.1, 1.0, 38.37), (75.3, 1.0, 37.47), (77.3, 1.0, 37.63),
]  # fmt: skip
"""One H200 that served azure_conv at 22.3/s under (100, 100), every half second: sequences, part of
the time with prompts, ms a decode step (a run with a controller's log that is not kept)."""


def test_waits_for_prompts_are_not_taken_for_sequences() -> None:
    """Under (70, 30) decode took 10.1 ms a step with 21 sequences in the mean."""
    foreseen = {}
    for noise in (0.05, 0.3):
        model = DecodeTimeModel(noise=noise)
        for half, (sequences, busy, ms) in enumerate(SERVED):
            work = Work(shares=FULL, other_busy=busy, sequences=sequences)
            model.update(half / 2, work, 1e-3 * ms)
        there = Work(shares=Shares(70, 30), other_busy=1.0, sequences=21.0)
        foreseen[noise] = 1e3 * model.predict(there)
    assert foreseen[0.3] == pytest.approx(10.1, rel=0.15)
    assert foreseen[0.05] > 1.2 * 10.1
    controller = SloController()
    assert controller.decode_model.noise == controller.prefill_model.noise == 0.3


def test_a_server_pays_more_for_all_sms_than_single_steps_say() -> None:
    """Prompt tokens took 1.18 to 1.20 times as long under (70, 30)."""
    shares = Shares(70, 30), FULL
    divided, full = (
        prefill_beside(s, H200_SERVING) * prefill_curve(s.prefill, 0.55) for s in shares
    )
    single, both = (prefill_beside(s, H200) * prefill_curve(s.prefill, 0.55) for s in shares)
    assert 1.2 < divided / full < 1.28 < single / both
    assert SloController().interference == H200_SERVING


def test_noisy_times_of_a_token_are_believed_less() -> None:
    """Longer prompts under the larger share, say: half as fast, though SMs help."""
    seen = {}
    for noise in (0.05, 0.3):
        model = PrefillTimeModel(noise=noise)
        for percent, seconds in ((80, 1.0), (100, 1.5)):
            model.update(0.0, Work(shares=Shares(percent, 100), other_busy=1.0), seconds)
        seen[noise] = model.coefficients["parallel"]
    assert seen[0.05] < 0.1
    assert seen[0.3] == pytest.approx(0.55, abs=0.1)


def test_one_time_is_enough_as_the_priors_know_the_shape() -> None:
    model = DecodeTimeModel()
    with pytest.raises(ValueError, match="no time has been observed"):
        model.predict(Work(shares=FULL, other_busy=0.0))
    alone = DECODE_ALONE[64]
    model.update(0.0, Work(shares=FULL, other_busy=0.0), alone[100] * 1e-3)
    assert model.r_squared is None
    for percent, measured in alone.items():
        work = Work(shares=Shares(100, percent), other_busy=0.0)
        assert model.predict(work) == pytest.approx(measured * 1e-3, rel=0.12)  # few rows


def test_times_are_replaced_and_forgotten() -> None:
    model = PrefillTimeModel(memory_s=60)
    half, full = Work(shares=Shares(50, 50), other_busy=0.0), Work(shares=FULL, other_busy=0.0)
    model.update(0.0, half, 1.0)
    model.update(50.0, full, 1.0)
    model.update(55.0, full, 2.0)
    assert dict(model.points) == {half: 1.0, full: 2.0}
    model.update(61.0, full, 3.0)
    assert dict(model.points) == {full: 3.0}


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_points=2 .* at least 3"):
        TtftModel(max_points=2)
    with pytest.raises(ConfigError, match=r"share=1\.5"):
        TpotModel().update(1.5, 1.0)
    with pytest.raises(ConfigError, match="memory_s=0"):
        DecodeTimeModel(memory_s=0)
    with pytest.raises(ConfigError, match="noise=0"):
        PrefillTimeModel(noise=0)
    with pytest.raises(ConfigError, match="seconds=0"):
        PrefillTimeModel().update(0.0, Work(shares=FULL, other_busy=0.0), 0)
    with pytest.raises(ConfigError, match="other_busy=2"):
        PrefillTimeModel().update(0.0, Work(shares=FULL, other_busy=2), 1.0)
    with pytest.raises(ConfigError, match=r"decode_slowdown=0\.5"):
        Interference(decode_slowdown=0.5)
