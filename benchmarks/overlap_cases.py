"""The products and collectives that the benchmark of FlashOverlap times."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

LINKS = ("nvlink", "no_p2p")
ALONE = "alone"
"""In place of a link: one GPU, which has the products alone."""
RANKS = (2, 4)
"""GPUs that collectives are over."""
GEMM = "gemm"
"""The product alone, in place of one of the collectives."""
SHORT = {GEMM: "GEMM", "all_reduce": "AR", "reduce_scatter": "RS", "all_to_all": "A2A"}
TRACED = (8192, 8192, 4096)
"""M, N, K of the cases whose times are traced unless `--trace` names others."""


class Shape(NamedTuple):
    """M, N and K of one rank's product: x `[M, K]`, weight `[N, K]`."""

    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        """As in names of cases."""
        return f"{self.m}x{self.n}x{self.k}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads MxNxK, for `argparse`."""
        return cls(*map(int, text.split("x")))

    @property
    def set_bytes(self) -> int:
        """Bytes of operands and result, 16-bit numbers."""
        return 2 * (self.m * self.k + self.n * self.k + self.m * self.n)

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return 2 * self.m * self.n * self.k


class Case(NamedTuple):
    """One product and what follows it, on GPUs that one kind of link joins."""

    link: str
    ranks: int
    op: str
    """`GEMM` or one of `jpd.overlap.OPS`."""
    shape: Shape

    @property
    def name(self) -> str:
        """As in result rows."""
        return f"{self.link} {self.ranks} {SHORT[self.op]} {self.shape.name}"

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case of this name."""
        link, ranks, short, shape = name.split()
        op = next(op for op, known in SHORT.items() if known == short)
        return cls(link, int(ranks), op, Shape.parse(shape))


# The exact shapes of the paper's artifact (its tune/preparation.py), for one GPU.
PAPER: Mapping[str, tuple[Shape, ...]] = {
    "a800": tuple(
        Shape(m, n, k)
        for m, n in ((8192, 8192), (16384, 8192), (16384, 16384))
        for k in (2048, 4096, 8192)
    ),
    "4090": tuple(Shape(m, 8192, k) for m in (2048, 3072, 4096, 8192) for k in (8192, 16384)),
}
PAPER_A2A: Mapping[str, tuple[Shape, ...]] = {
    "a800": tuple(
        Shape(m, n, k) for m, n in ((4096, 8192), (8192, 8192), (8192, 16384)) for k in (4096, 8192)
    ),
    "4090": tuple(Shape(m, 8192, k) for m in (512, 1024, 2048, 2560) for k in (8192, 16384)),
}
LLAMA = {"llama3-70b": ((8192, 8192), (8192, 28672)), "llama3-8b": ((4096, 4096), (4096, 14336))}
"""N and K of what ends attention and MLP: both are split along K."""
LLAMA_ROWS = (1024, 2048, 4096, 8192, 16384)
TINY = (Shape(136, 256, 64),)
"""For trying the benchmark out on a CPU; ragged, and split over 4 devices."""
SETS = (*PAPER, *LLAMA)


def llama(model: str, ranks: int) -> tuple[Shape, ...]:
    """The row-parallel layers of a model that is split over `ranks` GPUs."""
    return tuple(Shape(m, n, k // ranks) for n, k in LLAMA[model] for m in LLAMA_ROWS)


def by_shape(ranks: int, sets: Iterable[str] = SETS) -> dict[Shape, tuple[str, ...]]:
    """What follows the product of each shape, in the table's order.

    All-reduce and reduce-scatter on 2 GPUs, also all-to-all on 4 and more; on one GPU nothing
    follows the products, which are those of all numbers of GPUs.
    """
    if ranks == 1:
        return {shape: () for many in RANKS for shape in by_shape(many, sets)}
    found: dict[Shape, tuple[str, ...]] = {}
    sums = ("all_reduce", "reduce_scatter")
    for name in sets:
        for shape in PAPER[name] if name in PAPER else llama(name, ranks):
            found[shape] = sums
    if ranks >= 4:
        for shape in itertools.chain(*(PAPER_A2A[name] for name in sets if name in PAPER)):
            found[shape] = (*found.get(shape, ()), "all_to_all")
    return found


def cases_of(link: str, ranks: int, shapes: Mapping[Shape, Sequence[str]]) -> list[Case]:
    """The product alone and with each collective, shape by shape."""
    return [Case(link, ranks, op, shape) for shape, ops in shapes.items() for op in (GEMM, *ops)]
