"""How fast are torch's products and their collectives: one after the other, and async TP?

Runs in a process of its own and starts one for each GPU; `benchmarks/overlap.py` starts it::

    python -m benchmarks.baselines.torch_overlap --ranks 2 --case nvlink:2:RS:8192x8192x4096

``torch`` is `torch.nn.functional.linear` (cuBLAS) and then NCCL, ``torch_async_tp`` is
`fused_matmul_reduce_scatter` of torch's symmetric memory, which needs P2P but no multicast.

All processes wait for one another, a sleep holds each GPU while calls are enqueued, and a sample
follows on others without a pause; the time is that of the slowest GPU, by events.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.overlap_cases import Case
from benchmarks.rows import failed_row, make_row

ASYNC_TP = "torch_async_tp"
MAX_REL_ERR = 8e-3
_WARM_S, _SAMPLE_S = 0.04, 0.02
_HOLD_CYCLES = 20_000_000  # about 10 ms
_MOST_CALLS = 100


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines.torch_overlap")
    parser.add_argument("--ranks", type=int, required=True, metavar="N")
    parser.add_argument(
        "--case",
        nargs="+",
        type=lambda text: Case.parse(text.replace(":", " ")),
        default=[],
        metavar="LINK:RANKS:OP:MxNxK",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return parser.parse_args(argv)


def keys_of(cases: Sequence[Case]) -> list[tuple[str, str]]:
    """(case, impl) of every row."""
    keys = [(case.name, "torch") for case in cases]
    return keys + [(c.name, ASYNC_TP) for c in cases if c.op == "reduce_scatter"]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from benchmarks.baselines.torch_time import Rows

    if torch.cuda.device_count() < args.ranks:
        rows = Rows("torch_overlap", keys_of(args.case), args.json)
        for key in keys_of(args.case):
            rows.set(failed_row(*key, f"torch sees {torch.cuda.device_count()} GPUs"))
        return rows.finish()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _rank, (args.ranks, args.case, args.json, f"{folder}/store"), nprocs=args.ranks
        )
    return 0


def _rank(rank: int, ranks: int, cases: Sequence[Case], file: Path | None, store: str) -> None:
    """One GPU's process; the first one keeps the rows."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch
    from torch import distributed

    from benchmarks.baselines.torch_time import Rows

    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    distributed.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=ranks, device_id=device
    )
    torch.manual_seed(rank)
    rows = Rows("torch_overlap", keys_of(cases), file) if rank == 0 else None

    def keep(row: dict[str, Any]) -> None:
        if rows is not None:
            rows.set(row)

    with torch.no_grad():
        for case in cases:
            for name in ("torch", ASYNC_TP):
                if (case.name, name) not in keys_of([case]):
                    continue
                try:
                    samples, error = _measure(case, name, device)
                    keep(
                        make_row(
                            case.name,
                            name,
                            samples,
                            "us",
                            flops=case.shape.flops,
                            rel_err=error,
                        )
                    )
                except Exception as problem:  # one case must not cost the others
                    keep(failed_row(case.name, name, problem))
    if rows is not None:
        rows.finish()
    distributed.destroy_process_group()


def _measure(case: Case, name: str, device: Any) -> tuple[list[float], float]:
    """Samples in µs a call and the worst row's error, equal on all ranks.

    Raises:
        RuntimeError: some rank cannot, or its result is wrong: then all of them raise.
    """
    import torch
    from torch import distributed

    m, n, k = case.shape
    sets = min(24, max(2, -(-400_000_000 // case.shape.set_bytes)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    calls, error, problem = [], float("inf"), ""
    try:
        if name == ASYNC_TP and case.link == "no_p2p":
            raise RuntimeError("symmetric memory is P2P")
        pairs = [(random(m, k), random(n, k) * k**-0.5) for _ in range(sets)]
        make = _async_tp if name == ASYNC_TP else _sequential
        calls = [make(case, x, w) for x, w in pairs]
    except Exception as found:
        problem = f"{type(found).__name__}: {found}"
    _agree(problem, device)
    want = _collective(case, pairs[0][0].float() @ pairs[0][1].float().T)
    try:
        got = calls[0]().float()
        error = float(((got - want).norm(dim=1) / want.norm(dim=1)).max())
        if not error <= MAX_REL_ERR:
            problem = f"relative error {error:.2e} > {MAX_REL_ERR:.0e}"
    except Exception as found:
        problem = f"{type(found).__name__}: {found}"
    _agree(problem, device)
    del want, got

    def total_s(count: int, warm: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        distributed.barrier()
        torch.cuda._sleep(_HOLD_CYCLES)
        for i in range(warm):
            calls[i % sets]()
        start.record()
        for i in range(count):
            calls[i % sets]()
        end.record()
        torch.cuda.synchronize()
        return _slowest(start.elapsed_time(end) / 1e3, device)

    one_s = total_s(3, 3) / 3
    one_s = total_s(3, 3) / 3
    count = max(2, min(_MOST_CALLS // 3, round(_SAMPLE_S / one_s)))
    warm = max(1, min(_MOST_CALLS - count, round(_WARM_S / one_s)))
    samples = [total_s(count, warm) / count * 1e6 for _ in range(5)]
    return samples, _slowest(error, device)


def _slowest(value: float, device: Any) -> float:
    """The largest of all ranks."""
    import torch
    from torch import distributed

    tensor = torch.tensor(value, device=device, dtype=torch.float64)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return float(tensor)


def _agree(problem: str, device: Any) -> None:
    """Raises on all ranks if one has a problem: nobody must wait for one that gave up."""
    if _slowest(float(bool(problem)), device):
        raise RuntimeError(problem or "another rank failed")


def _collective(case: Case, y: Any) -> Any:
    import torch
    from torch import distributed

    if case.op == "all_reduce":
        distributed.all_reduce(y)
        return y
    if case.op == "reduce_scatter":
        out = torch.empty(y.shape[0] // case.ranks, y.shape[1], device=y.device, dtype=y.dtype)
        distributed.reduce_scatter_tensor(out, y)
        return out
    out = torch.empty_like(y)
    distributed.all_to_all_single(out, y)
    return out


def _sequential(case: Case, x: Any, w: Any) -> Callable[[], Any]:
    import torch

    return lambda: _collective(case, torch.nn.functional.linear(x, w))


def _async_tp(case: Case, x: Any, w: Any) -> Callable[[], Any]:
    import torch
    from torch import distributed
    from torch.distributed import _symmetric_memory as symmetric

    del case
    group = distributed.group.WORLD.group_name
    symmetric.enable_symm_mem_for_group(group)
    return lambda: torch.ops.symm_mem.fused_matmul_reduce_scatter(
        x, w.t(), "sum", scatter_dim=0, group_name=group
    )


if __name__ == "__main__":
    sys.exit(main())
