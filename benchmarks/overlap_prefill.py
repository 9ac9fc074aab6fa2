"""The prefill of a model that is split over GPUs, and the training step of one of its MLPs.

Both as programs that are compiled once for each way to sum over the ranks, and share one set of
weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.overlap_cases import Shape
from benchmarks.overlap_time import GPU_OPTIONS, on_gpu
from jpd import ops
from jpd.checkpoint import param_bytes
from jpd.checkpoint.dummy import make_params
from jpd.config import KernelConfig
from jpd.layers.rope import angles
from jpd.models import ModelConfig, bind
from jpd.ops import overlap, registry
from jpd.overlap import PlanTable
from jpd.parallel import MESH_AXIS, ManyDevices, Split

PAGE = 64
"""Tokens."""
LAST = 8
"""Tokens at the end of the prompt whose logits are compared."""
_SPARE_BYTES = 2 << 30


@dataclass(frozen=True)
class Variant:
    """One way to compute products and sums; all else is the same."""

    products: str = "auto"
    """Implementation of `linear` and `gated_linear`: kernels where they can, or "xla": cuBLAS."""
    sums: str = "auto"
    """`jpd.ops.overlap.Settings.implementation`."""
    reorder: str = "auto"
    """`jpd.ops.overlap.Settings.reorder`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Compiler options besides `GPU_OPTIONS`."""

    @contextlib.contextmanager
    def tracing(
        self, plans: PlanTable | None, communicators: Sequence[Any]
    ) -> Iterator[list[registry.Choice]]:
        """Programs of this variant are traced inside the block; what its ops take is collected."""
        kernels = KernelConfig(linear=self.products, gated_linear=self.products)
        settings = overlap.using(
            implementation=self.sums,
            reorder=self.reorder,
            plans=plans,
            communicators={MESH_AXIS: list(communicators)},
        )
        with ops.using(kernels), settings, registry.recording() as taken:
            yield taken

    def compile(self, lowered: jax.stages.Lowered) -> Any:
        """The program."""
        options = {**GPU_OPTIONS, **self.options} if on_gpu() else dict(self.options)
        return lowered.compile(compiler_options=options)


class Model:
    """Random weights on the devices, and room for one prompt's keys and values.

    Args:
      config: the model with as many layers as are used.
      devices: as many as ranks.
      tokens: of the longest prompt.
    """

    def __init__(self, config: ModelConfig, devices: Sequence[jax.Device], tokens: int) -> None:
        self.config = config
        self.place = ManyDevices(Split(config, len(devices)), devices)
        self.rank = self.place.rank_model
        self.params = make_params(config, config.dtype, seed=0, placement=self.place)
        pages = -(-tokens // PAGE)
        shape, place = self.place.pages((pages, PAGE, self.rank.num_kv_heads, self.rank.head_dim))
        self._empty = jax.jit(lambda: jnp.zeros(shape, config.dtype), out_shardings=place)
        self.pages: list[tuple[jax.Array, jax.Array]] = []
        self.renew_pages()

    def renew_pages(self) -> None:
        """Makes pages anew: those that a failed program was given are lost."""
        self.pages = []
        self.pages = [(self._empty(), self._empty()) for _ in range(self.config.num_layers)]

    def prompt(self, tokens: int) -> jax.Array:
        """Random token ids, the same ones each time."""
        ids = jax.random.randint(jax.random.key(1), (tokens,), 0, self.config.vocab_size)
        return jax.device_put(ids, self.place.everywhere)

    def lower(self, tokens: int) -> jax.stages.Lowered:
        """A prefill: (params, pages, ids `[tokens]`) -> logits of the last tokens, and pages, in
        place."""
        inputs = self.params, self.pages, self.prompt(tokens)
        specs = jax.tree.map(lambda array: array.sharding.spec, inputs)
        mapped = jax.shard_map(
            # Another function for each variant: what JAX keeps of one, it takes for the next.
            lambda *args: self._prefill(*args),
            mesh=self.place.mesh,
            in_specs=specs,
            out_specs=(P(), specs[1]),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=1).lower(*inputs)

    def run(self, program: Any, ids: jax.Array) -> jax.Array:
        """Enqueues a compiled prefill; its logits."""
        logits, self.pages = program(self.params, self.pages, ids)
        return logits

    def products(self, tokens: int) -> dict[str, Shape]:
        """Products of a rank that are summed over the ranks."""
        rank = self.rank
        widths = {"attention": rank.num_heads * rank.head_dim, "mlp": rank.ffn_size}
        return {name: Shape(tokens, rank.hidden_size, k) for name, k in widths.items()}

    def _prefill(self, params: Any, pages: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        with ops.over_ranks(ops.Ranks(MESH_AXIS, self.place.split.cut_axes, overlap=True)):
            model = bind(self.rank, params)
            positions = jnp.arange(len(ids))
            cos, sin = angles(self.rank.rope, self.rank.head_dim, positions)
            where = _Where.of_prompt(len(ids))
            layer = jax.jit(partial(_layer, self.rank))  # traced for the first, and for all others
            x, after = model.embed(ids), []
            for number in range(self.rank.num_layers):
                x, *kv = layer(params["layers"][number], x, cos, sin, where, *pages[number])
                after.append(tuple(kv))
            hidden, _ = model.norm(x)
            return model.logits(hidden[-LAST:]), after


class _Where(NamedTuple):
    """One prompt that is alone in its pages, as `jpd.ops` has it."""

    slots: jax.Array
    page_table: jax.Array
    starts: jax.Array
    counts: jax.Array

    @classmethod
    def of_prompt(cls, tokens: int) -> _Where:
        """The first pages, in order."""
        slots = jnp.arange(tokens, dtype=jnp.int32)
        pages = jnp.arange(-(-tokens // PAGE), dtype=jnp.int32)[None]
        return cls(slots, pages, jnp.zeros(1, jnp.int32), jnp.full(1, tokens, jnp.int32))


def _layer(
    config: ModelConfig,
    params: Any,
    x: ops.Stream,
    cos: jax.Array,
    sin: jax.Array,
    where: _Where,
    k_pages: jax.Array,
    v_pages: jax.Array,
) -> tuple[ops.Stream, jax.Array, jax.Array]:
    """One layer of the model; what its norm is to add, and the pages."""
    kv: list[jax.Array] = []
    one = config.replace(num_layers=1, windows=config.windows[:1])

    def attend(
        layer: int, qkv: jax.Array, cos: jax.Array, sin: jax.Array, norms: ops.HeadNorms | None
    ) -> jax.Array:
        pages, heads = (k_pages, v_pages), config.num_heads
        q, *pages = ops.rope_write(qkv, cos, sin, *pages, where.slots, num_heads=heads, norms=norms)
        kv.extend(pages)
        how = {"scale": q.shape[-1] ** -0.5, "window": one.windows[layer]}
        table, starts, counts = where.page_table, where.starts, where.counts
        return ops.prefill_attention(q, *pages, table, starts, counts, counts, **how)

    # `bind` takes a whole tree; of all but this layer, which is not run, a shape will do.
    outside = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), config.dtype)
    tree = {"embed": {"weight": outside}, "layers": {0: params}}
    with ops.workspace():
        x = bind(one, tree).layers[0](x, cos, sin, attend)
    return x, *kv


def layers_that_fit(config: ModelConfig, ranks: int, tokens: int, limit_bytes: float) -> int:
    """How many layers of a model have room on each of the GPUs, with a prompt of `tokens`.

    Raises:
      ValueError: not one.
    """
    rank = Split(config, ranks).rank_model
    none, one = (
        param_bytes(dataclasses.replace(rank, num_layers=n, windows=rank.windows[:n]), rank.dtype)
        for n in (0, 1)
    )
    itemsize = jnp.dtype(rank.dtype).itemsize
    kv = 2 * tokens * rank.num_kv_heads * rank.head_dim * itemsize
    # Inputs and results of a layer's widest products, twice, and of the others.
    wide = 2 * (2 * rank.ffn_size + 8 * rank.hidden_size)
    left = limit_bytes - _SPARE_BYTES - none - tokens * wide * itemsize
    found = min(config.num_layers, int(left // (one - none + kv)))
    if found < 1:
        raise ValueError(f"no layer fits into {limit_bytes / 1e9:.0f} GB on each of {ranks} GPUs")
    return found


class Training:
    """One MLP block with sequence parallelism: forward, and backward to x and both weights.

    Rows of x and of the result are split over the ranks, so that a reduce-scatter follows the
    second product, and the gradient of the first one's input (Korthikanti et al., arXiv
    2205.05198, section 4.2.2).

    Args:
      config: the model's widths.
      mesh: of one axis.
      tokens: rows of x.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, tokens: int) -> None:
        self.mesh = mesh
        width, ffn = config.hidden_size, config.ffn_size
        split = P(MESH_AXIS), P(MESH_AXIS), P(MESH_AXIS), P(None, MESH_AXIS)
        shapes = ((tokens, width), (tokens, width), (2 * ffn, width), (width, ffn))
        inputs = (1.0, 1.0, width**-0.5, ffn**-0.5)
        keys = jax.random.split(jax.random.key(2), 4)

        def drawn(key: jax.Array, shape: tuple[int, ...], scale: float, spec: P) -> jax.Array:
            place = NamedSharding(mesh, spec)
            draw = jax.jit(
                lambda key: (scale * jax.random.normal(key, shape)).astype(config.dtype),
                out_shardings=place,
            )
            return draw(key)

        self._specs = split
        self.arrays = tuple(map(drawn, keys, shapes, inputs, split))
        """x, the gradient of the result, the weight of gate and up, that of down."""
        self._width, self._ffn, self._tokens = width, ffn // mesh.size, tokens

    def lower(self, dtype: Any = None) -> jax.stages.Lowered:
        """(x, gradient, weights) -> the result and the gradients of x and of the weights.

        Args:
          dtype: of all numbers; None for the model's.
        """

        def mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
            how = {"resident": dtype is None}  # else weights are converted first
            hidden = overlap.all_gather_matmul(x, gate_up, MESH_AXIS, **how)
            gate, up = jnp.split(hidden, 2, axis=1)
            return overlap.matmul_reduce_scatter(jax.nn.silu(gate) * up, down, MESH_AXIS, **how)

        def step(*arrays: jax.Array) -> Any:
            x, g, *weights = arrays if dtype is None else (a.astype(dtype) for a in arrays)
            y, backward = jax.vjp(mlp, x, *weights)
            return y, *backward(g)

        specs = self._specs
        mapped = jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=specs,
            out_specs=(specs[0], specs[0], *specs[2:]),
            check_vma=False,
        )
        return jax.jit(mapped).lower(*self.arrays)

    def products(self) -> dict[str, Shape]:
        """Products of a rank that are summed over the ranks."""
        tokens, width, ffn = self._tokens, self._width, self._ffn
        return {
            "forward": Shape(tokens, width, ffn),
            "backward": Shape(tokens, width, 2 * ffn),
        }


def difference(got: Any, want: Any) -> float:
    """Largest relative error of an array of a tree; infinite where one is not finite."""

    @jax.jit
    def worst(got: Any, want: Any) -> jax.Array:
        def one(a: jax.Array, b: jax.Array) -> jax.Array:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            error = jnp.sqrt(jnp.square(a - b).sum() / jnp.square(b).sum())
            return jnp.where(jnp.isfinite(error), error, jnp.inf)

        return jnp.stack(jax.tree.leaves(jax.tree.map(one, got, want))).max()

    return float(worst(got, want))
