"""How fast is FlashInfer's attention over paged keys and values, for bf16 and pages of 16?

Runs in a process of its own; `benchmarks/decode_attention.py` and `prefill_attention.py` start it::

    python -m benchmarks.baselines.flashinfer_attention --kind decode --cases "B=1" --json fi.json

FlashInfer compiles its kernels with nvcc on first use. Plans are made before the clock starts, as
an engine does once for all layers of a step; they are made for these very lengths. Decode modes:
``cuda_cores``, ``tensor_cores`` (its fa2 kernels), ``tensor_cores_fa3``, and ``xqa``; prefill:
``fa3`` and ``fa2``. ``flashinfer`` is the fastest of them (`mode`), and must be right like ours.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attention_cases import (
    DECODE,
    HEAD_SIZE,
    MAX_REL_ERR,
    PAGE_TOKENS,
    PREFILL,
    QUICK_DECODE,
    QUICK_PREFILL,
    Decode,
    Pages,
    Prefill,
    select,
)
from benchmarks.rows import failed_row, make_row

IMPL = "flashinfer"
WORKSPACE_BYTES = 512 << 20
MODES = {
    "decode": ("cuda_cores", "tensor_cores", "tensor_cores_fa3", "xqa"),
    "prefill": ("fa3", "fa2"),
}
# The others take a minute or more of nvcc: xqa one for each number of heads that share a key.
DEFAULT_MODES = {"decode": ("cuda_cores", "tensor_cores"), "prefill": ("fa3", "fa2")}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines.flashinfer_attention")
    parser.add_argument("--kind", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="[all]")
    parser.add_argument("--modes", nargs="+", help="of the kind [those that compile fast]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    decode = args.kind == "decode"
    known = [*DECODE, *QUICK_DECODE] if decode else [*PREFILL, *QUICK_PREFILL]
    args.cases = select(known, args.cases)
    args.modes = args.modes or DEFAULT_MODES[args.kind]
    if unknown := set(args.modes) - set(MODES[args.kind]):
        parser.error(f"--modes of {args.kind} are {MODES[args.kind]}, got {sorted(unknown)}")
    return args


def page_list(pages: Pages, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Page table as FlashInfer wants it: (indptr `[B + 1]`, indices, tokens of the last pages)."""
    needed = -(-lengths // PAGE_TOKENS)
    indptr = np.concatenate([[0], np.cumsum(needed)]).astype(np.int32)
    used = zip(pages.table, needed, strict=True)
    indices = np.concatenate([row[:n] for row, n in used]).astype(np.int32)
    return indptr, indices, (lengths - (needed - 1) * PAGE_TOKENS).astype(np.int32)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from benchmarks.baselines.torch_time import Rows, best_mode, relative_error, rotations

    rows = Rows("flashinfer_attention", [(case.name, IMPL) for case in args.cases], args.json)
    try:
        import flashinfer
    except Exception as problem:  # without it every case has failed, for this reason
        for case in args.cases:
            rows.set(failed_row(case.name, IMPL, problem))
        return rows.finish()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda"
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    scale = HEAD_SIZE**-0.5
    bf16 = torch.bfloat16

    def exact(q: Any, k_pages: Any, v_pages: Any, table: Any, seen: np.ndarray) -> torch.Tensor:
        """float32: q `[R, Hq, D]`, table `[R, W]`; query r sees its first `seen[r]` tokens."""
        group = q.shape[1] // k_pages.shape[2]
        out = []
        for row, length in enumerate(seen.tolist()):
            used = table[row, : -(-length // PAGE_TOKENS)]
            k, v = (
                t[used].flatten(0, 1)[:length].float().repeat_interleave(group, 1).transpose(0, 1)
                for t in (k_pages, v_pages)
            )
            scores = (k @ q[row].float()[:, :, None])[..., 0] * scale
            out.append((scores.softmax(-1)[:, None] @ v)[:, 0])
        return torch.stack(out)

    def decode_modes(case: Decode, pages: Pages, pools: Any) -> dict[str, Callable[[], Any]]:
        lengths = case.lengths
        indptr, indices, last = (torch.from_numpy(a).to(device) for a in page_list(pages, lengths))
        table = torch.from_numpy(pages.table).to(device)
        q = torch.randn(case.batch, case.q_heads, HEAD_SIZE, device=device, dtype=bf16)
        want = exact(q, *pools[0], table.long(), lengths)

        def checked(call: Callable[[Any, Any], Any]) -> Any:
            return [lambda kv=kv: call(*kv) for kv in pools], relative_error(call(*pools[0]), want)

        def wrapper(tensor_cores: bool, backend: str) -> Any:
            planned = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=tensor_cores, backend=backend
            )
            planned.plan(
                indptr,
                indices,
                last,
                case.q_heads,
                case.kv_heads,
                HEAD_SIZE,
                PAGE_TOKENS,
                q_data_type=bf16,
                kv_data_type=bf16,
                sm_scale=scale,
            )
            return checked(lambda k, v: planned.run(q, (k, v)))

        def xqa() -> Any:
            from flashinfer.decode import xqa_batch_decode_with_kv_cache

            seen = torch.from_numpy(lengths).to(device).to(torch.uint32)
            scratch = torch.zeros(WORKSPACE_BYTES // 2, dtype=torch.uint8, device=device)
            return checked(
                lambda k, v: xqa_batch_decode_with_kv_cache(
                    q, (k, v), scratch, table, seen, int(lengths.max()), bmm1_scale=scale
                )
            )

        return {
            "cuda_cores": lambda: wrapper(False, "auto"),
            "tensor_cores": lambda: wrapper(True, "fa2"),
            "tensor_cores_fa3": lambda: wrapper(True, "fa3"),
            "xqa": xqa,
        }

    def prefill_modes(case: Prefill, pages: Pages, pools: Any) -> dict[str, Callable[[], Any]]:
        indptr, indices, last = (
            torch.from_numpy(a).to(device) for a in page_list(pages, case.contexts)
        )
        starts = torch.from_numpy(np.append(case.starts, case.tokens).astype(np.int32)).to(device)
        q = torch.randn(case.tokens, case.q_heads, HEAD_SIZE, device=device, dtype=bf16)
        owner, seen = case.owners(case.sample())
        tokens = torch.from_numpy(case.sample()).to(device)
        table = torch.from_numpy(pages.table[owner]).to(device).long()
        want = exact(q[tokens], *pools[0], table, seen)

        def planned(backend: str) -> Any:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                workspace, "NHD", backend=backend
            )
            wrapper.plan(
                starts,
                indptr,
                indices,
                last,
                case.q_heads,
                case.kv_heads,
                HEAD_SIZE,
                PAGE_TOKENS,
                causal=True,
                sm_scale=scale,
                q_data_type=bf16,
                kv_data_type=bf16,
            )
            error = relative_error(wrapper.run(q, pools[0])[tokens], want)
            return [lambda kv=kv: wrapper.run(q, kv) for kv in pools], error

        return {mode: lambda mode=mode: planned(mode) for mode in MODES["prefill"]}

    with torch.no_grad():
        for case in args.cases:
            try:
                decode = isinstance(case, Decode)
                lengths = case.lengths if decode else case.contexts
                pages = Pages.shuffled(lengths)
                shape = (pages.count, PAGE_TOKENS, case.kv_heads, HEAD_SIZE)
                pools = [
                    tuple(torch.randn(shape, device=device, dtype=bf16) for _ in range(2))
                    for _ in range(
                        rotations(case.kv_bytes, least=case.least_calls if decode else 4)
                    )
                ]
                modes = (decode_modes if decode else prefill_modes)(case, pages, pools)
                start = time.perf_counter()
                best, samples, error = best_mode({m: modes[m] for m in args.modes}, MAX_REL_ERR)
                print(f"{case.name}: {best}, {time.perf_counter() - start:.1f} s", flush=True)
                rows.set(
                    make_row(
                        case.name,
                        IMPL,
                        samples,
                        "us",
                        nbytes=case.nbytes,
                        flops=case.flops,
                        rel_err=error,
                        mode=best,
                    )
                )
                del modes, pools
            except Exception as problem:  # one case must not cost the others
                rows.set(failed_row(case.name, IMPL, problem))
            torch.cuda.empty_cache()
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
