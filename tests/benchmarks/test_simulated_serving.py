"""The stored serving run, simulated again: what is compared with what, and that it comes near."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulated_serving
from benchmarks.readme import RESULTS
from benchmarks.serving_impls import SHORTEST
from jpd.bench import traces

STORED = RESULTS / "h200" / "semi_pd_serving.json"


def test_the_stored_run_is_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = json.loads(STORED.read_text())
    first = next(row for row in served["rows"] if "rate" in row)
    command = ["simulated_serving", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    simulated_serving.main()
    found = json.loads((tmp_path / "simulated_serving.json").read_text())
    (row,) = found["rows"]
    assert (row["case"], row["impl"]) == (first["case"], first["impl"])
    assert row["measured_mean_ttft_ms"] == first["mean_ttft_ms"]
    simulated, measured = row["mean_e2el_ms"], first["mean_e2el_ms"]
    assert row["e2el_error_pct"] == pytest.approx(100 * (simulated / measured - 1))
    # The bar for a model that was fitted to the run; this one was not.
    assert max(abs(row[f"{name}_error_pct"]) for name in simulated_serving.MEASURES) < 15
    assert found["summary"]["azure_conv_capacity_ratio"] == pytest.approx(1, abs=0.05)
    assert found["summary"]["run"].startswith(served["git"])


def test_short_prompts_go_first_where_they_do() -> None:
    shares = "semi_pd_70_30"
    requests = traces.make("azure_conv", rate=24.0, n=200, seed=0, max_total_tokens=8192)
    fcfs, shortest = (
        [record.ttft_s for record in simulated_serving.serve("llama31-8b", impl, requests)]
        for impl in (shares, shares + SHORTEST)
    )
    assert sum(shortest) < 0.7 * sum(fcfs)
    assert max(shortest) > max(fcfs)


def test_mixed_steps_are_smaller_where_they_are() -> None:
    requests = traces.make("azure_conv", rate=20.0, n=100, seed=0, max_total_tokens=8192)
    tpots = [
        np.mean([r.tpot_s for r in simulated_serving.serve("llama31-8b", impl, requests)])
        for impl in ("chunked", "chunked_1024", "chunked_512")
    ]
    assert tpots[0] > 1.1 * tpots[1] > 1.1 * tpots[2]


@pytest.mark.parametrize("name", ["nothing.json", "decode_step.json"])
def test_another_file_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulated_serving", str(STORED.with_name(name))])
    with pytest.raises(SystemExit):
        simulated_serving.main()
    assert name in capsys.readouterr().err


def test_the_stored_comparison_is_of_the_stored_run() -> None:
    compared = json.loads((RESULTS / "cpu" / "simulated_serving.json").read_text())
    assert compared["summary"]["run"].startswith(json.loads(STORED.read_text())["git"])


def test_errors_of_both_signs_count() -> None:
    rows = [
        {"impl": "chunked", "status": "ok", "ttft_error_pct": e, "tpot_error_pct": 0.0}
        | {"e2el_error_pct": 1.0}
        for e in (-8.0, 2.0)
    ]
    rows.append({"impl": "chunked", "status": "failed: lost"})
    summary = simulated_serving.summarise(rows)
    assert summary["chunked_ttft_error_pct_max"] == 8
    assert summary["chunked_ttft_error_pct_mean"] == 5
    assert not any(key.startswith("prefill_first") for key in summary)
