"""Tests on 8 host devices; `test_devices.py` runs them in a process that has these."""

import functools
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jpd import models, ops
from jpd.config import EngineConfig, KernelConfig
from jpd.engine import build
from jpd.engine.shapes import shape_table
from jpd.errors import ConfigError, KernelError
from jpd.layers.attention import causal_attend
from jpd.ops import overlap, pallas, registry, sum_check
from jpd.ops.overlap import communicators, gpu, plain
from jpd.ops.overlap.tiles import tiles_of
from jpd.ops.self_check import Widths
from jpd.overlap import OPS, Plan, PlanTable, Tiling, Topology
from jpd.parallel import ManyDevices, Split
from native.overlap import BuildError, Communicator, OverlapError
from pallas_kernels import mosaic, signal_gemm
from pallas_kernels.signal_gemm.schedule import partitions

TILING = Tiling(64, 128, 2, "n", "m", 2)
M, N, K = 136, 200, 24  # on one rank; ragged in rows and columns
CALLS = {
    "all_reduce": overlap.matmul_all_reduce,
    "reduce_scatter": overlap.matmul_reduce_scatter,
    "all_to_all": overlap.matmul_all_to_all,
}
PLAIN = {
    "all_reduce": lambda x, w: lax.psum(x @ w.T, "tp"),
    "reduce_scatter": lambda x, w: lax.psum_scatter(x @ w.T, "tp", tiled=True),
    "all_to_all": lambda x, w: lax.all_to_all(x @ w.T, "tp", 0, 0, tiled=True),
}
SPECS = {  # x and w [ranks, ...], and the result
    "all_reduce": P(),
    "reduce_scatter": P("tp"),
    "all_to_all": P("tp"),
}


COLUMN = (
    # op, composition, and how x lies on the ranks
    (overlap.all_gather_matmul, lambda x, w: lax.all_gather(x, "tp", tiled=True) @ w.T, P("tp")),
    (overlap.replicated_matmul, lambda x, w: x @ w.T, P()),
)


def mesh_of(ranks):
    return Mesh(np.array(jax.devices()[:ranks]), ("tp",))


def plan_of(op, ranks, m=M, n=N, k=K, waves=None, sms=2, ctas=1):
    """A plan of as many groups as there are waves."""
    tiles = signal_gemm.tile_count(
        m, n, signal_gemm.SignalConfig(**vars(TILING)), 1 if op == "all_reduce" else ranks
    )
    waves = waves or (1,) * signal_gemm.waves_of(tiles, sms)
    return Plan(
        op=op,
        ranks=ranks,
        m=m,
        n=n,
        k=k,
        overlap=True,
        tiling=TILING,
        sms=sms,
        ctas=ctas,
        waves=waves,
    )


def arrays(ranks, dtype=jnp.float32, m=M, n=N, k=K):
    """x and w of every rank: different random numbers, so that no two tiles are equal."""
    keys = jax.random.split(jax.random.key(ranks))
    x = jax.random.normal(keys[0], (ranks, m, k), jnp.float32)
    w = jax.random.normal(keys[1], (ranks, n, k), jnp.float32) / k**0.5
    return x.astype(dtype), w.astype(dtype)


def on_mesh(function, ranks, out, *, check_vma=True):
    """function(x, w) with each rank's x and w."""

    def body(x, w):
        return function(x[0], w[0])

    mapped = jax.shard_map(
        body, mesh=mesh_of(ranks), in_specs=P("tp"), out_specs=out, check_vma=check_vma
    )
    return jax.jit(mapped)


def difference(found, expected):
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def by_hand(op, x, w):
    """What every rank has in the end, in NumPy, stacked as `SPECS` has it."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    y = np.einsum("rmk,rnk->rmn", x, w)
    if op != "all_to_all":
        return y.sum(0)  # rank r holds block r of a reduce-scatter
    ranks, m, n = y.shape
    return y.reshape(ranks, ranks, m // ranks, n).swapaxes(0, 1).reshape(ranks * m, n)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("ranks", [2, 8])
def test_grouped_and_xla_compute_the_plain_composition(op, ranks):
    x, w = arrays(ranks)
    want = by_hand(op, x, w)
    options = [{}, {"implementation": "grouped", "plan": plan_of(op, ranks)}]
    calls = [functools.partial(CALLS[op], axis_name="tp", **o) for o in options]
    for got in on_mesh(lambda x, w: [f(x, w) for f in (*calls, PLAIN[op])], ranks, SPECS[op])(x, w):
        assert difference(got, want) < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_every_partition_of_a_small_product(op):
    shape = {"m": 128, "n": 512}
    x, w = arrays(4, **shape)
    plans = [plan_of(op, 4, **shape, waves=waves, sms=2) for waves in partitions(4)]
    assert len(plans) == 8

    def all_of_them(x, w):
        return [CALLS[op](x, w, "tp", plan=plan, implementation="grouped") for plan in plans]

    want = by_hand(op, x, w)
    for got in on_mesh(all_of_them, 4, SPECS[op])(x, w):
        assert difference(got, want) < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_is_rounded_before_and_after_the_sum(op):
    x, w = arrays(4, jnp.bfloat16)
    got = on_mesh(functools.partial(CALLS[op], axis_name="tp"), 4, SPECS[op])(x, w)
    assert got.dtype == jnp.bfloat16
    assert difference(got, by_hand(op, x, w)) < 4e-3


def gradients(function, op, ranks, check_vma):
    """d loss / d (x, w) of a loss that weighs every element of every rank's result differently."""

    def loss(x, w):
        y = on_mesh(function, ranks, SPECS[op], check_vma=check_vma)(x, w)
        weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (weights * y**2).sum()

    return jax.jit(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize(("ranks", "check_vma"), [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_autodiff(op, ranks, check_vma):
    x, w = arrays(ranks)
    options = [{}, {"implementation": "grouped", "plan": plan_of(op, ranks)}]
    calls = [functools.partial(CALLS[op], axis_name="tp", **o) for o in options]
    want, *found = jax.jit(
        lambda x, w: [gradients(f, op, ranks, check_vma)(x, w) for f in (PLAIN[op], *calls)]
    )(x, w)
    for got in found:
        assert max(map(difference, got, want)) < 1e-5


def collectives_in(compiled):
    names = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all")
    text = compiled.as_text()
    return {name: len(re.findall(rf"= [^=]* {name}(?:-start)?\(", text)) for name in names}


@pytest.mark.parametrize("op", OPS)
def test_a_backward_pass_repeats_nothing_of_the_forward_pass(op):
    x, w = arrays(4)
    call = functools.partial(CALLS[op], axis_name="tp")
    ours, plain = (gradients(f, op, 4, True).lower(x, w).compile() for f in (call, PLAIN[op]))
    assert collectives_in(ours) == collectives_in(plain)
    assert sum(collectives_in(ours).values()) > 0
    products = [len(re.findall(r" dot\(", c.as_text())) for c in (ours, plain)]
    assert products[0] == products[1] > 0


def test_gradients_on_a_mesh_of_two_axes_sum_over_the_other_one():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("dp", "tp"))
    x, w = arrays(4)
    x = jnp.stack([x, 2 * x + 1])

    def gradient(function):
        def loss(x, w):
            body = jax.shard_map(
                lambda x, w: function(x[0, 0], w[0])[None],
                mesh=mesh,
                in_specs=(P("dp", "tp"), P("tp")),
                out_specs=P("dp"),
            )
            return (body(x, w) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, w)

    got = gradient(functools.partial(overlap.matmul_all_reduce, axis_name="tp"))
    want = gradient(PLAIN["all_reduce"])
    assert max(map(difference, got, want)) < 1e-5


@pytest.mark.parametrize("check_vma", [True, False])
def test_column_parallel_products_and_their_gradients(check_vma):
    x, w = arrays(4)
    before = ops.choices()

    def gradient(function, spec):
        def loss(x, w):
            y = jax.shard_map(
                lambda x, w: function(x, w[0])[None],
                mesh=mesh_of(4),
                in_specs=(spec, P("tp")),
                out_specs=P("tp"),
                check_vma=check_vma,
            )(x, w)
            return (jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y**2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x[0], w)

    for function, composed, spec in COLUMN:
        got = gradient(functools.partial(function, axis_name="tp"), spec)
        want = gradient(composed, spec)
        assert difference(got[0], want[0]) < 1e-5
        assert max(map(difference, got[1], want[1])) < 1e-5
    after = ops.choices()
    taken = {key for key in after if after[key] > before.get(key, 0)}
    assert ("matmul_reduce_scatter", "xla") in taken
    assert (("matmul_all_reduce", "xla") in taken) == check_vma


def test_gradients_of_inputs_that_another_axis_shares():
    """Other weights along "dp": what x gets back is summed over it too."""
    x, w = arrays(8)
    w = w.reshape(2, 4, N, K)

    def gradient(function, spec):
        def loss(x, w):
            y = jax.shard_map(
                lambda x, w: function(x, w[0, 0])[None, None],
                mesh=Mesh(np.array(jax.devices()).reshape(2, 4), ("dp", "tp")),
                in_specs=(spec, P("dp", "tp")),
                out_specs=P("dp", "tp"),
            )(x, w)
            return (jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y**2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x[0], w)

    for function, composed, spec in COLUMN:
        got = gradient(functools.partial(function, axis_name="tp"), spec)
        assert max(map(difference, got, gradient(composed, spec))) < 1e-5


@pytest.mark.parametrize("op", OPS)
def test_packed_results_are_normed_where_they_lie(op):
    x, w = arrays(4)
    rows = M // 4 if op == "reduce_scatter" else M
    residual = jax.random.normal(jax.random.key(1), (rows, N))
    weight = jax.random.normal(jax.random.key(2), (N,))
    kept = []
    plan = plan_of(op, 4)

    def body(x, w, *, packed, **options):
        y = CALLS[op](x, w, "tp", packed=packed, **options)
        kept.append(type(y))
        return jnp.stack(overlap.rms_norm_residual(y, residual, weight, 1e-5))[None]

    packed = functools.partial(body, packed=True, implementation="grouped", plan=plan)
    unpacked = functools.partial(body, packed=False)

    def both(x, w):
        def results_and_gradient(function):
            def loss(x, w):
                y = on_mesh(function, 4, P("tp"), check_vma=False)(x, w)
                return (y**3).sum(), y

            gradient, y = jax.grad(loss, (0, 1), has_aux=True)(x, w)
            return *gradient, y

        return results_and_gradient(packed), results_and_gradient(unpacked)

    got, want = jax.jit(both)(x, w)
    assert max(map(difference, got, want)) < 1e-5
    assert {kind is overlap.Packed for kind in kept} == {True, False}


MODEL = models.config_from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 320,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
)
TOKENS = 150  # in tiles of 64 x 128: three rows of three, the last ones ragged


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_model_norms_sums_where_they_lie(ranks):
    """The same tokens as of one device, whoever puts tiles in order."""
    params = models.init_params(MODEL, "float32", 0)
    tokens = jax.random.randint(jax.random.key(0), (TOKENS,), 0, MODEL.vocab_size)
    want = models.logits(MODEL, params, tokens)
    place = ManyDevices(Split(MODEL, ranks), jax.devices()[:ranks])
    widths = (MODEL.hidden_size // ranks, MODEL.ffn_size // ranks)
    shape = {"m": TOKENS, "n": MODEL.hidden_size}
    plans = [plan_of("all_reduce", ranks, **shape, k=k, waves=(1, 2, 2)) for k in widths]

    def logits(params, tokens):
        attend = causal_attend(place.rank_model)
        with ops.over_ranks(ops.Ranks("tp", place.split.cut_axes, overlap=True)):
            return models.bind(place.rank_model, params)(tokens, jnp.arange(TOKENS), attend)

    whole = place.accept(params)
    specs = (jax.tree.map(lambda array: array.sharding.spec, whole), P())
    for reorder, taken in {"auto": "xla", "alone": "alone"}.items():
        before = ops.choices()
        # Anew for each: JAX knows nothing of the settings that a function was traced with.
        mapped = jax.shard_map(
            lambda *args: logits(*args),
            mesh=place.mesh,
            in_specs=specs,
            out_specs=P(),
            check_vma=False,
        )
        table = PlanTable(TOPOLOGY, plans)
        with overlap.using(implementation="grouped", plans=table, reorder=reorder):
            got = jax.jit(mapped)(whole, tokens)
        added = {key: n - before.get(key, 0) for key, n in ops.choices().items()}
        assert added["matmul_all_reduce", "grouped"] == 2 * MODEL.num_layers
        # Every sum is a stream that a norm reads, the last one too.
        assert added["rms_norm_residual", taken] == 2 * MODEL.num_layers
        np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
        assert difference(got, want) < 1e-5


# What the implementation "overlap" does around the native part, with a stand-in for that part.


class StandIn:
    """A `native.overlap.Communicator` of host devices: sends what the GEMM has signalled."""

    def __init__(self, size=4, max_ctas=1):
        self.size, self.max_ctas = size, max_ctas
        self.transfers = []

    def run(self, transfer, gemm, after):
        self.transfers.append(transfer)
        assert [a.ndim for a in after] == [2, 2]
        packed = jax.new_ref(jnp.full(transfer.shape, jnp.nan, transfer.dtype))
        counters = jax.new_ref(jnp.zeros(len(transfer.groups), jnp.int32))
        gemm(packed, counters)
        ranks = 1 if transfer.collective == "all_reduce" else self.size
        flat, received = packed[...].reshape(-1), []
        for number, (offset, count, tiles) in enumerate(transfer.groups):
            ready = counters[number] == tiles
            sent = jnp.where(ready, flat[offset : offset + count], jnp.nan).reshape(ranks, -1)
            got = plain.collective(transfer.collective, sent, "tp")
            received.append(got.reshape(-1))
        return jnp.concatenate(received).reshape(transfer.result_shape(self.size))

    def check(self):
        pass


def counting_gemm(x, w, counters, *, groups, config, sms, ranks, packed=None):
    """`signal_gemm` without its kernel."""
    y = (x.astype(jnp.float32) @ w.astype(jnp.float32).T).astype(x.dtype)
    tiles = signal_gemm.pack(y, config, groups=groups, ranks=ranks)
    counters[...] = counters[...] + jnp.array(groups, jnp.int32)
    if packed is None:
        return tiles
    packed[...] = tiles
    return None


TOPOLOGY = Topology("NVIDIA H200", "nvlink", "2.28.9")


@pytest.fixture
def gpu_like(monkeypatch):
    """gpu.py on host devices."""
    monkeypatch.setattr(gpu, "_check_device", lambda: None)
    monkeypatch.setattr(gpu, "topology", lambda: TOPOLOGY)
    monkeypatch.setattr(mosaic, "sm_count", lambda: 132)


@pytest.mark.parametrize("op", OPS)
def test_overlap_starts_computes_and_ends(op, gpu_like, monkeypatch):
    monkeypatch.setattr(signal_gemm, "signal_gemm", counting_gemm)
    x, w = arrays(4, jnp.bfloat16)
    plan, comm = plan_of(op, 4), StandIn()
    call = functools.partial(CALLS[op], axis_name="tp", implementation="overlap", plan=plan)
    with overlap.using(communicators={"tp": comm}, trace=True):
        got = on_mesh(call, 4, SPECS[op], check_vma=False)(x, w)
        gradient = gradients(call, op, 4, False)(x, w)
    assert difference(got, by_hand(op, x, w)) < 1e-2
    want = gradients(PLAIN[op], op, 4, False)(x, w)
    assert max(map(difference, gradient, want)) < 2e-2
    transfer = comm.transfers[0]
    assert tuple(group.tiles for group in transfer.groups) == tiles_of(op, 4, M, N, plan).groups
    assert transfer.trace


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_overlap_lowers_to_start_gemm_and_done_on_the_same_buffers(op, check_vma, gpu_like):
    """For CUDA, with the real kernel, on one axis of a mesh of two."""

    comm = object.__new__(Communicator)  # no NCCL to make one with
    comm.id, comm.size, comm.max_ctas = 7, 4, 1
    m, n, k = 256, 256, 128
    plan = plan_of(op, 4, m=m, n=n, k=k)
    out = P("dp") if op == "all_reduce" else P(("dp", "tp"))
    mapped = jax.shard_map(
        lambda x, w: CALLS[op](x, w, "tp", plan=plan, implementation="overlap"),
        mesh=Mesh(np.array(jax.devices()).reshape(2, 4), ("dp", "tp")),
        in_specs=(P("dp", "tp"), P(None, "tp")),
        out_specs=out,
        check_vma=check_vma,
    )
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2 * m, 4 * k), (n, 4 * k))]
    with overlap.using(communicators={"tp": comm}):
        text = jax.jit(mapped).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # Each takes what the one before gives: packed and counters, in the order that it has them.
    made = r"(%\d+):\d"
    started = re.search(rf"{made} = stablehlo.custom_call @jpd_overlap_start\(", text)[1]
    gemm = re.search(rf"{made} = (?:func\.)?call @_call\(.*, {started}#1, {started}#0\)", text)
    assert f"@jpd_overlap_done({gemm[1]}#1, {gemm[1]}#0" in text
    assert "mosaic_gpu" in text


def products_of(function, **kernels):
    """The implementations of `linear` that a program for an H200 takes."""
    shapes = [jax.ShapeDtypeStruct((4, *s), jnp.bfloat16) for s in ((128, 256), (512, 256))]
    selected = ops.using(KernelConfig(**kernels), "gpu")
    for_h200 = pallas.tracing_for(pallas.Gpu("NVIDIA H200", 132, "9.0"))
    with selected, for_h200, registry.recording() as taken:
        on_mesh(function, 4, P("tp"), check_vma=False).trace(*shapes)
    return [choice.taken for choice in taken if choice.op == "linear"]


PUBLIC = [
    *CALLS.values(),
    # These take a weight for resident, unless told.
    *(functools.partial(op, resident=False) for op, _, _ in COLUMN),
]


@pytest.mark.parametrize("op", PUBLIC, ids=[*CALLS, "all_gather", "replicated"])
def test_a_weight_that_may_be_computed_is_not_read_early(op):
    """Kernels read it before the one ahead of them is complete: only where somebody says so."""

    def forward(x, w, **options):
        return op(x, w, "tp", **options)

    def backward(x, w, **options):
        return jax.grad(lambda x, w: op(x, w, "tp", **options).sum(), (0, 1))(x, w)

    for kernels in ({}, {"linear": "pallas"}):
        assert products_of(forward, **kernels) == ["xla"]
        assert set(products_of(backward, **kernels)) == {"xla"}
    with pytest.raises(ConfigError, match="resident=True says that it does not"):
        products_of(forward, pallas_only=True)
    for kernels in ({}, {"pallas_only": True}):
        assert products_of(functools.partial(forward, resident=True), **kernels) == ["pallas"]
        first, *others = products_of(functools.partial(backward, resident=True), **kernels)
        assert first == "pallas"
        assert set(others) <= {"xla"}, "a transposed weight is computed"


def test_grouped_products_do_not_read_a_computed_weight_early():
    plan = plan_of("all_reduce", 4, m=128, n=512, k=256)
    call = functools.partial(
        overlap.matmul_all_reduce, axis_name="tp", implementation="grouped", plan=plan
    )
    assert products_of(call) == ["xla"]
    assert products_of(functools.partial(call, resident=True)) == ["pallas"]


@pytest.mark.parametrize("overlapping", [True, False])
def test_layers_read_their_weights_early(overlapping):
    def layer(x, w):
        with ops.over_ranks(ops.Ranks("tp", {"ffn"}, overlap=overlapping)):
            return ops.summed_linear(x, w, over="ffn")

    assert products_of(layer) == ["pallas"]


def test_a_process_without_a_gpu_that_traces_for_one_names_that_gpu(monkeypatch):
    """Other processes lower an engine's steps, and say why those do not overlap."""
    monkeypatch.setattr(gpu._native(), "nccl_version", lambda: "2.28.9")
    with pallas.tracing_for(pallas.Gpu("NVIDIA H100", 114, "9.0")):
        assert gpu.topology().slug == "nvidia_h100-nvlink-nccl2.28.9"
        assert not gpu.leaves_room(plan_of("all_reduce", 4, sms=114))
        assert gpu.leaves_room(plan_of("all_reduce", 4, sms=113))


def test_auto_looks_plans_up_and_says_why_it_does_not_overlap(gpu_like, caplog, monkeypatch):
    refusals = []

    def refusing(x, w, *args, **kwargs):
        """The kernel's own refusals, without the kernel."""
        if x.shape[1] % 64:
            refusals.append(x.shape)
            raise NotImplementedError(f"K is {x.shape[1]}, it must be a multiple of 64")
        return counting_gemm(x, w, *args, **kwargs)

    monkeypatch.setattr(signal_gemm, "signal_gemm", refusing)
    k, good = 64, StandIn()
    x, w = arrays(4, jnp.bfloat16, k=k)
    table = PlanTable(TOPOLOGY, [plan_of("all_reduce", 4, m=M - 8, k=k)])

    def choices_of(plans, m=M, k=k, dtype=jnp.bfloat16, axis="tp", comm=good):
        """The implementations that a trace takes."""
        before = ops.choices()
        selected = ops.using(KernelConfig(linear="xla"), "gpu")
        with selected, overlap.using(communicators={axis: comm}, plans=plans):
            call = functools.partial(overlap.matmul_all_reduce, axis_name="tp")
            mapped = on_mesh(call, 4, P(), check_vma=False)
            mapped.trace(x[:, :m, :k].astype(dtype), w[:, :, :k].astype(dtype))
        after = ops.choices()
        added = {key for key in after if after[key] > before.get(key, 0)}
        return {name for op, name in added if op == "matmul_all_reduce"}

    assert choices_of(table) == {"overlap"}
    sequential = Plan(op="all_reduce", ranks=4, m=M, n=N, k=k, overlap=False)
    greedy = plan_of("all_reduce", 4, waves=(1,), sms=132, k=k)
    wide = plan_of("all_reduce", 4, waves=(1,), sms=131, ctas=2, k=k)
    refused = [
        ({"plans": table, "m": 16}, "no plan near all_reduce of 16x200x64 on 4 ranks"),
        ({"plans": table, "dtype": jnp.float32}, "x is float32"),
        ({"plans": table, "k": 32}, "K is 32"),
        ({"plans": table, "axis": "ep"}, r"no NCCL communicator for mesh axis 'tp'"),
        ({"plans": table, "comm": StandIn(max_ctas=2)}, "leaves NCCL 1 SMs"),
        ({"plans": table, "comm": StandIn(max_ctas=None)}, "max_ctas of None"),
        ({"plans": None}, "nvidia_h200-nvlink-nccl2.28.9"),
        ({"plans": PlanTable(TOPOLOGY, [sequential])}, "not to overlap"),
        ({"plans": PlanTable(TOPOLOGY, [greedy])}, "takes 132 SMs and NCCL 1"),
        # Without a communicator, what else is missing comes first: none is made where that is so.
        ({"plans": table, "m": 16, "comm": ()}, "no plan near all_reduce of this shape on 4 ranks"),
        ({"plans": PlanTable(TOPOLOGY, [sequential]), "comm": ()}, "this shape .* not to overlap"),
        ({"plans": PlanTable(TOPOLOGY, [wide]), "comm": ()}, "takes 131 SMs and NCCL 2"),
        ({"plans": table, "comm": ()}, r"no NCCL communicator for .* are: 'tp'\)"),
    ]
    for options, reason in refused:
        caplog.clear()
        assert choices_of(**options) == {"xla"}
        assert re.search(reason, caplog.text), (reason, caplog.text)
    assert refusals
    assert len(good.transfers) == 1  # what was refused had not been started
    for wrong in (
        {"plans": PlanTable(Topology("B", "c", "d"))},
        {"plans": table, "comm": StandIn(size=2)},
    ):
        with pytest.raises(ConfigError, match=r"plans are for Topology|communicator of 2 ranks"):
            choices_of(**wrong)
    # Of several communicators it takes the one with most blocks of those that the plan allows.
    several = [StandIn(max_ctas=ctas) for ctas in (1, 4, 16)]
    roomy = PlanTable(TOPOLOGY, [plan_of("all_reduce", 4, k=k, ctas=8)])
    assert choices_of(roomy, comm=several) == {"overlap"}
    assert [len(comm.transfers) for comm in several] == [0, 1, 0]


# The check at the start of an engine.


@pytest.fixture
def checked(gpu_like, monkeypatch):
    """`check_ranks` of a model on two ranks, with these stand-ins for GEMM and communicator."""
    monkeypatch.setattr(communicators, "_has_native", lambda: True)
    split = Split(MODEL, 2)
    place = ManyDevices(split, jax.devices()[:2])
    params = place.accept(models.init_params(MODEL, "bfloat16", 0))
    kernels = KernelConfig(rms_norm="xla")
    shapes = {"token_buckets": (16, 32, 64, 128), "batch_buckets": (8,), "max_num_seqs": 8}
    shapes |= {"max_num_batched_tokens": 128, "max_model_len": 256, "page_size": 16}
    config = EngineConfig(
        model="none", dtype="bfloat16", tensor_parallel_size=2, kernels=kernels, **shapes
    )
    near = {"m": 136, "n": MODEL.hidden_size}
    width = MODEL.num_heads * MODEL.head_dim // 2
    plans = [plan_of("all_reduce", 2, **near, k=k) for k in (width, MODEL.ffn_size // 2)]
    lines = []
    monkeypatch.setattr(build.logger, "info", lambda text, what: lines.append(what))

    def check(gemm=counting_gemm, comm=None, plans=plans, decode=True, **options):
        lines.clear()
        monkeypatch.setattr(signal_gemm, "signal_gemm", gemm)
        table = PlanTable(TOPOLOGY, plans)
        with overlap.using(communicators={"tp": comm or StandIn(2)}, plans=table):
            changed = config.replace(**options)
            steps = shape_table(changed, prefill=True, decode=decode)
            build.check_ranks(changed, split, params, place, steps)
        return "; ".join(lines).split("; ") if lines else []

    return check


def test_sums_that_hide_behind_products_are_checked_before_anything_is_served(checked):
    """Of each layer and plan the largest step; nothing where nothing overlaps."""
    comm = StandIn(2)
    lines = checked(comm=comm)
    products = [re.search(r"(\w+) bfloat16\[(\d+), (\d+)\]", line).groups() for line in lines]
    assert products == [("out", "128", "320"), ("down", "128", "512")]
    assert all(line.endswith(" on 2 ranks by overlap, xla") for line in lines)
    assert len(comm.transfers) == 2
    alone = checked(decode=False)  # by an executor for prompts
    assert [re.search(r"\[(\d+)", line).group(1) for line in alone] == ["128", "128"]
    assert checked(plans=[]) == []
    assert checked(kernels=KernelConfig(matmul_all_reduce="xla")) == []
    assert checked(kernels=KernelConfig(self_check=False)) == []


def swapped(x, w, counters, *, packed=None, **static):
    """A GEMM that stores two tiles in each other's place."""
    tiles = counting_gemm(x, w, counters, **static)
    tiles = tiles.at[jnp.array([0, 1])].set(tiles[jnp.array([1, 0])])
    if packed is None:
        return tiles
    packed[...] = tiles
    return None


def eager(x, w, counters, *, packed=None, **static):
    """A GEMM whose first counter is raised once too often: nothing else shows it for certain."""
    tiles = counting_gemm(x, w, counters, packed=packed, **static)
    if packed is None:
        counters[0] += 1
    return tiles


class Unsummed(StandIn):
    """Sends nothing."""

    def run(self, transfer, gemm, after):
        packed = jax.new_ref(jnp.zeros(transfer.shape, transfer.dtype))
        gemm(packed, jax.new_ref(jnp.zeros(len(transfer.groups), jnp.int32)))
        return packed[...]


class OneRank(StandIn):
    """One rank gets its last tile late."""

    def run(self, transfer, gemm, after):
        right = super().run(transfer, gemm, after)
        return right.at[-1].multiply(lax.axis_index("tp") == 0)


class Stuck(StandIn):
    """Fills results with NaN and knows why."""

    def run(self, transfer, gemm, after):
        return super().run(transfer, gemm, after) * jnp.nan

    def check(self):
        raise OverlapError("all_reduce number 0 is not complete after 60 s")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gemm": swapped}, "relative error"),
        ({"gemm": eager}, "relative error"),
        ({"comm": Unsummed(2)}, "relative error"),
        ({"comm": OneRank(2)}, "relative error"),
        ({"comm": Stuck(2)}, "relative error nan .*; all_reduce number 0 is not complete"),
    ],
    ids=["tiles", "counters", "sum", "one rank", "stuck"],
)
def test_a_sum_that_is_wrong_is_refused(checked, wrong, said):
    with pytest.raises(KernelError, match=f"^matmul_all_reduce out .* by overlap, xla: {said}"):
        checked(**wrong)


def test_the_check_runs_the_kernel(gpu_like, monkeypatch):
    """Interpreted, on one rank, as the interpreter has one memory for all."""
    monkeypatch.setattr(communicators, "_has_native", lambda: True)
    interpreted = functools.partial(signal_gemm.signal_gemm, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(signal_gemm, "signal_gemm", interpreted)
    mesh, m, n, k = mesh_of(1), 72, 136, 64
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(n, k)), jnp.bfloat16)
    weight = jax.device_put(weight, NamedSharding(mesh, P(None, "tp")))
    widths = Widths(n, 2, 2, 64, 16, (None,), "bfloat16", 1e-5, False, True)
    table = PlanTable(TOPOLOGY, [plan_of("all_reduce", 1, m=m, n=n, k=k)])
    with overlap.using(communicators={"tp": StandIn(1)}, plans=table):
        lines = sum_check.run(
            widths, KernelConfig(rms_norm="xla"), [sum_check.Sum("down", weight, (8, m))], mesh
        )
    assert [line.split(" bfloat16")[0] for line in lines] == ["matmul_all_reduce down"]


def test_without_nccl_or_a_compiler_nothing_overlaps_and_that_is_said_once(
    gpu_like, monkeypatch, caplog
):
    asked = []

    class Native:
        OverlapError, BuildError = OverlapError, BuildError

        @staticmethod
        def start():
            asked.append(1)
            raise BuildError("install g++ or set CXX")

    monkeypatch.setattr(gpu, "_native", lambda: Native)
    communicators._has_native.cache_clear()
    try:
        for _ in range(3):
            assert communicators.communicators(mesh_of(4), "tp", [(M, N, K)]) == {}
    finally:
        communicators._has_native.cache_clear()
    assert len(asked) == 1
    assert caplog.text.count("do not overlap with products: install g++ or set CXX") == 1
