"""The matrix products that benchmarks time: y `[M, N]` = x `[M, K]` · weight `[N, K]`ᵀ."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple


class Gemm(NamedTuple):
    """One product."""

    rows: int
    """M: tokens."""
    outputs: int
    """N."""
    inputs: int
    """K."""

    @property
    def name(self) -> str:
        """As in result rows."""
        return f"{self.outputs}x{self.inputs} M={self.rows}"

    @property
    def nbytes(self) -> int:
        """Fewest bytes through device memory, 16-bit values."""
        m, n, k = self
        return 2 * (n * k + m * k + m * n)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight alone."""
        return 2 * self.outputs * self.inputs

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return 2 * self.rows * self.outputs * self.inputs

    @classmethod
    def parse(cls, text: str) -> Gemm:
        """Reads M:N:K."""
        return cls(*map(int, text.split(":")))


# N, K of the products of one layer.
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "llama2-7b": {
        "qkv": (12288, 4096),
        "o": (4096, 4096),
        "gate_up": (22016, 4096),
        "down": (4096, 11008),
    },
    "llama31-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "llama3-70b-tp4": {
        "qkv": (2560, 8192),
        "o": (8192, 2048),
        "gate_up": (14336, 8192),
        "down": (8192, 7168),
    },
    "qwen25-7b": {
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
    },
    # For trying a benchmark out on a CPU; its times mean nothing.
    "tiny": {"qkv": (256, 128), "o": (128, 128), "gate_up": (512, 128), "down": (128, 256)},
}


def parse_shape(text: str) -> tuple[int, int]:
    """Reads NxK, for `argparse`.

    Raises:
        ArgumentTypeError: it is not one of the weights in `LAYERS`.
    """
    known = shapes(*LAYERS)
    named = {f"{n}x{k}": (n, k) for n, k in known}
    if text not in named:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(named)}")
    return named[text]


def shapes(*models: str) -> list[tuple[int, int]]:
    """The different (N, K) of these models' layers, in order."""
    return list(dict.fromkeys(shape for model in models for shape in LAYERS[model].values()))


def in_rounds(shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[Gemm]:
    """Cases in the order in which they are measured: all shapes with two numbers of rows at a time.

    A run that ends early has every shape with the first numbers of rows; the weights of a shape,
    which are made anew for each round, serve two cases.
    """
    rounds = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    return [Gemm(m, *shape) for some in rounds for shape in shapes for m in some]
