"""The dense GEMM kernel: persistent blocks of one loading and two computing warpgroups."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.dense_gemm.config import TILE_K, DenseConfig
from pallas_kernels.products import pad_rows
from pallas_kernels.workspace import counters

_CHUNK = 64
"""Rows and columns of the output that pass through one slot of the epilogue."""
_SLOTS = 2
"""Slots of each computing warpgroup: one is filled while the other is on its way to GMEM."""
_ROWS = 8
"""Rows of a swizzled tile, in which Mosaic's TMA descriptors count; M is padded to a multiple."""
_LOADER = 2
"""Index of the warpgroup that loads; 0 and 1 compute."""
_LOADER_REGISTERS, _COMPUTE_REGISTERS = 40, 232
_HALF_OF_REGISTERS = 64 * 256
"""Accumulators of a warpgroup that leave as many registers again for what the epilogue adds."""


def _next(slot, stages: int):
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


class _Work:
    """How the work items of one GEMM map to parts of its operands (all static but the item)."""

    def __init__(self, config: DenseConfig, m: int, n: int, k: int, gated: bool):
        self.config = config
        self.gated = gated
        self.columns = config.tile_n // 2 if gated else config.tile_n
        pair = {axis: 2 if config.cluster == axis else 1 for axis in ("m", "n")}
        self.pair = pair
        self.tiles_m = pl.cdiv(m, config.tile_m * pair["m"])
        self.tiles_n = pl.cdiv(n, self.columns * pair["n"])
        self.steps = k // TILE_K
        # Every item fills the pipeline: the slots filled first are all of one item.
        self.stages = min(config.stages, self.steps // config.split_k)
        self.items = self.tiles_m * self.tiles_n * config.split_k
        """Items that blocks (pairs of blocks, with a cluster) take turns to work on."""

    @property
    def padded(self) -> tuple[int, int, int]:
        """Blocks' tiles along M and along N, and warpgroups: one counter of split-K each."""
        return self.tiles_m * self.pair["m"], self.tiles_n * self.pair["n"], 2

    def locate(self, item, member):
        """Tile indices along M and N, the part of K, its first step and number of steps."""
        config = self.config
        tile = lax.div(item, config.split_k)
        part = lax.rem(item, config.split_k)
        m, n = plgpu.planar_snake(
            tile,
            (self.tiles_m, self.tiles_n),
            "mn".index(config.grid_minor),
            config.grid_tile_width,
        )
        if config.cluster == "m":
            m = m * 2 + member
        elif config.cluster == "n":
            n = n * 2 + member
        first = lax.div(part * self.steps, config.split_k)
        return m, n, part, first, lax.div((part + 1) * self.steps, config.split_k) - first


def _load(g: dict, work: _Work, each_item, member, *, k_major: bool, interpret: Any) -> None:
    """The loading warpgroup: fills operand slots, running ahead of the others across tiles.

    The first slots get their weights before the kernel before this one is complete.
    """
    config, stages = work.config, work.stages
    across_m = {"collective_axes": "pair"} if config.cluster == "m" else {}
    across_n = {"collective_axes": "pair"} if config.cluster == "n" else {}
    halves = 1 + work.gated
    outputs = g["y"].shape[1]

    def load_w(n, step, slot):
        k = pl.ds(step * TILE_K, TILE_K)
        for half in range(halves):
            source = pl.ds(half * outputs + n * work.columns, work.columns)
            target = pl.ds(half * work.columns, work.columns)
            plgpu.copy_gmem_to_smem(
                g["w"].at[source, k] if k_major else g["w"].at[k, source],
                g["w_s"].at[slot, target] if k_major else g["w_s"].at[slot],
                g["loaded"].at[slot],
                **across_m,
            )

    def load_x(m, step, slot):
        plgpu.copy_gmem_to_smem(
            g["x"].at[pl.ds(m * config.tile_m, config.tile_m), pl.ds(step * TILE_K, TILE_K)],
            g["x_s"].at[slot],
            g["loaded"].at[slot],
            **across_n,
        )

    _, n, _, first, _ = work.locate(lax.axis_index("block"), member)
    for slot in range(stages):
        load_w(n, first + slot, slot)
    mosaic.wait_for_previous(interpret)

    def load_item(item, carry):
        m, n, _, first, count = work.locate(item, member)

        def load_step(i, carry):
            slot, done = carry

            @pl.when(done >= stages)
            def _():
                plgpu.barrier_wait(g["freed"].at[slot])
                load_w(n, first + i, slot)

            load_x(m, first + i, slot)
            return _next(slot, stages), done + 1

        return lax.fori_loop(0, count, load_step, carry)

    slot, _ = each_item(load_item, (jnp.int32(0), jnp.int32(0)))

    # The other block of a pair writes into this one's shared memory and barriers: stay until all
    # slots were given back.
    def drain(_, slot):
        plgpu.barrier_wait(g["freed"].at[slot])
        return _next(slot, stages)

    lax.fori_loop(0, stages, drain, slot)


def _compute(g: dict, work: _Work, each_item, member, *, k_major: bool, interpret: Any) -> None:
    """A computing warpgroup: products of its part of each tile, then the epilogue."""
    config, stages, split_k = work.config, work.stages, work.config.split_k
    rows, columns = config.wg_shape
    warpgroup = lax.axis_index("wg")
    row = warpgroup * rows if config.wg_dimension == "m" else 0
    column = warpgroup * columns if config.wg_dimension == "n" else 0

    def multiply(acc, slot):
        plgpu.barrier_wait(g["loaded"].at[slot])
        x_s, w_s = g["x_s"].at[slot], g["w_s"].at[slot]
        if config.wg_dimension == "m":
            x_s = x_s.at[pl.ds(row, rows)]
        elif k_major:
            w_s = w_s.at[pl.ds(column, columns)]
        else:
            w_s = w_s.at[:, pl.ds(column, columns)]
        plgpu.wgmma(acc, x_s, w_s.transpose((1, 0)) if k_major else w_s)

    def compute_item(item, slot):
        m, n, part, _, count = work.locate(item, member)
        top = m * config.tile_m + row
        left = n * work.columns + column
        tile = (m, n, warpgroup)

        def products(acc):
            multiply(acc, slot)

            def step(_, carry):
                last, slot = carry
                multiply(acc, slot)
                plgpu.wgmma_wait(1)  # the product before this one is complete
                plgpu.barrier_arrive(g["freed"].at[last])
                return slot, _next(slot, stages)

            last, after = lax.fori_loop(1, count, step, (slot, _next(slot, stages)))
            asked = _ask(g, work, top, left) if split_k == 1 else []
            sums = acc[...]
            plgpu.barrier_arrive(g["freed"].at[last])
            return sums, asked, after

        accumulators = plgpu.ACC((rows, columns), jnp.float32)
        sums, bias, after = pl.run_scoped(products, accumulators)
        if split_k == 1:
            chunk_of = lambda r, c: sums[r : r + _CHUNK, c : c + _CHUNK]  # noqa: E731
            _finish(g, work, top, left, bias, chunk_of)
            return after

        mosaic.store(g["partial"].at[part, *tile], sums)
        flat = (m * work.padded[1] + n) * 2 + warpgroup
        counter = g["counters"].at[flat]
        ticket = mosaic.take_ticket(counter, g["ticket"].at[warpgroup], interpret=interpret)

        @pl.when(ticket == split_k - 1)
        def _():
            g["counters"][flat] = 0
            bias = _ask(g, work, top, left)

            def share(of, r, c):
                at = g["partial"].at[of, *tile, pl.ds(r, _CHUNK), pl.ds(c, _CHUNK)]
                return mosaic.load(at, plgpu.Layout.WGMMA)

            def total(r, c):  # the same whoever comes last: all parts in their order, or just two
                if split_k == 2 and rows * columns <= _HALF_OF_REGISTERS:
                    return sums[r : r + _CHUNK, c : c + _CHUNK] + share(1 - part, r, c)
                return functools.reduce(jnp.add, [share(p, r, c) for p in range(split_k)])

            _finish(g, work, top, left, bias, total)

        return after

    mosaic.wait_for_previous(interpret)
    each_item(compute_item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _chunks(work: _Work) -> list[tuple[int, int]]:
    """Row and column, in the warpgroup's part of the tile, of each chunk of the output."""
    rows, columns = work.config.wg_shape
    if work.gated:
        columns //= 2
    return [(r, c) for r in range(0, rows, _CHUNK) for c in range(0, columns, _CHUNK)]


def _at(top, left, chunk):
    return pl.ds(top + chunk[0], _CHUNK), pl.ds(left + chunk[1], _CHUNK)


def _ask(g: dict, work: _Work, top, left) -> list[jax.Array]:
    """Starts to load what the epilogue adds, while the last products are computed.

    Returns the bias of each 64 columns of the accumulators if registers are left for it; the
    residual's first chunks go to the epilogue's slots.
    """
    if "residual" in g:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, chunk in enumerate(_chunks(work)[:_SLOTS]):
            _load_residual(g, i, _at(top, left, chunk))
    rows, columns = work.config.wg_shape
    if "bias" not in g or rows * columns > _HALF_OF_REGISTERS:
        return []
    return [_load_bias(g, work, left, c) for c in range(0, columns, _CHUNK)]


def _load_bias(g: dict, work: _Work, left, c: int) -> jax.Array:
    outputs = g["y"].shape[1]
    first, c = divmod(c, work.columns) if work.gated else (0, c)
    # A chunk wholly past the last column is dropped later; read somewhere allowed.
    start = jnp.minimum(left + c, outputs - _CHUNK) + first * outputs
    return mosaic.load(g["bias"].at[pl.ds(start, _CHUNK)], plgpu.Layout.WGMMA.reduce(0))


def _load_residual(g: dict, slot: int, at) -> None:
    warpgroup = lax.axis_index("wg")
    plgpu.copy_gmem_to_smem(
        g["residual"].at[*at],
        g["y_s"].at[warpgroup, slot],
        g["residual_loaded"].at[warpgroup * _SLOTS + slot],
    )


def _finish(g: dict, work: _Work, top, left, bias: list[jax.Array], sums) -> None:
    """The epilogue: bias, activation, residual, rounding, and TMA to GMEM, chunk by chunk.

    TMA drops what lies over the edge of y. `sums(row, column)` are a chunk's float32 sums.
    """
    warpgroup = lax.axis_index("wg")
    chunks = _chunks(work)
    # With an odd number of chunks, the tile before ended in the slot that this one begins with.
    first_pending = 0 if len(chunks) % _SLOTS else _SLOTS - 1

    def biased(r, c):
        value = sums(r, c)
        if "bias" not in g:
            return value
        row = bias[c // _CHUNK] if bias else _load_bias(g, work, left, c)
        return value + lax.broadcast_in_dim(row.astype(jnp.float32), value.shape, [1])

    for i, (r, c) in enumerate(chunks):
        slot = g["y_s"].at[warpgroup, i % _SLOTS]
        out = biased(r, c)
        if work.gated:
            out = out / (1.0 + jnp.exp(-out)) * biased(r, c + work.columns)
        if "residual" in g:
            plgpu.barrier_wait(g["residual_loaded"].at[warpgroup * _SLOTS + i % _SLOTS])
            out = out + plgpu.load(slot, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        else:
            pending = _SLOTS - 1 if i else first_pending
            plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
        slot[...] = out.astype(slot.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, g["y"].at[*_at(top, left, (r, c))])
        if "residual" in g and i + _SLOTS < len(chunks):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            _load_residual(g, i % _SLOTS, _at(top, left, chunks[i + _SLOTS]))


def _body(*refs: Any, names: list[str], work: _Work, k_major: bool, interpret: Any) -> None:
    """One block: each of its three warpgroups walks the same items."""
    g = dict(zip(names, refs, strict=True))
    member = lax.axis_index("pair") if work.config.cluster else 0

    def each_item(visit, carry):
        loop = plgpu.nd_loop((work.items,), collective_axes="block", init_carry=carry)
        return loop(lambda info, carry: visit(info.index[0], carry))

    mosaic.let_next_start(interpret)
    rest = {"k_major": k_major, "interpret": interpret}

    @pl.when(lax.axis_index("wg") == _LOADER)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        _load(g, work, each_item, member, **rest)

    @pl.when(lax.axis_index("wg") != _LOADER)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _compute(g, work, each_item, member, **rest)


@functools.partial(jax.jit, static_argnames=("gated", "w_layout", "config", "sms", "interpret"))
def _call(x, w, bias, residual, arrivals, *, gated, w_layout, config, sms, interpret):
    m, k = x.shape
    k_major = w_layout == "nk"
    outputs = w.shape[0 if k_major else 1] // (1 + gated)
    work = _Work(config, m, outputs, k, gated)
    dtype, split, stages = x.dtype, config.split_k > 1, work.stages
    pairs = bool(config.cluster)
    w_tile = (config.tile_n, TILE_K) if k_major else (TILE_K, config.tile_n)
    named = {
        "x": x,
        "w": w,
        "bias": bias,
        "residual": residual,
        "counters": arrivals,
        "y": jax.ShapeDtypeStruct((m, outputs), dtype),
        "partial": split
        and jax.ShapeDtypeStruct((config.split_k, *work.padded, *config.wg_shape), jnp.float32),
        "x_s": plgpu.SMEM(
            (stages, config.tile_m, TILE_K), dtype, transforms=mosaic.tiled(dtype, TILE_K)
        ),
        "w_s": plgpu.SMEM((stages, *w_tile), dtype, transforms=mosaic.tiled(dtype, TILE_K)),
        "y_s": plgpu.SMEM(
            (2, _SLOTS, _CHUNK, _CHUNK), dtype, transforms=mosaic.tiled(dtype, _CHUNK)
        ),
        "loaded": plgpu.Barrier(num_arrivals=2 + gated, num_barriers=stages),
        "freed": plgpu.ClusterBarrier(
            collective_axes=("pair",), num_arrivals=2, num_barriers=stages
        )
        if pairs
        else plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "residual_loaded": residual is not None and plgpu.Barrier(num_barriers=2 * _SLOTS),
        "ticket": split and plgpu.SMEM((2, 1), jnp.int32),
    }
    named = {
        name: value for name, value in named.items() if value is not None and value is not False
    }
    order = list(named)
    outs = [name for name in ("y", "partial") if name in named]
    operands = [named[name] for name in order[: order.index("y")]]
    out = plgpu.kernel(
        functools.partial(_body, names=order, work=work, k_major=k_major, interpret=interpret),
        out_type=[named[name] for name in outs],
        scratch_types=[named[name] for name in order[order.index("x_s") :]],
        grid=(min(max(sms // (1 + pairs), 1), work.items),),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=mosaic.WARPGROUP,
        kernel_name="dense_gemm",
        **({"cluster": (2,), "cluster_names": ("pair",)} if pairs else {}),
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands)
    return out[0]


def run(x, w, bias, residual, *, config: DenseConfig, gated, w_layout, sms, interpret):
    """Launches the kernel; arguments are checked by the caller."""
    m, k = x.shape
    over = -m % _ROWS
    if over:
        x, residual = pad_rows(x), None if residual is None else pad_rows(residual)
    outputs = w.shape[0 if w_layout == "nk" else 1] // (1 + gated)
    tiles_m, tiles_n, parts = _Work(config, m + over, outputs, k, gated).padded
    arrivals = counters(tiles_m * tiles_n * parts) if config.split_k > 1 else None
    static = {"gated": gated, "w_layout": w_layout, "config": config, "sms": sms}
    y = _call(x, w, bias, residual, arrivals, **static, interpret=interpret)
    return y[:m] if over else y
