"""The signalling GEMM kernel: persistent blocks of one loading and two computing warpgroups."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels import mosaic
from pallas_kernels.signal_gemm import schedule
from pallas_kernels.signal_gemm.config import TILE_K, SignalConfig
from pallas_kernels.signal_gemm.layout import packed_shape, tile_grid

_CHUNK = 64
"""Rows and columns of the output that pass through one slot of the epilogue."""
_SLOTS = 2
"""Slots of each computing warpgroup: one is filled while the other is on its way to GMEM."""
_ROWS = 8
"""Rows of a swizzled tile, in which Mosaic's TMA descriptors count: a block of x has a multiple."""
_LOADER = 2
"""Index of the warpgroup that loads; 0 and 1 compute."""
_LOADER_REGISTERS, _COMPUTE_REGISTERS = 40, 232
_SIGNAL_AFTER = 4
"""Steps of the next tile between a tile's last store, or the first step where its sums were not
held, and its signal: the stores complete while wgmma works."""


def _next(slot, stages: int):
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


class _Work:
    """How tiles map to operands, slots of the output and counters (all static but the tile)."""

    def __init__(self, config: SignalConfig, m: int, n: int, k: int, groups, ranks: int, sms: int):
        self.config = config
        self.groups = groups
        self.ranks = ranks
        self.part_m = config.part_m(ranks)
        self.grid = tile_grid(m, n, config, ranks)
        self.tiles = self.grid[0] * self.grid[1]
        self.blocks = min(sms, self.tiles)
        self.steps = k // TILE_K
        # No warpgroup is ahead of the other by more than `stages` steps, hence by one tile: the two
        # barriers of `_signal`, taken in turns, rely on it.
        self.stages = min(config.stages, self.steps)

    def locate(self, tile):
        """Row and column of a tile in the matrix of tiles: `schedule.tile_order`."""
        config = self.config
        return plgpu.planar_snake(
            tile, self.grid, "mn".index(config.grid_minor), config.grid_tile_width
        )

    def group(self, tile):
        """Group of a tile, its first tile and its number of tiles."""
        starts = schedule.starts_of(self.groups)
        group, start, size = jnp.int32(0), jnp.int32(0), jnp.int32(self.groups[0])
        for number in range(1, len(self.groups)):
            past = tile >= starts[number]
            group = lax.select(past, jnp.int32(number), group)
            start = lax.select(past, jnp.int32(starts[number]), start)
            size = lax.select(past, jnp.int32(self.groups[number]), size)
        return group, start, size

    def slots(self, tile):
        """The tile's slot of the packed buffer for rank 0, and how far the next rank's is."""
        if self.ranks == 1:
            return tile, 0
        _, start, size = self.group(tile)
        return start * self.ranks + tile - start, size


def _add_release(counter: Any, interpret: Any) -> None:
    """Adds one to `counter` (a GMEM int32 scalar ref) with release at system scope.

    Whoever then reads the new number, a stream that waits on the memory included, sees all that
    this warpgroup stored and all that it learnt was stored through barriers. In interpret mode
    blocks run one after another, so that a plain read and write does.
    """
    if interpret is not None:
        counter[...] = counter[...] + 1
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(ctx, ref):
        del ctx
        mgpu.utils.warpgroup_barrier()
        semaphore = mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(ref))
        semaphore.signal(1, memory_scope="sys")

    signal(counter)


def _load(g: dict, work: _Work, each_tile, *, interpret: Any) -> None:
    """The loading warpgroup: fills operand slots, running ahead of the others across tiles.

    The first slots get their weights before the kernel before this one is complete.
    """
    config, stages = work.config, work.stages

    def load_w(n, step, slot):
        plgpu.copy_gmem_to_smem(
            g["w"].at[pl.ds(n * config.tile_n, config.tile_n), pl.ds(step * TILE_K, TILE_K)],
            g["w_s"].at[slot],
            g["loaded"].at[slot],
        )

    def load_x(m, step, slot):
        for rank in range(work.ranks):
            rows = pl.ds(m * work.part_m, work.part_m)
            plgpu.copy_gmem_to_smem(
                g["x"].at[rank, rows, pl.ds(step * TILE_K, TILE_K)],
                g["x_s"].at[slot, pl.ds(rank * work.part_m, work.part_m)],
                g["loaded"].at[slot],
            )

    _, n = work.locate(lax.axis_index("block"))
    for slot in range(stages):
        load_w(n, slot, slot)
    mosaic.wait_for_previous(interpret)

    def load_tile(tile, carry):
        m, n = work.locate(tile)

        def load_step(step, carry):
            slot, done = carry

            @pl.when(done >= stages)
            def _():
                plgpu.barrier_wait(g["freed"].at[slot])
                load_w(n, step, slot)

            load_x(m, step, slot)
            return _next(slot, stages), done + 1

        return lax.fori_loop(0, work.steps, load_step, carry)

    slot, _ = each_tile(load_tile, (jnp.int32(0), jnp.int32(0)))

    def drain(_, slot):
        plgpu.barrier_wait(g["freed"].at[slot])
        return _next(slot, stages)

    lax.fori_loop(0, stages, drain, slot)


def _compute(g: dict, work: _Work, each_tile, *, interpret: Any) -> None:
    """A computing warpgroup: products of its part of each tile, stores, and the signal.

    Rounded sums stay in registers, where they fit, until the products of the next tile are on their
    way, and are stored chunk by chunk between these. The signal waits for the stores to complete,
    which takes as long as some more steps.
    """
    config, stages = work.config, work.stages
    rows, columns = config.wg_shape
    warpgroup = lax.axis_index("wg")
    row = warpgroup * rows if config.wg_dimension == "m" else 0
    column = warpgroup * columns if config.wg_dimension == "n" else 0
    chunks = range(len(_chunks(config)))
    dtype = g["x"].dtype

    def multiply(acc, slot):
        plgpu.barrier_wait(g["loaded"].at[slot])
        x_s, w_s = g["x_s"].at[slot], g["w_s"].at[slot]
        if config.wg_dimension == "m":
            x_s = x_s.at[pl.ds(row, rows)]
        else:
            w_s = w_s.at[pl.ds(column, columns)]
        plgpu.wgmma(acc, x_s, w_s.transpose((1, 0)))

    def compute_tile(tile, carry):
        slot, held = carry
        before = tile - work.blocks

        def store_held(chunk):
            @pl.when(before >= 0)
            def _():
                _store(g, work, before, held, chunk, row, column)

        def products(acc):
            def step(carry, meanwhile=None):
                last, slot = carry
                multiply(acc, slot)
                if meanwhile is not None:
                    meanwhile()
                plgpu.wgmma_wait(1)  # the product before this one is complete
                plgpu.barrier_arrive(g["freed"].at[last])
                return slot, _next(slot, stages)

            def steps(first, end, carry):
                return lax.fori_loop(first, end, lambda _, carry: step(carry), carry)

            multiply(acc, slot)
            carry, done = (slot, _next(slot, stages)), 1
            for chunk in chunks if config.holds_sums else ():
                if done < work.steps:
                    carry, done = step(carry, functools.partial(store_held, chunk)), done + 1
                else:
                    store_held(chunk)
            early = min(done + _SIGNAL_AFTER, work.steps)
            carry = steps(done, early, carry)

            @pl.when(before >= 0)
            def _():
                _signal(g, work, before, interpret=interpret)

            last, after = steps(early, work.steps, carry)
            sums = acc[...].astype(dtype)
            plgpu.barrier_arrive(g["freed"].at[last])
            return sums, after

        sums, after = pl.run_scoped(products, plgpu.ACC((rows, columns), jnp.float32))
        if config.holds_sums:
            return after, sums
        for chunk in chunks:
            _store(g, work, tile, sums, chunk, row, column)
        return after, None

    mosaic.wait_for_previous(interpret)
    nothing = None
    if config.holds_sums:
        nothing = plgpu.layout_cast(jnp.zeros((rows, columns), dtype), plgpu.Layout.WGMMA)
    _, held = each_tile(compute_tile, (jnp.int32(0), nothing))
    block = lax.axis_index("block")
    last = block + lax.div(work.tiles - 1 - block, jnp.int32(work.blocks)) * work.blocks
    for chunk in chunks if config.holds_sums else ():
        _store(g, work, last, held, chunk, row, column)
    _signal(g, work, last, interpret=interpret)


def _chunks(config: SignalConfig) -> list[tuple[int, int]]:
    """Row and column, in a warpgroup's part of the tile, of each chunk of the output."""
    rows, columns = config.wg_shape
    return [(r, c) for r in range(0, rows, _CHUNK) for c in range(0, columns, _CHUNK)]


def _store(g: dict, work: _Work, tile, sums, chunk: int, row, column) -> None:
    """The epilogue: one chunk of a warpgroup's rounded sums by TMA to each rank's part of the tile.

    `row` and `column` are where the warpgroup's sums begin in the tile.
    """
    r, c = _chunks(work.config)[chunk]
    high = min(_CHUNK, work.part_m)
    copies = _CHUNK // high
    first, stride = work.slots(tile)
    slot = g["y_s"].at[lax.axis_index("wg"), chunk % _SLOTS]
    # Copies are counted one by one; a tile begins with none on their way, as the one before it was
    # signalled, so that an odd number of chunks does no harm.
    plgpu.wait_smem_to_gmem((_SLOTS - 1) * copies, wait_read_only=True)
    slot[...] = sums[r : r + _CHUNK, c : c + _CHUNK]
    plgpu.commit_smem()
    for part in range(copies):
        top = row + r + part * high
        rank = lax.div(top, jnp.int32(work.part_m))
        plgpu.copy_smem_to_gmem(
            slot.at[pl.ds(part * high, high)],
            g["packed"].at[
                first + rank * stride,
                pl.ds(lax.rem(top, jnp.int32(work.part_m)), high),
                pl.ds(column + c, _CHUNK),
            ],
        )


def _signal(g: dict, work: _Work, tile, *, interpret: Any) -> None:
    """Raises the counter of the tile's group once both warpgroups' stores of it are complete.

    Called by both; the second of them signals for the first.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=False)  # not just read: complete in GMEM
    stored = g["stored"].at[lax.rem(lax.div(tile, jnp.int32(work.blocks)), jnp.int32(2))]
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_arrive(stored)

    @pl.when(warpgroup == 1)
    def _():
        plgpu.barrier_wait(stored)
        _add_release(g["counters"].at[work.group(tile)[0]], interpret)


def _body(*refs: Any, names: list[str], work: _Work, interpret: Any) -> None:
    """One block: each of its three warpgroups walks the same tiles.

    It never lets the next kernel start early: the SMs that it leaves are the collective's.
    """
    g = dict(zip(names, refs, strict=True))

    def each_tile(visit, carry):
        loop = plgpu.nd_loop((work.tiles,), collective_axes="block", init_carry=carry)
        return loop(lambda info, carry: visit(info.index[0], carry))

    @pl.when(lax.axis_index("wg") == _LOADER)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        _load(g, work, each_tile, interpret=interpret)

    @pl.when(lax.axis_index("wg") != _LOADER)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _compute(g, work, each_tile, interpret=interpret)


@functools.partial(
    jax.jit, static_argnames=("n_rows", "groups", "config", "ranks", "sms", "interpret")
)
def _call(x, w, counters, packed, *, n_rows, groups, config, ranks, sms, interpret):
    k, n = x.shape[2], w.shape[0]
    work = _Work(config, n_rows, n, k, groups, ranks, sms)
    dtype, stages = x.dtype, work.stages
    operands = {"x": x, "w": w, "counters": counters}
    outputs = {}
    if packed is None:
        outputs["packed"] = jax.ShapeDtypeStruct(packed_shape(n_rows, n, config, ranks), dtype)
    else:
        operands["packed"] = packed
    swizzled = mosaic.tiled(dtype, TILE_K)
    scratch = {
        "x_s": plgpu.SMEM((stages, config.tile_m, TILE_K), dtype, transforms=swizzled),
        "w_s": plgpu.SMEM((stages, config.tile_n, TILE_K), dtype, transforms=swizzled),
        "y_s": plgpu.SMEM(
            (2, _SLOTS, _CHUNK, _CHUNK), dtype, transforms=mosaic.tiled(dtype, _CHUNK)
        ),
        "loaded": plgpu.Barrier(num_arrivals=1 + ranks, num_barriers=stages),
        "freed": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "stored": plgpu.Barrier(num_arrivals=1, num_barriers=2),
    }
    names = [*operands, *outputs, *scratch]
    out = plgpu.kernel(
        functools.partial(_body, names=names, work=work, interpret=interpret),
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(work.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=mosaic.WARPGROUP,
        kernel_name="signal_gemm",
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands.values())
    return out[0] if outputs else None


def run(x, w, counters, packed, *, groups, config: SignalConfig, ranks, sms, interpret):
    """Launches the kernel; arguments are checked by the caller."""
    m, k = x.shape
    blocks = x.reshape(ranks, m // ranks, k)
    over = -blocks.shape[1] % _ROWS
    if over:
        blocks = jnp.pad(blocks, ((0, 0), (0, over), (0, 0)))
    static = {"groups": groups, "config": config, "ranks": ranks, "sms": sms}
    return _call(blocks, w, counters, packed, n_rows=m, **static, interpret=interpret)
