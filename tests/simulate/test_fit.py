"""A fit finds the coefficients that times were made with, and says what it cannot know."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpd.errors import ConfigError
from jpd.semi_pd.share_models import H200, Interference
from jpd.simulate.fit import MeasuredStep, StepTimes, fit, non_negative_least_squares, predict
from jpd.simulate.latency import DecodeTime, LatencyModel, Overheads, PromptTime

TRUE = LatencyModel(
    source="made up",
    decode=DecodeTime(step_s=4e-3, row_s=1e-5, context_token_s=3e-8),
    prompt=PromptTime(step_s=5e-3, token_s=2.5e-5, pair_s=4e-10, context_token_s=3e-8),
    parallel=0.45,
    knee=50.0,
    interference=Interference(
        prefill_slowdown=1.4, prefill_pull=0.6, decode_slowdown=1.1, overlap_wait=60.0
    ),
)
PAIRS = [(100, 100), (50, 50), (30, 50), (80, 100), (70, 20), (50, 15)]


def step(rng: np.random.Generator, *, prompt: bool, pairs: list, busy: bool) -> MeasuredStep:
    rows = 0 if prompt and rng.random() < 0.3 else int(rng.integers(1, 128))
    tokens = int(rng.integers(1, 2048)) if prompt else 0
    prefill, decode = pairs[rng.integers(len(pairs))]
    return MeasuredStep(
        rows=rows,
        context_tokens=rows * int(rng.integers(10, 3000)),
        prompt_tokens=tokens,
        pairs=tokens * (tokens + 1) // 2 + tokens * int(rng.integers(0, 3000)),
        padded_rows=rows and 1 << (rows - 1).bit_length(),
        padded_tokens=tokens and 1 << (tokens - 1).bit_length(),
        padded_context=int(rng.choice([2048, 8192])),
        prefill_share=prefill,
        decode_share=decode,
        other_busy=float(rng.random()) if busy else 0.0,
        seconds=1.0,
    )


def measured(seed: int, noise: float, pairs: list = PAIRS, busy: bool = True) -> StepTimes:
    rng = np.random.default_rng(seed)
    steps = []
    for prompt in (False, True):
        kind = [step(rng, prompt=prompt, pairs=pairs, busy=busy) for _ in range(300)]
        times = predict(TRUE, kind) * rng.gamma(1 / noise**2, noise**2, len(kind))
        steps += [
            dataclasses.replace(s, seconds=float(t)) for s, t in zip(kind, times, strict=True)
        ]
    return StepTimes("made up", Overheads(), steps)


def test_finds_the_coefficients_behind_noisy_times():
    found = fit(measured(0, 0.03)).model
    assert found.decode.step_s == pytest.approx(4e-3, rel=0.03)
    assert found.decode.row_s == pytest.approx(1e-5, rel=0.1)
    assert found.decode.context_token_s == pytest.approx(3e-8, rel=0.05)
    assert found.prompt.step_s == pytest.approx(5e-3, rel=0.1)
    assert found.prompt.token_s == pytest.approx(2.5e-5, rel=0.03)
    assert found.prompt.pair_s == pytest.approx(4e-10, rel=0.15)
    assert found.prompt.context_token_s == pytest.approx(3e-8, rel=0.15)
    assert found.prompt.padded_pair_s < 1e-11
    assert found.parallel == pytest.approx(0.45, abs=0.05)
    assert found.knee == pytest.approx(50, abs=3)
    assert found.interference.prefill_slowdown == pytest.approx(1.4, abs=0.05)
    assert found.interference.decode_slowdown == pytest.approx(1.1, abs=0.05)
    assert found.interference.overlap_wait == pytest.approx(60, rel=0.15)
    assert found.interference.prefill_pull == pytest.approx(0.6, abs=0.1)
    assert found.interference.overlap_offset == H200.overlap_offset


def test_says_how_far_off_it_is():
    exact, noisy = fit(measured(0, 1e-6)), fit(measured(0, 0.1))
    assert exact.decode.mean < 0.01
    assert exact.prompt.mean < 0.01
    # The mean and the 95th percentile of |gamma noise|.
    assert noisy.decode.mean == pytest.approx(0.08, abs=0.015)
    assert noisy.prompt.p95 == pytest.approx(0.2, abs=0.04)
    assert noisy.decode.steps == noisy.prompt.steps == 300


def test_means_are_right_however_noisy_times_are():
    times = measured(3, 0.7, pairs=[(100, 100)], busy=False)
    found = fit(times).model
    for prompt in (False, True):
        steps = [s for s in times.steps if bool(s.prompt_tokens) == prompt]
        total = sum(s.seconds for s in steps)
        assert predict(found, steps).sum() == pytest.approx(total, rel=0.03)


def test_steps_that_seem_to_take_no_time_do_no_harm():
    """Where a host is late to notice the end of a step, the next one seems to be short."""
    times = measured(0, 0.02, pairs=[(100, 100)], busy=False)
    rng = np.random.default_rng(0)
    steps = list(times.steps)
    for i in rng.choice(len(steps) - 1, 30, replace=False).tolist():
        moved_s = steps[i].seconds - 1e-7
        steps[i] = dataclasses.replace(steps[i], seconds=1e-7)
        steps[i + 1] = dataclasses.replace(steps[i + 1], seconds=steps[i + 1].seconds + moved_s)
    found = fit(dataclasses.replace(times, steps=steps)).model
    decodes = [s for s in times.steps if not s.prompt_tokens]
    np.testing.assert_allclose(predict(found, decodes), predict(TRUE, decodes), rtol=0.15)


def test_what_was_not_varied_keeps_its_default():
    found = fit(measured(1, 0.02, pairs=[(100, 100)], busy=False)).model
    assert (found.parallel, found.knee, found.interference) == (0.55, 40.0, H200)
    beside = fit(measured(1, 0.02, pairs=[(50, 50)])).model
    assert (beside.parallel, beside.knee) == (0.55, 40.0)
    assert beside.interference.overlap_wait == H200.overlap_wait
    assert beside.interference.prefill_slowdown == H200.prefill_slowdown
    assert beside.interference.prefill_pull == pytest.approx(0.6, abs=0.05)


def test_steps_of_one_phase_alone():
    times = measured(0, 0.02, pairs=[(100, 100)], busy=False)
    decodes = [s for s in times.steps if not s.prompt_tokens]
    found = fit(StepTimes("decode", Overheads(), decodes))
    assert found.prompt is None
    assert found.model.prompt == PromptTime()
    assert found.decode.mean < 0.03


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_least_squares_without_negative_numbers(seed, columns):
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(20, columns)), rng.normal(size=20)
    expected, loss = scipy.nnls(matrix, target)
    found = non_negative_least_squares(matrix, target)
    assert (found >= 0).all()
    assert np.linalg.norm(matrix @ found - target) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_columns_that_say_nothing_are_left_out():
    matrix = np.array([[1.0, 0, 2], [2, 0, 1]])
    np.testing.assert_allclose(non_negative_least_squares(matrix, np.array([3.0, 3])), [1, 0, 1])


def test_a_file_of_steps(tmp_path):
    times = measured(0, 0.1)
    overheads = Overheads(launch_s=1e-3, message_s=2e-4)
    times = dataclasses.replace(times, overheads=overheads, tensor_parallel_size=4)
    path = tmp_path / "steps.json"
    times.write(path)
    assert StepTimes.read(path) == times
    assert fit(StepTimes.read(path)).model.tensor_parallel_size == 4


def test_a_file_of_one_gpu_need_not_say_so(tmp_path):
    path = tmp_path / "steps.json"
    measured(0, 0.1).write(path)
    found = json.loads(path.read_text())
    del found["tensor_parallel_size"]
    path.write_text(json.dumps(found))
    assert StepTimes.read(path).tensor_parallel_size == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("source"), "source"),
        (lambda found: found["steps"][0].pop("seconds"), "seconds"),
        (lambda found: found["steps"][0].update(colour=3), "colour"),
        (lambda found: found["steps"][0].update(seconds=0), "seconds=0 is not allowed: above 0"),
        (lambda found: found["steps"][0].update(rows=1.5), "rows=1.5 is not allowed: int"),
        (lambda found: found["steps"][0].update(other_busy=1.2), "other_busy=1.2 .*: 0..1"),
        (lambda found: found["steps"][0].update(decode_share=0), "decode_share=0 .*1..100"),
        (lambda found: found["overheads"].update(launch_s=-1), "launch_s=-1 is not allowed"),
        (lambda found: found.update(tensor_parallel_size=0), "tensor_parallel_size=0 .* at least"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, change, message):
    path = tmp_path / "steps.json"
    measured(0, 0.1).write(path)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=message) as raised:
        StepTimes.read(path)
    assert str(path) in str(raised.value)


def test_no_steps():
    with pytest.raises(ConfigError, match=r"steps=\[\] is not allowed: at least one"):
        fit(StepTimes("nothing", Overheads(), []))
