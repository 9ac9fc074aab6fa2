"""Are the kernels right on every share of the SMs, and how long do they take there?

An MPS daemon in private folders, and for every share a process of its own with
CUDA_MPS_ACTIVE_THREAD_PERCENTAGE: each kernel against float32 results that NumPy computed on the
CPU (`benchmarks/share_problems.py`), and a whole engine (two layers of Llama-3.1-8B, kernels only)
against the same engine on 100 %: `tokens_agree` is the part of its greedy tokens that are the same,
up to a first difference, and `logprob_diff` the largest difference of their log-probabilities.
``cublas`` rows are torch's products at the same shares, in processes that may hang: cuBLAS is
known to be wrong under MPS.

`max_rel_err` and `cublas_max_rel_err` in the summary are over all shares; `hangs` counts our
processes that had to be stopped, `cublas_hangs` cuBLAS's. `sms` is what the process saw. Times are
device times (`benchmarks/device_time.py`) with nothing else on the GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import share_problems
from benchmarks.budget import Budget, spread
from benchmarks.mps import run_bounded
from benchmarks.options import add_bounds, planned
from benchmarks.report import Report, add_arguments
from benchmarks.rows import failed_row, make_row
from native.mps import Mps, MpsError

SHARES = tuple(range(100, 5, -5))
MODEL = "model step"
MAX_REL_ERR = 1e-2
CHILD_TIMEOUT_S = 60
CUBLAS_TIMEOUT_S = 40
CUBLAS_AT_ONCE = 4
WARM_AT_ONCE = 4
HUNG = "hung"
PROMPT_TOKENS, NEW_TOKENS, BATCH = 200, 6, 4


def case_name(kernel: str, share: int) -> str:
    """As in result rows."""
    return f"{kernel} @ {share} %"


# --- in the child ---------------------------------------------------------------------------


def run_problems(share: int, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of all kernels, in this process and on its share."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import device_time
    from benchmarks.attention_reference import worst_row_error
    from benchmarks.gemm_impls import interpreted

    on_gpu = jax.default_backend() == "gpu"
    sms = jax.local_devices()[0].core_count if on_gpu else 0
    chains, operands, problems = {}, {}, {}
    for name in names:
        problem = problems[name] = share_problems.load(folder / f"{name.replace('/', '-')}.npz")
        arrays = {key: jnp.asarray(a) for key, a in problem.arrays.items()}

        def make(name: str = name, arrays: Any = arrays) -> device_time.Chain:
            from pallas_kernels.workspace import workspace

            op, large = share_problems.call(name, interpreted())
            own = {key: arrays[key] for key in large}
            shared = {key: a for key, a in arrays.items() if key not in large}
            nbytes = sum(a.nbytes for a in own.values())
            calls = device_time.rotations(nbytes, least=4, most=16) if on_gpu else 1
            copies = [own, *({k: jnp.copy(a) for k, a in own.items()} for _ in range(calls - 1))]
            operands[name] = shared, copies
            return device_time.Chain(op, shared, own, calls, workspace)

        chains[name] = make
    # Kernels launched one by one, as in a model's step.
    compiled = device_time.compile_chains(chains, ["stream"])
    rows = []
    for name in names:
        case, kernel = case_name(name, share), "jpd"
        try:
            program = compiled[name]
            if isinstance(program, Exception):
                raise program
            shared, copies = operands[name]
            got = np.asarray(program.first_output(shared, copies))[problems[name].rows]
            error = worst_row_error(got, problems[name].want)
            if not math.isfinite(error):
                raise RuntimeError("the result holds numbers that are not finite")
            launches = share_problems.LAUNCHES.get(share_problems.kernel_of(name), 1)
            timing = device_time.measure(program, shared, copies, samples=3, launches=launches)
            extra = {"share": share, "sms": sms}
            if error > MAX_REL_ERR:
                reason = f"relative error {error:.2e} > {MAX_REL_ERR:.0e}"
                rows.append(failed_row(case, kernel, reason, wrong_by=error, **extra))
            else:
                rows.append(make_row(case, kernel, timing.samples, "us", rel_err=error, **extra))
        except Exception as error:  # one kernel must not cost the others
            rows.append(failed_row(case, kernel, error, share=share, sms=sms))
    return rows


def run_model(quick: bool) -> dict[str, Any]:
    """Greedy tokens and their log-probabilities of an engine with fixed random weights."""
    import jax
    import numpy as np

    from benchmarks.dummy import dummy_engine
    from benchmarks.models import MODELS
    from jpd import SamplingParams
    from jpd.config import KernelConfig

    name = "sm-shares"
    base = MODELS["tiny"] if quick else MODELS["llama31-8b"] | {"vocab_size": 32000}
    MODELS[name] = base | {"num_hidden_layers": 2}
    on_gpu = jax.default_backend() == "gpu"
    room = PROMPT_TOKENS + NEW_TOKENS + 2
    engine = dummy_engine(
        name,
        max_model_len=room,
        max_num_seqs=BATCH,
        max_num_batched_tokens=BATCH * PROMPT_TOKENS,
        max_prefills_per_step=BATCH,
        batch_buckets=(BATCH,),
        token_buckets=(BATCH * PROMPT_TOKENS,),
        context_buckets=(room,),
        num_pages=BATCH * (room // 16 + 2) + 1,
        enable_prefix_caching=False,
        show_progress=False,
        seed=0,
        kernels=KernelConfig(pallas_only=on_gpu),
    )
    random = np.random.default_rng(0)
    vocab = engine.model_config.vocab_size
    prompts = random.integers(0, vocab, (BATCH, PROMPT_TOKENS)).tolist()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NEW_TOKENS, logprobs=1)
    coordinator = engine.coordinator
    outputs = [coordinator.add(str(i), None, ids, params) for i, ids in enumerate(prompts)]
    start, steps = time.perf_counter(), 0
    while coordinator.has_work:
        coordinator.step()
        steps += 1
    seconds = time.perf_counter() - start
    tokens = [list(map(int, o.outputs[0].token_ids)) for o in outputs]
    chosen = [
        [float(step[token].logprob) for token, step in zip(ids, o.outputs[0].logprobs, strict=True)]
        for ids, o in zip(tokens, outputs, strict=True)
    ]
    return {"tokens": tokens, "logprobs": chosen, "step_us": seconds / steps * 1e6}


def child(args: argparse.Namespace) -> None:
    """Writes a JSON file with this share's rows and what its model generated."""
    import jax

    folder = args.problems
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    names = [*(share_problems.QUICK_PROBLEMS if args.quick else share_problems.PROBLEMS)]
    result: dict[str, Any] = {"rows": run_problems(args.child, folder, names), "model": None}
    # Written before the model runs too: if that hangs, the kernels' rows are kept.
    args.json.write_text(json.dumps(result))
    if not args.no_model:
        try:
            result["model"] = run_model(args.quick)
        except Exception as error:
            result["model"] = {"error": f"{type(error).__name__}: {error}"[:400]}
        args.json.write_text(json.dumps(result))
    sys.stdout.flush()
    # Nothing is left to save, and an MPS client that tears everything down takes long.
    os._exit(0)


def cublas_child(args: argparse.Namespace) -> None:
    """Writes the relative errors of torch's products to a JSON file."""
    import numpy as np
    import torch

    errors = {}
    problems = share_problems.QUICK_PROBLEMS if args.quick else share_problems.PROBLEMS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in problems:
        if not share_problems.kernel_of(name).endswith("_gemm"):
            continue
        problem = share_problems.load(args.problems / f"{name.replace('/', '-')}.npz")
        x, w = (
            torch.from_numpy(problem.arrays[key].view(np.int16)).view(torch.bfloat16).to(device)
            for key in ("x", "w")
        )
        got = torch.nn.functional.linear(x, w)[problem.rows].float().cpu().numpy()
        error = np.linalg.norm(got - problem.want) / np.linalg.norm(problem.want)
        errors[name] = float(error) if math.isfinite(error) else None
        args.json.write_text(json.dumps(errors))
    os._exit(0)


# --- in the parent --------------------------------------------------------------------------


def compare_model(case: str, got: Any, want: Any, **extra: Any) -> dict[str, Any]:
    """Row of a model's run against that on all SMs."""
    for run in (got, want):
        if not run or "error" in run:
            reason = run["error"] if run else "the process ended before the model did"
            return failed_row(case, "jpd", reason, **extra)
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
    return make_row(case, "jpd", [got["step_us"]], "us", **extra)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary's numbers from all rows."""
    summary: dict[str, Any] = {}
    for impl, key in (("jpd", "hangs"), ("cublas", "cublas_hangs")):
        hung = [r for r in rows if r["impl"] == impl and r["status"] == f"failed: {HUNG}"]
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


class Children:
    """Starts the processes of this run.

    Args:
        args: the command line, with the folder of the problems.
        daemon: None where there is no GPU to share.
        budget: a process is stopped when its time is over.
    """

    def __init__(self, args: argparse.Namespace, daemon: Mps | None, budget: Budget) -> None:
        self._args, self._daemon, self._budget = args, daemon, budget
        with_model = {100, *(args.model_shares or args.shares)}
        self.with_model = set() if args.no_model else with_model
        """Shares on which the engine runs too."""

    def run(
        self, kind: str, share: int, file: Path, timeout_s: float, *, model: bool = False
    ) -> tuple[int | None, str, bool]:
        """One process on a share.

        Returns:
            Exit status (None for one that was stopped), standard error, and whether it was stopped
            because the time of the whole run was over.
        """
        env = os.environ | (self._daemon.environment(share) if self._daemon else {})
        # Several processes at a time take memory as they need it.
        env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
        command = [sys.executable, "-m", "benchmarks.sm_shares", kind, str(share)]
        command += ["--problems", str(self._args.problems), "--json", str(file)]
        command += ["--quick"] * self._args.quick + ["--no-model"] * (not model)
        limit_s = self._budget.limit_s(timeout_s)
        status, text = run_bounded(command, env, limit_s, self._daemon)
        return status, text, status is None and limit_s < timeout_s


def run_shares(
    report: Report, daemon: Mps | None, args: argparse.Namespace, budget: Budget
) -> None:
    """Starts the children of all shares, as long as there is time, and collects what they found."""
    problems = problems_of(args.quick)
    for name, make in problems.items():
        share_problems.save(make(), args.problems / f"{name.replace('/', '-')}.npz")
    children = Children(args, daemon, budget)
    if args.warm:  # compiles for all shares, several at once; the runs that count find it done

        def warm(share: int) -> None:
            if budget.left_s > 0:
                file = args.problems / f"warm{share}.json"
                children.run("--child", share, file, CHILD_TIMEOUT_S)

        with ThreadPoolExecutor(WARM_AT_ONCE) as pool:
            list(pool.map(warm, args.shares))
    whole: Any = None
    for share in args.shares:
        if not budget.enough():
            break
        with budget.case():
            whole = run_share(report, children, args.problems, share, problems, whole)
        report.save()
    # Last: a client that hangs may do harm to the daemon.
    if not args.no_peers:
        run_cublas(report, children, args, budget, problems)


def run_share(
    report: Report, children: Children, folder: Path, share: int, problems: Any, whole: Any
) -> Any:
    """Adds our rows of one share; returns what the model did on all SMs."""
    file = folder / f"share{share}.json"
    began = time.perf_counter()
    model_too = share in children.with_model
    status, text, cut = children.run("--child", share, file, CHILD_TIMEOUT_S, model=model_too)
    print(f"{share} %: {time.perf_counter() - began:.1f} s, status {status}", flush=True)
    if not file.exists():
        if not cut:
            last = text.strip().splitlines()[-1:] or [f"exited with {status}"]
            reason = HUNG if status is None else last[0]
            for name in problems:
                report.fail(case_name(name, share), "jpd", reason, share=share)
        return whole
    result = json.loads(file.read_text())
    report.extend(result["rows"])
    if model_too:
        model = result["model"]
        if model is None and status is None:
            if cut:
                return whole
            report.fail(case_name(MODEL, share), "jpd", HUNG, share=share)
            return whole
        whole = model if share == 100 else whole
        report.extend([compare_model(case_name(MODEL, share), model, whole, share=share)])
    return whole


def run_cublas(
    report: Report, children: Children, args: argparse.Namespace, budget: Budget, problems: Any
) -> None:
    """Adds the rows of torch's products: nothing is timed, so several shares at once."""
    gemms = [name for name in problems if is_gemm(name)]

    def cublas(share: int) -> tuple[int | None, str, bool] | None:
        if budget.left_s <= 0:
            return None
        file = args.problems / f"cublas{share}.json"
        return children.run("--cublas-child", share, file, args.peer_seconds)

    with ThreadPoolExecutor(CUBLAS_AT_ONCE) as pool:
        found = dict(zip(args.shares, pool.map(cublas, args.shares), strict=True))
    for share, ended in found.items():
        if ended is None:
            continue
        status, text, cut = ended
        file = args.problems / f"cublas{share}.json"
        errors = json.loads(file.read_text()) if file.exists() else {}
        for name in gemms:
            case = case_name(name, share)
            if name not in errors:
                if cut:
                    continue
                last = text.strip().splitlines()[-1:] or [f"exited with {status}"]
                report.fail(case, "cublas", HUNG if status is None else last[0], share=share)
            elif errors[name] is None:
                report.fail(case, "cublas", "the result is not finite", share=share)
            else:
                report.add(case, "cublas", rel_err=errors[name], share=share)
    report.save()


def problems_of(quick: bool) -> dict[str, Any]:
    """What every share computes, by name."""
    return share_problems.QUICK_PROBLEMS if quick else share_problems.PROBLEMS


def is_gemm(name: str) -> bool:
    """Whether cuBLAS has a part in it."""
    return share_problems.kernel_of(name).endswith("_gemm")


def expected_rows(shares: Sequence[int], args: argparse.Namespace) -> list[tuple[str, str]]:
    """(case, impl) of the rows of these shares."""
    names = [*problems_of(args.quick)]
    keys = [(case_name(name, share), "jpd") for share in shares for name in names]
    if not args.no_model:
        models = {100, *(args.model_shares or shares)}
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
    parser.add_argument("--warm", action="store_true", help="compile for all shares first")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cublas-child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--problems", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args)
    if args.cublas_child is not None:
        cublas_child(args)
    budget = Budget(args.seconds)
    report = Report("sm_shares", "Are the kernels right on every share of the SMs?", out=args.out)
    named = args.shares or ([100] if args.quick else SHARES)
    known = named if args.quick else dict.fromkeys((*SHARES, *named))
    names = [*problems_of(args.quick), *([] if args.no_model else [MODEL])]
    every = [(name, share) for share in known for name in names]
    chosen = [(name, share) for share in (args.shares or spread(named)) for name in names]
    cases = planned(report, args, chosen, every, name=lambda key: case_name(*key), order_named=True)
    # 100 % always: the models on other shares are compared with it.
    args.shares = list(dict.fromkeys([100, *(share for _, share in cases)])) if cases else []
    report.summarise = summarise
    report.expect(expected_rows(args.shares, args))
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
