"""The ops on two GPUs or more, with NCCL and the real kernel: `pytest -m multigpu`."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpd.config import KernelConfig
from jpd.ops import overlap, registry, sum_check
from jpd.ops.self_check import Widths
from jpd.overlap import OPS, Plan, PlanTable, Tiling, Trace
from native.overlap import Communicator
from pallas_kernels import signal_gemm
from pallas_kernels.signal_gemm.schedule import partitions
from tests.overlap.eight_devices import (
    CALLS,
    PLAIN,
    SPECS,
    arrays,
    difference,
    gradients,
    mesh_of,
    on_mesh,
)

GPUS = jax.device_count() if jax.default_backend() == "gpu" else 0
RANKS = [ranks for ranks in (2, 4, 8) if ranks <= GPUS] or [2]
TILING = Tiling(128, 128, 4, "m", "m", 4)
SMS, CTAS = 100, 16
M, N, K = 2048, 2560, 512  # 320 tiles in 4 waves

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs or more"),
]


@functools.cache
def communicator(ranks):
    """Kept open: it ends with the process."""
    return Communicator.for_axis(mesh_of(ranks), "tp", max_ctas=CTAS, timeout_s=20.0)


def plan_of(op, ranks, waves=None, m=M, n=N, k=K, tiling=TILING):
    config = signal_gemm.SignalConfig(**dataclasses.asdict(tiling))
    tiles = signal_gemm.tile_count(m, n, config, 1 if op == "all_reduce" else ranks)
    waves = waves or (1,) * signal_gemm.waves_of(tiles, SMS)
    shape = {"op": op, "ranks": ranks, "m": m, "n": n, "k": k}
    return Plan(**shape, overlap=True, tiling=tiling, sms=SMS, ctas=CTAS, waves=waves)


def overlapped(op, ranks, plan, **options):
    call = functools.partial(
        CALLS[op], axis_name="tp", implementation="overlap", plan=plan, **options
    )
    return on_mesh(call, ranks, SPECS[op], check_vma=False)


def compared(op, ranks, plan, x, w, repeats=1):
    """Largest error against XLA's composition on float32 copies, over many calls."""
    exact = on_mesh(PLAIN[op], ranks, SPECS[op])
    with overlap.using(communicators={"tp": communicator(ranks)}):
        run = overlapped(op, ranks, plan)
        results = [(run(x * s, w), s) for s in (1 + np.arange(repeats) % 3).tolist()]
    with jax.default_matmul_precision("highest"):
        want = np.asarray(exact(x.astype(jnp.float32), w.astype(jnp.float32)))
    communicator(ranks).check()
    return max(difference(np.asarray(got, np.float32), s * want) for got, s in results)


@pytest.mark.parametrize(("op", "ranks"), [*itertools.product(OPS, RANKS)])
def test_every_partition(op, ranks):
    x, w = arrays(ranks, jnp.bfloat16, M, N, K)
    for waves in partitions(4):
        assert compared(op, ranks, plan_of(op, ranks, waves), x, w) < 6e-3, waves


@pytest.mark.parametrize(("op", "ranks"), [*itertools.product(OPS, RANKS)])
def test_a_hundred_repeats_with_ragged_rows_and_columns(op, ranks):
    m, n, k = 1000, 1160, 320
    x, w = arrays(ranks, jnp.bfloat16, m, n, k)
    plan = plan_of(op, ranks, m=m, n=n, k=k, tiling=dataclasses.replace(TILING, tile_m=256))
    assert compared(op, ranks, plan, x, w, repeats=100) < 6e-3


@pytest.mark.parametrize("op", OPS)
def test_float16_and_gradients(op):
    m, n, k = 512, 512, 256
    x, w = arrays(2, jnp.float16, m, n, k)
    plan = plan_of(op, 2, m=m, n=n, k=k)
    assert compared(op, 2, plan, x, w) < 2e-3
    call = functools.partial(CALLS[op], axis_name="tp", implementation="overlap", plan=plan)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    with overlap.using(communicators={"tp": communicator(2)}):
        got = gradients(call, op, 2, False)(x, w)
    want = gradients(PLAIN[op], op, 2, False)(x, w)
    assert max(map(difference, got, want)) < 2e-2


@pytest.mark.parametrize("ranks", RANKS)
def test_a_wrong_permutation_is_caught(ranks):
    op = "all_reduce"
    x, w = arrays(ranks, jnp.bfloat16, M, N, K)
    plan = plan_of(op, ranks)

    def right_and_wrong(x, w):
        y = CALLS[op](x, w, "tp", packed=True, implementation="overlap", plan=plan)
        config = dataclasses.replace(y.layout.config, grid_tile_width=1)
        wrong = dataclasses.replace(y.layout, config=config)
        return overlap.unpack(y), overlap.unpack(overlap.Packed(y.data, wrong))

    with overlap.using(communicators={"tp": communicator(ranks)}):
        right, wrong = on_mesh(right_and_wrong, ranks, SPECS[op], check_vma=False)(x, w)
    want = on_mesh(PLAIN[op], ranks, SPECS[op])(x, w)
    assert difference(right, want) < 6e-3
    assert difference(wrong, want) > 0.3


@pytest.mark.parametrize("ranks", RANKS)
def test_norms_read_what_was_sent(ranks):
    op = "all_reduce"
    x, w = arrays(ranks, jnp.bfloat16, M, N, K)
    plan = plan_of(op, ranks)
    residual = jax.random.normal(jax.random.key(1), (M, N), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(2), (N,), jnp.bfloat16)

    def normed(reorder):
        def body(x, w):
            y = CALLS[op](x, w, "tp", packed=True, implementation="overlap", plan=plan)
            return overlap.rms_norm_residual(y, residual, weight, 1e-5)

        using = overlap.using(communicators={"tp": communicator(ranks)}, reorder=reorder)
        with using, registry.recording() as taken:
            outs = on_mesh(body, ranks, P(), check_vma=False)(x, w)
        assert ("rms_norm_residual", reorder) in {choice[:2] for choice in taken}
        return outs

    wants = normed("xla")
    for reorder in ("pallas", "alone"):
        for got, want in zip(normed(reorder), wants, strict=True):
            assert difference(got, want) < 4e-3
    with jax.default_matmul_precision("highest"):
        sums = on_mesh(PLAIN[op], ranks, SPECS[op])(x.astype(jnp.float32), w.astype(jnp.float32))
    assert difference(wants[1], sums + residual) < 6e-3
    communicator(ranks).check()


@pytest.mark.parametrize("ranks", RANKS)
def test_the_check_at_the_start_of_an_engine_runs_what_steps_will(ranks):
    """Communicators and all, made as an engine makes them."""
    mesh = mesh_of(ranks)
    weight = jax.random.normal(jax.random.key(3), (N, ranks * K), jnp.bfloat16)
    weight = jax.device_put(weight, NamedSharding(mesh, P(None, "tp")))
    widths = Widths(N, 4, 4, 128, 16, (None,), "bfloat16", 1e-5, False, True)
    table = PlanTable(overlap.topology(), [plan_of("all_reduce", ranks)])
    with overlap.using(plans=table):
        sums = [sum_check.Sum("down", weight, (M // 2, M))]
        lines = sum_check.run(widths, KernelConfig(), sums, mesh)
    assert [line.split(" bfloat16")[0] for line in lines] == ["matmul_all_reduce down"]
    assert lines[0].endswith(f" on {ranks} ranks by overlap, pallas")


def test_collectives_run_behind_the_gemm():
    op, m, n, k = "all_reduce", 8192, 8192, 4096
    x, w = arrays(2, jnp.bfloat16, m, n, k)
    plan = plan_of(op, 2, waves=(10, 10, 10, 11), m=m, n=n, k=k)
    with overlap.using(communicators={"tp": communicator(2)}, trace=True):
        run = overlapped(op, 2, plan)
        for _ in range(5):
            run(x, w).block_until_ready()
    calls = [Trace.of_call(call) for call in communicator(2).trace()]
    assert all(trace.premature() == () for trace in calls)
    hidden = np.median([trace.fraction_hidden for trace in calls])
    assert hidden > 0.3, calls[-1]
