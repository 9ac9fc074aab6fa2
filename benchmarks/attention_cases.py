"""The attention calls that benchmarks time, and how their pages lie. NumPy only.

Head size 128, pages of 16 tokens, bf16. The pages of all sequences lie in a random order in a pool
of just their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

HEAD_SIZE = 128
PAGE_TOKENS = 16
MAX_REL_ERR = 4e-3
"""Of any output row against float32; a row of results above it fails."""


class Pages(NamedTuple):
    """Where the tokens of some sequences lie."""

    count: int
    """P: pages in the pool."""
    table: np.ndarray
    """`[B, W]` int32; entries past the last page of a sequence are 0."""

    @classmethod
    def shuffled(cls, lengths: np.ndarray, *, width_multiple: int = 1) -> Pages:
        """Pages for sequences of these lengths in tokens, in a random but fixed order."""
        needed = -(-lengths // PAGE_TOKENS)
        order = np.random.default_rng(1).permutation(int(needed.sum())).astype(np.int32)
        width = -(-int(needed.max()) // width_multiple) * width_multiple
        table = np.zeros((len(lengths), width), np.int32)
        ends = np.cumsum(needed)
        for row, (end, pages) in enumerate(zip(ends, needed, strict=True)):
            table[row, :pages] = order[end - pages : end]
        return cls(len(order), table)


class Decode(NamedTuple):
    """One new token for each of `batch` sequences."""

    batch: int
    q_heads: int
    kv_heads: int
    context: int
    """Tokens of every sequence; of the longest one if they differ."""
    ragged: bool = False

    @property
    def name(self) -> str:
        """As in result rows."""
        ragged = " ragged" if self.ragged else ""
        return f"B={self.batch} {self.q_heads}/{self.kv_heads} S={self.context}{ragged}"

    @property
    def lengths(self) -> np.ndarray:
        """`[B]` int32: all the same, or from an eighth of the context up to all of it."""
        lengths = np.full(self.batch, self.context, np.int32)
        if self.ragged:
            random = np.random.default_rng(0)
            lengths[1:] = random.integers(self.context // 8, self.context + 1, self.batch - 1)
        return lengths

    @property
    def kv_bytes(self) -> int:
        """Keys and values, bf16."""
        return 4 * self.kv_heads * HEAD_SIZE * int(self.lengths.sum())

    @property
    def least_calls(self) -> int:
        """Calls of a timed program at least: as many as a model has layers, unless they are long.

        What is done once for all calls (a schedule, cleared counters) then weighs what it does in
        a model's step.
        """
        return 32 if self.kv_bytes < 300_000_000 else 8

    @property
    def nbytes(self) -> int:
        """Fewest bytes through device memory: keys, values, queries and outputs."""
        return self.kv_bytes + 4 * self.batch * self.q_heads * HEAD_SIZE

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return 4 * self.q_heads * HEAD_SIZE * int(self.lengths.sum())


class Prefill(NamedTuple):
    """Prompt chunks, each after a prefix that lies in the pages already."""

    q_heads: int
    kv_heads: int
    chunks: tuple[tuple[int, int], ...]
    """(tokens of the chunk, tokens of the prefix) of each sequence."""

    @property
    def name(self) -> str:
        """As in result rows."""
        heads = f"{self.q_heads}/{self.kv_heads}"
        if len(self.chunks) > 1:
            prefix = " with prefixes" if any(p for _, p in self.chunks) else ""
            return f"{heads} T={self.tokens} in {len(self.chunks)} chunks{prefix}"
        (count, prefix), *_ = self.chunks
        return f"{heads} T={count}" + (f" after {prefix}" if prefix else "")

    @property
    def tokens(self) -> int:
        """T: tokens of all chunks."""
        return sum(count for count, _ in self.chunks)

    @property
    def counts(self) -> np.ndarray:
        """`[N]` int32."""
        return np.array([count for count, _ in self.chunks], np.int32)

    @property
    def starts(self) -> np.ndarray:
        """`[N]` int32: first token of each chunk."""
        return np.cumsum([0, *self.counts[:-1]]).astype(np.int32)

    @property
    def contexts(self) -> np.ndarray:
        """`[N]` int32: tokens of prefix and chunk."""
        return np.array([count + prefix for count, prefix in self.chunks], np.int32)

    @property
    def kv_bytes(self) -> int:
        """Keys and values, bf16."""
        return 4 * self.kv_heads * HEAD_SIZE * int(self.contexts.sum())

    @property
    def nbytes(self) -> int:
        """Fewest bytes through device memory."""
        return self.kv_bytes + 4 * self.tokens * self.q_heads * HEAD_SIZE

    @property
    def flops(self) -> int:
        """Pairs of a query and a key that it may see; a multiply-add counts as two."""
        pairs = sum(count * prefix + count * (count + 1) // 2 for count, prefix in self.chunks)
        return 4 * self.q_heads * HEAD_SIZE * pairs

    def sample(self, rows: int = 48) -> np.ndarray:
        """Tokens whose outputs are checked: the ends of every chunk and some between."""
        ends = np.concatenate([self.starts, self.starts + self.counts - 1])
        some = np.random.default_rng(2).integers(0, self.tokens, rows)
        return np.unique(np.concatenate([ends, some]))

    def owners(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sequence, tokens that it sees) of each of these tokens."""
        sequence = np.searchsorted(self.starts, tokens, side="right") - 1
        seen = (self.contexts - self.counts)[sequence] + tokens - self.starts[sequence] + 1
        return sequence.astype(np.int32), seen.astype(np.int32)


DECODE = [
    Decode(1, 32, 32, 512),
    Decode(1, 32, 32, 1024),
    Decode(1, 32, 32, 8192),
    Decode(1, 32, 8, 8192),
    Decode(1, 32, 8, 32768),
    Decode(1, 28, 4, 4096),
    Decode(1, 64, 8, 16384),
    Decode(8, 32, 32, 1024),
    Decode(8, 32, 8, 1024),
    Decode(8, 32, 8, 8192),
    Decode(8, 28, 4, 4096),
    Decode(16, 64, 8, 8192),
    Decode(32, 32, 8, 4096),
    Decode(32, 32, 32, 1024),
    Decode(64, 32, 8, 4096),
    Decode(128, 32, 8, 1024),
    Decode(128, 64, 8, 2048),
    Decode(8, 32, 8, 8192, ragged=True),
    Decode(32, 32, 8, 4096, ragged=True),
    Decode(64, 28, 4, 4096, ragged=True),
    Decode(128, 32, 32, 1024, ragged=True),
]
QUICK_DECODE = [Decode(1, 4, 4, 40), Decode(2, 4, 2, 64, ragged=True)]

_PACK = (100, 900, 37, 1500, 512, 260, 700, 87)  # 4096 tokens
PREFILL = [
    *(Prefill(32, 8, ((tokens, 0),)) for tokens in (1024, 2048, 4096, 8192, 16384)),
    Prefill(32, 32, ((2048, 0),)),
    Prefill(32, 32, ((8192, 0),)),
    Prefill(28, 4, ((2048, 0),)),
    Prefill(28, 4, ((8192, 0),)),
    Prefill(32, 8, ((2048, 8192),)),
    Prefill(32, 32, ((2048, 8192),)),
    Prefill(28, 4, ((2048, 8192),)),
    Prefill(32, 8, tuple((count, 0) for count in _PACK)),
    Prefill(28, 4, tuple((count, 0) for count in _PACK)),
    Prefill(32, 8, tuple((count, 1000 * i) for i, count in enumerate(_PACK))),
]
QUICK_PREFILL = [Prefill(8, 2, ((64, 0),)), Prefill(4, 4, ((20, 0), (33, 40)))]


def select(cases: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """The cases whose name is given, or starts with one that is given; all for None.

    In the order of the names.

    Raises:
        ValueError: a name fits no case.
    """
    if names is None:
        return list(cases)
    chosen: dict[str, Any] = {}
    for name in names:
        found = [c for c in cases if c.name == name]
        found = found or [c for c in cases if c.name.startswith(name)]
        if not found:
            raise ValueError(f"no case is called {name!r}; there are {[c.name for c in cases]}")
        chosen |= {case.name: case for case in found}
    return [*chosen.values()]
