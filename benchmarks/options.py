"""Options that the kernel benchmarks share. Imports nothing that starts JAX."""

from __future__ import annotations

import argparse

VARIANTS = ("stream", "graph")


def add_variants(parser: argparse.ArgumentParser) -> None:
    """Adds ``--variants``: how a program's kernels are launched, see `benchmarks/device_time.py`.

    Half the programs to compile and to run with one of them; then a row may show the slower one.
    """
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="how JAX's kernels are launched; the faster one counts [both]",
    )
