"""Signalling GEMM: numbers, counters, the packed layout, what is signalled when, real shapes."""

import functools
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.signal_gemm import (
    SignalConfig,
    candidates,
    default,
    group_spans,
    groups_of_waves,
    kernel,
    pack,
    packed_shape,
    partitions,
    reference,
    schedule,
    signal_gemm,
    tile_count,
    unpack,
    waves_of,
)
from pallas_kernels.signal_gemm.shapes import ROW_PARALLEL, SMS, call, case, whole_waves
from tests.pallas_kernels import modes

BF16, FP16 = jnp.bfloat16, jnp.float16
SMALL = SignalConfig(tile_m=128, tile_n=128, stages=3, grid_tile_width=2)
TINY = SignalConfig(tile_m=64, tile_n=128, stages=2, wg_dimension="n", grid_tile_width=2)


def call_into_ref(x, w, **static):
    """The buffer that the caller gave, and the counters."""
    counters = jax.new_ref(jnp.zeros(len(static["groups"]), jnp.int32))
    shape = packed_shape(x.shape[0], w.shape[0], static["config"], static["ranks"])
    packed = jax.new_ref(jnp.full(shape, jnp.nan, x.dtype))
    assert signal_gemm(x, w, counters, packed=packed, **static) is None
    return jax.freeze(packed), jax.freeze(counters)


def matrices(m, n, k, dtype=BF16):
    """Random x, and w so scaled that y has variance 1."""
    keys = jax.random.split(jax.random.key(m * n + k))
    w = jax.random.normal(keys[1], (n, k), jnp.float32) / k**0.5
    return jax.random.normal(keys[0], (m, k), dtype), w.astype(dtype)


def difference(found, expected):
    """Relative error."""
    found = np.asarray(found, np.float32)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(m, n, k, *, groups, config, sms, ranks=1, dtype=BF16, call=call):
    """Runs the kernel; its error in the packed buffer and in the matrix, and the counters."""
    x, w = matrices(m, n, k, dtype)
    static = {"groups": groups, "config": config, "ranks": ranks}
    packed, counters = modes.run(functools.partial(call, **static, sms=sms), x, w)
    assert packed.dtype == dtype
    error = difference(packed, reference.signal_gemm(x, w, **static))
    y = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    unpacked = unpack(packed, m, n, config, groups=groups, ranks=ranks)
    return error, difference(unpacked, y), counters.tolist()


MEETING = "(_add_release)"
"""Where blocks add to one counter: with atomics on a GPU, which interpret mode does not know."""


def assert_right(capfd, m, n, k, *, groups, **rest):
    """Right numbers, counters at the groups' sizes, no race."""
    packed, unpacked, counters = check(m, n, k, groups=groups, **rest)
    assert packed <= 4e-3
    assert unpacked <= 4e-3
    assert counters == list(groups)
    assert not modes.unexplained_races(capfd.readouterr().out, MEETING)


CASES = {  # M, N, K, SMs, config, ranks, dtype
    "ragged": (200, 256, 512, 3, SMALL, 1, BF16),
    "an-odd-number-of-chunks": (200, 384, 640, 2, SignalConfig(128, 192, 3), 1, BF16),
    "one-step": (130, 128, 64, 1, SMALL, 1, BF16),
    "less-than-a-tile": (5, 72, 128, 4, SMALL, 1, FP16),
    "columns-over-the-edge": (300, 200, 192, 2, SignalConfig(256, 192, 3), 1, BF16),
    "wide": (190, 512, 128, 3, SignalConfig(128, 256, 2), 1, FP16),
    "two-ranks": (200, 256, 320, 3, SMALL, 2, BF16),
    "two-ranks-of-tall-tiles": (516, 128, 64, 2, SignalConfig(256, 128, 2), 2, BF16),
    "four-ranks": (404, 200, 128, 2, SMALL, 4, BF16),
    "eight-ranks": (8 * 19, 256, 192, 2, TINY, 8, FP16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_without_races(name, capfd):
    m, n, k, sms, config, ranks, dtype = CASES[name]
    groups = whole_waves(m, n, config, sms, ranks)
    given = {"groups": groups, "config": config, "sms": sms, "ranks": ranks, "dtype": dtype}
    assert_right(capfd, m, n, k, **given)


@pytest.mark.parametrize("seed", range(4))
def test_random_ragged_shapes(seed, capfd):
    random = np.random.default_rng(seed)
    ranks = int(random.choice([1, 2, 4]))
    m, n, k = int(random.integers(1, 80)) * ranks, int(random.integers(1, 40)) * 8, 64
    config = (SMALL, TINY)[seed % 2]
    tiles = tile_count(m, n, config, ranks)
    cuts = np.unique([*random.integers(1, tiles + 1, 3).tolist(), tiles])
    groups = tuple(np.diff([0, *cuts]).tolist())
    sms = int(random.integers(1, 5))
    assert_right(capfd, m, n, k, groups=groups, config=config, sms=sms, ranks=ranks)


@pytest.mark.parametrize(
    ("waves", "ranks"), [(w, 1) for w in partitions(4)] + [(w, 2) for w in partitions(3)]
)
def test_every_partition_of_few_waves(waves, ranks, capfd):
    m, n = 250, 200  # 4 x 2 tiles
    sms = 2 if sum(waves) == 4 else 3
    groups = groups_of_waves(waves, tile_count(m, n, TINY, ranks), sms)
    assert_right(capfd, m, n, 64, groups=groups, config=TINY, sms=sms, ranks=ranks)


def test_a_group_may_end_within_a_wave(capfd):
    assert_right(capfd, 252, 200, 64, groups=(1, 4, 2, 1), config=TINY, sms=3, ranks=4)


def test_writes_to_the_callers_buffer(capfd):
    groups = whole_waves(200, 256, SMALL, 2)
    given = {"groups": groups, "config": SMALL, "sms": 2, "call": call_into_ref}
    assert_right(capfd, 200, 256, 128, **given)


@pytest.fixture
def changed_kernel(monkeypatch):
    """Changes the kernel for one test, past its cache of traces."""
    kernel._call.clear_cache()
    yield functools.partial(monkeypatch.setattr, kernel._Work)
    kernel._call.clear_cache()


def test_a_wrong_order_of_tiles_is_caught(changed_kernel):
    rows_first = lambda self, tile: (tile // self.grid[1], tile % self.grid[1])  # noqa: E731
    changed_kernel("locate", rows_first)
    groups = whole_waves(250, 200, TINY, 2)
    packed, unpacked, _ = check(250, 200, 64, groups=groups, config=TINY, sms=2)
    assert min(packed, unpacked) > 0.5


def test_a_wrong_order_of_ranks_is_caught(changed_kernel):
    changed_kernel("slots", lambda self, tile: (tile * self.ranks, 1))
    packed, unpacked, _ = check(250, 200, 64, groups=(4, 4), config=TINY, sms=2, ranks=2)
    assert min(packed, unpacked) > 0.5


def test_a_wrong_group_is_caught(changed_kernel):
    group = kernel._Work.group
    changed_kernel("group", lambda self, tile: group(self, tile + 1))
    *_, counters = check(250, 200, 64, groups=(4, 4), config=TINY, sms=2)
    assert counters == [3, 5]


def equations(jaxpr):
    """All equations, inner ones where they stand."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize(
    "config", [SignalConfig(stages=3), SignalConfig(256, 192, 3)], ids=["held", "not_held"]
)
def test_signals_only_when_stores_are_complete(config):
    function, shapes = case(2048, 8192, 2048, config)
    found = [
        (equation.primitive.name, equation.params)
        for equation in equations(jax.make_jaxpr(function)(*shapes).jaxpr)
        if re.search(
            "smem_to_gmem|inline_mgpu|barrier_arrive|barrier_wait", equation.primitive.name
        )
    ]
    names = [name for name, _ in found]
    signals = [i for i, name in enumerate(names) if name == "inline_mgpu_p"]
    assert len(signals) == 2  # of the tile before, in the loop; of the last one, after it
    for i in signals:
        assert names[i - 3 : i] == ["wait_smem_to_gmem", "barrier_arrive", "barrier_wait"]
        assert found[i - 3][1] == {"n": 0, "wait_read_only": False}
    before, between = names[: signals[0]], names[signals[0] : signals[1]]
    # The same tile's: before the products of the next one, or among them.
    assert ("copy_smem_to_gmem" in before) == config.holds_sums
    assert "copy_smem_to_gmem" in between


def test_the_signal_is_a_release_at_system_scope(monkeypatch):
    asked = []
    semaphore = kernel.mgpu.utils.SemaphoreRef

    def signal(self, value, predicate=None, relaxed=False, memory_scope=None):
        asked.append((value, predicate, relaxed, memory_scope))

    monkeypatch.setattr(semaphore, "signal", signal)
    function, shapes = case(2048, 8192, 2048, SignalConfig(stages=3))
    modes.lower(function, *shapes)
    assert asked
    assert set(asked) == {(1, None, False, "sys")}


configs = st.builds(
    SignalConfig,
    tile_m=st.sampled_from([128, 256]),
    tile_n=st.sampled_from([64, 128]),
    stages=st.just(2),
    grid_minor=st.sampled_from(["m", "n"]),
    grid_tile_width=st.integers(1, 5),
)


@st.composite
def problems(draw):
    """M, N, config, groups and ranks."""
    config, ranks = draw(configs), draw(st.sampled_from([1, 2, 4, 8]))
    m, n = draw(st.integers(1, 90)) * ranks, draw(st.integers(1, 300))
    tiles = tile_count(m, n, config, ranks)
    cuts = draw(st.sets(st.integers(1, tiles))) | {tiles}
    groups = tuple(np.diff([0, *sorted(cuts)]).tolist())
    return m, n, config, groups, ranks


@settings(deadline=None, max_examples=10)
@given(problems())
def test_packing_is_the_reference_and_comes_back(problem):
    m, n, config, groups, ranks = problem
    y = np.random.default_rng(m * n).standard_normal((m, n)).astype(np.float32)
    packed = pack(y, config, groups=groups, ranks=ranks)
    assert packed.shape == packed_shape(m, n, config, ranks)
    expected = reference.signal_gemm(
        y, np.eye(n, dtype=np.float32), groups=groups, config=config, ranks=ranks
    )
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(unpack(packed, m, n, config, groups=groups, ranks=ranks), y)


@settings(deadline=None, max_examples=10)
@given(problems())
def test_one_collective_a_group_is_psum_scatter_and_all_to_all(problem):
    m, n, config, groups, ranks = problem
    random = np.random.default_rng(m * n)
    sent = [random.integers(-9, 9, (m, n)).astype(np.float32) for _ in range(ranks)]
    flat = [np.asarray(pack(y, config, groups=groups, ranks=ranks)).ravel() for y in sent]
    spans = group_spans(groups, config)
    assert spans[0].offset == 0
    assert sum(span.size for span in spans) == flat[0].size
    rows = m // ranks
    for rank in range(ranks):
        reduced, exchanged = [], []
        for offset, size in spans:
            share = size // ranks
            mine = slice(offset + rank * share, offset + (rank + 1) * share)
            reduced.append(sum(buffer[mine] for buffer in flat))
            exchanged += [buffer[mine] for buffer in flat]
        of_rank = slice(rank * rows, (rank + 1) * rows)
        part = (-1, config.tile_m // ranks, config.tile_n)
        got = unpack(np.concatenate(reduced).reshape(part), rows, n, config)
        np.testing.assert_array_equal(got, sum(sent)[of_rank])
        got = unpack(
            np.concatenate(exchanged).reshape(part), m, n, config, groups=groups, ranks=ranks
        )
        np.testing.assert_array_equal(got, np.concatenate([y[of_rank] for y in sent]))


@pytest.mark.parametrize(
    ("tiles_m", "tiles_n", "minor", "width"),
    [(1, 1, "m", 1), (5, 3, "m", 2), (7, 4, "n", 3), (3, 8, "n", 4), (6, 2, "m", 16)],
)
def test_tiles_walk_as_in_the_kernel(tiles_m, tiles_n, minor, width):
    order = schedule.tile_order(tiles_m, tiles_n, minor, width)
    assert len({tuple(tile) for tile in order.tolist()}) == tiles_m * tiles_n == len(order)
    snake = functools.partial(
        plgpu.planar_snake,
        shape=(tiles_m, tiles_n),
        minor_dim="mn".index(minor),
        tile_width=width,
    )
    np.testing.assert_array_equal(np.stack(jax.vmap(snake)(jnp.arange(len(order))), 1), order)


cut_waves = st.integers(1, 8).flatmap(lambda total: st.sampled_from(list(partitions(total))))


@settings(deadline=None)
@given(cut_waves, st.integers(1, 20), st.integers(0, 19))
def test_groups_of_waves_end_with_their_waves(waves, sms, missing):
    total = sum(waves)
    tiles = total * sms - missing % sms
    groups = groups_of_waves(waves, tiles, sms)
    assert waves_of(tiles, sms) == total
    assert sum(groups) == tiles
    assert schedule.last_waves(groups, sms) == tuple(np.cumsum(waves) - 1)
    assert all(start % sms == 0 for start in schedule.starts_of(groups))


def test_partitions_are_all_and_each_once():
    for waves in range(1, 9):
        found = list(partitions(waves))
        assert len(set(found)) == len(found) == 2 ** (waves - 1)
        assert all(sum(groups) == waves and min(groups) > 0 for groups in found)
    assert next(partitions(5)) == (5,)


@pytest.mark.parametrize(("n", "k"), ROW_PARALLEL)
@pytest.mark.parametrize("m", [2048, 16384])
def test_defaults_lower_for_real_shapes(m, n, k):
    for ranks in (1, 4):
        function, shapes = case(m, n, k, default(m, n, k, SMS, ranks=ranks), ranks)
        modes.lower(function, *shapes)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_candidates_lower(ranks):
    for config in candidates(3000, 8192, 2048, SMS, ranks=ranks):
        function, shapes = case(3000, 8192, 2048, config, ranks)
        modes.lower(function, *shapes)


def test_rule_sends_little_padding():
    for n, k in ROW_PARALLEL:
        for m in (2048, 4096, 8192, 16384):
            config = default(m, n, k, SMS)
            assert np.prod(packed_shape(m, n, config)) <= 1.05 * m * n
            assert config.tile_m * config.tile_n >= 128 * 128


X, W = jnp.zeros((256, 64), BF16), jnp.zeros((128, 64), BF16)


@pytest.mark.parametrize(
    ("changed", "raised", "match"),
    [
        ({"groups": (1,)}, ValueError, r"\(1,\) do not cut 2 tiles"),
        ({"groups": (2, 0)}, ValueError, "do not cut"),
        ({"groups": ()}, ValueError, "do not cut"),
        ({"sms": 0}, ValueError, "sms is 0"),
        ({"ranks": 3}, ValueError, "M = 256 is not a multiple of 3"),
        ({"ranks": 16}, NotImplementedError, "16 ranks"),
        ({"x": X[:, :32]}, ValueError, "K = 32"),
        ({"x": X[:, :32], "w": W[:, :32]}, NotImplementedError, "K must be"),
        ({"w": W[:100]}, NotImplementedError, "N of 8"),
        ({"w": W.astype(FP16)}, ValueError, "w is float16"),
        ({"counters": jnp.zeros(1, jnp.int32)}, ValueError, "counters must be a jax.Ref"),
        ({"counters": (2, jnp.int32)}, ValueError, "counters is int32"),
        ({"counters": (1, jnp.float32)}, ValueError, "counters is float32"),
        ({"packed": ((2, 128, 64), BF16)}, ValueError, "packed is bfloat16"),
        ({"packed": ((2, 128, 128), FP16)}, ValueError, "packed is float16"),
    ],
)
def test_bad_input_is_named(changed, raised, match):
    arguments = {"x": X, "w": W, "counters": (1, jnp.int32), "groups": (2,), "config": SMALL}
    arguments |= {"sms": 2} | changed
    for name in ("counters", "packed"):
        if isinstance(arguments.get(name), tuple):
            arguments[name] = jax.new_ref(jnp.zeros(*arguments[name]))
    with pytest.raises(raised, match=match):
        signal_gemm(**arguments)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda: groups_of_waves((1, 1), 9, 3), "have 3"),
        (lambda: groups_of_waves((3, 0), 9, 3), "have 3"),
        (lambda: list(partitions(0)), "0 waves"),
        (lambda: unpack(jnp.zeros((2, 128, 128)), 300, 128, SMALL), "packed is"),
        (lambda: unpack(jnp.zeros((4, 64, 128)), 256, 128, SMALL, ranks=2), "groups are needed"),
        (lambda: pack(jnp.zeros((255, 128)), SMALL, ranks=2, groups=(2,)), "M = 255"),
        (lambda: SignalConfig(tile_m=96), "cannot compute"),
        (lambda: SignalConfig(stages=5), "shared memory"),
    ],
)
def test_what_does_not_fit_is_named(function, match):
    with pytest.raises(ValueError, match=match):
        function()
