"""What the benchmark of whole models computes on the host, and that it runs without a GPU."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import overlap_model, overlap_prefill
from benchmarks.models import MODELS
from benchmarks.overlap_model import Case, must_overlap, must_reorder, summarise
from benchmarks.rows import failed_row, load, make_row
from jpd.models import config_from_hf
from jpd.ops.registry import Choice
from jpd.overlap import Plan, Tiling
from tests.host_devices import run_module

LLAMA = config_from_hf(
    MODELS["llama3-70b"] | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
)
GB = 1e9


def test_cases_are_prefills_and_training_steps_of_every_link():
    names = [case.name for case in overlap_model.everything()]
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 3
    assert {"nvlink tp4 prefill 16384", "no_p2p tp2 mlp 4096"} < set(names)


def test_as_many_layers_as_fit():
    fit = overlap_prefill.layers_that_fit
    # 70.6e9 parameters of 16 bits.
    assert fit(LLAMA, 4, 16384, 0.75 * 150 * GB) == LLAMA.num_layers
    assert fit(LLAMA, 2, 16384, 0.75 * 150 * GB) == LLAMA.num_layers
    few = fit(LLAMA, 2, 16384, 50 * GB)
    assert 30 < few < 50
    assert fit(LLAMA, 2, 16384, 60 * GB) > few > fit(LLAMA, 2, 65536, 50 * GB)
    with pytest.raises(ValueError, match="no layer fits into 8 GB on each of 2 GPUs"):
        fit(LLAMA, 2, 16384, 8 * GB)


def test_flops_are_two_for_each_parameter_and_token_and_those_of_attention():
    one = overlap_model.prefill_flops(LLAMA, 1)
    assert one == pytest.approx(2 * 70.6e9 - 2 * 2 * 128256 * 8192, rel=0.01)
    long = overlap_model.prefill_flops(LLAMA, 16384)
    assert long - 16384 * one == pytest.approx(80 * 2 * 16384**2 * 8192, rel=1e-3)


def row(link, ranks, kind, tokens, impl, us, **extra):
    if kind == "prefill":
        extra = {"layers": 80, "layers_of_model": 80} | extra
    return make_row(Case(link, ranks, kind, tokens).name, impl, [us], "us", **extra)


def test_speedups_are_against_the_faster_of_one_after_the_other():
    rows = [
        row("nvlink", 4, "prefill", 4096, "xla", 120.0),
        row("nvlink", 4, "prefill", 4096, "jpd_sequential", 110.0),
        row("nvlink", 4, "prefill", 4096, "jpd", 100.0),
        row("nvlink", 4, "prefill", 4096, "jpd_alone", 105.0),
        row("nvlink", 4, "prefill", 4096, "jpd_cublas", 96.0),
        row("nvlink", 4, "prefill", 4096, "xla_latency_hiding", 130.0),
        row("nvlink", 4, "prefill", 8192, "xla", 240.0),
        row("nvlink", 4, "prefill", 8192, "jpd", 200.0, layers=40),
        row("nvlink", 4, "prefill", 8192, "jpd_cublas", 250.0),
        row("nvlink", 4, "mlp", 8192, "xla", 90.0),
        row("nvlink", 4, "mlp", 8192, "jpd", 100.0),
        row("no_p2p", 2, "prefill", 4096, "xla", 150.0),
        row("no_p2p", 2, "prefill", 4096, "jpd", 100.0),
        failed_row("nvlink tp2 prefill 4096", "jpd", "no plan", layers=80, layers_of_model=80),
    ]
    assert summarise(rows) == {
        "tp4_speedup_max": pytest.approx(1.2),
        "tp4_speedup_min": pytest.approx(1.1),
        "tp4_speedup_at_4096": pytest.approx(1.1),
        "tp4_speedup_at_8192": pytest.approx(1.2),
        "tp4_speedup_jpd_cublas_max": pytest.approx(110 / 96),
        "tp4_speedup_jpd_cublas_min": pytest.approx(0.96),
        "tp4_speedup_jpd_cublas_at_4096": pytest.approx(110 / 96),
        "tp4_speedup_jpd_cublas_at_8192": pytest.approx(0.96),
        "tp4_speedup_jpd_alone_geomean": pytest.approx(110 / 105),
        "tp4_overlap_kernels_geomean": pytest.approx(1.1),
        "tp4_overlap_cublas_geomean": pytest.approx((1.25 * 0.96) ** 0.5),
        "tp4_vs_xla_latency_hiding_geomean": pytest.approx(1.3),
        "tp4_layers": "40 of 80, 80 of 80",
        "tp4_mlp_speedup_max": pytest.approx(0.9),
        "tp4_mlp_speedup_min": pytest.approx(0.9),
        "tp4_mlp_speedup_at_8192": pytest.approx(0.9),
        "no_p2p_tp2_speedup_max": pytest.approx(1.5),
        "no_p2p_tp2_speedup_min": pytest.approx(1.5),
        "no_p2p_tp2_speedup_at_4096": pytest.approx(1.5),
        "no_p2p_tp2_layers": "80 of 80",
    }


def test_what_did_not_overlap_is_not_timed_under_that_name():
    shape = {"op": "all_reduce", "ranks": 2, "m": 64, "n": 64, "k": 64}
    how = {"tiling": Tiling(64, 128, 2, "n", "m", 2), "sms": 1, "ctas": 1, "waves": (1,)}
    yes, no = Plan(**shape, overlap=True, **how), Plan(**shape, overlap=False)
    took = Choice("matmul_all_reduce", "overlap", "")
    fell = Choice("matmul_all_reduce", "xla", "no communicator")
    other = Choice("linear", "xla", "")
    must_overlap([took, other, took], {"attention": yes, "mlp": yes})
    must_overlap([took, fell], {"attention": no, "mlp": yes})
    must_overlap([fell, fell], {"attention": no, "mlp": None})
    with pytest.raises(RuntimeError, match="no plan near attention, mlp"):
        must_overlap([fell, fell], {"attention": None, "mlp": None})
    for taken in ([took, fell], [fell]):
        with pytest.raises(RuntimeError, match="no communicator"):
            must_overlap(taken, {"attention": yes, "mlp": yes})
    with pytest.raises(RuntimeError, match="no sum at all"):
        must_overlap([other], {"attention": yes, "mlp": yes})


def test_a_row_whose_sums_are_added_by_another_program_fails():
    kernel, xla = (Choice("rms_norm_residual", taken, "") for taken in ("pallas", "xla"))
    for reorder, choice in (("auto", kernel), ("pallas", kernel), ("xla", xla)):
        must_reorder([choice, Choice("rms_norm", "other", "")], reorder)
    must_reorder([], "auto")
    for reorder, choice in (("auto", xla), ("xla", kernel), ("alone", xla)):
        with pytest.raises(RuntimeError, match="sums were to be added by"):
            must_reorder([kernel, xla, choice], reorder)


def test_rounding_sets_the_limit_of_errors_but_not_its_own():
    limit = overlap_model.most_rel_err
    assert limit("jpd", {}) == pytest.approx(0.01)
    assert limit("jpd", {"jpd_sequential": 0.02}) == pytest.approx(0.06)
    assert limit("jpd", {"jpd_sequential": 0.2}) == pytest.approx(0.3)
    assert limit("jpd_sequential", {"jpd": 0.5}) == pytest.approx(0.3)


class Clock:
    """Time that passes only for the host and for a device that works off what is enqueued."""

    def __init__(self, host_s, device_s):
        self.now = self.free = 0.0
        self.host_s, self.device_s = host_s, device_s
        self.enqueued = 0

    def run(self):
        self.enqueued += 1
        self.now += self.host_s
        done = self.free = max(self.now, self.free) + self.device_s
        return SimpleNamespace(block_until_ready=lambda: self.wait(done))

    def wait(self, until):
        self.now = max(self.now, until)


@pytest.mark.parametrize(("device_s", "runs"), [(1.0, 1), (0.02, 8), (0.001, 12)])
def test_times_are_the_devices_and_not_the_hosts(monkeypatch, device_s, runs):
    clock = Clock(device_s / 4, device_s)
    monkeypatch.setattr(overlap_model.time, "perf_counter", lambda: clock.now)
    samples = overlap_model.sustained_us(clock.run, 0.95 * device_s, samples=3)
    assert samples == pytest.approx([device_s * 1e6] * 3)
    assert clock.enqueued == 4 * runs


run = partial(run_module, "benchmarks.overlap_model", devices=4)


def test_quick_mode_runs_on_devices_of_a_cpu(tmp_path):
    out = "--out", str(tmp_path)
    done = run("--quick", "--ranks", "4", *out)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    file = tmp_path / "overlap_model.json"
    doc = load(file)
    rows = {(row["case"], row["impl"]): row for row in doc["rows"]}
    prefill, mlp = (f"host tp4 {kind} 136" for kind in ("prefill", "mlp"))
    impls = {"xla", "jpd_sequential", "jpd", "jpd_cublas", "xla_latency_hiding", "grouped"}
    wanted = {(mlp, impl) for impl in impls}
    wanted |= {(prefill, impl) for impl in impls | {"jpd_gather", "jpd_alone"}}
    assert set(rows) == wanted
    for (case, impl), found in rows.items():
        assert found["status"] == "ok"
        if (case, impl) == (prefill, "xla"):
            assert found["rel_err"] is None
        else:
            assert found["rel_err"] < 1e-2
        if case == prefill:
            assert (found["layers"], found["layers_of_model"]) == (2, 2)
    assert rows[prefill, "jpd"]["mlp_plan"] == "XLA: no GPU"
    assert doc["summary"]["tp4_layers"] == "2 of 2"
    assert doc["summary"]["cases"] == "2 of 2"
    more = ("--kinds", "prefill", "--impls", "xla", "jpd", "grouped", "--layers", "1")
    done = run("--quick", "--ranks", "2", *more, "--merge", *out)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    doc, two = load(file), "host tp2 prefill 136"
    merged = {(row["case"], row["impl"]): row["status"] for row in doc["rows"]}
    assert merged == dict.fromkeys([*rows, *((two, i) for i in ("xla", "jpd", "grouped"))], "ok")
    assert (doc["summary"]["tp2_layers"], doc["summary"]["tp4_layers"]) == ("1 of 2", "2 of 2")


def test_one_gpu_has_no_sums_to_hide(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap_model, "set_up", lambda report, ranks: ("alone", 1))
    monkeypatch.setattr(sys, "argv", ["overlap_model", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"one GPU .* 2 or 4"):
        overlap_model.main()


def test_the_model_needs_gpus_and_its_layers():
    assert "needs GPUs" in run().stderr
    done = run("--quick", "--layers", "3")
    assert "--layers 3: the model has 2" in done.stderr
