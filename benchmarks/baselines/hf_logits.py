"""Hugging Face transformers as the judge of tokens: makes checkpoints, and scores tokens with them.

Runs in a process of its own: it imports torch and never JAX::

    python -m benchmarks.baselines.hf_logits make config.json FOLDER
    python -m benchmarks.baselines.hf_logits score FOLDER tokens.json scores.npz

``make`` writes a checkpoint in bfloat16 with random weights. ``score`` reads one twice, in float32
(the very same numbers) and in bfloat16, and runs every sequence of ``{"tokens": [[...]], "starts":
[...]}`` through both without a cache; of each token from `starts` on it stores, as one array over
all sequences:

``best``, ``best_bf16``
    the token with the largest logit in float32, and in bfloat16.
``gap``, ``gap_bf16``
    how far below the best the float32 logit of the token is, and that of `best_bf16`.
``logprob``, ``logprob_bf16``
    of the token, in float32 and in bfloat16.
``noise``
    the largest distance of a bfloat16 logit from the float32 one, over the vocabulary.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def make(config: Path, folder: Path) -> None:
    """Writes a checkpoint of random weights, the same on every machine of one torch version."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    model.to(torch.bfloat16).save_pretrained(folder)


def _facts(chosen: torch.Tensor, exact: torch.Tensor, bf16: torch.Tensor) -> dict[str, Any]:
    """Of tokens `[T]`, from logits `[T, V]` in float32."""

    def of(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, tokens[:, None])[:, 0]

    top, best = exact.max(-1)
    best_bf16 = bf16.argmax(-1)
    return {
        "best": best,
        "best_bf16": best_bf16,
        "gap": top - of(exact, chosen),
        "gap_bf16": top - of(exact, best_bf16),
        "logprob": of(exact, chosen) - exact.logsumexp(-1),
        "logprob_bf16": of(bf16, chosen) - bf16.logsumexp(-1),
        "noise": (bf16 - exact).abs().amax(-1),
    }


def score(folder: Path, tokens: Path, out: Path) -> None:
    """Writes the facts of all tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # No TF32: float32 is the judge.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact, bf16 = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    work = json.loads(tokens.read_text())
    found: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for ids, start in zip(work["tokens"], work["starts"], strict=True):
            row = torch.tensor([ids], device=device)
            logits = [model(row).logits[0, start - 1 : -1].float() for model in (exact, bf16)]
            for key, values in _facts(row[0, start:], *logits).items():
                found.setdefault(key, []).append(values.cpu().numpy())
    np.savez(out, **{key: np.concatenate(parts) for key, parts in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines.hf_logits")
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write a checkpoint of random weights")
    maker.add_argument("config", type=Path, help="a config.json")
    maker.add_argument("folder", type=Path)
    scorer = commands.add_parser("score", help="judge tokens")
    scorer.add_argument("folder", type=Path, help="the checkpoint")
    scorer.add_argument("tokens", type=Path, help="JSON with `tokens` and `starts`")
    scorer.add_argument("out", type=Path, help="npz to write")
    args = parser.parse_args()
    if args.command == "make":
        make(args.config, args.folder)
    else:
        score(args.folder, args.tokens, args.out)


if __name__ == "__main__":
    main()
