"""How fast is torch's scaled_dot_product_attention (flash, cuDNN, efficient), for bf16?

Runs in a process of its own; `benchmarks/decode_attention.py` and `prefill_attention.py` start it::

    python -m benchmarks.baselines.torch_attention --kind decode --cases "B=1 32/8" --json sdpa.json

Keys and values are contiguous: no pages. Only cases whose sequences are all of one length apply,
for prefill only single chunks. Every back end is tried with keys laid out `[B, S, H, D]` and
`[B, H, S, D]`; ``torch_sdpa`` is the fastest of them (`mode`), and must be right like ours. For
prefill ``torch_cudnn`` is the cuDNN back end alone. After a prefix the mask is torch's
`causal_lower_right`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.attention_cases import (
    DECODE,
    HEAD_SIZE,
    MAX_REL_ERR,
    PREFILL,
    QUICK_DECODE,
    QUICK_PREFILL,
    Decode,
    Prefill,
    select,
)
from benchmarks.rows import failed_row, make_row


def applies(case: Decode | Prefill) -> bool:
    """Without pages all sequences must have one length."""
    return not case.ragged if isinstance(case, Decode) else len(case.chunks) == 1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines.torch_attention")
    parser.add_argument("--kind", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="[all that apply]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    known = [*DECODE, *QUICK_DECODE] if args.kind == "decode" else [*PREFILL, *QUICK_PREFILL]
    args.cases = [case for case in select(known, args.cases) if applies(case)]
    return args


def impls(kind: str) -> tuple[str, ...]:
    """Rows of each case."""
    return ("torch_sdpa",) if kind == "decode" else ("torch_cudnn", "torch_sdpa")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    from benchmarks.baselines.torch_time import Rows, best_mode, relative_error, rotations

    keys = [(case.name, impl) for case in args.cases for impl in impls(args.kind)]
    rows = Rows("torch_attention", keys, args.json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    if device == "cpu":
        backends = {"math": SDPBackend.MATH}
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def exact(q: Any, k: Any, v: Any, seen: Any) -> torch.Tensor:
        """float32: q `[B, Hq, R, D]`, k and v `[B, Hkv, S, D]`; query r sees `seen[r]` keys."""
        group = q.shape[1] // k.shape[1]
        mask = torch.arange(k.shape[2], device=device) < seen[:, None]
        out = []
        for row in range(q.shape[0]):  # one at a time: float32 copies of everything would not fit
            keys, values = (t[row].float().repeat_interleave(group, 0) for t in (k, v))
            scores = q[row].float() @ keys.transpose(1, 2) * HEAD_SIZE**-0.5
            out.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values)
        return torch.stack(out)

    def measure(case: Decode | Prefill) -> None:
        decode = isinstance(case, Decode)
        batch = case.batch if decode else 1
        queries = 1 if decode else case.tokens
        length = case.context if decode else int(case.contexts[0])
        causal = not decode
        count = rotations(case.kv_bytes, least=case.least_calls if decode else 4)
        shape = (batch, length, case.kv_heads, HEAD_SIZE)
        pools = [
            tuple(torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
            for _ in range(count)
        ]
        query = torch.randn(
            batch, queries, case.q_heads, HEAD_SIZE, device=device, dtype=torch.bfloat16
        )
        if decode:
            sample, seen = torch.zeros(1, dtype=torch.long), torch.tensor([length])
        else:
            sample = torch.from_numpy(case.sample())
            seen = torch.from_numpy(case.owners(case.sample())[1]).long()
        sample, seen = sample.to(device), seen.to(device)
        options: dict[str, Any] = {"enable_gqa": case.q_heads != case.kv_heads}
        if causal and queries == length:
            options["is_causal"] = True
        elif causal:
            options["attn_mask"] = causal_lower_right(queries, length)

        def mode(backend: str, heads_first: bool) -> Callable[[], Any]:
            def turned(x: torch.Tensor) -> torch.Tensor:
                """Random values: the same memory serves for either layout."""
                if heads_first:
                    return x.view(batch, x.shape[2], x.shape[1], HEAD_SIZE)
                return x.transpose(1, 2)

            def make() -> tuple[list[Callable[[], Any]], float]:
                q = turned(query)

                def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                    with sdpa_kernel(backends[backend]):
                        return sdpa(q, k, v, **options)

                turns = [(turned(k), turned(v)) for k, v in pools]
                got = call(*turns[0])[:, :, sample]
                want = exact(q[:, :, sample], *turns[0], seen)
                error = relative_error(
                    got.transpose(1, 2).flatten(0, 1), want.transpose(1, 2).flatten(0, 1)
                )
                return [lambda kv=kv: call(*kv) for kv in turns], error

            return make

        layouts = {"bhsd": True, "bshd": False}
        for impl in impls(args.kind):
            names = ["cudnn"] if impl == "torch_cudnn" and device == "cuda" else [*backends]
            modes = {f"{b} {name}": mode(b, layouts[name]) for b in names for name in layouts}
            try:
                best, samples, error = best_mode(modes, MAX_REL_ERR)
                rows.set(
                    make_row(
                        case.name,
                        impl,
                        samples,
                        "us",
                        nbytes=case.nbytes,
                        flops=case.flops,
                        rel_err=error,
                        mode=best,
                    )
                )
            except Exception as problem:  # one case must not cost the others
                rows.set(failed_row(case.name, impl, problem))

    with torch.no_grad():
        for case in args.cases:
            try:
                measure(case)
            except Exception as problem:
                for impl in impls(args.kind):
                    rows.set(failed_row(case.name, impl, problem))
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
