"""The GEMV kernel: weights go straight to registers, products and sums are done by CUDA cores.

A block is one warpgroup and has few rows of the weight; there are many more blocks than the SMs
hold, so that the hardware evens out the work and no block waits for another. A row's parts are
asked for in turn, each as soon as the part that was in the same registers is multiplied.

An RMS norm of x costs no pass of its own: it is x / r times a weight, and the root r of x's mean
square can be divided by once the products are summed. Whoever multiplies a row sees all of x.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.gemv.config import GemvConfig, parts_of, vector, x_depth

_UNROLLED = 8
"""Most parts of a row without a loop."""


def layout(config: GemvConfig, elements: int) -> Any:
    """`[rows, threads of a row, elements]` in registers: a row's threads are neighbours."""
    lanes = 32
    match config.warps:
        case 1:
            return plgpu.Layout.TILED(plgpu.Tiling(((4, lanes, elements),)), (-3,), (-2,), -1)
        case 2:
            tiling = plgpu.Tiling(((2, 2 * lanes, elements), (lanes, elements)))
            return plgpu.Layout.TILED(tiling, (-5, -4), (-2,), -1)
    tiling = plgpu.Tiling(((1, 4 * lanes, elements), (lanes, elements)))
    return plgpu.Layout.TILED(tiling, (-4,), (-2,), -1)


def _body(
    *refs: Any,
    config: GemvConfig,
    names: tuple[str, ...],
    gated: bool,
    eps: float,
    interpret: Any,
):
    """One block: `config.block_n` outputs of every row of x.

    A part is what the threads of a row load at once; `w` is `[N, K / elements, elements]`, `x` is
    `[M, K / elements, elements]`. Weights, the norm's too, are asked for before the kernel before
    this one is complete.
    """
    g = dict(zip(names, refs, strict=True))
    x, w, y = g["x"], g["w"], g["y"]
    (rows, vectors, elements), outputs = x.shape, y.shape[1]
    halves, threads, block_n = 1 + gated, config.threads, config.block_n
    parts = parts_of(config, vectors * elements)
    depth = min(config.depth, parts)
    few = x_depth(rows, depth)
    shape = (block_n, threads, elements)
    in_registers = layout(config, elements)
    one_output = in_registers.reduce((1, 2))
    of_thread = in_registers.reduce(0)
    normed = "norm" in g
    first = lax.axis_index("block") * block_n

    def part_of(i):
        """The last part begins early enough to be whole, and `whole` drops what came before."""
        start, last = i * threads, vectors - threads
        if vectors % threads:
            start = min(start, last) if isinstance(i, int) else jnp.minimum(start, last)
        return pl.ds(start, threads)

    def here(half=0):
        return pl.ds(half * outputs + first, block_n)

    def load_w(i):
        return tuple(
            mosaic.load(w.at[here(half), part_of(i)], in_registers) for half in range(halves)
        )

    def load_x(i):
        return tuple(mosaic.load(x.at[row, part_of(i)], of_thread) for row in range(rows))

    def load_norm(i):
        return mosaic.load(g["norm"].at[part_of(i)], of_thread) if normed else ()

    def whole(values, i):
        """What belongs to part `i` alone."""
        if not isinstance(i, int) or (i + 1) * threads <= vectors:
            return values
        seen = i * threads - (vectors - threads)
        index = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=of_thread)
        return jnp.where(index >= seen, values, 0.0)

    def multiply(i, weights, activations, norm, sums, squares):
        """Adds the products of part `i`, elements that a thread holds together, and x's squares."""
        activations = [whole(a.astype(jnp.float32), i) for a in activations]
        if normed:
            of_part = [jnp.sum(a * a, axis=1) for a in activations]
            squares = tuple(old + new for old, new in zip(squares, of_part, strict=True))
            activations = [a * norm.astype(jnp.float32) for a in activations]
        activations = [lax.broadcast_in_dim(a, shape, (1, 2)) for a in activations]
        added = []
        for half, weight in enumerate(weights):
            weight = weight.astype(jnp.float32)
            for row, a in enumerate(activations):
                added.append(sums[half * rows + row] + jnp.sum(weight * a, axis=2))
        return tuple(added), squares

    mosaic.let_next_start(interpret)
    held = [load_w(i) for i in range(depth)]
    norm_held = [load_norm(i) for i in range(few)]
    mosaic.wait_for_previous(interpret)
    x_held = [load_x(i) for i in range(few)]
    bias = [
        mosaic.load(g["bias"].at[here(half)], one_output).astype(jnp.float32)
        for half in range(halves)
        if "bias" in g
    ]
    residual = [
        mosaic.load(g["residual"].at[row, here()], one_output).astype(jnp.float32)
        for row in range(rows)
        if "residual" in g
    ]
    start = plgpu.layout_cast(jnp.zeros(shape[:2], jnp.float32), in_registers.reduce(2))
    no_squares = plgpu.layout_cast(jnp.zeros(threads, jnp.float32), in_registers.reduce((0, 2)))

    def step(i, held, x_held, norm_held, sums, squares, slot=None):
        """Part `i`, followed by the loads of the parts that take its place and that of its x."""
        slot = i % depth if slot is None else slot
        of_x = x_held[slot % few], norm_held[slot % few]
        sums, squares = multiply(i, held[slot], *of_x, sums, squares)
        held, x_held, norm_held = [*held], [*x_held], [*norm_held]
        traced = not isinstance(i, int)
        if config.in_order and (traced or i + few < parts):
            mosaic.let_next_start(interpret)  # done long ago; ptxas moves nothing across it
        if traced or i + depth < parts:
            held[slot] = load_w(i + depth)
        if traced or i + few < parts:
            x_held[slot % few] = load_x(i + few)
            norm_held[slot % few] = load_norm(i + few)
        return held, x_held, norm_held, sums, squares

    def turn(n, carry):
        """All parts in flight."""
        for slot in range(depth):
            carry = step(n * depth + slot, *carry, slot=slot)
        return carry

    carry = (held, x_held, norm_held, (start,) * (halves * rows), (no_squares,) * rows * normed)
    turns = parts // depth - 1 if parts > _UNROLLED else 0
    if turns:  # in the loop every part is followed by one that takes its place
        carry = lax.fori_loop(0, turns, turn, carry)
    for i in range(turns * depth, parts):
        carry = step(i, *carry)
    *_, sums, squares = carry

    totals = [jnp.sum(value, axis=1) for value in sums]
    for row, square in enumerate(squares):
        of_output = lax.broadcast_in_dim(square, shape[:2], (1,))
        whole_row = jnp.sum(plgpu.layout_cast(of_output, in_registers.reduce(2)), axis=1)
        root = lax.rsqrt(whole_row * (1 / (vectors * elements)) + eps)
        for half in range(halves):
            totals[half * rows + row] *= root
    for row in range(rows):
        out = [totals[half * rows + row] for half in range(halves)]
        if bias:
            out = [value + b for value, b in zip(out, bias, strict=True)]
        value = out[0]
        if gated:
            value = value / (1.0 + jnp.exp(-value)) * out[1]
        if residual:
            value = value + residual[row]
        mosaic.store(y.at[row, here()], value.astype(y.dtype))


def run(x, w, bias, residual, norm, *, eps: float, config: GemvConfig, gated: bool, interpret: Any):
    """Launches the kernel; arguments are checked by the caller."""
    (rows, inputs), outputs = x.shape, w.shape[0] // (1 + gated)
    elements = vector(config, inputs)
    cut = (inputs // elements, elements)
    operands = {
        "x": x.reshape(rows, *cut),
        "w": w.reshape(w.shape[0], *cut),
        "bias": bias,
        "residual": residual,
        "norm": None if norm is None else norm.reshape(cut),
    }
    operands = {name: value for name, value in operands.items() if value is not None}
    return plgpu.kernel(
        functools.partial(
            _body,
            config=config,
            names=(*operands, "y"),
            gated=gated,
            eps=eps,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        grid=(outputs // config.block_n,),
        grid_names=("block",),
        compiler_params=mosaic.WARPGROUP,
        kernel_name="gemv",
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands.values())
