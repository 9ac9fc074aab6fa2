"""Options that the kernel benchmarks share. Imports nothing that starts JAX."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.budget import spread
from benchmarks.report import Report
from benchmarks.rows import load
from jpd.errors import ConfigError
from jpd.semi_pd.controller import Shares

VARIANTS = ("stream", "graph")
PEER_SECONDS = 300.0


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


def seconds(text: str) -> float:
    """Reads a time that is not negative."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"seconds must be 0 or more, got {text}")
    return value


def stored(text: str) -> Path:
    """Reads the path of a file that must be there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path}: there is no such file")
    return path


def shares(text: str) -> Shares:
    """Reads SM shares, as `70,30`."""
    try:
        prefill, decode = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"two integers X,Y in percent, got {text!r}") from None
    try:
        return Shares(prefill, decode)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_seconds(
    parser: argparse.ArgumentParser,
    bound: str = "begin no case that may not end within N s; 0 measures nothing",
) -> None:
    """Adds ``--seconds``; `bound` is what it does."""
    parser.add_argument(
        "--seconds",
        type=seconds,
        metavar="N",
        help=f"{bound} [no limit]",
    )


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--merge`` and ``--missing``."""
    parser.add_argument(
        "--merge",
        nargs="*",
        type=stored,
        metavar="FILE",
        help="keep the cases of these results that this run does not measure "
        "[the file that is written, if it exists]",
    )
    parser.add_argument(
        "--missing", action="store_true", help="--merge, and measure only what those files lack"
    )


def add_bounds(parser: argparse.ArgumentParser, *, peer_seconds: float = PEER_SECONDS) -> None:
    """Adds ``--seconds``, ``--merge``, ``--missing`` and ``--peer-seconds``."""
    add_seconds(parser)
    add_merge_arguments(parser)
    parser.add_argument(
        "--peer-seconds",
        type=seconds,
        metavar="N",
        default=peer_seconds,
        help="limit of each baseline's process; with --seconds it leaves time for "
        f"the others [{peer_seconds:.0f}]",
    )


def planned(
    report: Report,
    args: argparse.Namespace,
    chosen: Sequence[Any],
    everything: Sequence[Any] = (),
    *,
    name: Callable[[Any], str] = lambda case: case.name,
    order_named: bool = False,
    once: Sequence[str] = ("copy_bytes_per_s",),
) -> list[Any]:
    """What this run is to measure, in an order of which any beginning tells much.

    Merges earlier files into the report and tells it the names of all cases.

    Args:
        report: gets them.
        args: with the options of :func:`add_bounds`.
        chosen: cases that the other options name.
        everything: cases of the whole benchmark, in the table's order.
        name: of a case.
        order_named: the order of what is chosen was named, and stays as it is.
        once: keys of the summary that a run measures and that no rows say: kept from the files.
    """
    report.cases = list(dict.fromkeys(map(name, [*everything, *chosen])))
    if args.merge is not None or args.missing:
        files = args.merge or [file for file in [report.path] if file.exists()]
        report.merge(files, measures=args.seconds != 0)
        report.summary |= {k: v for k in once if (v := report.earlier(k)) is not None}
    if args.missing:
        chosen = [case for case in chosen if report.lacks(name(case))]
    return list(chosen) if order_named else spread(chosen)


def merge_of_one_model(
    parser: argparse.ArgumentParser, report: Report, args: argparse.Namespace, model: str
) -> None:
    """Merges earlier files into the report and notes the model of its rows in the summary.

    Ends the program if rows of several models would come together, or none at all.

    Args:
        parser: of the command line.
        report: gets them.
        args: with the options of :func:`add_seconds` and :func:`add_merge_arguments`.
        model: that this run measures, if it does.
    """
    measures, files = args.seconds != 0, []
    if args.merge is not None or args.missing:
        files = args.merge or [file for file in [report.path] if file.exists()]
    if not measures and not files:
        parser.error("--seconds 0 measures nothing: --merge what?")
    models = [load(file)["summary"].get("model") for file in files]
    wanted = model if measures else models[0]
    for file, found in zip(files, models, strict=True):
        if found is None:
            parser.error(f"--merge: {file} does not say of which model its results are")
        if found != wanted:
            parser.error(f"--merge: {file} has results of {found}, not of {wanted}")
    report.merge(files, measures=measures)
    report.summary["model"] = wanted


def keep_one_impl(parser: argparse.ArgumentParser, report: Report, impl: str) -> None:
    """Notes in the summary what rows call by one name; ends the program if merged rows differ."""
    earlier = report.earlier("impl")
    if earlier not in (None, impl):
        parser.error(f"--impl {impl}: the merged rows are of --impl {earlier}")
    report.summary["impl"] = impl
