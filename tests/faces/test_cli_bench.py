"""`jpd bench`: what it measures, prints and writes."""

import json

import jax
import numpy as np
import pytest

from jpd import CompletionOutput, RequestMetrics, RequestOutput
from jpd.bench import report
from jpd.cli import main
from tests.faces.tiny import OPTIONS


def test_bench_latency(built, folder, tmp_path, capsys):
    file = tmp_path / "latency.json"
    options = "--input-len 6 --output-len 5 --batch-size 3 --num-iters 4 --num-iters-warmup 1"
    command = ["bench", "latency", str(folder), *OPTIONS, *options.split(), "--json", str(file)]
    assert main(command) == 0
    assert "time to first token" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert len(result["latencies"]) == 4
    assert result["avg_latency"] == pytest.approx(np.mean(result["latencies"]))
    assert result["percentiles"]["90"] == pytest.approx(np.percentile(result["latencies"], 90))
    assert result["completed"] == 12
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (72, 60)
    assert result["output_throughput"] == pytest.approx(60 / sum(result["latencies"]))
    assert 0 < result["p50_ttft_ms"] <= result["p99_ttft_ms"] <= result["p99_e2el_ms"]
    assert (result["config"]["batch_size"], result["config"]["max_num_seqs"]) == (3, 4)
    assert result["environment"]["packages"]["jax"] == jax.__version__


def test_bench_throughput(built, folder, tmp_path, capsys):
    file = tmp_path / "throughput.json"
    options = "--input-len 8 --output-len 6 --num-prompts 9 --random-range-ratio 0.5"
    command = ["bench", "throughput", str(folder), *OPTIONS, *options.split(), "--json", str(file)]
    assert main(command) == 0
    assert "9 requests in" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["completed"] == 9
    assert 9 * 4 <= result["total_input_tokens"] <= 9 * 12
    assert 9 * 3 <= result["total_output_tokens"] <= 9 * 9
    assert result["total_output_tokens"] != 9 * 6


def test_bench_refuses(built, folder, capsys):
    assert main(["bench", "latency", str(folder), *OPTIONS, "--batch-size", "5"]) == 2
    assert "batch_size=5 is not allowed: 1 to max_num_seqs=4" in capsys.readouterr().err
    assert main(["bench", "throughput", str(folder), *OPTIONS, "--input-len", "60"]) == 2
    assert "max_model_len=64" in capsys.readouterr().err


def test_summary_of_known_times():
    def output(prompt, generated, first_s, finished_s):
        metrics = RequestMetrics(
            arrival_s=10.0,
            first_token_s=10 + first_s,
            finished_s=10 + finished_s,
            num_generated_tokens=generated,
            longest_output_tokens=generated,
        )
        return RequestOutput("0", None, [1] * prompt, [CompletionOutput(0)], metrics, True)

    result = report.summarize([output(3, 5, 1.0, 3.0), output(5, 1, 2.0, 2.0)], 4.0)
    assert result["duration"] == 4.0
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (8, 6)
    assert result["request_throughput"] == 0.5
    assert result["output_throughput"] == 1.5
    assert result["total_token_throughput"] == 3.5
    assert result["mean_ttft_ms"] == pytest.approx(1500)
    assert result["p90_ttft_ms"] == pytest.approx(1900)
    assert result["mean_tpot_ms"] == result["p99_tpot_ms"] == pytest.approx(500)
    assert result["p50_e2el_ms"] == pytest.approx(2500)
    assert report.summarize([output(5, 1, 2.0, 2.0)], 4.0)["mean_tpot_ms"] is None
