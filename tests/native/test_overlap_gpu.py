"""native.overlap on GPUs: pallas_kernels.signal_gemm and NCCL against XLA's own.

JAX_PLATFORMS=cuda python -m pytest tests/native/test_overlap_gpu.py

On one GPU those of one rank run: nobody is sent to, but start, waits, copies and done are the same.
Those of several are `-m multigpu`.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from native.overlap import Communicator, OverlapError, Transfer, groups_of
from pallas_kernels import signal_gemm as gemms

GPUS = 0 if os.environ["JAX_PLATFORMS"] == "cpu" else jax.device_count()
pytestmark = pytest.mark.skipif(GPUS < 1, reason="needs a GPU: JAX_PLATFORMS=cuda")
MULTIGPU = (
    pytest.mark.multigpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs: JAX_PLATFORMS=cuda"),
)
MANY = max(2, 1 << max(0, GPUS.bit_length() - 1))
"""Ranks: as many as there are GPUs, a power of two."""

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_to_all")
SMS = 116
RTOL = 8e-3
"""Relative error of bf16 sums of float32 products that were rounded to bf16 first."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, id="one"), pytest.param(MANY, id="many", marks=MULTIGPU)],
)
def mesh(request):
    return jax.sharding.Mesh(np.array(jax.devices()[: request.param]), ("tp",))


@pytest.fixture(scope="module")
def communicator(mesh):
    with Communicator.for_axis(mesh, "tp", max_ctas=16, timeout_s=30) as made:
        yield made
        made.check()


def operands(mesh, m, n, k, seed=0):
    """x `[ranks, m, k]` and w `[ranks, n, k]`, another for each GPU."""
    place = NamedSharding(mesh, P("tp"))
    keys = jax.random.split(jax.random.key(seed))
    shapes = (m, k), (n, k)
    return [
        jax.device_put(jax.random.normal(key, (mesh.size, *shape), jnp.bfloat16), place)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def cut(collective, ranks, m, n, k, waves=None, **options):
    """Configuration, groups and transfer of a product; `waves` of each group, None: one each."""
    shares = 1 if collective == "all_reduce" else ranks
    config = gemms.default(m, n, k, SMS, ranks=shares)
    tiles = gemms.tile_count(m, n, config, shares)
    waves = waves or [1] * gemms.waves_of(tiles, SMS)
    groups = gemms.groups_of_waves(waves, tiles, SMS)
    spans = groups_of(gemms.group_spans(groups, config), groups)
    shape = gemms.packed_shape(m, n, config, shares)
    return config, groups, Transfer(collective, spans, shape, jnp.bfloat16, **options)


def overlapped(communicator, mesh, collective, m, n, k, waves=None, signals=True, **options):
    ranks = mesh.size
    config, groups, transfer = cut(collective, ranks, m, n, k, waves, **options)
    shares = 1 if collective == "all_reduce" else ranks

    def body(x, w):
        def gemm(packed, counters):
            raised = counters if signals else jax.new_ref(jnp.zeros(len(groups), jnp.int32))
            static = {"groups": groups, "config": config, "sms": SMS, "ranks": shares}
            gemms.signal_gemm(x[0], w[0], raised, packed=packed, **static)

        y = communicator.run(transfer, gemm, [x])
        rows = m // ranks if collective == "reduce_scatter" else m
        many = {"groups": groups, "ranks": ranks} if collective == "all_to_all" else {}
        return gemms.unpack(y, rows, n, config, **many)[None]

    return on(mesh, body)


def reference(mesh, collective):
    def body(x, w):
        y = lax.dot_general(x[0], w[0], (((1,), (1,)), ((), ())))
        if collective == "all_reduce":
            y = lax.psum(y, "tp")
        elif collective == "reduce_scatter":
            y = lax.psum_scatter(y, "tp", tiled=True)
        else:
            y = lax.all_to_all(y, "tp", 0, 0, tiled=True)
        return y[None]

    return on(mesh, body)


def on(mesh, body):
    axes = P("tp")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
    return jax.jit(mapped)


def error(got, right):
    got, right = (np.asarray(a, np.float32) for a in (got, right))
    return np.linalg.norm(got - right) / np.linalg.norm(right)


@pytest.mark.parametrize("m", [1024, 1016, 24])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_equals_xla(communicator, mesh, collective, m):
    n, k = 1536, 512
    x, w = operands(mesh, m, n, k)
    right = reference(mesh, collective)(x, w)
    for enqueue in ("done", "start"):
        for trace in (False, True):
            options = {"enqueue": enqueue, "trace": trace}
            got = overlapped(communicator, mesh, collective, m, n, k, **options)(x, w)
            assert error(got, right) < RTOL
    communicator.check()


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_partition(communicator, mesh, collective):
    m, n, k = 4096, 3072, 256
    x, w = operands(mesh, m, n, k)
    right = reference(mesh, collective)(x, w)
    _, groups, _ = cut(collective, mesh.size, m, n, k)
    for waves in gemms.partitions(len(groups)):
        got = overlapped(communicator, mesh, collective, m, n, k, waves)(x, w)
        assert error(got, right) < RTOL, waves


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_hundred_times_on_the_same_buffers(communicator, mesh, collective):
    m, n, k = 2048, 2048, 512
    run, check = overlapped(communicator, mesh, collective, m, n, k), reference(mesh, collective)
    pairs = [operands(mesh, m, n, k, seed) for seed in range(4)]
    rights = [check(*pair) for pair in pairs]
    for i in range(100):
        assert error(run(*pairs[i % 4]), rights[i % 4]) < RTOL, i


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter"])
def test_many_in_flight(communicator, mesh, collective):
    """The host runs far ahead: no result may be another call's."""
    m, n, k = 2048, 2048, 512
    run = overlapped(communicator, mesh, collective, m, n, k)
    pairs = [operands(mesh, m, n, k, seed) for seed in range(4)]
    rights = [reference(mesh, collective)(*pair) for pair in pairs]
    got = [run(*pairs[i % 4]) for i in range(60)]
    for i, result in enumerate(got):
        assert error(result, rights[i % 4]) < RTOL, i


@pytest.mark.parametrize("mesh", [pytest.param(MANY, id="many", marks=MULTIGPU)], indirect=True)
def test_a_wrong_permutation_is_seen(communicator, mesh):
    m, n, k = 1024, 1536, 512
    x, w = operands(mesh, m, n, k)
    got = overlapped(communicator, mesh, "reduce_scatter", m, n, k)(x, w)
    right = reference(mesh, "reduce_scatter")(x, w)
    assert error(got[::-1], right) > 0.5
    swapped = np.asarray(got, np.float32)
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert error(swapped, right) > RTOL


def test_the_host_driven_path_is_the_same(mesh):
    from native.overlap.host import HostCommunicator

    m, n, k = 1024, 1536, 512
    x, w = operands(mesh, m, n, k)
    place = NamedSharding(mesh, P("tp"))
    for collective in COLLECTIVES:
        config, groups, transfer = cut(collective, mesh.size, m, n, k)
        shares = 1 if collective == "all_reduce" else mesh.size

        def body(x, w, packed, counters, config=config, groups=groups, shares=shares):
            packed, counters = jax.new_ref(packed[0]), jax.new_ref(counters[0])
            static = {"groups": groups, "config": config, "sms": SMS, "ranks": shares}
            gemms.signal_gemm(x[0], w[0], counters, packed=packed, **static)
            return jax.freeze(packed)[None], jax.freeze(counters)[None]

        def zeros(shape, dtype):
            make = jax.jit(lambda: jnp.zeros((mesh.size, *shape), dtype), out_shardings=place)
            return make()

        axes = P("tp")
        mapped = jax.shard_map(body, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
        gemm = jax.jit(mapped, donate_argnums=(2, 3))
        result = None
        if collective != "all_reduce":
            result = zeros(transfer.result_shape(mesh.size), jnp.bfloat16)
        with HostCommunicator(mesh.devices.tolist(), timeout_s=30) as host:
            got = host.run(
                transfer,
                lambda packed, counters, gemm=gemm: gemm(x, w, packed, counters),
                zeros(transfer.shape, jnp.bfloat16),
                zeros((len(groups),), jnp.int32),
                result,
            )
        rows = m // mesh.size if collective == "reduce_scatter" else m
        many = {"groups": groups, "ranks": mesh.size} if collective == "all_to_all" else {}
        ours = [gemms.unpack(part, rows, n, config, **many) for part in np.asarray(got)]
        assert error(np.stack(ours), reference(mesh, collective)(x, w)) < RTOL


def test_a_trace_has_times_in_order(communicator, mesh):
    m, n, k = 8192, 8192, 2048
    x, w = operands(mesh, m, n, k)
    run = overlapped(communicator, mesh, "all_reduce", m, n, k, trace=True)
    communicator.trace()
    for _ in range(3):
        run(x, w).block_until_ready()
    calls = communicator.trace()
    assert len(calls) == 3 * mesh.size
    for call in calls:
        ends = [0.0, *(group.end_us for group in call.groups)]
        for before, group in zip(ends, call.groups, strict=False):
            assert before <= group.start_us + 1 <= group.end_us + 1
            assert group.signal_us <= group.start_us
        assert ends[-1] <= call.end_us + 1


@pytest.mark.parametrize("collective", ["reduce_scatter", "all_to_all"])
def test_what_is_ready_is_sent_while_the_gemm_computes(communicator, mesh, collective):
    """On one rank a copy on the device. A host that is busy may come late: not in every call."""
    m, n, k = 8192, 8192, 4096
    x, w = operands(mesh, m, n, k)
    run = overlapped(communicator, mesh, collective, m, n, k, trace=True)
    run(x, w).block_until_ready()
    communicator.trace()
    for _ in range(10):
        run(x, w).block_until_ready()
    calls = communicator.trace()
    beside = {call.rank for call in calls if call.groups[0].end_us < call.gemm_end_us}
    assert beside == set(range(mesh.size)), calls[-1]


@pytest.mark.parametrize(
    ("mesh", "fault", "collective"),
    [
        pytest.param(1, "gemm", "reduce_scatter", id="one-gemm"),
        pytest.param(MANY, "gemm", "all_reduce", id="many-gemm", marks=MULTIGPU),
        pytest.param(MANY, "peer", "all_reduce", id="many-peer", marks=MULTIGPU),
    ],
    indirect=["mesh"],
)
def test_what_is_stuck_ends_in_an_error_and_nan(mesh, fault, collective):
    """A GEMM that never signals; a rank that never calls."""
    m, n, k = 1024, 1536, 512
    with Communicator.for_axis(mesh, "tp", max_ctas=16, timeout_s=2) as broken:
        if fault == "gemm":
            run = overlapped(broken, mesh, collective, m, n, k, signals=False)
            pair = operands(mesh, m, n, k)
        else:
            alone = jax.sharding.Mesh(mesh.devices[:1], ("tp",))
            run = overlapped(broken, alone, collective, m, n, k)
            pair = operands(alone, m, n, k)
        got = np.asarray(run(*pair), np.float32)
        assert np.isnan(got).all()
        said = "the GEMM signalled 0 of" if fault == "gemm" else "a peer is missing"
        with pytest.raises(OverlapError, match=said):
            broken.check()
        with pytest.raises(Exception, match="is not complete after 2 s"):
            jax.block_until_ready(run(*pair))
    x, w = operands(mesh, m, n, k)
    with Communicator.for_axis(mesh, "tp", max_ctas=16, timeout_s=30) as fresh:
        got = overlapped(fresh, mesh, collective, m, n, k)(x, w)
        assert error(got, reference(mesh, collective)(x, w)) < RTOL
