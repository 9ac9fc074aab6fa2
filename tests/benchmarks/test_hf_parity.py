"""The comparison with Hugging Face: what counts as wrong, and what a judge that fails gives."""

from concurrent.futures import Future

import numpy as np
import pytest

from benchmarks import hf_parity
from benchmarks.report import Report


def scores(**changes):
    """Of four tokens: the second is not the best, but nearly."""
    fields = {
        "gap": [0.0, 0.05, 0.0, 0.0],
        "gap_bf16": [0.0, 0.05, 0.03, 0.0],
        "logprob": [-1.0, -2.0, -3.0, -4.0],
        "logprob_bf16": [-1.02, -2.02, -2.98, -3.98],
        "noise": [0.04, 0.04, 0.04, 0.04],
    }
    return {key: np.array(values) for key, values in (fields | changes).items()}


def test_a_near_tie_is_no_error():
    fields = hf_parity.judge(np.array([-1.01, -2.01, -3.01, -4.01]), scores())
    assert fields["top1_agreement"] == 0.75
    assert fields["hf_bf16_top1_agreement"] == 0.5
    assert fields["wrong_tokens"] == 0
    assert fields["logprob_rms"] == pytest.approx(0.01)
    assert fields["hf_bf16_logprob_rms"] == pytest.approx(0.02)
    assert hf_parity.complaint(fields) is None


def test_a_token_that_rounding_does_not_explain_is_wrong():
    gap = np.array([0.0, 0.05, 0.09, 0.0])
    fields = hf_parity.judge(scores()["logprob"], scores(gap=gap))
    assert hf_parity.complaint(fields) == "1 of 4 tokens are wrong"


@pytest.mark.parametrize("shift", [0.026, float("nan")])
def test_log_probabilities_may_be_as_far_off_as_those_of_the_peer(shift):
    fields = hf_parity.judge(scores()["logprob"] + shift, scores())
    assert "log-probabilities are off by" in hf_parity.complaint(fields)
    assert hf_parity.complaint(hf_parity.judge(scores()["logprob"] + 0.024, scores())) is None


def test_the_summary_weighs_models_by_their_tokens():
    rows = [
        {"tokens": 30, "top1_agreement": 1.0, "hf_bf16_top1_agreement": 0.9, "wrong_tokens": 0}
        | {"logprob_rms": 0.01, "hf_bf16_logprob_rms": 0.02},
        {"tokens": 10, "top1_agreement": 0.6, "hf_bf16_top1_agreement": 0.5, "wrong_tokens": 2}
        | {"logprob_rms": 0.03, "hf_bf16_logprob_rms": 0.02},
        {"tokens": None},
    ]
    summary = hf_parity.summarise(rows)
    assert summary["top1_agreement"] == pytest.approx(0.9)
    assert summary["hf_bf16_top1_agreement"] == pytest.approx(0.8)
    assert (summary["models"], summary["tokens"], summary["wrong_tokens"]) == (2, 40, 2)
    assert summary["logprob_rms_ratio_max"] == pytest.approx(1.5)
    assert hf_parity.summarise(rows[2:]) == {}


def test_a_judge_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"^hf_logits score: \w*(Error|Exception)"):
        hf_parity.hugging_face("score", tmp_path, tmp_path / "tokens.json", tmp_path / "out.npz")


def test_a_model_that_fails_costs_no_other_its_row(tmp_path):
    report = Report("hf_parity", "?", out=tmp_path)
    good, wrong, died = Future(), Future(), Future()
    good.set_result((hf_parity.judge(scores()["logprob"], scores()), 1.0))
    gap = np.array([0.0, 0.05, 0.09, 0.0])
    wrong.set_result((hf_parity.judge(scores()["logprob"], scores(gap=gap)), 1.0))
    died.set_exception(RuntimeError("hf_logits score: no torch"))
    for model, done in (("died", died), ("wrong", wrong), ("good", good)):
        hf_parity.add_row(report, model, done)
    assert [row["status"] for row in report.rows] == [
        "failed: RuntimeError: hf_logits score: no torch",
        "failed: 1 of 4 tokens are wrong",
        "ok",
    ]
    assert hf_parity.summarise(report.rows)["models"] == 2
