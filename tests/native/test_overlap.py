"""native.overlap without a GPU: built with all warnings, and run on XLA's CPU with stand-ins for
libcuda and libnccl (fake_gpu.cc), in a process of its own (overlap_scenarios.py)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from native import build
from native.overlap import Group, OverlapError, Transfer, groups_of, library, nccl_version
from native.overlap import trace as traces
from tests.aot import compile_for_h200, needs_wheels

FOLDER = Path(__file__).parent
ROUNDING = 2e-6
# What a call ends with on the private stream: all is sent, the gate of the watchdog, the end.
GATE = ("record", "wait 1", "record")
RELEASED = (2**31 - 1) // 2
"""What ends the wait for any number of tiles."""
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_to_all")

pytestmark = pytest.mark.skipif(
    os.environ["JAX_PLATFORMS"] != "cpu", reason="stand-ins for a GPU are of no use on one"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def results(cache):
    """What each scenario of overlap_scenarios.py found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        stand_ins = build.build(FOLDER / "fake_gpu.cc", ["-O0"])
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.overlap_scenarios", str(stand_ins)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        timeout=1200,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def value(results):
    def look(name):
        found = results[name]
        assert "raised" not in found, found["raised"]
        return found["value"]

    return look


def lines_of(log, stream):
    return [line.removeprefix(f"{stream} ") for line in log if line.startswith(f"{stream} ")]


# ---------------------------------------------------------------------------- results


@pytest.mark.parametrize("way", ["done", "start", "trace"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_results_are_those_of_the_collective(value, collective, ranks, way):
    assert value(f"results_{way}")[f"{collective}-{ranks}"] < ROUNDING


def test_the_comparison_sees_a_wrong_permutation(value):
    assert value("wrong_permutation_is_seen") > 0.1


def test_calls_follow_each_other_in_a_program(value):
    assert value("two_calls_in_a_program") < 4 * ROUNDING


def test_a_mesh_of_two_axes_has_a_clique_for_each_place_on_the_other(value):
    found = value("mesh_of_two_axes")
    assert found["tp"] < ROUNDING
    assert found["dp"] < ROUNDING


def test_bfloat16(value):
    assert value("bfloat16") < 0.01


def test_the_counters_are_what_the_gemm_counted(value):
    assert value("counters_are_returned") == [4, 1, 3]


# ---------------------------------------------------------------------------- order


def test_an_all_reduce_waits_for_each_group_in_turn(value):
    log = value("order_all_reduce")["log"]
    for device in ("d0", "d1"):
        assert lines_of(log, f"{device} private") == [
            "priority -5",
            "wait_event",
            "wait 4",
            "all_reduce 64",
            "wait 1",
            "all_reduce 16",
            "wait 3",
            "all_reduce 48",
            *GATE,
        ]
    # Counters are zero before the event that lets the private stream look at them.
    for_two = sorted(lines_of(log, "xla"))
    assert for_two == sorted(["memset32 0 x3", "record", "wait_event"] * 2)
    assert log.index("xla memset32 0 x3") < log.index("xla record")
    assert log.index("xla record") < log.index("d0 private wait_event")


def test_by_default_the_private_stream_is_filled_after_the_gemm(value):
    log = value("order_all_reduce")["log"]
    for device in ("d0", "d1"):
        assert log.index(f"{device} gemm 2") < log.index(f"{device} private wait 4")


def test_it_can_be_filled_before_the_gemm(value):
    log = value("order_start")["log"]
    expected = ["priority -5", "wait_event", "wait 4", "all_reduce 64", "wait 1"]
    for device in ("d0", "d1"):
        assert lines_of(log, f"{device} private")[:5] == expected
        assert log.index(f"{device} private all_reduce 48") < log.index(f"{device} gemm 2")


def test_an_all_to_all_is_grouped_sends_and_receives(value):
    log = lines_of(value("order_all_to_all")["log"], "d1 private")
    expected = ["wait 4", "send 32", "recv 32", "send 32", "recv 32", "wait 1", "send 8"]
    assert log[2:9] == expected


def test_a_trace_looks_at_the_signals_on_a_stream_of_their_own(value):
    log = value("order_trace")["log"]
    signals = ["wait_event", *["wait 4", "record", "wait 1", "record", "wait 3", "record"]]
    assert lines_of(log, "d0 signals") == ["priority -5", *signals, "record"]
    private = lines_of(log, "d0 private")
    groups = [("wait 4", 32), ("wait 1", 8), ("wait 3", 24)]
    sent = []
    for wait, count in groups:
        sent += [wait, "record", f"reduce_scatter {count}", "record"]
    assert private == ["priority -5", "wait_event", *sent, "wait_event", *GATE]


def test_without_a_trace_a_call_records_three_events(value):
    for name in ("order_all_reduce", "order_start"):
        assert value(name)["records_of_three_more"] == 3 * 2 * 3  # calls, devices, events


def test_a_trace_has_the_times_of_each_group(value):
    found = value("trace")
    assert found["again"] == 0
    assert sorted((call["rank"], call["number"]) for call in found["calls"]) == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    for call in found["calls"]:
        assert call["collective"] == "all_reduce"
        before = 0.0
        for group, nbytes in zip(call["groups"], (256, 64, 192), strict=True):
            assert group["nbytes"] == nbytes
            assert before < group["start_us"] < group["end_us"]
            assert 0 < group["signal_us"] <= group["start_us"]
            before = group["end_us"]
        assert before < call["end_us"]
        assert 0 < call["gemm_end_us"] < call["end_us"]


def test_for_jit_there_is_no_effect(value):
    assert "FfiEffect" not in value("no_effects")


def test_derivatives_and_vmap_are_refused(value):
    found = value("transformations")
    assert "custom_vjp" in found["grad"]
    assert "vmap" in found["vmap"]


# ---------------------------------------------------------------------------- communicators


def test_options_reach_nccl(value):
    found = value("options_reach_nccl")
    assert [line for line in found["log"] if line.startswith("init r0")] == [
        "init r0/2 blocking=1 cga=0 max=16"
    ]
    assert sorted(found["closed"]) == ["destroy r0", "destroy r1"]


def test_a_program_on_another_device_is_an_error(value):
    found = value("wrong_device")
    assert "no rank on device 0 of this process, only on 1" in found["sole"]
    assert "no rank on device 0 of this process, only on 2, 3" in found["two"]
    assert found["right"] is None


def test_ranks_of_several_processes_connect(value):
    names = [line.split(" blocking")[0] for line in value("one_process_per_gpu")]
    assert names == ["destroy r0", "destroy r1", "init r0/2", "init r1/2"]


def test_a_process_that_never_comes_is_an_error(value):
    found = value("missing_process")
    assert "did not connect within 0.3 s" in found["error"]
    assert found["seconds"] < 300  # not the time-out of collectives


def test_a_process_that_comes_late_finds_nobody(value):
    found = value("late_process")
    assert all("did not connect within" in error for error in found["errors"])
    assert found["aborted"]
    assert found["freed"]
    assert found["aborts"] == 2


def test_streams_and_memory_are_given_back(value):
    found = value("open_and_close")
    assert found["while_open"] == 2 * 5  # devices; three streams, the pinned page and the gate
    assert found["left"] == 0
    assert "ncclCommInitRankConfig" in found["error"]
    assert found["freed"]


def test_an_error_while_connecting_is_an_error(value):
    assert "rank 0 on device 0: NCCL: ncclCommInitRankConfig" in value("init_error")


def test_the_id_goes_through_exchange(value):
    found = value("exchange")
    assert found["passed"] == [128]
    assert "do all processes make the same communicator?" in found["error"]


def test_a_closed_communicator_is_an_error(value):
    found = value("closed")
    assert "closed" in found["run"]
    assert "closed" in found["check"]


def test_closing_waits_for_the_handler_that_is_at_work(value):
    assert value("closed_under_a_step") == {"waited": True, "went_on": True, "errors": [None]}


def test_libraries_that_are_missing_or_too_old_are_named(results):
    assert "NCCL 21700 is too old: 2.18 is needed" in results["old_nccl"]
    assert "cannot load libnowhere.so" in results["no_library"]


def test_the_version_is_that_of_the_library_in_use(value):
    assert value("nccl_version") == "2.28.9"


def test_the_version_takes_nothing_but_nccl(monkeypatch):
    def build_of(source):
        raise AssertionError(f"{source} is built")

    monkeypatch.setattr(build, "build", build_of)
    monkeypatch.setattr(library, "nccl_library", lambda: "libnowhere.so")
    with pytest.raises(OverlapError, match="cannot load libnowhere"):
        nccl_version()


# ---------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("stuck_collective", "every tile is signalled, so a peer is missing or stuck"),
        ("stuck_reduce_scatter", "every tile is signalled, so a peer is missing or stuck"),
        ("stuck_gemm", "the GEMM signalled 0 of 1 tiles of group 1 of 3"),
    ],
)
def test_what_is_stuck_ends_in_an_error_and_nan(value, scenario, reason):
    found = value(scenario)
    assert f"is not complete after {found['timeout_s']:g} s" in found["check"]
    assert reason in found["check"]
    assert reason in found["later"]
    assert found["nan"]
    assert found["timeout_s"] < found["seconds"]
    assert {"abort r0", "abort r1"} <= set(found["log"])
    assert found["new"] < ROUNDING


def test_a_rank_alone_is_stuck_in_the_same_way(value):
    found = value("stuck_gemm_of_one_rank")
    for said in (found["check"], found["later"]):
        assert "the GEMM signalled 0 of 1 tiles of group 1 of 3" in said
    assert found["nan"]
    assert "abort r0" in found["log"]
    assert found["new"] < ROUNDING


def test_a_call_of_nccl_that_does_not_return_ends_in_an_error(value):
    found = value("stuck_in_nccl")
    assert f"did not return within {found['timeout_s']:g} s" in found["check"]
    assert "ncclAllReduce" in found["step"]
    assert found["timeout_s"] < found["seconds"]
    assert found["new"] < ROUNDING


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("nccl_error", "NCCL: ncclAllReduce -> internal error (said the fake)"),
        ("nccl_error_in_group", "NCCL: ncclSend/ncclRecv -> internal error (said the fake)"),
        ("nccl_error_at_start", "NCCL: ncclAllReduce -> internal error (said the fake)"),
        ("cuda_error", "CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
)
def test_errors_of_calls_surface_at_the_step(value, scenario, said):
    found = value(scenario)
    for when in ("step", "check", "later"):
        assert said in found[when]
    assert {"abort r0", "abort r1"} <= set(found["log"])  # the other rank must not wait for it
    assert found["new"] < ROUNDING


def test_errors_that_come_later_surface_in_check_and_at_the_next_step(value):
    found = value("async_error")
    for when in ("check", "later"):
        assert "rank 1 of 2 on device 1: NCCL: a collective failed: remote error" in found[when]


def test_the_timeout_is_of_one_collective(value):
    assert value("slow_but_right") is None


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("outside", "group 2 (offset 80, count 49) does not lie in the 128 elements"),
        ("negative", "group 0 (offset -8"),
        ("overlapping", "group 1 (offset 60"),
        ("empty", "group 1 (offset 64, count 0)"),
        ("huge", "group 0 (offset 0, count 4611686018427387904)"),
        ("targets", "group 1 waits for 0 tiles"),
        ("lengths", "must have the same length"),
        ("counters", "counters must be int32, one for each of 3"),
        ("counters_type", "counters must be int32"),
        ("no_result", "need a buffer for the result"),
        ("result", "the result has 128 elements, not 64"),
        ("extra_result", "an all-reduce is in place"),
        ("shares", "group 0 cannot be shared out to 2 ranks"),
        ("collective", "no such collective: broadcast"),
        ("dtype", "dtype is not supported"),
    ],
)
def test_buffers_are_checked(value, case, said):
    assert said in value("buffers_are_checked")[case]


def test_good_buffers_pass(value):
    assert value("buffers_are_checked")["good"] is None


def test_done_needs_its_start(value):
    assert "done without its start" in value("done_without_start")


@pytest.mark.parametrize("case", ["all_reduce", "reduce_scatter", "result"])
def test_a_buffer_that_xla_moved_is_seen(value, case):
    assert "XLA moved a buffer between start and done" in value("moved_buffers")[case]


def test_a_step_that_gives_up_ends_when_the_private_stream_has_left_its_buffers(value):
    found = value("abandoned")
    assert "XLA moved a buffer between start and done" in found["error"]
    assert found["log"].count("d0 private all_reduce 64") == 1
    assert f"d0 rescue memset32 {RELEASED} x3" in found["log"]
    assert found["log"].count("r0 left a collective") == 3


def test_a_start_without_its_done_is_dropped(value):
    found = value("start_without_done")
    assert found["same_counters"]
    assert not found["same_packed"]
    assert found["error"] < ROUNDING


@pytest.mark.parametrize("name", ["plain", "trace"])
def test_events_are_used_again(value, name):
    counts = value("events")[name]
    assert counts[1] > counts[0]
    assert counts[1:] == [counts[1]] * 6


# ---------------------------------------------------------------------------- driven by the host


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_host_driven_path_gives_the_same(value, collective):
    assert value("host")[collective] < ROUNDING


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_sequential_peer_of_the_benchmark_is_right(value, collective):
    assert value("host_sequential")[collective] < 0.05  # of bfloat16 around 1


def test_the_host_driven_path_fails_clearly(value):
    found = value("host")
    assert "packed moved: the GEMM must donate its buffers" in found["not_donated"]
    assert "all_reduce is not complete after 0.3 s" in found["stuck"]


def test_the_host_driven_path_leaves_the_buffers_when_nccl_fails(value):
    found = value("host_nccl_error")
    assert "NCCL error 3" in found["error"]
    assert found["left"]
    assert found["aborts"] == ["abort r0", "abort r1"]
    assert "was aborted after a failure" in found["later"]


# ---------------------------------------------------------------------------- arguments


def transfer(**changes):
    fields = {"collective": "all_reduce", "groups": ((0, 64, 4),), "shape": (8, 8)}
    return Transfer(**{"dtype": "bfloat16", **fields, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"collective": "broadcast"}, "broadcast"),
        ({"enqueue": "later"}, "later"),
        ({"dtype": "uint8"}, "uint8"),
        ({"groups": ()}, "at least one"),
        ({"groups": ((0, 32, 1), (16, 16, 1))}, "does not follow"),
        ({"groups": ((0, 0, 1),)}, "does not follow"),
        ({"groups": ((0, 64, 0),)}, "does not follow"),
        ({"groups": ((0, 65, 1),)}, "end at 65"),
    ],
)
def test_transfers_are_checked(changes, said):
    with pytest.raises(ValueError, match=said):
        transfer(**changes)


def test_what_each_rank_gets():
    assert transfer().result_shape(3) == (8, 8)
    assert transfer(collective="reduce_scatter").result_shape(4) == (2, 8)
    assert transfer(collective="all_to_all").result_shape(4) == (8, 8)
    with pytest.raises(ValueError, match="3 ranks"):
        transfer(collective="all_to_all").result_shape(3)
    assert hash(transfer()) == hash(transfer(groups=[[0, 64, 4]], dtype=jnp.bfloat16))


def test_groups_are_made_of_spans_and_tiles():
    assert groups_of([(0, 8), (8, 16)], [1, 2]) == (Group(0, 8, 1), Group(8, 16, 2))
    with pytest.raises(ValueError, match="zip"):
        groups_of([(0, 8)], [1, 2])


def test_how_much_of_the_communication_is_hidden():
    groups = (traces.GroupTrace(10, 10, 30, 1), traces.GroupTrace(20, 30, 50, 1))
    call = traces.CallTrace(0, 0, 0, "all_reduce", 0.0, 45.0, 55.0, groups)
    assert call.communication_us == 40
    assert call.exposed_us == 10
    assert call.hidden_fraction == 0.75


# ---------------------------------------------------------------------------- compiled for a GPU


@needs_wheels
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_xla_copies_and_reorders_nothing(cache, monkeypatch, collective):
    """Two layers in a row, each a signalling GEMM between start and done."""
    from native.overlap import Communicator, library
    from pallas_kernels import signal_gemm as gemms

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    communicator = object.__new__(Communicator)
    communicator.id, communicator.size = 1, 2
    m, n, k, sms = 2048, 2048, 2048, 116
    ranks = 1 if collective == "all_reduce" else 2
    config = gemms.default(m, n, k, sms, ranks=ranks)
    tiles = gemms.tile_count(m, n, config, ranks)
    groups = gemms.groups_of_waves([1] * gemms.waves_of(tiles, sms), tiles, sms)
    spans = groups_of(gemms.group_spans(groups, config), groups)
    shape = gemms.packed_shape(m, n, config, ranks)
    moved = Transfer(collective, spans, shape, jnp.bfloat16)

    def layer(x, w):
        def gemm(packed, counters):
            options = {"groups": groups, "config": config, "sms": sms, "ranks": ranks}
            gemms.signal_gemm(x, w, counters, packed=packed, **options)

        y = communicator.run(moved, gemm, [x])
        rows = m // 2 if collective == "reduce_scatter" else m
        many = {"groups": groups, "ranks": 2} if collective == "all_to_all" else {}
        y = gemms.unpack(y, rows, n, config, **many)
        return x + jnp.concatenate([y] * (m // rows))

    matrix = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)

    def twice(x, w, w2):
        library.handle()  # here: the platform, made by compile_for_h200, must be there before
        return layer(layer(x, w), w2)

    compiled = compile_for_h200(twice, [matrix] * 3).as_text()
    targets = re.findall(r'custom_call_target="(\w+)"', compiled)
    assert targets == ["jpd_overlap_start", "mosaic_gpu_v2", "jpd_overlap_done"] * 2
    assert " copy(" not in compiled
    assert "copy-start(" not in compiled
