"""Options of benchmarks whose kernels other processes lower, and may lower on another machine.

Imports nothing that starts JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.budget import Budget
from benchmarks.lowered import IN_PLACE, Chains, Gpu, Lowering, LoweringProcessError


def add_lowering(parser: argparse.ArgumentParser) -> None:
    """Adds ``--lowered`` and ``--lower-for``."""
    parser.add_argument(
        "--lowered",
        type=Path,
        metavar="DIR",
        help="keep lowered kernels there for later runs of the same code",
    )
    parser.add_argument(
        "--lower-for",
        type=Gpu.parse,
        metavar="GPU:SMS",
        help="measure nothing: fill --lowered for this GPU, 'NVIDIA H200:132', which need not be "
        "in this machine",
    )


def start_lowering(
    args: argparse.Namespace, budget: Budget, chains: Callable[[], Chains]
) -> contextlib.AbstractContextManager[Lowering | None]:
    """Begins to lower the chains for the GPU of this process.

    Args:
        args: with the options of :func:`add_lowering`.
        budget: the run's.
        chains: gives them as they are on a GPU.

    Returns:
        A context manager whose value is the :class:`Lowering`; None without a GPU, time or
        flatbuffers.

    Raises:
        SystemExit: there is a folder but no GPU.
    """
    if not budget.enough():
        return contextlib.nullcontext()
    gpu = Gpu.of_driver()
    if gpu is None:
        if args.lowered is not None:
            sys.exit("--lowered: no GPU that jax may use; --lower-for fills the folder without one")
        return contextlib.nullcontext()
    if importlib.util.find_spec("flatbuffers") is None:  # which jax writes modules with
        print("flatbuffers is not installed: kernels are lowered one by one, while the GPU waits")
        return contextlib.nullcontext()
    return Lowering(chains(), gpu, folder=args.lowered)


def fill(args: argparse.Namespace, chains: Chains) -> int:
    """Lowers what is missing in a folder, and says what was done.

    Args:
        args: with the options of :func:`add_lowering`.
        chains: as they are on a GPU.

    Returns:
        The exit code: 1 if a process failed. A kernel that refuses a shape is no failure.

    Raises:
        SystemExit: no folder is named.
    """
    if args.lowered is None:
        sys.exit("--lower-for needs --lowered")
    refused, failed = 0, 0
    with Lowering(
        chains, args.lower_for, folder=args.lowered, processes=len(os.sched_getaffinity(0))
    ) as run:
        for key, module in run.modules.items():
            error = module.exception()
            if error is not None:
                print(f"{key}: {type(error).__name__}: {error}")
                died = isinstance(error, LoweringProcessError)
                refused, failed = refused + (not died), failed + died
    made = len(run.modules) - run.found - refused - failed
    print(
        f"{args.lowered}: {run.found} programs found, {made} lowered, {refused} refused, "
        f"{failed} failed; {len(chains) - len(run.modules)} others are lowered where they run "
        f"({', '.join(sorted({key[-1] for key in chains} & {*IN_PLACE})) or 'none'})"
    )
    return int(failed > 0)
