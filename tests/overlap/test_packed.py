"""Un-permuting, alone and inside the norm, on one device; wrong permutations must not pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpd import ops
from jpd.config import KernelConfig
from jpd.errors import ConfigError
from jpd.ops import overlap
from jpd.ops.overlap.tiles import tiles_of
from jpd.overlap import OPS, BandwidthCurve, Plan, Tiling, search
from pallas_kernels import signal_gemm
from pallas_kernels.signal_gemm import SignalConfig

CONFIG = SignalConfig(tile_m=64, tile_n=128, stages=2, wg_dimension="n", grid_tile_width=2)
SHAPES = [
    # m, n, groups, ranks; ragged in rows and columns
    (200, 264, (2, 3, 7), 1),
    (64, 128, (1,), 1),
    (200, 264, (4, 1, 1, 6), 2),
    (264, 136, (9, 1), 8),
]


def matrix(m, n):
    return jax.random.normal(jax.random.key(m + n), (m, n))


def packed_of(y, groups, ranks):
    data = signal_gemm.pack(y, CONFIG, groups=groups, ranks=ranks)
    layout = overlap.Layout(*y.shape, CONFIG.part_m(ranks), CONFIG, groups, ranks)
    return overlap.Packed(data, layout)


@pytest.mark.parametrize(("m", "n", "groups", "ranks"), SHAPES)
def test_unpack_is_the_inverse_of_pack(m, n, groups, ranks):
    y = matrix(m, n)
    packed = packed_of(y, groups, ranks)
    # Padding must not reach the result.
    used = signal_gemm.pack(jnp.ones_like(y), CONFIG, groups=groups, ranks=ranks)
    poisoned = dataclasses.replace(packed, data=jnp.where(used == 1, packed.data, jnp.nan))
    np.testing.assert_array_equal(jax.jit(overlap.unpack)(poisoned), y)
    np.testing.assert_array_equal(
        overlap.unpack(packed),
        signal_gemm.unpack(packed.data, m, n, CONFIG, groups=groups, ranks=ranks),
    )
    np.testing.assert_array_equal(overlap.unpack(y), y)


def test_a_wrong_permutation_is_caught():
    """Each of the ways to be wrong about the order gives another matrix, and another norm."""
    m, n, groups, ranks = 256, 512, (2, 4, 10), 2
    y = matrix(m, n)
    packed = packed_of(y, groups, ranks)
    zeros, ones = jnp.zeros_like(y), jnp.ones(n)
    right = overlap.rms_norm_residual(packed, zeros, ones, 1e-6)[0]
    wrong = {
        "groups": {"groups": (4, 2, 10)},
        "one group": {"groups": (16,)},
        "width": {"config": dataclasses.replace(CONFIG, grid_tile_width=1)},
        "minor": {"config": dataclasses.replace(CONFIG, grid_minor="n")},
        "ranks": {"ranks": 1},
    }
    for name, changes in wrong.items():
        layout = dataclasses.replace(packed.layout, **changes)
        if name == "ranks":
            layout = dataclasses.replace(layout, groups=(4, 8, 20))
        other = overlap.Packed(packed.data, layout)
        assert relative(overlap.unpack(other), y) > 0.3, name
        assert relative(overlap.rms_norm_residual(other, zeros, ones, 1e-6)[0], right) > 0.3, name
    assert relative(overlap.unpack(packed), y) == 0


def relative(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize(("m", "n", "groups", "ranks"), SHAPES)
def test_the_norm_reads_packed_results(m, n, groups, ranks):
    y, residual, weight = matrix(m, n), matrix(m, n) * 2 + 1, matrix(1, n)[0]
    normed, total = overlap.rms_norm_residual(packed_of(y, groups, ranks), residual, weight, 1e-5)
    want = np.asarray(y, np.float64) + np.asarray(residual, np.float64)
    np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-6)
    want = want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight)
    np.testing.assert_allclose(normed, want, rtol=1e-4, atol=1e-5)
    plain = overlap.rms_norm_residual(y, residual, weight, 1e-5)
    np.testing.assert_allclose(normed, plain[0], rtol=1e-5, atol=1e-6)


def test_unpacking_is_one_gather_of_runs():
    packed = packed_of(matrix(200, 264), (2, 3, 7), 1)
    text = str(jax.make_jaxpr(overlap.unpack)(packed))
    assert text.count("gather[") == 1
    assert "slice_sizes=(1, 128)" in text
    assert "scatter" not in text
    assert "transpose" not in text


def test_shapes_that_do_not_fit_are_refused():
    packed = packed_of(matrix(200, 264), (2, 3, 7), 1)
    with pytest.raises(ValueError, match=r"the buffer is \(6, 64, 128\)"):
        overlap.unpack(overlap.Packed(packed.data[:6], packed.layout))
    with pytest.raises(ValueError, match="groups"):
        overlap.unpack(
            overlap.Packed(packed.data, dataclasses.replace(packed.layout, groups=(2, 3)))
        )
    with pytest.raises(ValueError, match="residual"):
        overlap.rms_norm_residual(packed, matrix(200, 263), jnp.ones(264), 1e-5)


def test_a_plan_for_a_nearby_shape_makes_groups_of_whole_waves():
    tiling = Tiling(64, 128, 2, "n", "m", 2)
    assert dataclasses.asdict(SignalConfig(**dataclasses.asdict(tiling))) == dataclasses.asdict(
        tiling
    )
    plan = Plan(
        op="reduce_scatter",
        ranks=4,
        m=512,
        n=512,
        k=64,
        overlap=True,
        tiling=tiling,
        sms=4,
        ctas=8,
        waves=(1, 3, 4),
    )
    own = tiles_of("reduce_scatter", 4, 512, 512, plan)
    assert own.groups == (4, 12, 16)
    assert own.layout.m == 128
    near = tiles_of("reduce_scatter", 4, 720, 512, plan)  # 48 tiles in 12 waves
    assert near.groups == (8, 16, 24)
    assert near.layout.part_m == 16
    with pytest.raises(NotImplementedError, match="3 ranks"):
        tiles_of("all_to_all", 3, 720, 512, plan)


@pytest.mark.parametrize("op", OPS)
def test_what_is_searched_is_what_is_sent(op):
    """From times to a plan, and from the plan to groups whose bytes the search counted."""
    m, n, k, ranks = 520, 700, 64, 4
    curve = BandwidthCurve((1e3, 1e6), (1e-6, 1e-3))
    option = overlap.option_of(op, ranks, m, n, CONFIG, sms=7, ctas=4, gemm_s=1e-3, curve=curve)
    plan = search([option], op=op, ranks=ranks, m=m, n=n, k=k, sequential_s=1.0)
    assert len(plan.waves) > 1
    tiles = tiles_of(op, ranks, m, n, plan)
    assert tiles.config == CONFIG
    sent = [size * 2 for _, size in signal_gemm.group_spans(tiles.groups, tiles.config)]
    assert option.work.group_bytes(plan.waves) == sent
    shape = signal_gemm.packed_shape(m, n, CONFIG, tiles.ranks)
    assert option.work.total_bytes == 2 * np.prod(shape)


def one_rank(function, *arrays):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tp",))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
        *arrays
    )


def test_bad_calls_are_refused_with_the_values():
    x, w = jnp.ones((8, 16)), jnp.ones((4, 16))
    call = overlap.matmul_all_reduce
    with pytest.raises(ValueError, match=r"x float32\[8, 16\] and w float32\[16, 4\]"):
        one_rank(lambda x, w: call(x, w.T, "tp"), x, w)
    with pytest.raises(ValueError, match="bfloat16"):
        one_rank(lambda x, w: call(x, w.astype(jnp.bfloat16), "tp"), x, w)
    plan = Plan(op="all_reduce", ranks=2, m=8, n=4, k=16, overlap=False)
    with pytest.raises(ValueError, match="the plan is for"):
        one_rank(lambda x, w: call(x, w, "tp", plan=plan), x, w)
    with pytest.raises(ConfigError, match="implementation='fast' of matmul_all_reduce; known"):
        one_rank(lambda x, w: call(x, w, "tp", implementation="fast"), x, w)
    with pytest.raises(ExceptionGroup, match="no implementation") as caught:
        one_rank(lambda x, w: call(x, w, "tp", implementation="overlap"), x, w)
    if jax.default_backend() == "cpu":
        assert "GPUs can overlap, not 'cpu'" in str(caught.value.exceptions[0])
    # Where only kernels may run, the product keeps to them: XLA's collective is none of theirs.
    only = ops.using(KernelConfig(pallas_only=True))
    if jax.default_backend() == "cpu":
        with only, pytest.raises(ConfigError, match=r"no kernel takes linear\("):
            one_rank(lambda x, w: call(x, w, "tp"), x, w)
    with pytest.raises(ExceptionGroup) as caught, overlap.using(implementation="grouped"):
        one_rank(lambda x, w: call(x, w, "tp"), x, w)
    assert "a plan that overlaps" in str(caught.value.exceptions[0])
    np.testing.assert_allclose(one_rank(lambda x, w: call(x, w, "tp"), x, w), 16 * np.ones((8, 4)))
