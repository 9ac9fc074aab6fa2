"""What native.overlap does on XLA's CPU with the stand-ins of fake_gpu.cc; prints JSON.

python -m tests.native.overlap_scenarios LIBRARY_OF_THE_STAND_INS

Each scenario is a function of this module that begins with `scenario_`; its value, or the traceback
of what it raised, is what the tests look at. All run in one process, as NCCL is loaded but once.
"""

import ctypes
import dataclasses
import json
import os
import sys
import threading
import time
import traceback

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["NPROC"] = "16"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from native.overlap import Buffers, Communicator, Transfer, groups_of, library
from tests.native import fake_cupy

fake = ctypes.CDLL(sys.argv[1])
fake.fake_log.restype = ctypes.c_char_p
fake.fake_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
fake.fake_reset.restype = None
fake.fake_events.restype = fake.fake_held.restype = ctypes.c_int64

SPANS = ((0, 64), (64, 16), (80, 48))
TILES = (4, 1, 3)
COUNT = 128
PATIENCE_S = 600.0
"""Longer than anything takes on a busy machine."""
SOON_S = 20.0
"""How long to look for what a scenario is about, which comes at once or never."""


def log():
    return fake.fake_log().decode().splitlines()


def devices(count):
    return jax.devices()[:count]


def open_communicator(count, **options):
    fake.fake_reset()
    options = {"warm_up_bytes": 0, "timeout_s": PATIENCE_S, **options}
    return Communicator([devices(count)], **options)


def transfer_of(collective, **options):
    shape = (16, 8)
    return Transfer(collective, groups_of(SPANS, TILES), shape, "float32", **options)


def fake_gemm(values, transfer, missing=-1):
    """Writes `values` to the packed buffer, group after group."""

    def gemm(packed, counters):
        offsets, counts, tiles = np.array(transfer.groups, np.int64).T.copy()
        call = jax.ffi.ffi_call(
            "fake_gemm",
            [jax.typeof(packed[...]), jax.typeof(counters[...])],
            input_output_aliases={1: 0, 2: 1},
        )
        attributes = {"offsets": offsets, "counts": counts, "tiles": tiles}
        packed[...], counters[...] = call(
            values, packed[...], counters[...], missing=np.int64(missing), **attributes
        )

    return gemm


def program(communicator, mesh, transfer, missing=-1, calls=1):
    """values `[ranks, ...]` -> results `[ranks, ...]`, of `calls` calls one after another."""

    def body(values):
        values = values[0]
        for _ in range(calls):
            gemm = fake_gemm(values, transfer, missing)
            result = communicator.run(transfer, gemm, [values])
            if transfer.collective != "reduce_scatter":
                values = result
        return result[None]

    axes = P(mesh.axis_names)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
    return jax.jit(mapped)


def expected(collective, values):
    """Of each rank, in float64, group by group."""
    ranks = len(values)
    flat = values.reshape(ranks, -1).astype(np.float64)
    total = flat.sum(0)
    if collective == "all_reduce":
        return np.stack([total] * ranks).reshape(values.shape)
    results = []
    for rank in range(ranks):
        parts = []
        for offset, count in SPANS:
            share = count // ranks
            if collective == "reduce_scatter":
                parts.append(total[offset:][rank * share : (rank + 1) * share])
            else:
                parts += [
                    flat[source, offset:][rank * share : (rank + 1) * share]
                    for source in range(ranks)
                ]
        results.append(np.concatenate(parts))
    rows = values.shape[1] // (ranks if collective == "reduce_scatter" else 1)
    return np.stack(results).reshape(ranks, rows, values.shape[2])


def random_values(ranks, seed=0):
    return np.random.default_rng(seed).normal(size=(ranks, 16, 8)).astype(np.float32)


def mesh_of(count):
    return jax.sharding.Mesh(np.array(devices(count)), ("tp",))


def error_of(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def largest_errors(repeats, **options):
    found = {}
    for ranks in (1, 2, 4):
        with open_communicator(ranks) as communicator:
            for collective in ("all_reduce", "reduce_scatter", "all_to_all"):
                transfer = transfer_of(collective, **options)
                run = program(communicator, mesh_of(ranks), transfer)
                worst = 0.0
                for seed in range(repeats):
                    values = random_values(ranks, seed)
                    got = np.asarray(run(values))
                    worst = max(worst, np.abs(got - expected(collective, values)).max())
                communicator.check()
                found[f"{collective}-{ranks}"] = float(worst)
    return found


def scenario_results_done():
    return largest_errors(20)


def scenario_results_start():
    return largest_errors(20, enqueue="start")


def scenario_results_trace():
    return largest_errors(3, trace=True)


def scenario_wrong_permutation_is_seen():
    with open_communicator(2) as communicator:
        transfer = transfer_of("all_to_all")
        values = random_values(2)
        got = np.asarray(program(communicator, mesh_of(2), transfer)(values))
        return float(np.abs(got[::-1] - expected("all_to_all", values)).max())


def order_of(collective, **options):
    with open_communicator(2) as communicator:
        run = program(communicator, mesh_of(2), transfer_of(collective, **options))
        values = random_values(2)
        run(values).block_until_ready()
        communicator.wait()
        lines = [line for line in log() if "rescue" not in line]
        fake.fake_reset()
        for _ in range(3):
            run(values).block_until_ready()
        again = sum("record" in line for line in log())
    return {"log": lines, "records_of_three_more": again}


def scenario_order_all_reduce():
    return order_of("all_reduce")


def scenario_order_start():
    return order_of("all_reduce", enqueue="start")


def scenario_order_all_to_all():
    return order_of("all_to_all")


def scenario_order_trace():
    return order_of("reduce_scatter", trace=True)


def scenario_two_calls_in_a_program():
    with open_communicator(2) as communicator:
        values = random_values(2)
        got = program(communicator, mesh_of(2), transfer_of("all_reduce"), calls=3)(values)
        once = expected("all_reduce", values)
        return float(np.abs(np.asarray(got) - 4 * once).max())


def scenario_trace():
    with open_communicator(2) as communicator:
        run = program(communicator, mesh_of(2), transfer_of("all_reduce", trace=True))
        for _ in range(2):
            run(random_values(2)).block_until_ready()
        first = [dataclasses.asdict(call) for call in communicator.trace()]
        return {"calls": first, "again": len(communicator.trace())}


def scenario_mesh_of_two_axes():
    mesh = jax.sharding.Mesh(np.array(devices(4)).reshape(2, 2), ("dp", "tp"))
    fake.fake_reset()
    values = random_values(4)
    found = {}
    for axis, cliques in (("tp", ((0, 1), (2, 3))), ("dp", ((0, 2), (1, 3)))):
        options = {"warm_up_bytes": 1 << 12, "timeout_s": PATIENCE_S}
        with Communicator.for_axis(mesh, axis, **options) as communicator:
            got = np.asarray(program(communicator, mesh, transfer_of("all_reduce"))(values))
        errors = []
        for clique in cliques:
            ours = values[list(clique)]
            errors.append(np.abs(got[list(clique)] - expected("all_reduce", ours)).max())
        found[axis] = float(max(errors))
    return found


def scenario_bfloat16():
    with open_communicator(2) as communicator:
        transfer = Transfer("all_reduce", groups_of(SPANS, TILES), (16, 8), "bfloat16")
        values = jnp.asarray(random_values(2), jnp.bfloat16)
        got = program(communicator, mesh_of(2), transfer)(values)
        right = expected("all_reduce", np.asarray(values, np.float32))
        return float(np.abs(np.asarray(got, np.float32) - right).max() / np.abs(right).max())


def scenario_nccl_version():
    return library.nccl_version()


def scenario_options_reach_nccl():
    with open_communicator(2, max_ctas=16) as communicator:
        text = log()
        id_before = communicator.id
    return {"log": text, "closed": log()[-2:], "id": id_before}


def scenario_wrong_device():
    """A program on a device, by the devices of the communicator: what is said."""
    found = {}
    values = random_values(1)
    for name, ordinals in {"sole": [1], "two": [2, 3], "right": [0]}.items():
        fake.fake_reset()
        chosen = [jax.devices()[ordinal] for ordinal in ordinals]
        with Communicator([chosen], warm_up_bytes=0, timeout_s=PATIENCE_S) as communicator:
            run = program(communicator, mesh_of(1), transfer_of("all_reduce"))
            found[name] = error_of(lambda run=run: run(values).block_until_ready())
    return found


def create(rank, shared, connect_timeout_s, warm_up_bytes=0):
    """Rank `rank` of 2 alone, as of a process of its own: the communicator's number."""
    array = ctypes.c_int * 1
    ids = array(rank), array(rank), array(2), shared
    times = PATIENCE_S, connect_timeout_s
    return library.call("create", 1, *ids, 0, 0, 0, *times, warm_up_bytes)


def scenario_one_process_per_gpu():
    """Two communicators of one rank each, made at the same time, as two processes would."""
    fake.fake_reset()
    shared = library.unique_id()
    made = {}

    def make(rank):
        made[rank] = create(rank, shared, PATIENCE_S, warm_up_bytes=1 << 12)

    threads = [threading.Thread(target=make, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in made.values():
        library.call("check", number)
        library.call("close", number)
    return sorted(line for line in log() if line.startswith(("init", "destroy")))


def scenario_missing_process():
    """Rank 0 of 2 alone: the other never comes."""
    fake.fake_reset()
    begin = time.monotonic()
    error = error_of(lambda: create(0, library.unique_id(), 0.3))
    return {"error": error, "seconds": time.monotonic() - begin}


def within(seconds, happened):
    """Whether `happened()` comes true in time."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def scenario_late_process():
    """Rank 1 comes when rank 0 has given up: both end, and hold nothing."""
    fake.fake_reset()
    held = fake.fake_held()
    shared = library.unique_id()
    errors = [error_of(lambda: create(0, shared, 0.3))]
    errors.append(error_of(lambda: create(1, shared, 0.3, warm_up_bytes=1 << 12)))
    return {
        "errors": errors,
        "aborted": within(SOON_S, lambda: {"abort r0", "abort r1"} <= set(log())),
        "freed": within(SOON_S, lambda: fake.fake_held() <= held),
        "aborts": sum(line.startswith("abort") for line in log()),
    }


def scenario_open_and_close():
    """What a communicator holds, and what is left of it; then one that cannot be opened."""
    fake.fake_reset()
    held = fake.fake_held()
    with open_communicator(2, warm_up_bytes=1 << 12):
        while_open = fake.fake_held() - held
    left = fake.fake_held() - held
    fake.fake_set(b"init_error_in", 0)
    options = {"warm_up_bytes": 0, "connect_timeout_s": PATIENCE_S}
    error = error_of(lambda: Communicator([devices(1)], **options))
    freed = within(SOON_S, lambda: fake.fake_held() <= held)
    return {"while_open": while_open, "left": left, "error": error, "freed": freed}


def scenario_init_error():
    fake.fake_reset()
    fake.fake_set(b"init_error_in", 0)
    options = {"warm_up_bytes": 0, "connect_timeout_s": PATIENCE_S}
    return error_of(lambda: Communicator([devices(1)], **options))


def scenario_exchange():
    """What process 0 passes is what the ranks connect by."""
    passed = []

    def exchange(data):
        passed.append(len(data))
        return data

    with open_communicator(2, exchange=exchange):
        pass
    return {
        "passed": passed,
        "error": error_of(lambda: open_communicator(2, exchange=lambda _: b"")),
    }


def broken_step(
    setting,
    value,
    timeout_s=PATIENCE_S,
    missing=-1,
    collective="all_reduce",
    enqueue="done",
    ranks=2,
):
    """A step with a fault: what it gives, what is said after it, and whether a new one works."""
    with open_communicator(ranks, timeout_s=timeout_s) as communicator:
        transfer = transfer_of(collective, enqueue=enqueue)
        values = random_values(ranks)
        if setting is not None:
            fake.fake_set(setting, value)
        run = program(communicator, mesh_of(ranks), transfer, missing)
        begin = time.monotonic()
        got = []
        step = error_of(lambda: got.append(np.asarray(run(values))))
        after_s = time.monotonic() - begin
        while error_of(communicator.check) is None and time.monotonic() - begin < PATIENCE_S:
            time.sleep(0.01)
        aborts = {f"abort r{rank}" for rank in range(ranks)}  # each rank's has a thread of its own
        while not aborts <= set(log()) and time.monotonic() - begin < PATIENCE_S:
            time.sleep(0.01)
        check = error_of(communicator.check)
        later = error_of(lambda: np.asarray(run(values)))
        result = {
            "step": step,
            "seconds": after_s,
            "check": check,
            "later": later,
            "nan": bool(got and np.isnan(got[0]).all()),
            "log": log(),
        }
    with open_communicator(ranks) as communicator:
        got = np.asarray(program(communicator, mesh_of(ranks), transfer_of(collective))(values))
        result["new"] = float(np.abs(got - expected(collective, values)).max())
    return result


def stuck_step(reason, setting, value, **options):
    """A step in which something is stuck.

    On a busy machine something else may take longer than the time-out; then with longer ones.
    """
    for timeout_s in (0.4, 4.0, 40.0):
        found = broken_step(setting, value, timeout_s=timeout_s, **options)
        if reason in found["check"]:
            break
    return found | {"timeout_s": timeout_s}


def scenario_stuck_collective():
    return stuck_step("a peer is missing", b"stuck_at", 1)


def scenario_stuck_reduce_scatter():
    return stuck_step("a peer is missing", b"stuck_at", 0, collective="reduce_scatter")


def scenario_stuck_gemm():
    return stuck_step("0 of 1 tiles of group 1", None, 0, missing=1)


def scenario_stuck_gemm_of_one_rank():
    return stuck_step(
        "0 of 1 tiles of group 1", None, 0, missing=1, collective="reduce_scatter", ranks=1
    )


def scenario_stuck_in_nccl():
    return stuck_step("a call of NCCL", b"block_in_call", 1)


def scenario_async_error():
    return broken_step(b"async_error_of", 1)


def scenario_nccl_error():
    return broken_step(b"error_in", 2)


def scenario_nccl_error_in_group():
    return broken_step(b"error_in", 3, collective="all_to_all")


def scenario_nccl_error_at_start():
    return broken_step(b"error_in", 1, enqueue="start")


def scenario_cuda_error():
    return broken_step(b"memset_error_in", 0)


def many_calls(timeout_s):
    """Calls that take longer than the time-out in all: the error, and what the longest one took."""
    with open_communicator(2, timeout_s=timeout_s) as communicator:
        run = program(communicator, mesh_of(2), transfer_of("all_reduce"))
        values, error, longest_s = random_values(2), None, 0.0
        end = time.monotonic() + 3.5 * timeout_s
        while error is None and (begin := time.monotonic()) < end:
            error = error_of(lambda: run(values).block_until_ready())
            longest_s = max(longest_s, time.monotonic() - begin)
        return error or error_of(communicator.check), longest_s


def scenario_slow_but_right():
    """No failure, as the time-out is that of a single call; longer ones as in `stuck_step`."""
    for timeout_s in (0.2, 2.0, 20.0):
        error, longest_s = many_calls(timeout_s)
        if error is None or longest_s < timeout_s:
            break
    return error


def scenario_closed():
    communicator = open_communicator(2)
    run = program(communicator, mesh_of(2), transfer_of("all_reduce"))
    run(random_values(2)).block_until_ready()
    communicator.close()
    communicator.close()
    return {
        "run": error_of(lambda: run(random_values(2)).block_until_ready()),
        "check": error_of(communicator.check),
    }


def scenario_closed_under_a_step():
    """Closed while a handler has not come back from its wait: how far that was when close did."""
    communicator = open_communicator(1)
    run, values = program(communicator, mesh_of(1), transfer_of("all_reduce")), random_values(1)
    fake.fake_set(b"late_ms", 1000)
    errors = []
    step = threading.Thread(
        target=lambda: errors.append(error_of(lambda: run(values).block_until_ready()))
    )
    step.start()
    waited = within(PATIENCE_S, lambda: "xla wait_event" in log())
    communicator.close()
    found = {"waited": waited, "went_on": "xla goes on" in log()}
    step.join()
    return found | {"errors": errors}


def scenario_no_effects():
    """Nothing that would take a program off the fast path of jit."""
    with open_communicator(2) as communicator:
        run = program(communicator, mesh_of(2), transfer_of("reduce_scatter"))
        return [type(effect).__name__ for effect in jax.make_jaxpr(run)(random_values(2)).effects]


def scenario_transformations():
    values = jnp.ones((16, 8))
    with open_communicator(1) as communicator:

        def run(values):
            transfer = transfer_of("all_reduce")
            return communicator.run(transfer, fake_gemm(values, transfer), [values]).sum()

        return {
            "grad": error_of(lambda: jax.grad(run)(values)),
            "vmap": error_of(lambda: jax.vmap(run)(values[None])),
        }


def host_results(collective, donate=(0, 1), missing=-1, timeout_s=PATIENCE_S, settings=()):
    from native.overlap.host import HostCommunicator

    fake.fake_reset()
    for setting, value in settings:
        fake.fake_set(setting, value)
    mesh = mesh_of(2)
    sharding = jax.sharding.NamedSharding(mesh, P("tp"))
    transfer = transfer_of(collective)
    values = random_values(2)
    here = jax.device_put(values, sharding)

    def body(values, packed, counters):
        refs = jax.new_ref(packed[0]), jax.new_ref(counters[0])
        fake_gemm(values[0], transfer, missing)(*refs)
        return tuple(jax.freeze(ref)[None] for ref in refs)

    axes = P("tp")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
    gemm = jax.jit(mapped, donate_argnums=[n + 1 for n in donate])

    def zeros(shape, dtype):
        make = jax.jit(lambda: jnp.zeros((2, *shape), dtype), out_shardings=sharding)
        return make()  # not from NumPy, whose memory cannot be donated

    with HostCommunicator(mesh.devices, timeout_s=timeout_s, libcuda=sys.argv[1]) as host:

        def run():
            result = None
            if collective != "all_reduce":
                result = zeros(transfer.result_shape(2), np.float32)
            return host.run(
                transfer,
                lambda packed, counters: gemm(here, packed, counters),
                zeros(transfer.shape, np.float32),
                zeros((len(TILES),), np.int32),
                result,
            )

        if settings:
            found = {"error": error_of(run), "left": all(s.done for s in host._streams)}
            found["aborts"] = sorted(line for line in log() if line.startswith("abort"))
            return found | {"later": error_of(run) if found["left"] else None}
        got = run()
    return float(np.abs(np.asarray(got) - expected(collective, values)).max())


def scenario_host():
    collectives = "all_reduce", "reduce_scatter", "all_to_all"
    found = {collective: host_results(collective) for collective in collectives}
    found["log"] = log()
    found["not_donated"] = error_of(lambda: host_results("all_reduce", donate=(1,)))
    stuck = {"missing": 1, "timeout_s": 0.3}
    found["stuck"] = error_of(lambda: host_results("all_reduce", **stuck))
    return found


def scenario_host_nccl_error():
    """The second rank's call of the second group fails, in a group with one that is then stuck."""
    return host_results("all_reduce", settings=[(b"error_in", 3)])


def scenario_host_sequential():
    """The benchmark's peer, two calls in a row on the same buffers: worst error of each op."""
    from benchmarks.overlap_cases import Case, Shape
    from benchmarks.overlap_host import HostSequential
    from benchmarks.overlap_time import AXIS, operands
    from jpd.ops.overlap.plain import collective
    from native.overlap.host import HostCommunicator

    mesh, shape, found = jax.sharding.Mesh(np.array(devices(2)), (AXIS,)), Shape(16, 8, 4), {}
    xs, ws = operands(mesh, *shape, 2)
    for op in ("all_reduce", "reduce_scatter", "all_to_all"):
        fake.fake_reset()

        def right(x, w, op=op):
            y = x.astype(jnp.float32) @ w.astype(jnp.float32).T
            return collective(op, y, AXIS)[None]

        split = P(None, AXIS)
        options = {"in_specs": (split, split), "out_specs": P(AXIS), "check_vma": False}
        reference = jax.shard_map(right, mesh=mesh, **options)
        with HostCommunicator(devices(2), timeout_s=PATIENCE_S, libcuda=sys.argv[1]) as host:
            peer = HostSequential(host, mesh, Case("nvlink", 2, op, shape))
            errors = [
                # Not on the host: what was read there is not overwritten by the next call.
                float(jnp.abs(peer(x, w).astype(jnp.float32) - reference(x, w)).max())
                for x, w in zip(xs, ws, strict=True)
            ]
        found[op] = max(errors)
    return found


def call(target, communicator, operands, results, aliases, attributes):
    """One FFI call on device 0, past the checks of Python."""
    made = jax.ffi.ffi_call(target, results, input_output_aliases=aliases, has_side_effect=True)

    def body(*values):
        return made(*values, communicator=np.int64(communicator.id), **attributes)

    return error_of(lambda: jax.block_until_ready(jax.jit(body)(*operands)))


def scenario_buffers_are_checked():
    good = transfer_of("all_reduce").attributes("start")
    f32, s32 = jnp.float32, jnp.int32
    packed, counters = jax.ShapeDtypeStruct((16, 8), f32), jax.ShapeDtypeStruct((3,), s32)
    cases = {
        "outside": ({"counts": np.array([64, 16, 49])}, [packed, counters]),
        "negative": ({"offsets": np.array([-8, 64, 80])}, [packed, counters]),
        "overlapping": ({"offsets": np.array([0, 60, 80])}, [packed, counters]),
        "empty": ({"counts": np.array([64, 0, 48])}, [packed, counters]),
        "huge": ({"counts": np.array([2**62, 16, 48])}, [packed, counters]),
        "targets": ({"targets": np.array([4, 0, 3])}, [packed, counters]),
        "lengths": ({"targets": np.array([4, 1])}, [packed, counters]),
        "counters": ({}, [packed, jax.ShapeDtypeStruct((2,), s32)]),
        "counters_type": ({}, [packed, jax.ShapeDtypeStruct((3,), f32)]),
        "no_result": ({"collective": "reduce_scatter"}, [packed, counters]),
        "result": ({"collective": "reduce_scatter"}, [packed, counters, packed]),
        "extra_result": ({}, [packed, counters, packed]),
        "shares": ({"collective": "all_to_all", "counts": np.array([63, 16, 48])},
                   [packed, counters, packed]),
        "collective": ({"collective": "broadcast"}, [packed, counters]),
        "dtype": ({}, [jax.ShapeDtypeStruct((16, 8), jnp.uint8), counters]),
    }  # fmt: skip
    with open_communicator(2) as communicator:
        found = {
            name: call(library.START, communicator, [], results, {}, {**good, **change})
            for name, (change, results) in cases.items()
        }
        found["good"] = call(library.START, communicator, [], [packed, counters], {}, good)
        communicator.check()  # what is wrong with one call is no failure of the communicator
    return found


def scenario_done_without_start():
    attributes = transfer_of("all_reduce").attributes("done")
    values, zeros = jnp.zeros((16, 8), jnp.float32), jnp.zeros(3, jnp.int32)
    results = [jax.typeof(values), jax.typeof(zeros)]
    with open_communicator(2) as communicator:
        return call(library.DONE, communicator, [values, zeros], results, {0: 0, 1: 1}, attributes)


def moved_buffer(collective, name, enqueue="done", settings=()):
    """A copy of one buffer between start and done, which XLA must never make: what is said."""
    transfer = transfer_of(collective, enqueue=enqueue)
    with open_communicator(1, timeout_s=SOON_S) as communicator:
        for setting, value in settings:
            fake.fake_set(setting, value)

        def body(values):
            buffers = communicator.start(transfer, [values])
            moved = buffers._replace(**{name: getattr(buffers, name) * 1.0 + values})
            return communicator.done(transfer, moved)[0], getattr(buffers, name)

        error = error_of(lambda: jax.block_until_ready(jax.jit(body)(jnp.ones((16, 8)))))
        return {"error": error, "log": log()}


def scenario_moved_buffers():
    return {
        "all_reduce": moved_buffer("all_reduce", "packed")["error"],
        "reduce_scatter": moved_buffer("reduce_scatter", "packed")["error"],
        "result": moved_buffer("reduce_scatter", "result")["error"],
    }


def scenario_abandoned():
    """A handler gives up when waits and a stuck collective are on the private stream already, and
    NCCL takes its time to abort: what has happened when the step ends."""
    settings = [(b"stuck_at", 0), (b"slow_abort_ms", 500)]
    return moved_buffer("all_reduce", "packed", "start", settings)


def scenario_start_without_done():
    """A program breaks off after start; the next one has other data in the same counters."""
    transfer, values = transfer_of("all_reduce"), jnp.asarray(random_values(1)[0])
    attributes = transfer.attributes("start")
    with open_communicator(1) as communicator:

        def begin(packed, counters):
            call = jax.ffi.ffi_call(
                library.START,
                [jax.typeof(packed), jax.typeof(counters)],
                input_output_aliases={0: 0, 1: 1},
                has_side_effect=True,
            )
            return call(packed, counters, communicator=np.int64(communicator.id), **attributes)

        def whole(packed, counters):
            refs = [jax.new_ref(buffer) for buffer in begin(packed, counters)]
            fake_gemm(values, transfer)(*refs)
            return communicator.done(transfer, Buffers(*map(jax.freeze, refs), None))

        def zeros(shape, dtype):
            return jax.jit(lambda: jnp.zeros(shape, dtype))()  # not NumPy's, see host_results

        first, counters = jax.jit(begin, donate_argnums=(0, 1))(
            zeros((16, 8), jnp.float32), zeros((3,), jnp.int32)
        )
        place = counters.unsafe_buffer_pointer()
        got, counters = jax.jit(whole, donate_argnums=(0, 1))(zeros((16, 8), jnp.float32), counters)
        communicator.wait()
        return {
            "same_counters": counters.unsafe_buffer_pointer() == place,
            "same_packed": got.unsafe_buffer_pointer() == first.unsafe_buffer_pointer(),
            "error": float(jnp.abs(got - values).max()),
        }


def scenario_events():
    """How many events were made before each of six calls, and in all."""
    found = {}
    for name, traced in {"plain": False, "trace": True}.items():
        with open_communicator(2) as communicator:
            run = program(communicator, mesh_of(2), transfer_of("all_reduce", trace=traced))
            counts = [fake.fake_events()]
            for seed in range(6):
                run(random_values(2, seed)).block_until_ready()
                communicator.trace()  # waits, and gives the events of a trace back
                counts.append(fake.fake_events())
            found[name] = counts
    return found


def scenario_counters_are_returned():
    transfer = transfer_of("all_reduce")
    with open_communicator(1) as communicator:

        def body(values):
            buffers = communicator.start(transfer, [values])
            packed, counters = jax.new_ref(buffers.packed), jax.new_ref(buffers.counters)
            fake_gemm(values, transfer)(packed, counters)
            buffers = buffers._replace(packed=jax.freeze(packed), counters=jax.freeze(counters))
            return communicator.done(transfer, buffers)[1]

        return np.asarray(jax.jit(body)(jnp.ones((16, 8)))).tolist()


def main():
    fake.fake_reset()
    fake.fake_set(b"version", 21700)
    results = {"old_nccl": error_of(lambda: library.start(sys.argv[1], sys.argv[1]))}
    results["no_library"] = error_of(lambda: library.start("libnowhere.so", sys.argv[1]))
    fake.fake_reset()
    library.start(sys.argv[1], sys.argv[1])
    jax.ffi.register_ffi_target("fake_gemm", jax.ffi.pycapsule(fake.FakeGemm), platform="cpu")
    fake_cupy.install(fake)
    only = sys.argv[2:]
    for name, scenario in list(globals().items()):
        if not name.startswith("scenario_") or (only and name not in only):
            continue
        name = name.removeprefix("scenario_")
        print(name, file=sys.stderr, flush=True)
        begin = time.monotonic()
        try:
            results[name] = {"value": scenario()}
        except Exception:
            results[name] = {"raised": traceback.format_exc()}
        results[name]["seconds"] = time.monotonic() - begin
    print(json.dumps(results))


if __name__ == "__main__":
    main()
