"""Un-permuting, alone and inside the norm, on one device; wrong permutations must not pass."""

import dataclasses

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from jpd import ops
from jpd.config import KernelConfig
from jpd.errors import ConfigError
from jpd.ops import overlap, registry
from jpd.ops.norm import rms_norm_xla
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


def test_on_a_gpu_the_norms_kernel_reads_packed_results():
    m, n = 70, 384
    y, residual = (matrix(m, width).astype(jnp.bfloat16)[:, :n] for width in (n, n + 1))
    weight = matrix(1, n)[0].astype(jnp.bfloat16)
    packed = packed_of(y, (2, 3, 1), 1)

    def normed(how, packed=packed, dtype=jnp.bfloat16):
        before = ops.choices()
        interpreted = ops.kernels_without_gpu(plgpu.InterpretGPUParams())
        with interpreted, ops.using(KernelConfig(), "gpu"), overlap.using(reorder=how):

            def loss(data, residual, weight):
                y = dataclasses.replace(packed, data=data)
                outs = overlap.rms_norm_residual(y, residual, weight, 1e-5)
                return sum((jnp.sin(jnp.arange(n)) * out).sum() for out in outs), outs

            arrays = (a.astype(dtype) for a in (packed.data, residual, weight))
            gradients, outs = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        after = ops.choices()
        taken = {k[1] for k in after if k[0] == "rms_norm_residual" and after[k] > before.get(k, 0)}
        return taken, outs, gradients

    kernel, xla, alone = (normed(how) for how in ("auto", "xla", "alone"))
    assert [found[0] for found in (kernel, xla, alone)] == [{"pallas"}, {"xla"}, {"alone"}]
    for _, outs, _ in (kernel, alone):
        np.testing.assert_array_equal(outs[1], xla[1][1])
        assert relative(outs[0], xla[1][0]) < 4e-3
    for got, want in zip(kernel[2], xla[2], strict=True):
        np.testing.assert_array_equal(got, want)
    # What the kernel does not take, XLA does.
    assert normed("auto", dtype=jnp.float32)[0] == {"xla"}
    blocks = packed_of(y, (2, 3, 1), 2)
    assert normed("auto", packed=blocks)[0] == {"xla"}


@pytest.mark.parametrize(
    ("asked", "taken", "norm"),
    [
        (KernelConfig(rms_norm="xla"), "xla", None),
        (KernelConfig(rms_norm="twice"), "alone", "twice"),
        (KernelConfig(pallas_only=True), "pallas", None),
    ],
)
def test_the_op_that_is_selected_norms_sums_too(asked, taken, norm, monkeypatch):
    y, residual, weight = (matrix(*s).astype(jnp.bfloat16) for s in ((3, 256), (3, 256), (1, 256)))
    known = registry.ops()["rms_norm"].implementations
    monkeypatch.setitem(known, "twice", lambda x, w, eps: 2 * rms_norm_xla(x, w, eps))
    interpreted = ops.kernels_without_gpu(plgpu.InterpretGPUParams())
    with interpreted, ops.using(asked, "gpu"), registry.recording() as choices:
        got, total = overlap.rms_norm_residual(y, residual, weight[0], 1e-5)
    named = [choice[:2] for choice in choices]
    assert named[-1] == ("rms_norm_residual", taken)
    assert norm is None or ("rms_norm", norm) in named
    np.testing.assert_array_equal(total, y + residual)
    want = rms_norm_xla(total, weight[0], 1e-5)
    assert relative(got, want * (2 if norm else 1)) < 4e-3


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


@pytest.mark.parametrize("column", [overlap.all_gather_matmul, overlap.replicated_matmul])
def test_no_kernel_reads_a_weight_that_was_just_transposed(column):
    """Kernels read weights before those ahead of them are complete."""
    x, w = jnp.ones((128, 256), jnp.bfloat16), jnp.ones((512, 256), jnp.bfloat16)

    def gradient(x, w):
        return jax.grad(lambda x: column(x, w, "tp").astype(jnp.float32).sum())(x)

    with (
        ops.kernels_without_gpu(),
        ops.using(KernelConfig(), "gpu"),
        overlap.using(implementation="xla"),
        registry.recording() as choices,
    ):
        jax.make_jaxpr(lambda *arrays: one_rank(gradient, *arrays))(x, w)
    assert [choice[:2] for choice in choices if choice.op == "linear"] == [
        ("linear", "pallas"),  # forward
        ("linear", "xla"),
    ]
