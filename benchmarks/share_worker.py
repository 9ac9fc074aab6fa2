"""The processes of `benchmarks/sm_shares.py`, each on its share of the SMs."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import share_problems
from benchmarks.rows import failed_row, make_row

MAX_REL_ERR = 1e-2
PROMPT_TOKENS, NEW_TOKENS, BATCH = 200, 6, 4
HOLDS_US = (5_000, 10_000, 20_000, 40_000)
"""How long the stream is held while the host enqueues: `pallas_kernels.timing` has a program for
each of them, which is compiled ahead. Any other is compiled when it is needed."""


def case_name(kernel: str, share: int) -> str:
    """As in result rows."""
    return f"{kernel} @ {share} %"


def problems_of(quick: bool) -> dict[str, Any]:
    """What every share computes, by name."""
    return share_problems.QUICK_PROBLEMS if quick else share_problems.PROBLEMS


def ready_file(file: Path) -> Path:
    """What the child that writes `file` makes when it is ready to time."""
    return file.with_suffix(".ready")


class Kernels:
    """All kernels, compiled in this process and on its share, and their operands.

    Args:
        folder: with the problems.
        names: of the problems.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        import jax
        import jax.numpy as jnp

        from benchmarks import device_time
        from benchmarks.gemm_impls import interpreted
        from pallas_kernels import timing
        from pallas_kernels.workspace import workspace

        on_gpu = jax.default_backend() == "gpu"
        self.sms = jax.local_devices()[0].core_count if on_gpu else 0
        self._problems, self._operands, chains = {}, {}, {}
        for name in names:
            problem = share_problems.load(folder / f"{name.replace('/', '-')}.npz")
            arrays = {key: jnp.asarray(a) for key, a in problem.arrays.items()}
            self._problems[name] = problem

            def make(name: str = name, arrays: Any = arrays) -> device_time.Chain:
                op, large = share_problems.call(name, interpreted())
                own = {key: arrays[key] for key in large}
                shared = {key: a for key, a in arrays.items() if key not in large}
                nbytes = sum(a.nbytes for a in own.values())
                calls = device_time.rotations(nbytes, least=4, most=16) if on_gpu else 1
                more = ({k: jnp.copy(a) for k, a in own.items()} for _ in range(calls - 1))
                self._operands[name] = shared, [own, *more]
                return device_time.Chain(op, shared, own, calls, workspace)

            chains[name] = make
        # Kernels launched one by one, as in a model's step.
        self._compiled = device_time.compile_chains(chains, ["stream"])
        if on_gpu:
            timing.stamper()
            for us in HOLDS_US:
                timing.spinner(us)

    def check(self, name: str) -> float:
        """Runs a kernel; the relative error of its result."""
        import numpy as np

        from benchmarks.attention_reference import worst_row_error

        program = self._compiled[name]
        if isinstance(program, Exception):
            raise program
        problem = self._problems[name]
        got = np.asarray(program.first_output(*self._operands[name]))[problem.rows]
        error = worst_row_error(got, problem.want)
        if not math.isfinite(error):
            raise RuntimeError("the result holds numbers that are not finite")
        return error

    def time_us(self, name: str) -> list[float]:
        """Samples of a kernel that was checked."""
        from benchmarks import device_time

        program = self._compiled[name]
        launches = share_problems.LAUNCHES.get(share_problems.kernel_of(name), 1)
        return device_time.measure(
            program, *self._operands[name], samples=3, launches=launches
        ).samples


class Model:
    """An engine with fixed random weights, and prompts."""

    def __init__(self, quick: bool) -> None:
        import jax
        import numpy as np

        from benchmarks.dummy import dummy_engine
        from benchmarks.models import MODELS
        from jpd.config import KernelConfig

        name = "sm-shares"
        base = MODELS["tiny"] if quick else MODELS["llama31-8b"] | {"vocab_size": 32000}
        MODELS[name] = base | {"num_hidden_layers": 2}
        on_gpu = jax.default_backend() == "gpu"
        room = PROMPT_TOKENS + NEW_TOKENS + 2
        self._engine = dummy_engine(
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
        vocab = self._engine.model_config.vocab_size
        self._prompts = random.integers(0, vocab, (BATCH, PROMPT_TOKENS)).tolist()

    def generate(self) -> tuple[dict[str, Any], float]:
        """Greedy tokens with their log-probabilities, and µs of a step."""
        from jpd import SamplingParams

        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NEW_TOKENS, logprobs=1)
        coordinator = self._engine.coordinator
        outputs = [coordinator.add(str(i), None, p, params) for i, p in enumerate(self._prompts)]
        start, steps = time.perf_counter(), 0
        while coordinator.has_work:
            coordinator.step()
            steps += 1
        seconds = time.perf_counter() - start
        texts = [output.outputs[0] for output in outputs]
        tokens = [list(map(int, text.token_ids)) for text in texts]
        logprobs = [
            [float(at[token].logprob) for token, at in zip(ids, text.logprobs, strict=True)]
            for ids, text in zip(tokens, texts, strict=True)
        ]
        if not all(math.isfinite(x) for some in logprobs for x in some):
            raise RuntimeError("log-probabilities that are not finite")
        return {"tokens": tokens, "logprobs": logprobs}, seconds / steps * 1e6


def child(args: argparse.Namespace) -> None:
    """Checks this share's kernels and model, waits, and times them.

    What it found is in a JSON file at any time, so that nothing is lost if it hangs: `checked`, the
    relative errors of right results, and `rows`, by the problems' names; and `model`.
    """
    import jax

    folder, share = args.problems, args.child
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    names = [*problems_of(args.quick)]
    checked: dict[str, float] = {}
    rows: dict[str, Any] = {}
    found: dict[str, Any] = {"checked": checked, "rows": rows, "model": None}
    kernels = Kernels(folder, names)
    extra = {"share": share, "sms": kernels.sms}

    def save() -> None:
        part = args.json.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(args.json)

    def fail(name: str, reason: str | Exception, **more: Any) -> None:
        rows[name] = failed_row(case_name(name, share), "jpd", reason, **extra, **more)

    for name in names:
        try:
            error = kernels.check(name)
            if error <= MAX_REL_ERR:
                checked[name] = error
            else:
                reason = f"relative error {error:.2e} > {MAX_REL_ERR:.0e}"
                fail(name, reason, wrong_by=error)
        except Exception as error:  # one kernel must not cost the others
            fail(name, error)
        save()
    model = None
    if not args.no_model:
        try:
            model = Model(args.quick)
            found["model"], _ = model.generate()
        except Exception as error:
            model, found["model"] = None, {"error": _described(error)}
        save()
    wait_for_go(args.json)
    for name, error in checked.items():
        case = case_name(name, share)
        try:
            rows[name] = make_row(case, "jpd", kernels.time_us(name), "us", rel_err=error, **extra)
        except Exception as failure:
            fail(name, failure, rel_err=error)
        save()
    if model is not None:
        try:
            _, found["model"]["step_us"] = model.generate()
        except Exception as error:
            found["model"]["error"] = _described(error)
        save()
    sys.stdout.flush()
    # Nothing is left to save, and an MPS client that tears everything down takes long.
    os._exit(0)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def wait_for_go(file: Path) -> None:
    """Says that this process is ready to time, and waits until it may."""
    ready_file(file).touch()
    if not sys.stdin.readline():
        os._exit(1)  # the parent has ended


def cublas_child(args: argparse.Namespace) -> None:
    """Writes the relative errors of torch's products to a JSON file."""
    import numpy as np
    import torch

    errors = {}
    problems = problems_of(args.quick)
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
