"""Compares the kernels that a model's steps will run with NumPy, before anything is served.

A kernel may be wrong on a machine on which nobody has tried it, without any error: cuBLAS is, for
some shapes, under an MPS share of the SMs. So every op runs on a few random inputs, at the model's
real widths and with the implementation that a step would take, and the reference is computed on the
host, where no GPU library has a part in it.

Nearly all of the time is compilation: the programs are compiled in parallel, and everything else
is NumPy, as each operation outside of them would be a program of its own to compile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpd.config import KernelConfig
from jpd.errors import KernelError
from jpd.ops import registry
from jpd.ops.attention import decode_attention, prefill_attention
from jpd.ops.norm import rms_norm
from jpd.ops.normed import Unnormed, gated_linear_of, linear_of
from jpd.ops.overlap import Packed, rms_norm_residual
from jpd.ops.overlap.packed import Layout
from jpd.ops.pallas import decode_choice, product_choice, takes_norm
from jpd.ops.rope import HeadNorms, rope_write

MAX_RELATIVE_ERROR = 1e-2
_COLUMNS, _ROWS = 1024, 32
"""Of a product, how many are compared: spread evenly, so that few tiles have none."""
_LENGTHS = (300, 0, 65, 1, 17, 16)
"""Tokens of decoding rows; 0 is a padded row."""
_CHUNKS = {0: 70, 2: 65, 5: 9}
"""Of these rows, how many of the last tokens are a prompt chunk."""


@dataclass(frozen=True)
class Widths:
    """What the shapes of a model's ops follow from."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    windows: Sequence[int | None]
    dtype: str
    eps: float
    qk_norm: bool
    sums: bool = False
    """Norms add sums over ranks to the residual stream."""


@dataclass(frozen=True)
class Product:
    """A linear layer of the model."""

    name: str
    weight: jax.Array
    """`[N, K]`, the model's own."""
    rows: Sequence[int]
    """Tokens of the steps, ascending: some of them are tried."""
    bias: jax.Array | None = None
    residual: bool = False
    gated: bool = False
    eps: float | None = None
    """Of the norm that its activations are read through, which its kernel may take along; None if
    there is none."""


Draw = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Case:
    """One thing to run and compare."""

    name: str
    run: Callable[..., Any]
    """The op, of the arrays."""
    arrays: tuple[Any, ...]
    want: Callable[[Any], Iterator[tuple[np.ndarray, np.ndarray]]]
    """From the op's result, on the host, to pairs of what was got and what was wanted."""


@dataclass(frozen=True)
class _Started:
    """A case whose program is being compiled."""

    case: Case
    what: str
    """Name of the case, and the implementations that were taken."""
    program: Future[Callable[..., Any]]


def run(
    widths: Widths,
    kernels: KernelConfig,
    products: Sequence[Product],
    batches: Sequence[int],
    device: jax.Device,
) -> list[str]:
    """Checks every op of a model with every kernel and configuration that its steps choose.

    Args:
      widths: the model's.
      kernels: the engine's selection.
      products: its linear layers.
      batches: decoding rows of the steps, ascending.
      device: what the steps run on.

    Returns:
      What was checked.

    Raises:
      KernelError: a result is not finite, or its relative error exceeds 1e-2.
    """
    with registry.using(kernels, device.platform), jax.default_device(device):
        return run_cases(lambda pool: _cases(widths, products, batches, pool))


def run_cases(make: Callable[[ThreadPoolExecutor], Iterator[Case]]) -> list[str]:
    """Runs cases and compares their results; what was checked, or `KernelError`, as for `run`.

    Args:
      make: gives the cases; compiles what it needs itself in these threads.
    """
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        # Lowered one after another: only the compiler is safe to run in threads.
        started = [_start(case, pool) for case in make(pool)]
        return [_check(one) for one in started]
    finally:
        pool.shutdown(cancel_futures=True)


def _start(case: Case, pool: ThreadPoolExecutor) -> _Started:
    before = registry.choices()
    lowered = jax.jit(case.run).lower(*case.arrays)
    taken = {name for (_, name), n in registry.choices().items() if n > before.get((_, name), 0)}
    what = f"{case.name} by {', '.join(sorted(taken))}"
    return _Started(case, what, pool.submit(lowered.compile))


def _check(started: _Started) -> str:
    case = started.case
    got = jax.tree.map(np.asarray, started.program.result()(*case.arrays))
    for one, want in case.want(got):
        # The comparison is false for NaN too.
        error = np.linalg.norm(one - want) / max(np.linalg.norm(want), 1e-30)
        if not error <= MAX_RELATIVE_ERROR:
            raise KernelError(
                f"{started.what}: relative error {error:.2e} against the reference on the host, "
                f"{MAX_RELATIVE_ERROR} is allowed: this machine would give wrong answers "
                "(kernels.self_check=False skips the comparison)"
            )
    return started.what


def as_float(x: np.ndarray) -> np.ndarray:
    """In float32, on the host."""
    return np.asarray(x).astype(np.float32)


def drawing(rng: np.random.Generator, dtype: str) -> Draw:
    """A function that draws arrays of a shape: uniform numbers of variance 1, which take a fifth of
    the time of normal ones."""

    def draw(*shape: int) -> np.ndarray:
        x = rng.random(shape, np.float32)
        x -= 0.5
        x *= 12**0.5
        return x.astype(jnp.dtype(dtype))

    return draw


def _one_of_each(
    numbers: Sequence[int], choice: Callable[[int], Any], always: Iterable[int]
) -> list[int]:
    """These `always`, and for each choice that none of them makes the first number that does."""
    found = {choice(number): number for number in (*reversed(numbers), *always)}
    return sorted({*found.values(), *always})


def _cases(
    widths: Widths, products: Sequence[Product], batches: Sequence[int], pool: ThreadPoolExecutor
) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    draw = drawing(rng, widths.dtype)
    for product in products:
        yield from _product_cases(product, Columns(product, pool), draw, widths.sums)
    # One kernel for all numbers of rows.
    all_rows = [rows for product in products for rows in product.rows]
    least, most = min(all_rows), max(all_rows)
    for rows in sorted({least, most}):
        yield _norm_case(widths, draw, rows)
        if widths.sums:
            yield _sum_case(widths, draw, rows)
    if widths.sums:
        yield _packed_sum_case(widths, draw, most)
    yield _rope_case(widths, draw, rng)
    heads = widths.num_heads, widths.num_kv_heads, widths.head_dim
    tried = _one_of_each(batches, lambda batch: decode_choice(batch, *heads), [len(_LENGTHS)])
    for window in dict.fromkeys(widths.windows):
        pages = _Pages(widths, draw, rng, window)
        for batch in tried:
            yield pages.decode_case(batch, phi=None)
            # So far off that every row of asynchronous softmax must be computed again.
            yield pages.decode_case(batch, phi=1e3)
        yield pages.prefill_case()


class Columns:
    """The outputs of a product that are compared, and their part of its weight."""

    def __init__(self, product: Product, pool: ThreadPoolExecutor) -> None:
        outputs = product.weight.shape[0] // (1 + product.gated)
        self.columns = np.unique(np.linspace(0, outputs - 1, _COLUMNS).astype(int))
        """Of the output."""
        halves = [self.columns, outputs + self.columns] if product.gated else [self.columns]
        rows = np.concatenate(halves)
        picked = (product.weight, product.bias)
        lowered = jax.jit(lambda arrays: jax.tree.map(lambda a: a[rows], arrays)).lower(picked)
        self._program: Future[Callable[..., Any]] = pool.submit(lowered.compile)
        self._picked: Any = picked
        self._loaded = False

    def multiply(self, x: np.ndarray) -> list[np.ndarray]:
        """x `[M, K]` times those rows of the weight: one part, or gate and up."""
        if not self._loaded:  # once for all numbers of rows
            self._picked = jax.tree.map(as_float, self._program.result()(self._picked))
            self._loaded = True
        weight, bias = self._picked
        y = x @ weight.T
        return np.split(y if bias is None else y + bias, len(weight) // len(self.columns), axis=1)


def sampled_rows(rows: int) -> np.ndarray:
    """The rows of a product that are compared."""
    return np.unique(np.linspace(0, rows - 1, _ROWS).astype(int))


def _product_cases(product: Product, checked: Columns, draw: Draw, sums: bool) -> Iterator[Case]:
    """The fewest, a middle and the most rows, and some of each kernel and configuration.

    With a norm where the kernel takes it along, and with `sums` without one too: the norm that adds
    a sum is never the product's.
    """
    rows, (n, k), gated = product.rows, product.weight.shape, product.gated
    x = draw(rows[-1], k)
    residual = draw(rows[-1], n // (1 + gated)) if product.residual else None
    for some in _one_of_each(
        rows,
        lambda rows: product_choice(rows, n, k, gated=gated),
        [rows[0], rows[len(rows) // 2], rows[-1]],
    ):
        part = None if residual is None else residual[:some]
        norm = draw(k)
        along = product.eps is not None and takes_norm(x[:some], norm, product.weight, gated=gated)
        if along:
            yield _product_case(product, checked, x[:some], part, norm)
        if sums or not along:
            yield _product_case(product, checked, x[:some], part, None)


def _product_case(
    product: Product,
    checked: Columns,
    x: np.ndarray,
    residual: np.ndarray | None,
    norm: np.ndarray | None,
) -> Case:
    weight, bias, gated = product.weight, product.bias, product.gated
    some = sampled_rows(len(x))

    def want(got: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        at = np.ix_(some, checked.columns)
        rows = as_float(x[some])
        if norm is not None:
            rows = normed_rows(rows, as_float(norm), product.eps)
        y, *up = checked.multiply(rows)
        if gated:
            y = y * np.exp(-np.logaddexp(0, -y)) * up[0]
        if residual is not None:
            y = y + as_float(residual[at])
        yield as_float(got[at]), y
        yield _all_finite(got)

    def run(x: jax.Array, weight: jax.Array, bias: Any, residual: Any, norm: Any) -> jax.Array:
        read = x if norm is None else Unnormed(x, norm, product.eps)
        if gated:
            return gated_linear_of(read, weight, bias=bias)
        return linear_of(read, weight, bias=bias, residual=residual)

    op = "gated_linear" if gated else "linear"
    kind = "" if norm is None else " through a norm"
    name = f"{op} {product.name}{kind} {x.dtype}{list(x.shape)} x {list(weight.shape)}"
    return Case(name, run, (x, weight, bias, residual, norm), want)


def _all_finite(got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(np.isfinite(got).all(), np.float32), np.ones((), np.float32)


def normed_rows(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """The RMS norm of each row."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _norm_case(widths: Widths, draw: Draw, rows: int) -> Case:
    x, weight, eps = draw(rows, widths.hidden_size), draw(widths.hidden_size), widths.eps
    return Case(
        f"rms_norm {x.dtype}{list(x.shape)}",
        lambda x, weight: rms_norm(x, weight, eps),
        (x, weight),
        lambda got: iter([(as_float(got), normed_rows(as_float(x), as_float(weight), eps))]),
    )


def _sum_case(widths: Widths, draw: Draw, rows: int) -> Case:
    y = draw(rows, widths.hidden_size)
    return _added_case(widths, draw, "", y, y)


def _packed_sum_case(widths: Widths, draw: Draw, rows: int) -> Case:
    """A sum whose tiles lie in the order in which a GEMM that signals would have sent them."""
    from pallas_kernels.signal_gemm.config import SignalConfig

    config, width = SignalConfig(tile_m=128, tile_n=128), widths.hidden_size
    down, across = -(-rows // config.tile_m), -(-width // config.tile_n)
    layout = Layout(rows, width, config.tile_m, config, (down * across,))
    tiles = draw(down * across, config.tile_m, config.tile_n)
    (where,) = layout.where()
    y = tiles[where].swapaxes(1, 2).reshape(down * config.tile_m, -1)[:rows, :width]
    return _added_case(widths, draw, " of tiles", Packed(jnp.asarray(tiles), layout), y)


def _added_case(
    widths: Widths, draw: Draw, what: str, y: np.ndarray | Packed, plain: np.ndarray
) -> Case:
    """The norm of a residual to which `y` is added, which is `plain` in order."""
    residual, weight = draw(*plain.shape), draw(widths.hidden_size)

    def want(got: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        total = as_float(plain) + as_float(residual)
        yield as_float(got[0]), normed_rows(total, as_float(weight), widths.eps)
        yield as_float(got[1]), total

    return Case(
        f"rms_norm_residual{what} {plain.dtype}{list(plain.shape)}",
        lambda y, residual, weight: rms_norm_residual(y, residual, weight, widths.eps),
        (y, residual, weight),
        want,
    )


def _rope_case(widths: Widths, draw: Draw, rng: np.random.Generator) -> Case:
    tokens, heads, kv_heads, size = 3, widths.num_heads, widths.num_kv_heads, widths.head_dim
    qkv = draw(tokens, heads + 2 * kv_heads, size)
    angle = rng.uniform(0, 6, (tokens, size // 2)).astype(np.float32)
    pages = [draw(4, widths.page_size, kv_heads, size) for _ in range(2)]
    slots = np.sort(rng.permutation(4 * widths.page_size)[:tokens]).astype(np.int32)
    norms = None
    if widths.qk_norm:
        norms = HeadNorms(jnp.asarray(draw(size)), jnp.asarray(draw(size)), widths.eps)

    def run(qkv: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> Any:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        options = {"num_heads": heads, "norms": norms}
        return rope_write(qkv, cos, sin, k_pages, v_pages, jnp.asarray(slots), **options)

    def turn(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        x = x if weight is None else normed_rows(x, as_float(weight), widths.eps)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def want(got: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        q, k, v = np.split(as_float(qkv), (heads, heads + kv_heads), axis=1)
        yield as_float(got[0]), turn(q, norms and norms.q)
        for after, before, rows in zip(
            got[1:], pages, (turn(k, norms and norms.k), v), strict=True
        ):
            expected = as_float(before).reshape(-1, kv_heads, size).copy()
            expected[slots] = rows
            yield as_float(after).reshape(expected.shape), expected

    return Case(f"rope_write {qkv.dtype}{list(qkv.shape)}", run, (qkv, *pages), want)


class _Pages:
    """Sequences in pages, and their attention on the host."""

    def __init__(
        self,
        widths: Widths,
        draw: Draw,
        rng: np.random.Generator,
        window: int | None,
    ) -> None:
        self._widths, self._draw, self._window = widths, draw, window
        self._scale = widths.head_dim**-0.5
        entries = -(-max(_LENGTHS) // widths.page_size)
        count = 1 + len(_LENGTHS) * entries  # nobody reads the first page
        shape = (count, widths.page_size, widths.num_kv_heads, widths.head_dim)
        self._k, self._v = draw(*shape), draw(*shape)
        table = 1 + rng.permutation(count - 1).reshape(len(_LENGTHS), entries)
        self._table = table.astype(np.int32)

    def _attend(self, q: np.ndarray, row: int, position: int) -> np.ndarray:
        """What a token `[Hq, D]` at a position of a sequence sees."""
        start = 0 if self._window is None else max(0, position + 1 - self._window)
        group = self._widths.num_heads // self._widths.num_kv_heads
        k, v = (
            as_float(pages[self._table[row]])
            .reshape(-1, *pages.shape[2:])[start : position + 1]
            .repeat(group, axis=1)
            for pages in (self._k, self._v)
        )
        scores = np.einsum("hd,thd->ht", q, k) * self._scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("ht,thd->hd", weights, v)

    def decode_case(self, batch: int, phi: float | None) -> Case:
        """With phi None as in all layers but a step's first, which start early, else as in that."""
        widths = self._widths
        heads, kv_heads, size = widths.num_heads, widths.num_kv_heads, widths.head_dim
        q = self._draw(batch, heads, size)
        rows = np.arange(batch) % len(_LENGTHS)
        lengths = np.asarray(_LENGTHS, np.int32)[rows]
        table = None if phi is None else np.full(heads, phi, np.float32)

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            # An early start is for pages that this kernel returned.
            token = jnp.zeros((1, heads + 2 * kv_heads, size), q.dtype)
            angle, slot = jnp.zeros((1, size // 2), jnp.float32), jnp.zeros(1, jnp.int32)
            _, k, v = rope_write(token, angle, angle, k, v, slot, num_heads=heads)
            return decode_attention(
                q,
                k,
                v,
                jnp.asarray(self._table[rows]),
                jnp.asarray(lengths),
                scale=self._scale,
                window=self._window,
                phi=table,
                early=phi is None,
            ).out

        def want(got: jax.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                expected = np.zeros(q.shape[1:], np.float32)
                if length:
                    expected = self._attend(as_float(q[at]), row, length - 1)
                yield as_float(got[at]), expected

        name = f"decode_attention {q.dtype}{list(q.shape)} over {list(self._k.shape)}"
        return Case(f"{name}, window {self._window}, phi {phi}", run, (q, self._k, self._v), want)

    def prefill_case(self) -> Case:
        widths = self._widths
        rows, counts = list(_CHUNKS), np.array(list(_CHUNKS.values()), np.int32)
        contexts = np.array(_LENGTHS, np.int32)[rows]
        starts = (np.cumsum(counts) - counts).astype(np.int32)
        table = self._table[rows]
        q = self._draw(64 * math.ceil(counts.sum() / 64), widths.num_heads, widths.head_dim)

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return prefill_attention(
                q,
                k,
                v,
                *map(jnp.asarray, (table, starts, counts, contexts)),
                scale=self._scale,
                window=self._window,
            )

        def want(got: jax.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for n, row in enumerate(rows):
                for i in (0, counts[n] // 2, counts[n] - 1):
                    at, position = starts[n] + i, contexts[n] - counts[n] + i
                    yield as_float(got[at]), self._attend(as_float(q[at]), row, position)
            yield _all_finite(got)

        name = f"prefill_attention {q.dtype}{list(q.shape)} over {list(self._k.shape)}"
        return Case(f"{name}, window {self._window}", run, (q, self._k, self._v), want)
