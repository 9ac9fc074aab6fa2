"""What the benchmark of FlashOverlap computes on the host, and that it runs without a GPU."""

import dataclasses
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    overlap,
    overlap_curves,
    overlap_devices,
    overlap_runs,
    overlap_time,
    overlap_tune,
)
from benchmarks.baselines import torch_overlap
from benchmarks.overlap_cases import (
    GEMM,
    LINKS,
    PAPER,
    PAPER_A2A,
    TINY,
    Case,
    Shape,
    by_shape,
    cases_of,
)
from benchmarks.overlap_impls import Implementation
from benchmarks.overlap_summary import bound_us, fill_bounds, summarise, summarise_tuning
from benchmarks.overlap_time import Operation
from benchmarks.report import Report
from benchmarks.rows import failed_row, load, make_row, skipped_row
from jpd.overlap import (
    BandwidthCurve,
    Contention,
    CurveKey,
    GroupEvents,
    PlanTable,
    Topology,
    Trace,
    sample_sizes,
    simulate,
)
from native.overlap import CallTrace, GroupTrace
from pallas_kernels.signal_gemm import SignalConfig
from tests.host_devices import run_module

ROOT = Path(__file__).parents[2]
SHAPE = Shape(8192, 8192, 4096)
TOPOLOGY = Topology("NVIDIA H200", "nvlink", "2.28.9")


def case_of(op, shape=SHAPE, link="nvlink", ranks=2):
    return Case(link, ranks, op, shape)


def row(case, impl, us, **extra):
    return make_row(case.name, impl, [us], "us", **extra)


# --- cases ----------------------------------------------------------------------------------


def test_shapes_are_those_of_the_artifact_and_of_llama():
    assert len(PAPER["a800"]) == 9
    assert len(PAPER["4090"]) == 8
    assert len(PAPER_A2A["a800"]) == 6
    assert len(PAPER_A2A["4090"]) == 8
    two, four = by_shape(2), by_shape(4)
    assert two[Shape(16384, 8192, 14336)] == ("all_reduce", "reduce_scatter")
    assert Shape(1024, 4096, 1024) in four
    assert not any("all_to_all" in ops for ops in two.values())
    assert sum("all_to_all" in ops for ops in four.values()) == 14
    assert four[Shape(8192, 8192, 8192)] == ("all_reduce", "reduce_scatter", "all_to_all")


def test_names_of_cases_are_read_back_and_are_different():
    cases = overlap.everything()
    assert [Case.parse(case.name) for case in cases] == cases
    assert len({case.name for case in cases}) == len(cases)
    joined = {(link, ranks) for link in LINKS for ranks in (2, 4)}
    assert {(case.link, case.ranks) for case in cases} == {("alone", 1)} | joined


def test_one_gpu_has_the_products_of_all():
    cases = overlap.everything()
    alone = [case for case in cases if case.link == "alone"]
    assert {case.op for case in alone} == {GEMM}
    assert len(alone) == len({case.shape for case in cases})
    assert overlap.chosen(overlap.parse_args(["--shapes", "64x32x16"]), "alone", 1) == [
        Case("alone", 1, GEMM, Shape(64, 32, 16))
    ]


@pytest.mark.parametrize(
    ("gpus", "asked", "found"),
    [
        (1, None, ("alone", 1)),
        (2, None, ("nvlink", 2)),
        (8, None, ("nvlink", 4)),
        (4, 1, ("alone", 1)),
        (0, None, ("host", 4)),
    ],
)
def test_as_many_gpus_as_there_are(gpus, asked, found, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    for key in ("NCCL_P2P_DISABLE", "NCCL_NVLS_ENABLE", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(key, "0")
    report = SimpleNamespace(env={"gpu_count": gpus, "gpu": "NVIDIA H200" if gpus else None})
    assert overlap_devices.set_up(report, asked) == found


def test_chosen_cases_come_shape_by_shape_with_the_product_first():
    args = overlap.parse_args(["--sets", "4090", "--ops", "GEMM", "RS"])
    cases = overlap.chosen(args, "nvlink", 2)
    assert len(cases) == 2 * len(PAPER["4090"])
    assert [case.op for case in cases[:4]] == [GEMM, "reduce_scatter"] * 2
    assert {case.shape.m for case in cases[:4]} == {2048, 8192}
    args = overlap.parse_args(["--shapes", "64x32x16"])
    ops = [case.op for case in overlap.chosen(args, "nvlink", 4)]
    assert ops == [GEMM, "all_reduce", "reduce_scatter", "all_to_all"]


def test_the_link_is_what_nccl_is_told(monkeypatch):
    for value, link in (("1", "no_p2p"), ("0", "nvlink"), ("", "nvlink")):
        monkeypatch.setenv("NCCL_P2P_DISABLE", value)
        assert overlap_devices.link_here() == link


def test_torch_is_asked_for_what_it_can_compute():
    cases = cases_of("nvlink", 2, {SHAPE: ("all_reduce", "reduce_scatter")})[1:]
    args = torch_overlap.parse_args(
        ["--ranks", "2", "--case", *(case.name.replace(" ", ":") for case in cases)]
    )
    assert args.case == cases
    assert [key[1] for key in torch_overlap.keys_of(args.case)] == [
        "torch",
        "torch",
        "torch_async_tp",
    ]


# --- summary --------------------------------------------------------------------------------


def test_the_bound_is_the_papers():
    case = case_of("all_reduce")
    tiles, sms = 64 * 32, 132
    waves = -(-tiles // sms)
    # A long collective: the first wave, and all of it.
    assert bound_us(case, 100.0, 400.0) == pytest.approx(100 / waves + 400)
    # A long GEMM: all of it, and the collective of the last wave, in proportion to its tiles.
    last = (tiles - (waves - 1) * sms) / tiles
    assert bound_us(case, 400.0, 100.0) == pytest.approx(400 + 100 * last)
    # By a curve, but never more than all at once.
    assert bound_us(case, 400.0, 100.0, lambda size: 3e-5) == pytest.approx(430)
    assert bound_us(case, 400.0, 100.0, lambda size: 3e-3) == pytest.approx(500)
    # In parts it may take less than at once.
    assert bound_us(case, 100.0, 400.0, lambda size: 3e-4) == pytest.approx(100 / waves + 300)


def test_bounds_are_filled_where_both_parts_were_measured():
    product, case = case_of(GEMM), case_of("all_reduce")
    other = case_of("all_reduce", link="no_p2p")
    rows = [
        row(product, "cublas", 120.0),
        row(product, "signal_gemm", 100.0),
        row(case, "collective", 400.0),
        row(case, "jpd", 500.0),
        row(other, "jpd", 500.0),
        failed_row(case.name, "xla", "no reason"),
    ]
    fill_bounds(rows)
    assert rows[3]["pct_of_bound"] == pytest.approx(100 * (100 / 16 + 400) / 500)
    assert [r["pct_of_bound"] for r in rows[:3] + rows[4:]] == [None] * 5


def test_speedups_are_against_the_fastest_of_one_after_the_other():
    products = [case_of(GEMM), case_of(GEMM, Shape(2048, 8192, 8192))]
    first, second = case_of("all_reduce"), case_of("reduce_scatter")
    slow = case_of("all_reduce", link="no_p2p")
    alone = case_of(GEMM, link="alone", ranks=1)
    cases = [*products, alone, first, second, slow, case_of("all_reduce", Shape(8, 8, 8))]
    rows = [
        row(products[0], "cublas", 98.0),
        row(products[0], "signal_gemm", 100.0),
        row(products[0], "dense_gemm", 99.0),
        row(alone, "cublas", 98.0 * 1.21),
        row(alone, "signal_gemm", 100.0),
        row(first, "xla", 130.0),
        row(first, "torch", 120.0),
        row(first, "cupy", 200.0),
        row(first, "jpd", 100.0, predicted_us=90.0, hidden=0.8),
        row(first, "jpd_rows", 110.0),
        row(first, "xla_chunks2", 150.0),
        row(second, "xla", 270.0),
        row(second, "jpd", 200.0, predicted_us=202.0),
        row(slow, "xla", 150.0),
        row(slow, "jpd", 100.0),
        skipped_row(case_of("all_reduce", Shape(8, 8, 8)).name, "jpd"),
    ]
    rows[8]["pct_of_bound"], rows[12]["pct_of_bound"] = 80.0, 90.0
    summary = summarise(rows, cases)
    # Of the one shape the case on one GPU counts.
    assert summary["gemm_vs_cublas_geomean"] == pytest.approx(0.98 * 1.21)
    without = [r for r in rows if r["case"] != alone.name]
    assert summarise(without, cases)["gemm_vs_cublas_geomean"] == pytest.approx(0.98)
    assert summary["gemm_vs_cublas_geomean_over"] == "1 of 2"
    assert summary["signal_cost_pct"] == pytest.approx(100 / 99)
    assert summary["signal_cost_pct_over"] == "1 of 2"
    assert summary["nvlink_max_speedup"] == pytest.approx(1.35)
    assert summary["nvlink_max_speedup_case"] == second.name
    assert summary["nvlink_min_speedup"] == pytest.approx(1.2)
    assert summary["nvlink_geomean_speedup"] == pytest.approx((1.2 * 1.35) ** 0.5)
    assert summary["nvlink_geomean_speedup_over"] == "2 of 3"
    assert summary["nvlink_geomean_speedup_reduce_scatter_2"] == pytest.approx(1.35)
    assert summary["nvlink_rows_geomean_speedup"] == pytest.approx(120 / 110)
    assert summary["nvlink_geomean_vs_xla_chunks2"] == pytest.approx(1.5)
    assert summary["nvlink_pct_of_bound_median"] == 85.0
    assert summary["nvlink_hidden_median"] == 0.8
    assert summary["nvlink_predictor_error_pct"] == pytest.approx((10 + 1) / 2)
    assert summary["no_p2p_max_speedup"] == pytest.approx(1.5)
    assert "no_p2p_pct_of_bound_median" not in summary


def test_rows_of_tuning_say_how_good_the_predictor_is():
    case = case_of("all_reduce")
    rows = [
        row(case, "sequential", 120.0),
        row(case, "116+16", 100.0, predicted_us=97.0, error_pct=3.0),
        row(case, "108+24", 110.0, predicted_us=104.5, error_pct=5.0),
        row(case, "exhaustive", 99.0, searched_pct=99.0, error_pct=40.0),
    ]
    assert summarise_tuning(rows) == {
        "nvlink_tune_predictor_error_pct": 4.0,
        "nvlink_tune_plans_timed": 2,
        "nvlink_searched_vs_exhaustive_pct": 99.0,
        "nvlink_exhaustive_cases": 1,
    }


# --- what the search is told -----------------------------------------------------------------


def test_curves_are_medians_over_calls_without_the_first_group():
    def call(*times):
        groups = [GroupTrace(0.0, 10.0, 10.0 + us, nbytes) for nbytes, us in times]
        return CallTrace(0, 0, 0, "all_reduce", 0.0, 5.0, 100.0, tuple(groups))

    calls = [call((999, 1e3), (4096, t), (1024, t / 2)) for t in (8.0, 10.0, 90.0)]
    curve = overlap_curves.curve_of(calls)
    assert curve.bytes == (1024.0, 4096.0)
    assert curve.seconds == pytest.approx((5e-6, 10e-6))


def test_beside_a_gemm_only_what_ended_before_it_counts():
    def call(gemm_end_us):
        groups = [GroupTrace(0.0, 0.0, 1.0, 999), GroupTrace(0.0, 1.0, 9.0, 4096)]
        groups += [GroupTrace(0.0, 9.0, 11.0, 2048), GroupTrace(0.0, 11.0, 12.0, 1024)]
        return CallTrace(0, 0, 0, "all_reduce", 0.0, gemm_end_us, 100.0, tuple(groups))

    curve = overlap_curves.curve_of([call(11.5)], beside_gemm=True)
    assert curve.bytes == (2048.0, 4096.0)
    assert curve.seconds == pytest.approx((2e-6, 8e-6))
    with pytest.raises(RuntimeError, match="1 sizes"):
        overlap_curves.curve_of([call(10.0)], beside_gemm=True)


def test_messages_are_whole_tiles_largest_first():
    tiles = overlap_curves.message_tiles(65536)
    assert tiles[0] * 65536 == overlap_curves.LARGEST
    assert tiles[-1] == 1
    assert tiles == sorted(set(tiles), reverse=True)


@pytest.mark.parametrize("tiles", [1, 31, 32, 33, 500])
def test_groups_fill_whole_rows_of_tiles(tiles):
    config = SignalConfig()
    a_row = 8192 // config.tile_n
    found = overlap_curves._whole_rows(tiles, (116, 40, 7), config)
    assert (found + 163) % a_row == 0
    assert tiles <= found < tiles + a_row


def test_a_run_that_measures_nothing_counts_no_cases_of_its_own_machine(tmp_path, monkeypatch):
    shutil.copy(ROOT / "benchmarks/results/h200/overlap.json", tmp_path)
    command = ["overlap", "--seconds", "0", "--merge", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        overlap.main()
    cases = load(tmp_path / "overlap.json")["summary"]["cases"]
    assert cases.endswith(f" of {len(overlap.everything())}")


def test_waves_are_straight_lines_in_k():
    waves = overlap_curves.WaveTimes.fit({(128, 256): {1000: 12e-6, 3000: 32e-6}})
    config = SimpleNamespace(tile_m=128, tile_n=256)
    assert waves.seconds(config, 2000) == pytest.approx(22e-6)
    assert waves.seconds(SimpleNamespace(tile_m=64, tile_n=64), 2000) is None


def test_a_gemm_is_slowed_down_by_what_it_lost():
    groups = (GroupEvents(2.0, 2.0, 4.0, 10), GroupEvents(6.0, 6.0, 7.0, 10))
    trace = Trace(groups, 0.0, 6.0, 7.0)
    # It took 6 instead of 5, and 2 of these were shared.
    assert overlap_curves.gemm_slowdown(trace, 5.0) == pytest.approx(2.0)
    assert overlap_curves.gemm_slowdown(trace, 7.0) == 1.0


# --- tuning ---------------------------------------------------------------------------------


def a_tuner(tmp_path, ctas=(8, 16)):
    communicators = [SimpleNamespace(max_ctas=c) for c in ctas]
    machine = overlap_runs.Machine(SimpleNamespace(size=2), "nvlink", None, communicators)
    report = Report("overlap_tune", "?", out=tmp_path)
    tuner = overlap_tune.Tuner(machine, TOPOLOGY, tmp_path / "tuned", report)
    sizes = sample_sizes()
    for count in ctas:
        seconds = tuple(1e-5 + size / (2e10 * count) for size in sizes)
        key = CurveKey(TOPOLOGY, "all_reduce", 2, count)
        tuner.curves[key] = BandwidthCurve(tuple(sizes), seconds)
    tuner.waves = overlap_curves.WaveTimes({(128, 256): (3e-6, 1.2e-8)})
    return tuner, report


def fake(monkeypatch, sequential_us):
    """Times in place of GPUs: what was predicted and a twentieth more, or this."""
    monkeypatch.setattr(overlap_tune, "Checker", lambda *args: None)
    monkeypatch.setattr(overlap_tune, "compile_all", lambda mesh, operands, jobs: jobs)
    monkeypatch.setattr(overlap_tune, "gemm_seconds", lambda *args: 1e-3)

    def checked_us(mesh, operands, checker, implementation, program, samples=5):
        plan = implementation.plan
        us = sequential_us
        if plan is not None:
            us = plan.predicted_s * 1.05e6 + 1e-3 * len(plan.waves)
        return [us] * samples, 1e-3

    monkeypatch.setattr(overlap_tune, "checked_us", checked_us)


def test_the_fastest_plan_is_stored_where_the_op_looks(tmp_path, monkeypatch):
    tuner, report = a_tuner(tmp_path)
    case = case_of("all_reduce", Shape(2048, 8192, 8192))
    fake(monkeypatch, sequential_us=5e3)
    assert tuner.tune(case, None, tried=2, exhaustive=True)
    table = PlanTable.shipped(TOPOLOGY, tmp_path / "tuned")
    plan = table.find("all_reduce", 2, *case.shape)
    assert plan.overlap
    assert plan.source == "measured"
    assert plan.sms + plan.ctas == 132
    assert plan.sequential_s == pytest.approx(5e-3)
    names = [r["impl"] for r in report.rows]
    assert {*names} == {"sequential", "124+8", "116+16", "exhaustive"}
    summary = summarise_tuning(report.rows)
    assert summary["nvlink_tune_predictor_error_pct"] == pytest.approx(100 * (1 - 1 / 1.05), 1e-2)
    assert summary["nvlink_searched_vs_exhaustive_pct"] <= 100
    # The search goes on where it ended.
    assert len(a_tuner(tmp_path)[0].table) == 1
    nearby = overlap_runs.fitted(plan, case_of("all_reduce", Shape(4096, 8192, 8192)))
    assert nearby.source == "nearby"
    assert sum(nearby.waves) == -(-32 * 32 // plan.sms)
    assert nearby.predicted_s is None
    assert overlap_runs.fitted(plan, case) is plan


def test_no_overlap_is_stored_where_nothing_is_faster(tmp_path, monkeypatch):
    tuner, _ = a_tuner(tmp_path)
    case = case_of("all_reduce", Shape(2048, 8192, 8192))
    fake(monkeypatch, sequential_us=100.0)
    assert not tuner.tune(case, None, tried=2, exhaustive=True)
    plan = PlanTable.shipped(TOPOLOGY, tmp_path / "tuned").find("all_reduce", 2, *case.shape)
    assert not plan.overlap
    assert plan.measured_s == pytest.approx(1e-4)
    assert overlap_runs.describe(plan) == "not to overlap (measured)"


def test_a_collective_is_predicted_as_it_was_beside_a_gemm(tmp_path):
    tuner, _ = a_tuner(tmp_path)
    case = case_of("all_reduce", Shape(2048, 8192, 8192))
    alone = tuner.options(case, 16)[0]
    config = SignalConfig(**vars(alone.tiling))
    option = tuner.option(case, 16, config, alone.work.gemm_s)
    assert option.work.contention == Contention()
    key = CurveKey(TOPOLOGY, "all_reduce", 2, 16)
    slowed = BandwidthCurve(
        (1 << 16, 1 << 30), tuple(2 * tuner.curves[key](b) for b in (65536, 1 << 30))
    )
    tuner.curves[dataclasses.replace(key, beside_gemm=True)] = slowed
    tuner.save()
    again = overlap_tune.Tuner(tuner.machine, TOPOLOGY, tuner.folder, tuner.report)
    option = again.option(case, 16, config, alone.work.gemm_s)
    assert option.work.contention.collective_s == slowed
    groups = (1,) * option.work.waves
    first = [simulate(work, groups).groups[0] for work in (alone.work, option.work)]
    before, after = (group.end_s - group.start_s for group in first)
    assert after == pytest.approx(2 * before)


def test_the_envelope_is_the_best_of_all_blocks():
    curves = [BandwidthCurve((1, 10), (1.0, 20.0)), BandwidthCurve((1, 10), (2.0, 10.0))]
    assert overlap_tune.envelope(curves).seconds == (1.0, 10.0)


def test_the_envelope_may_send_in_parts():
    curve = BandwidthCurve((1, 10, 40), (1.0, 2.0, 100.0))
    assert overlap_tune.envelope([curve]).seconds == pytest.approx((1.0, 2.0, 8.0))


# --- running --------------------------------------------------------------------------------


def test_a_row_that_lies_elsewhere_is_caught():
    mesh = overlap_time.mesh_of(1)
    operands = overlap_runs.Operands(mesh, TINY[0])
    checker = overlap_runs.Checker(mesh, "all_reduce", operands)
    pairs = zip(operands.xs, operands.ws, strict=True)
    outs = [jnp.dot(x, w.T) for x, w in pairs]
    plain = Implementation(Operation(lambda x, w: x))
    swapped = dataclasses.replace(plain, ordered=lambda y: y.at[jnp.array([3, 4])].set(y[4:2:-1]))
    late = [outs[0], outs[1].at[-1, -8:].set(0)]
    assert checker.error(plain, outs) < overlap_runs.MAX_REL_ERR
    assert checker.error(swapped, outs) > 0.5
    assert checker.error(plain, late) > 0.1
    with pytest.raises(RuntimeError, match="shape"):
        checker.error(dataclasses.replace(plain, ordered=lambda y: y[1:]), outs)


def test_all_gpus_are_held_and_the_slowest_counts(monkeypatch):
    clock, held = [0], []

    def program():
        clock[0] += 4_000_000

    monkeypatch.setattr(overlap_time, "on_gpu", lambda: True)
    monkeypatch.setattr(overlap_time, "_hold", lambda mesh, us: lambda: held.append(mesh))
    monkeypatch.setattr(overlap_time, "_stamp", lambda mesh: lambda: np.array([1, 2]) * clock[0])
    samples = overlap_time.run_us("all", program, 200, samples=3)
    assert samples == pytest.approx([8000] * 3)
    assert {*held} == {"all"}


run = partial(run_module, "benchmarks.overlap", devices=4)


def test_quick_mode_runs_on_four_devices_of_a_cpu(tmp_path):
    done = run("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    file = tmp_path / "overlap.json"
    rows = load(file)["rows"]
    by_impl = {(Case.parse(r["case"]).op, r["impl"]): r for r in rows}
    for op in ("all_reduce", "reduce_scatter", "all_to_all"):
        for impl in ("xla", "jpd", "jpd_rows", "xla_chunks2", "xla_chunks4", "grouped"):
            assert by_impl[op, impl]["status"] == "ok"
            assert by_impl[op, impl]["rel_err"] < overlap_runs.MAX_REL_ERR
        assert by_impl[op, "cupy"]["status"] == "not run: needs GPUs"
    assert by_impl["reduce_scatter", "xla_windowed"]["status"] == "ok"
    assert by_impl[GEMM, "signal_gemm"]["status"] == "not run: needs GPUs"
    assert not any("failed" in r["status"] for r in rows)
    again = run("--quick", "--seconds", "0", "--merge", str(file), "--out", str(tmp_path / "b"))
    assert again.returncode == 0, again.stderr
    merged = load(tmp_path / "b" / "overlap.json")["rows"]
    assert [(r["case"], r["impl"]) for r in merged] == [(r["case"], r["impl"]) for r in rows]


def test_one_device_has_the_product_alone(tmp_path):
    done = run("--quick", "--ranks", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = load(tmp_path / "overlap.json")["rows"]
    name = f"host 1 GEMM {TINY[0].name}"
    assert {(r["case"], r["impl"], r["status"]) for r in rows} == {
        (name, "cublas", "ok"),
        (name, "signal_gemm", "not run: needs GPUs"),
        (name, "dense_gemm", "not run: needs GPUs"),
    }


@pytest.mark.parametrize(
    ("here", "arguments", "said"),
    [
        (("alone", 1), ["--tune"], "two at least"),
        (("alone", 1), ["--ops", "AR", "RS"], "AR, RS: no case on 1 GPUs"),
        (("nvlink", 2), ["--ops", "A2A"], "A2A: no case on 2 GPUs"),
    ],
)
def test_what_so_many_gpus_have_none_of_is_refused(here, arguments, said, tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "set_up", lambda report, ranks: here)
    monkeypatch.setattr(sys, "argv", ["overlap", *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=said):
        overlap.main()
    assert not [*tmp_path.iterdir()]  # what is stored there stays


def test_tuning_needs_gpus(tmp_path):
    done = run("--tune", "--out", str(tmp_path))
    assert done.returncode != 0
    assert "needs GPUs" in done.stderr
