"""Are the kernels right on every share of the SMs, and how long do they take there?

An MPS daemon in private folders, and for every share a process of its own with
CUDA_MPS_ACTIVE_THREAD_PERCENTAGE: each kernel against float32 results that NumPy computed on the
CPU (`benchmarks/share_problems.py`), and a whole engine (two layers of Llama-3.1-8B, kernels only)
against the same engine on 100 %: `tokens_agree` is the part of its greedy tokens that are the same,
up to a first difference, and `logprob_diff` the largest difference of their log-probabilities.
``cublas`` rows are torch's products at the same shares, in processes that may hang: cuBLAS is
known to be wrong under MPS.

The processes come in batches. Those of a batch first do, beside each other, all that is not timed:
they compile, run and check every kernel, build the engine and generate what is compared. When all
of them wait or have ended, one after another is let go, times and ends; those that still wait have
memory of the GPU and run nothing on it. Timed are the kernels, launched one by one (device times,
`benchmarks/device_time.py`), and then a model step: the wall time of generating from the same
prompts a second time, over the number of steps, of which the first has all prompts and the others
decode.

`max_rel_err` and `cublas_max_rel_err` in the summary are over all shares; `hangs` counts our
processes that had to be stopped, `cublas_hangs` cuBLAS's. `sms` is what the process saw.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import mps, share_problems
from benchmarks.budget import Budget, spread
from benchmarks.options import add_bounds, planned
from benchmarks.report import Report, add_arguments
from benchmarks.rows import failed_row, make_row, skipped_row
from benchmarks.share_worker import case_name, child, cublas_child, problems_of, ready_file
from native.mps import Mps, MpsError

SHARES = tuple(range(100, 5, -5))
MODEL = "model step"
AT_ONCE = min(7, max(1, (os.cpu_count() or 1) // 2))
PREPARE_TIMEOUT_S = 150  # from its start until a process is ready to time, many beside each other
TIMED_TIMEOUT_S = 60  # from when it is let go until its end
POLL_S = 0.05
CUBLAS_TIMEOUT_S = 40
CUBLAS_AT_ONCE = 4
HUNG = "hung"
NOT_TIMED = "the result is right, but was not timed"
NO_WHOLE = "there are no tokens on 100 % to compare with"


class Ended(NamedTuple):
    """How a process ended."""

    status: int | None
    """None for one that was stopped."""
    errors: str
    """What it wrote to standard error."""
    cut: bool
    """It was stopped because the time of the whole run was over."""

    @property
    def reason(self) -> str:
        """Why it did not do all that it should have done."""
        if self.status is None:
            return HUNG
        return (self.errors.strip().splitlines() or [f"exited with {self.status}"])[-1]


def compare_model(case: str, got: Any, want: Any, ended: Ended, **extra: Any) -> dict[str, Any]:
    """Row of a model's run against that on all SMs.

    Args:
        case: name of the row.
        got: what the child found, None if it had not come to that.
        want: the same on all SMs, None if there is nothing.
        ended: how the child ended.
        **extra: for the row.
    """

    def missing(done: str = "") -> dict[str, Any]:
        if ended.cut:
            return skipped_row(case, "jpd", **extra)
        return failed_row(case, "jpd", ended.reason + done, **extra)

    if got is None:
        return missing()
    if "tokens" not in got:
        return failed_row(case, "jpd", got["error"], **extra)
    if want is None:
        return skipped_row(case, "jpd", NO_WHOLE, **extra)
    same = total = 0
    differences = []
    for mine, theirs, p, r in zip(
        got["tokens"], want["tokens"], got["logprobs"], want["logprobs"], strict=True
    ):
        total += len(theirs)
        # After a different token (a near tie) the texts differ, so nothing more is comparable.
        for a, b, x, y in zip(mine, theirs, p, r, strict=True):
            differences.append(abs(x - y))
            if a != b:
                break
            same += 1
    worst, agree = max(differences), same / total
    extra |= {"tokens_agree": agree, "logprob_diff": worst}
    # Logits of random weights are some tenths apart; a wrong product moves them by ones.
    if not worst <= 0.1:
        return failed_row(case, "jpd", f"log-probabilities differ by {worst:.3g}", **extra)
    if "error" in got:
        return failed_row(case, "jpd", got["error"], **extra)
    if "step_us" not in got:
        return missing(f": {NOT_TIMED}")
    return make_row(case, "jpd", [got["step_us"]], "us", **extra)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary's numbers from all rows."""
    summary: dict[str, Any] = {}
    for impl, key in (("jpd", "hangs"), ("cublas", "cublas_hangs")):
        hung = [r for r in rows if r["impl"] == impl and r["status"].startswith(f"failed: {HUNG}")]
        summary[key] = len({r["share"] for r in hung})
    for impl, key in (("jpd", "max_rel_err"), ("cublas", "cublas_max_rel_err")):
        errors = [
            row["rel_err"] if row["rel_err"] is not None else row.get("wrong_by")
            for row in rows
            if row["impl"] == impl
        ]
        errors = [error for error in errors if error is not None]
        if errors:
            summary[key] = max(errors)
    summary["jpd_failed"] = sum(
        r["impl"] == "jpd" and r["status"].startswith("failed") for r in rows
    )
    shares = {r["share"] for r in rows if r["impl"] == "jpd" and r.get("share") is not None}
    summary["shares"] = f"{len(shares)} of {len(shares | {*SHARES})}"
    summary["cublas_not_finite"] = sum(
        r["impl"] == "cublas" and "not finite" in r["status"] for r in rows
    )
    agree = [r["tokens_agree"] for r in rows if r.get("tokens_agree") is not None]
    if agree:
        summary["model_min_tokens_agree"] = min(agree)
        summary["model_max_logprob_diff"] = max(
            r["logprob_diff"] for r in rows if r.get("logprob_diff") is not None
        )
    return summary


class Child:
    """The process of a share, which prepares, waits, and times when it is let go.

    Use as a context manager: if it still runs in the end, it is stopped.

    Args:
        command: starts it.
        env: its environment.
        file: the JSON file that it writes.
        daemon: whose client it is, if there is a GPU to share.
        budget: it is stopped when its time is over.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        file: Path,
        daemon: Mps | None,
        budget: Budget,
    ) -> None:
        self._file, self._daemon, self._budget = file, daemon, budget
        self._stopped = self._cut = False
        self._began = time.monotonic()
        self._prepare_s = budget.limit_s(PREPARE_TIMEOUT_S)
        self._errors = file.with_suffix(".errors")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._stop(cut=False)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def prepare(self) -> None:
        """Waits until it is ready to time or has ended; one that takes too long is stopped."""
        while self._process.poll() is None and not ready_file(self._file).exists():
            if time.monotonic() > self._began + self._prepare_s:
                self._stop(cut=self._prepare_s < PREPARE_TIMEOUT_S)
                break
            time.sleep(POLL_S)

    def finish(self) -> Ended:
        """Lets it time, and returns when it has ended."""
        if self._process.poll() is None:
            limit_s = self._budget.limit_s(TIMED_TIMEOUT_S)
            try:
                self._process.communicate("go\n", limit_s)
            except subprocess.TimeoutExpired:
                self._stop(cut=limit_s < TIMED_TIMEOUT_S)
        status = None if self._stopped else self._process.returncode
        return Ended(status, self._errors.read_text(errors="replace"), self._cut)

    def _stop(self, *, cut: bool) -> None:
        """As `run_bounded` does: its work on the GPU ends before it is killed."""
        self._stopped, self._cut = True, cut
        mps.stop(self._process, self._daemon)


class Children:
    """Starts the processes of this run.

    Args:
        args: the command line, with the folder of the problems.
        daemon: None where there is no GPU to share.
        budget: a process is stopped when its time is over.
    """

    def __init__(self, args: argparse.Namespace, daemon: Mps | None, budget: Budget) -> None:
        self._args, self._daemon, self._budget = args, daemon, budget
        self.with_model = shares_with_model(args)
        """Shares on which the engine runs too."""

    def start(self, share: int, file: Path) -> Child:
        """Our process of a share, which writes the file."""
        command = self._command("--child", share, file)
        command += ["--no-model"] * (share not in self.with_model)
        return Child(command, self._environment(share), file, self._daemon, self._budget)

    def run_cublas(self, share: int, file: Path) -> Ended:
        """cuBLAS's process of a share, which writes the file."""
        limit_s = self._budget.limit_s(self._args.peer_seconds)
        command = self._command("--cublas-child", share, file)
        status, text = mps.run_bounded(command, self._environment(share), limit_s, self._daemon)
        return Ended(status, text, status is None and limit_s < self._args.peer_seconds)

    def _command(self, kind: str, share: int, file: Path) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.sm_shares", kind, str(share)]
        command += ["--problems", str(self._args.problems), "--json", str(file)]
        return command + ["--quick"] * self._args.quick

    def _environment(self, share: int) -> dict[str, str]:
        env = os.environ | (self._daemon.environment(share) if self._daemon else {})
        # Several processes at a time take memory as they need it.
        return env | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}


def run_shares(
    report: Report, daemon: Mps | None, args: argparse.Namespace, budget: Budget
) -> None:
    """Starts the children of all shares, as long as there is time, and collects what they found."""
    problems = problems_of(args.quick)
    for name, make in problems.items():
        share_problems.save(make(), args.problems / f"{name.replace('/', '-')}.npz")
    children = Children(args, daemon, budget)
    whole: Any = None
    for shares in batched(args.shares, args.at_once):
        if not budget.enough():
            break
        with budget.case():
            whole = run_batch(report, children, args.problems, shares, [*problems], whole)
    # Last: a client that hangs may do harm to the daemon.
    if not args.no_peers:
        run_cublas(report, children, args, budget, problems)


def run_batch(
    report: Report,
    children: Children,
    folder: Path,
    shares: Sequence[int],
    names: Sequence[str],
    whole: Any,
) -> Any:
    """Adds our rows of some shares; returns what the model did on all SMs.

    The processes prepare beside each other. Each times when all the others wait or have ended.
    """
    files = {share: folder / f"share{share}.json" for share in shares}
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        started = {
            share: stack.enter_context(children.start(share, file)) for share, file in files.items()
        }
        for process in started.values():
            process.prepare()
        print(f"{[*shares]} %: prepared in {time.monotonic() - began:.1f} s", flush=True)
        for share, process in started.items():
            began = time.monotonic()
            ended = process.finish()
            seconds = time.monotonic() - began
            print(f"{share} %: timed in {seconds:.1f} s, status {ended.status}", flush=True)
            model = add_share(report, share, names, files[share], ended)
            if share == 100 and model and "tokens" in model:
                whole = model
            if share in children.with_model:
                row = compare_model(case_name(MODEL, share), model, whole, ended, share=share)
                report.extend([row])
            report.save()
    return whole


def add_share(report: Report, share: int, names: Sequence[str], file: Path, ended: Ended) -> Any:
    """Adds the rows of a share's kernels; returns what its model did, None if nothing."""
    found = {"checked": {}, "rows": {}, "model": None}
    if file.exists():
        found = json.loads(file.read_text())
    for name in names:
        if name in found["rows"]:
            report.extend([found["rows"][name]])
        elif not ended.cut:
            error = found["checked"].get(name)
            reason = ended.reason if error is None else f"{ended.reason}: {NOT_TIMED}"
            report.fail(case_name(name, share), "jpd", reason, rel_err=error, share=share)
    return found["model"]


def run_cublas(
    report: Report, children: Children, args: argparse.Namespace, budget: Budget, problems: Any
) -> None:
    """Adds the rows of torch's products: nothing is timed, so several shares at once."""
    gemms = [name for name in problems if is_gemm(name)]

    def cublas(share: int) -> Ended | None:
        if budget.left_s <= 0:
            return None
        return children.run_cublas(share, args.problems / f"cublas{share}.json")

    with ThreadPoolExecutor(CUBLAS_AT_ONCE) as pool:
        found = dict(zip(args.shares, pool.map(cublas, args.shares), strict=True))
    for share, ended in found.items():
        if ended is None:
            continue
        file = args.problems / f"cublas{share}.json"
        errors = json.loads(file.read_text()) if file.exists() else {}
        for name in gemms:
            case = case_name(name, share)
            if name not in errors:
                if not ended.cut:
                    report.fail(case, "cublas", ended.reason, share=share)
            elif errors[name] is None:
                report.fail(case, "cublas", "the result is not finite", share=share)
            else:
                report.add(case, "cublas", rel_err=errors[name], share=share)
    report.save()


def is_gemm(name: str) -> bool:
    """Whether cuBLAS has a part in it."""
    return share_problems.kernel_of(name).endswith("_gemm")


def shares_with_model(args: argparse.Namespace) -> set[int]:
    """Shares on which the engine runs too: 100 % always, as the others are compared with it."""
    return set() if args.no_model else {100, *(args.model_shares or args.shares)}


def expected_rows(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(case, impl) of the rows of this run."""
    names, shares, models = [*problems_of(args.quick)], args.shares, shares_with_model(args)
    keys = [(case_name(name, share), "jpd") for share in shares for name in names]
    keys += [(case_name(MODEL, share), "jpd") for share in shares if share in models]
    if not args.no_peers:
        gemms = [name for name in names if is_gemm(name)]
        keys += [(case_name(name, share), "cublas") for share in shares for name in gemms]
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sm_shares")
    add_arguments(parser)
    add_bounds(parser, peer_seconds=CUBLAS_TIMEOUT_S)
    parser.add_argument("--shares", nargs="+", type=int, metavar="PERCENT", help=f"[{SHARES}]")
    parser.add_argument("--no-peers", action="store_true", help="no cuBLAS")
    parser.add_argument("--no-model", action="store_true", help="kernels only")
    parser.add_argument(
        "--model-shares", nargs="+", type=int, metavar="PERCENT", help="shares with a model [all]"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        default=AT_ONCE,
        help=f"shares that are prepared beside each other [{AT_ONCE}]",
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cublas-child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--problems", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.at_once < 1:
        parser.error(f"--at-once must be 1 or more, got {args.at_once}")
    if args.child is not None:
        child(args)
    if args.cublas_child is not None:
        cublas_child(args)
    budget = Budget(args.seconds)
    report = Report("sm_shares", "Are the kernels right on every share of the SMs?", out=args.out)
    named = args.shares or ([100] if args.quick else SHARES)
    # Models on other shares are compared with the one on 100 %, which comes first.
    first = [] if args.no_model else [100]
    known = dict.fromkeys((*(first if args.quick else SHARES), *named))
    names = [*problems_of(args.quick), *([] if args.no_model else [MODEL])]
    every = [(name, share) for share in known for name in names]
    chosen = [(name, share) for share in (args.shares or spread(named)) for name in names]
    cases = planned(report, args, chosen, every, name=lambda key: case_name(*key), order_named=True)
    args.shares = list(dict.fromkeys([*first, *(share for _, share in cases)])) if cases else []
    report.summarise = summarise
    report.expect(expected_rows(args))
    if args.shares and budget.enough():
        with tempfile.TemporaryDirectory(prefix="shares-") as folder:
            args.problems = Path(folder)
            if args.quick and report.env["gpu"] is None:
                run_shares(report, None, args, budget)  # nothing to share: kernels are interpreted
            else:
                try:
                    with Mps.start() as daemon:
                        run_shares(report, daemon, args, budget)
                except MpsError as error:
                    report.fail("all", "jpd", error)
    report.finish()
    # cuBLAS is expected to fail here.
    failed = [row for row in report.rows if row["status"].startswith("failed")]
    sys.exit(any(row["impl"] == "jpd" for row in failed))


if __name__ == "__main__":
    main()
