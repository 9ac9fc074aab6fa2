"""Curves, predictor, search, plans and traces: numbers alone, no device."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpd.errors import ConfigError
from jpd.overlap import (
    BandwidthCurve,
    Contention,
    CurveKey,
    GroupEvents,
    Option,
    Plan,
    PlanTable,
    Tiling,
    Topology,
    Trace,
    Work,
    best_partition,
    bound,
    exhaustive,
    load_curves,
    plot,
    predict,
    sample_sizes,
    save_curves,
    search,
    simulate,
)
from jpd.overlap.partitions import partitions
from native.overlap import CallTrace, GroupTrace
from pallas_kernels.signal_gemm import schedule

H200 = Topology("NVIDIA H200", "nvlink", "2.28.9")
TILING = Tiling(128, 256, 4, "m", "m", 16)
# Measured: all-reduce on two H200s, NVLink and through the host (seconds by bytes).
NVLINK = BandwidthCurve(
    (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20), (35e-6, 33e-6, 74e-6, 248e-6, 887e-6)
)
NO_P2P = BandwidthCurve((1 << 20, 16 << 20, 256 << 20), (90e-6, 560e-6, 8.9e-3))


def affine(latency_s, bytes_per_s):
    """A collective of fixed cost and bandwidth."""
    return lambda size: np.where(
        np.asarray(size) > 0, latency_s + np.asarray(size) / bytes_per_s, 0
    )


def work(tiles=64, sms=8, gemm_s=1e-3, curve=NVLINK, **rest):
    return Work(tiles=tiles, sms=sms, tile_bytes=1 << 18, gemm_s=gemm_s, collective_s=curve, **rest)


@st.composite
def works(draw, most_waves=8, contention=False):
    """GEMMs that are shorter or longer than their collectives, with partial last waves too."""
    sms = draw(st.integers(1, 132))
    waves = draw(st.integers(1, most_waves))
    tiles = sms * waves - draw(st.integers(0, sms - 1))
    curve = affine(draw(st.floats(0, 1e-4)), draw(st.floats(1e9, 4e11)))
    factors = st.floats(1, 2) if contention else st.just(1.0)
    slowed = draw(factors)
    return Work(
        tiles=tiles,
        sms=sms,
        tile_bytes=65536,
        gemm_s=draw(st.floats(1e-5, 1e-2)),
        collective_s=curve,
        fixed_s=draw(st.floats(0, 1e-5)),
        contention=Contention(draw(factors), (lambda b: slowed * curve(b)) if contention else None),
    )


# Curves


def test_a_curve_goes_through_its_samples_and_never_falls():
    assert NVLINK(16 << 20) == pytest.approx(74e-6)
    assert NVLINK(40 << 20) == pytest.approx((74e-6 + 248e-6) / 2)
    assert NVLINK(4 << 20) == pytest.approx(35e-6)  # measured as faster than a quarter of it
    sizes = np.linspace(0, 1 << 30, 2000)
    assert (np.diff(NVLINK(sizes)) >= 0).all()


def test_small_messages_keep_their_latency_and_large_ones_their_bandwidth():
    assert NVLINK(1) == NVLINK(1 << 20) == 35e-6
    assert NVLINK(0) == 0
    slope = (887e-6 - 248e-6) / (192 << 20)
    assert NVLINK(512 << 20) == pytest.approx(887e-6 + slope * (256 << 20))
    flat = BandwidthCurve((1e6, 2e6), (1e-3, 1e-3))
    assert flat(1e9) > 0.2  # noise at the end does not make everything beyond it free


def test_bandwidth_on_the_bus():
    assert NVLINK.bus_bandwidth("all_reduce", 2)[-1] == pytest.approx((256 << 20) / 887e-6)
    assert NVLINK.bus_bandwidth("reduce_scatter", 4)[-1] == pytest.approx(
        (256 << 20) * 0.75 / 887e-6
    )


@pytest.mark.parametrize(
    ("sizes", "times", "message"),
    [
        ((1,), (1,), "2 or more"),
        ((1, 2), (1,), "2 or more"),
        ((2, 1), (1, 1), "ascend"),
        ((1, 2), (1, 0), "positive"),
        ((1, 2), (1, float("nan")), "positive"),
    ],
)
def test_curves_without_sense_are_refused(sizes, times, message):
    with pytest.raises(ValueError, match=message):
        BandwidthCurve(sizes, times)


def test_curves_are_sampled_and_stored(tmp_path):
    sizes = sample_sizes(1 << 16, 1 << 24, per_octave=1)
    assert sizes == [1 << i for i in range(16, 25)]
    assert sample_sizes()[0] == 64 << 10
    assert sample_sizes()[-1] == 1 << 30
    asked = []
    curve = BandwidthCurve.sample(lambda size: asked.append(size) or size * 1e-9, sizes[::-1])
    assert asked == sizes
    keys = [CurveKey(H200, op, 4, 16) for op in ("all_reduce", "all_to_all")]
    save_curves(tmp_path / "c.json", {keys[0]: curve, keys[1]: NO_P2P})
    assert load_curves(tmp_path / "c.json") == {keys[0]: curve, keys[1]: NO_P2P}
    (tmp_path / "c.json").write_text('{"schema": 2, "curves": []}')
    with pytest.raises(ConfigError, match=r"c\.json holds no bandwidth curves.*schema 2"):
        load_curves(tmp_path / "c.json")
    with pytest.raises(ValueError, match="'all_gather'"):
        CurveKey(H200, "all_gather", 4, 16)


# The predictor


def test_waves_and_bytes_are_those_of_the_kernel():
    for tiles, sms in itertools.product((1, 7, 8, 9, 30), (1, 4, 8)):
        one = work(tiles, sms)
        assert one.waves == schedule.waves_of(tiles, sms)
        assert list(partitions(min(one.waves, 6))) == list(schedule.partitions(min(one.waves, 6)))
        for groups in ((one.waves,), (1,) * one.waves):
            kernels = schedule.groups_of_waves(groups, tiles, sms)
            assert one.group_bytes(groups) == [count << 18 for count in kernels]
    with pytest.raises(ValueError, match="do not cut 8 waves"):
        work().group_bytes((4, 3))


def test_algorithm_1_by_hand():
    # 3 waves of 1 ms; 2 bytes a tile and second.
    one = Work(
        tiles=5, sms=2, tile_bytes=1, gemm_s=3.0, collective_s=lambda b: b * 2.0, fixed_s=0.5
    )
    # computed 1, 2, 3; sent 1 + 4 = 5, 5 + 4 = 9, 9 + 2 = 11
    assert predict(one, (1, 1, 1)) == 11.5
    # computed 2, 3; sent 2 + 8 = 10, 10 + 2 = 12
    assert predict(one, (2, 1)) == 12.5
    assert predict(one, (3,)) == 3 + 10 + 0.5
    # A short collective waits for the GEMM: 1, 2, 3 and 3 + 0.2
    quick = dataclasses.replace(one, collective_s=lambda b: b * 0.2, fixed_s=0)
    assert predict(quick, (1, 1, 1)) == pytest.approx(3.2)


def as_the_paper_writes_it(one, groups):
    """Algorithm 1 as printed: each step first accounts for the group before."""
    size = one.group_bytes(groups)
    acc_p = acc_m = 0.0
    for i, waves in enumerate(groups):
        if i > 0:
            acc_m = max(acc_p, acc_m) + one.collective_s(size[i - 1])
        acc_p += one.gemm_s / one.waves * waves
    return max(acc_p, acc_m) + one.collective_s(size[-1]) + one.fixed_s


@given(works(), st.data())
@settings(max_examples=60)
def test_simulation_without_contention_is_algorithm_1(one, data):
    groups = data.draw(st.sampled_from(list(partitions(one.waves))))
    seconds = predict(one, groups)
    assert seconds == pytest.approx(as_the_paper_writes_it(one, groups))
    trace = simulate(one, groups)
    assert trace.end_s == pytest.approx(seconds)
    assert trace.gemm_end_s == pytest.approx(one.gemm_s)
    assert [group.size_bytes for group in trace.groups] == one.group_bytes(groups)


@given(works(contention=True), st.data())
@settings(max_examples=60)
def test_contention_only_costs(one, data):
    groups = data.draw(st.sampled_from(list(partitions(one.waves))))
    alone = dataclasses.replace(one, contention=Contention())
    slowed, undisturbed = simulate(one, groups).end_s, predict(alone, groups)
    most = max(one.contention.gemm, one.beside_s(1 << 20) / one.collective_s(1 << 20))
    assert undisturbed * (1 - 1e-9) <= slowed <= most * undisturbed * (1 + 1e-9)


def test_contention_by_hand():
    # Waves of 1 s. The first group is sent from 1 s on: 2 s alone, but at half the pace while the
    # GEMM runs, which needs 1.5 s for its second wave meanwhile. So at 2.5 s 0.75 s of it are done.
    one = Work(
        tiles=2,
        sms=1,
        tile_bytes=1,
        gemm_s=2.0,
        collective_s=lambda b: b * 2.0,
        contention=Contention(gemm=1.5, collective_s=lambda b: b * 4.0),
    )
    first, second = simulate(one, (1, 1)).groups
    assert (first.signal_s, first.start_s) == (1, 1)
    assert second.signal_s == pytest.approx(2.5)
    assert first.end_s == second.start_s == pytest.approx(2.5 + 1.25)
    assert second.end_s == pytest.approx(3.75 + 2)
    with pytest.raises(ValueError, match="at least 1"):
        Contention(gemm=0.9)


@given(works(contention=True))
@settings(max_examples=40)
def test_no_partition_is_faster_than_the_bound(one):
    assert exhaustive(one)[1] >= bound(one) * (1 - 1e-9)


def test_the_bound_of_the_paper():
    rate = affine(0, 1e9)
    long = work(gemm_s=1.0, curve=rate)  # 64 tiles of 256 KiB: 16.8 ms; a wave is an eighth
    assert bound(long) == pytest.approx(1.0 + (1 << 21) / 1e9)
    short = work(gemm_s=1e-3, curve=rate)
    assert bound(short) == pytest.approx(1e-3 / 8 + (1 << 24) / 1e9)


# The search


@given(works(most_waves=9))
@settings(max_examples=60)
def test_the_search_finds_the_exhaustive_optimum(one):
    groups, seconds = best_partition(one)
    assert sum(groups) == one.waves
    assert seconds == pytest.approx(predict(one, groups))
    assert seconds == pytest.approx(exhaustive(one)[1])


@given(works(most_waves=8, contention=True))
@settings(max_examples=25)
def test_with_contention_it_is_within_a_percent(one):
    groups, seconds = best_partition(one, exhaustive_waves=0)
    assert seconds == pytest.approx(simulate(one, groups).end_s)
    assert exhaustive(one)[1] >= 0.99 * seconds


@pytest.mark.parametrize("curve", [NVLINK, NO_P2P], ids=["nvlink", "no_p2p"])
@pytest.mark.parametrize("gemm_s", [2e-4, 1e-3, 5e-3])
def test_measured_curves_too(curve, gemm_s):
    one = work(tiles=130, sms=13, gemm_s=gemm_s, curve=curve)
    best = exhaustive(one)[1]
    assert best_partition(one)[1] == pytest.approx(best)
    slowed = dataclasses.replace(one, contention=Contention(1.15, lambda b: 1.3 * curve(b)))
    assert best_partition(slowed, exhaustive_waves=0)[1] <= exhaustive(slowed)[1] / 0.99
    if gemm_s == 2e-4:  # the collectives' latencies add up: a wave a group is not the answer
        assert predict(one, (1,) * one.waves) > 1.2 * best


def test_the_number_of_groups_can_be_limited():
    one = work(tiles=80, curve=affine(0, 1e11))
    unlimited = best_partition(one, max_groups=None)
    for most in (1, 2):
        groups, seconds = best_partition(one, max_groups=most)
        assert len(groups) <= most < len(unlimited[0])
        assert seconds == pytest.approx(exhaustive(one, max_groups=most)[1])
        slowed = dataclasses.replace(one, contention=Contention(1.2, affine(0, 8e10)))
        assert len(best_partition(slowed, max_groups=most, exhaustive_waves=0)[0]) <= most


def test_many_waves_are_searched_quickly_enough():
    one = work(tiles=116 * 120, sms=116, gemm_s=0.02)
    groups, seconds = best_partition(one)
    assert sum(groups) == 120
    assert bound(one) <= seconds < one.gemm_s + one.collective_s(one.total_bytes)


SHAPE = {"op": "all_reduce", "ranks": 2, "m": 8192, "n": 8192, "k": 8192}


def options():
    """More SMs for NCCL make its curve faster and the GEMM slower."""
    return [
        Option(TILING, ctas, work(tiles=2048, sms=132 - ctas, gemm_s=0.19 / (132 - ctas), curve=c))
        for ctas, c in (
            (8, affine(2e-5, 1.5e11)),
            (16, affine(2e-5, 3e11)),
            (24, affine(2e-5, 3.1e11)),
        )
    ]


def test_the_search_shares_the_gpu_out_too():
    times = {option.ctas: best_partition(option.work)[1] for option in options()}
    best = min(times, key=times.get)
    plan = search(options(), **SHAPE, sequential_s=1.0)
    assert plan.overlap
    assert (plan.ctas, plan.sms, plan.tiling) == (best, 132 - best, TILING)
    assert plan.predicted_s == pytest.approx(times[best])
    assert sum(plan.waves) == -(-2048 // plan.sms)
    assert best == 16  # else this example shows nothing


def test_not_to_overlap_is_an_answer():
    best = search(options(), **SHAPE, sequential_s=1.0).predicted_s
    for sequential, overlaps in ((best * 1.05, True), (best * 1.01, False), (best * 0.9, False)):
        plan = search(options(), **SHAPE, sequential_s=sequential, min_gain=0.02)
        assert plan.overlap == overlaps
        assert plan.sequential_s == sequential
    assert not search([], **SHAPE, sequential_s=1.0).overlap
    # One wave is one group: there is nothing to hide behind.
    one = [Option(TILING, 16, work(tiles=8))]
    assert not search(one, **SHAPE, sequential_s=1.0).overlap


# Plans


def plan_of(m=4096, n=8192, k=2048, **rest):
    fields = {"op": "all_reduce", "ranks": 2, "overlap": True, "tiling": TILING, "sms": 116}
    return Plan(**{**fields, "m": m, "n": n, "k": k, "ctas": 16, "waves": (1, 2, 5), **rest})


def test_a_plan_scales_to_other_numbers_of_waves():
    plan = plan_of()
    assert plan.waves_for(8) == (1, 2, 5)
    assert plan.waves_for(16) == (2, 4, 10)
    assert plan.waves_for(9) == (1, 2, 6)
    assert plan.waves_for(2) == (1, 1)
    for total in range(1, 40):
        scaled = plan.waves_for(total)
        assert sum(scaled) == total
        assert min(scaled) >= 1
        assert len(scaled) <= 3
    with pytest.raises(ValueError, match="0 waves"):
        plan.waves_for(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "all_gather"},
        {"waves": ()},
        {"waves": (1, 0)},
        {"tiling": None},
        {"sms": 0},
        {"ctas": 0},
        {"m": 0},
    ],
)
def test_plans_that_contradict_themselves_are_refused(changes):
    with pytest.raises(ValueError, match=r"op is|waves|takes|m is"):
        plan_of(**changes)


def test_plans_are_static_arguments_and_survive_json():
    plan = plan_of(predicted_s=1e-3, waves=[1, 2])
    assert plan == plan_of(predicted_s=1e-3, waves=(1, 2))
    assert hash(plan) == hash(plan_of(predicted_s=1e-3, waves=(1, 2)))
    assert Plan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    sequential = plan_of(overlap=False, tiling=None, waves=())
    assert Plan.from_json(json.loads(json.dumps(sequential.as_json()))) == sequential


def test_the_table_finds_the_nearest_plan(tmp_path):
    small, large = plan_of(m=2048), plan_of(m=8192)
    other = [
        plan_of(m=4096, op="reduce_scatter"),
        plan_of(m=4096, ranks=4),
        plan_of(n=4096, m=4096),
    ]
    table = PlanTable(H200, [large, small, *other])

    def found(m, n=8192, k=2048, **rest):
        return table.find("all_reduce", 2, m, n, k, **rest)

    assert found(2048) is small
    assert found(3000) is small
    assert found(5000) is large
    assert found(4096) is small  # as far from both
    assert found(1024) is small
    assert found(1023) is None
    assert found(16385) is None
    assert found(16385, max_ratio=3) is large
    assert found(2048, k=4097) is None
    assert found(4096, n=4096) is other[2]
    table.save(tmp_path / f"{H200.slug}.json")
    again = PlanTable.shipped(H200, tmp_path)
    assert again.topology == H200
    assert len(again) == 5
    assert again.find("all_reduce", 2, 5000, 8192, 2048) == large
    table.add(plan_of(m=2048, overlap=False))
    assert len(table) == 5
    assert not found(2048).overlap
    assert len(PlanTable.shipped(Topology("NVIDIA H200", "no_p2p", "2.28.9"), tmp_path)) == 0


def test_a_broken_table_is_named(tmp_path):
    for text in ("", "{}", '{"schema": 1, "topology": {}, "plans": []}'):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ConfigError, match=r"t\.json holds no table of plans"):
            PlanTable.load(tmp_path / "t.json")


def test_names_of_files():
    assert H200.slug == "nvidia_h200-nvlink-nccl2.28.9"


# Traces


def trace(*groups, gemm_end_s=10.0, end_s=13.0):
    events = tuple(GroupEvents(*times, size_bytes=1) for times in groups)
    return Trace(events, gemm_start_s=0.0, gemm_end_s=gemm_end_s, end_s=end_s)


def test_the_fraction_hidden():
    one = trace((2, 3, 5), (6, 6, 8), (10, 10, 12))
    assert one.collective_s == 6
    assert one.hidden_s == 4
    assert one.fraction_hidden == pytest.approx(2 / 3)
    assert one.exposed_s == 3
    assert one.waits_s == (1, 0, 0)
    astride = trace((2, 8, 12), end_s=12)
    assert astride.fraction_hidden == 0.5
    assert trace((10, 11, 12)).fraction_hidden == 0
    assert trace((10, 10, 10), end_s=10).fraction_hidden == 1
    assert Trace.from_json(json.loads(json.dumps(one.as_json()))) == one


def test_a_trace_of_a_call_on_a_gpu():
    groups = (GroupTrace(100, 100, 150, 64), GroupTrace(200, 200.25, 260, 32))
    call = CallTrace(0, 0, 0, "all_reduce", 5.0, 210.0, 260.0, groups)
    one = Trace.of_call(call)
    assert one.groups[1].start_s == pytest.approx(200.25e-6)
    assert [group.size_bytes for group in one.groups] == [64, 32]
    assert one.gemm_end_s == pytest.approx(210e-6)
    assert one.fraction_hidden == pytest.approx((50 + 9.75) / (50 + 59.75))
    assert one.exposed_s == pytest.approx(50e-6)


def test_groups_that_were_sent_before_they_were_computed_are_named():
    one = trace((2, 3, 5), (6.5, 6, 8), (10, 10, 12))
    assert one.premature() == (1,)
    assert one.premature(tolerance_s=1.0) == ()
    assert simulate(work(), (2, 6)).premature(0) == ()


def test_traces_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="end comes before the start"):
        trace((1, 5, 2))
    with pytest.raises(ValueError, match="at the same time"):
        trace((1, 2, 5), (2, 4, 6))
    with pytest.raises(ValueError, match="too early"):
        trace((1, 2, 5), end_s=4)
    with pytest.raises(ValueError, match="without a group"):
        trace()


def test_a_trace_is_drawn_where_matplotlib_is(tmp_path, monkeypatch):
    one = trace((2, 3, 5), (6, 6, 8), (10, 10, 12))
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "matplotlib.figure", None)
        assert not plot(one, tmp_path / "t.svg")
        assert not (tmp_path / "t.svg").exists()
    pytest.importorskip("matplotlib")
    assert plot(one, tmp_path / "t.svg")
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")


def test_tuning_needs_no_jax():
    code = "import sys, jpd.overlap; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "native", "pallas_kernels", "matplotlib"} & set(done.stdout.split())
