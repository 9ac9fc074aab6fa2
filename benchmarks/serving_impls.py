"""What `benchmarks/semi_pd_serving.py` measures: the names of implementations and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jpd.semi_pd.controller import FULL, Shares

CHUNKED, PREFILL_FIRST = UNIFIED = ("chunked", "prefill_first")
STATIC, DYNAMIC, MEAN = "semi_pd_100_100", "semi_pd_dynamic", "semi_pd_mean"
AUTO, AUTO_MEAN = "auto", "auto_mean"
SHORTEST = "_shortest"
"""Ends the name of a twin, which has `scheduling_policy="shortest"` instead of "fcfs"."""
MIXED_TOKENS = (1024, 512)
"""Ends, before that, the name of one with so many `max_num_mixed_tokens` instead of its engine's
own."""


def with_twins[T](values: Mapping[str, T]) -> dict[str, T]:
    """The values of implementations, each for its twin too."""
    return {twin: value for impl, value in values.items() for twin in (impl, impl + SHORTEST)}


def with_mixed_tokens(impl: str) -> tuple[str, ...]:
    """An implementation that has mixed steps, and those with smaller ones."""
    return (impl, *(f"{impl}_{tokens}" for tokens in MIXED_TOKENS))


ALL_UNIFIED = (*with_mixed_tokens(CHUNKED), PREFILL_FIRST)
"""The unified policies, and those with smaller steps, in order of arrival."""
DIVIDED = with_twins(
    {f"semi_pd_{x}_{100 - x}": Shares(x, 100 - x) for x in (90, 85, 80, 70, 60, 50, 40, 30)}
)
"""Shares that stay and have no SM in common."""
FIXED = with_twins({STATIC: FULL}) | DIVIDED
"""Shares that stay."""
ENGINES = with_twins(
    {
        **dict.fromkeys(ALL_UNIFIED, "unified"),
        **{impl: "semi_pd" for impl in FIXED if not impl.endswith(SHORTEST)},
        DYNAMIC: "semi_pd",
        MEAN: "semi_pd",
        **dict.fromkeys((*with_mixed_tokens(AUTO), *with_mixed_tokens(AUTO_MEAN)), "semi_pd"),
        "time_slices": "time_slices",
        "disaggregated": "disaggregated",
    }
)
"""Whose engine is whose, in the order of their turns."""


class Parts(NamedTuple):
    """What the name of an implementation says."""

    plain: str
    """Without what follows."""
    mixed_tokens: int | None
    """`max_num_mixed_tokens`; None: the engine's own."""
    shortest: bool
    """`scheduling_policy="shortest"` instead of "fcfs"."""


def parts(impl: str) -> Parts:
    """Of a name in `ENGINES`."""
    of = impl.removesuffix(SHORTEST)
    for tokens in MIXED_TOKENS:
        plain = of.removesuffix(f"_{tokens}")
        if plain != of:
            return Parts(plain, tokens, of != impl)
    return Parts(of, None, of != impl)
