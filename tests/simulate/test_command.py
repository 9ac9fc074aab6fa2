"""`jpd simulate`: what it computes, prints and writes, without weights and without a device."""

import json
import os
import subprocess
import sys

import pytest

from jpd.cli import main
from jpd.simulate.fit import StepTimes
from tests.simulate.test_fit import measured

SIZES = ["--max-model-len", "512", "--max-num-seqs", "16", "--num-pages", "600"]


@pytest.fixture
def simulate(folder, tmp_path, capsys):
    """Runs the command; its numbers, and what it printed."""

    def run(*options: str) -> tuple[dict, str]:
        file = tmp_path / "simulated.json"
        command = ["simulate", str(folder), *SIZES, *options, "--json", str(file)]
        assert main(command) == 0, capsys.readouterr().err
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_unified(simulate):
    result, printed = simulate("--num-prompts", "40", "--rate", "50")
    assert "jpd simulate: azure_conv" in printed
    assert "time to first token" in printed
    source = "H200: arithmetic; SM shares and phases side by side as measured on one H200"
    assert source in printed
    assert (result["completed"], result["failed"], result["num_prompts"]) == (40, 0, 40)
    assert 0 < result["mean_ttft_ms"] < result["p99_ttft_ms"]
    assert result["latency_model"]["source"] == source
    assert result["attainment"]["joint"] <= result["attainment"]["ttft"] <= 1
    assert result["slo"]["ttft_s"] > result["slo"]["tpot_s"] > 0
    assert (result["replicas"], result["gpus"], list(result["tried"])) == (1, 1, ["1"])
    assert result["engines"][0]["num_pages"] == 600
    assert result["times_real_time"] > 0
    assert (result["config"]["rate"], result["config"]["max_num_seqs"]) == (50, 16)


def test_the_same_numbers_again(simulate):
    options = ["--workload", "sharegpt_like", "--num-prompts", "30", "--topology", "semi_pd"]
    first, second = simulate(*options)[0], simulate(*options)[0]
    for result in (first, second):
        del result["times_real_time"]
    assert first == second
    assert simulate(*options, "--seed", "1")[0]["mean_ttft_ms"] != first["mean_ttft_ms"]


def test_a_controller_switches_shares(simulate):
    options = (
        "--topology semi_pd --semi-pd.controller slo --semi-pd.ttft-slo-s 0.004 "
        "--semi-pd.tpot-slo-s 0.002 --semi-pd.prefill-share 30 --semi-pd.decode-share 70 "
        "--start-s 0.1 --rate 500 --num-prompts 800"
    )
    result, _ = simulate(*options.split())
    assert result["slo"] == {"ttft_s": 0.004, "tpot_s": 0.002}
    switches = result["engines"][0]["switches"]
    assert len(switches) > 0
    assert all(s["asked_s"] + 0.1 <= s["done_s"] + 1e-9 for s in switches)
    assert result["completed"] == 800


@pytest.mark.parametrize("ratio", ["", "--semi-pd.break-even 2.5"])
def test_who_says_when_one_executor_serves(simulate, ratio):
    """The controller, or a rule with a number; an object cannot be written on a command line."""
    options = f"--topology auto --semi-pd.controller mean {ratio} --num-prompts 50 --rate 100"
    assert simulate(*options.split())[0]["completed"] == 50


def test_measured_steps_take_the_place_of_arithmetic(simulate, tmp_path):
    file = tmp_path / "steps.json"
    measured(0, 0.05).write(file)
    assert len(StepTimes.read(file).steps) == 600
    result, printed = simulate("--num-prompts", "10", "--step-times", str(file))
    assert "latencies: made up" in printed
    model = result["latency_model"]
    assert model["decode"]["step_s"] == pytest.approx(4e-3, rel=0.1)
    assert 0 < model["fit_error"]["decode"]["mean"] < 0.1


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ("--tensor-parallel-size 2", 2),
        ("--tensor-parallel-size 2 --topology semi_pd --replicas 3", 6),
        ("--tensor-parallel-size 2 --topology disaggregated --replicas 2", 8),
    ],
)
def test_several_gpus(simulate, options, gpus):
    result, printed = simulate("--num-prompts", "10", *options.split())
    assert result["gpus"] == gpus
    assert f"GPUs: {gpus}" in printed
    assert result["latency_model"]["tensor_parallel_size"] == 2
    assert result["completed"] == 10
    good = result["attainment"]["joint"] * 10 / result["duration"]
    assert result["request_goodput"] == pytest.approx(good)
    assert result["request_goodput_per_gpu"] == pytest.approx(good / gpus)


def test_slo_that_was_given(simulate):
    """It goes before what controllers aim at, and is for topologies without any."""
    options = ["--num-prompts", "10", "--ttft-slo-s", "0.5", "--tpot-slo-s", "0.04"]
    assert simulate(*options)[0]["slo"] == {"ttft_s": 0.5, "tpot_s": 0.04}
    aims = ["--topology", "semi_pd", "--semi-pd.ttft-slo-s", "1", "--semi-pd.tpot-slo-s", "1"]
    assert simulate(*options, *aims)[0]["slo"] == {"ttft_s": 0.5, "tpot_s": 0.04}


def test_steps_measured_on_another_number_of_gpus(folder, tmp_path, capsys):
    file = tmp_path / "steps.json"
    measured(0, 0.05).write(file)
    command = ["simulate", str(folder), *SIZES, "--num-prompts", "10", "--step-times", str(file)]
    assert main([*command, "--tensor-parallel-size", "2"]) == 2
    message = "tensor_parallel_size=2 is not allowed: 1, which the latencies are of (made up)"
    assert message in capsys.readouterr().err


def test_how_many_are_needed(simulate):
    options = ["--rate", "1500", "--num-prompts", "400", "--slo-scale", "2.5"]
    result, printed = simulate(*options, "--most-replicas", "9", "--router", "least_tokens")
    tried = [found["joint"] for found in result["tried"].values()]
    assert result["enough"]
    assert 1 < result["replicas"] == len(tried) == len(result["engines"]) < 9
    assert tried[-1] >= 0.9 > max(tried[:-1])
    assert f"replicas: {result['replicas']}: " in printed
    too_few, _ = simulate(*options, "--router", "least_tokens")
    assert not too_few["enough"]
    assert too_few["attainment"]["joint"] == tried[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-prompts 1", "num_prompts=1 is not allowed: at least 2"),
        ("--rate 0", "rate=0.0 is not allowed: above 0"),
        ("--most-replicas 2 --replicas 3", "most_replicas=2 is not allowed: at least replicas=3"),
        ("--num-prompts 100000", "n must be in 1.."),
        ("--ttft-slo-s 0 --tpot-slo-s 1", "ttft_slo_s=0.0 is not allowed: above 0"),
        ("--ttft-slo-s 1", "tpot_slo_s=None is not allowed: a time, as ttft_slo_s=1.0 is given"),
        ("--tensor-parallel-size 3", "tensor_parallel_size=3 is not allowed: it must divide"),
        ("--step-times nothing.json", "nothing.json cannot be read"),
        ("--max-model-len 100000", "max_model_len=100000 is not allowed"),
    ],
)
def test_refuses(folder, capsys, options, message):
    assert main(["simulate", str(folder), *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_needs_no_device(folder):
    command = [sys.executable, "-m", "jpd", "simulate", str(folder), *SIZES, "--num-prompts", "4"]
    env = os.environ | {"JAX_PLATFORMS": "no_such_device"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "4 requests in" in done.stdout
