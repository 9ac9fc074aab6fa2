"""Are the tokens of whole models on the kernels those of Hugging Face transformers, in bfloat16?

Greedy tokens of an engine in bfloat16 (on a GPU with `kernels.pallas_only`) for prompts of many
lengths at once, so that prefill, chunks, mixed steps and batched decode all take part. transformers
judges them afterwards: it runs prompt and output through the same weights in float32 and, to know
what bfloat16 alone costs, in bfloat16 (`benchmarks/baselines/hf_logits.py`).

Models: the one in the box, which is trained, on its own corpus, so that its margins are real; and
of each family one with random weights, heads of 128 and the group sizes of published models.

`top1_agreement` is the part of the tokens that float32 would choose too after the same text, and
`hf_bf16_top1_agreement` that of transformers' own bfloat16. Two choices may differ where two logits
are nearly equal: a token is wrong (`wrong_tokens`, must be 0) if its float32 logit is farther below
the best than rounding explains, twice the largest error of transformers' bfloat16 logits there.
`logprob_rms` is the root mean square error of the log-probabilities that the engine reports, and
`hf_bf16_logprob_rms` that of transformers' bfloat16; a model fails beyond `MAX_RATIO` of it.

Nothing is timed: with `--at-once` several models run side by side, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import MODELS
from benchmarks.report import Report, add_arguments

MAX_RATIO = 1.25
BOX = "box"
# Twice the usual range: logits of random weights are then farther apart.
_BASE: dict[str, Any] = MODELS["small"] | {"head_dim": 128, "initializer_range": 0.04}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama 8/8": _BASE | {"model_type": "llama", "num_key_value_heads": 8},
    "llama 8/2": _BASE | {"model_type": "llama", "rope_theta": 500000.0},
    "mistral 8/2, window 128": _BASE | {"model_type": "mistral", "sliding_window": 128},
    "qwen2 7/1": _BASE
    | {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
    },
    "qwen3 8/1": _BASE | {"model_type": "qwen3", "num_key_value_heads": 1},
}
PROMPTS, LONGEST_PROMPT, NEW_TOKENS = 48, 700, 32


def hugging_face(*args: object) -> None:
    """Runs `benchmarks.baselines.hf_logits` in a process of its own.

    Raises:
        RuntimeError: it failed; with the last line that it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.baselines.hf_logits", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exited with {done.returncode}"]
        raise RuntimeError(f"hf_logits {args[0]}: {lines[-1]}")


def prompts_of(model: str, vocab_size: int, tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of many lengths: pieces of the corpus for the model in the box, else random."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, LONGEST_PROMPT, count)
    if model != BOX:
        return [random.integers(0, vocab_size, n).tolist() for n in lengths]
    from jpd.box import corpus

    chapter = corpus.chapters(Path(corpus.__file__).parent / "text")[0]
    ids = tokenizer.encode(chapter)
    starts = random.integers(0, len(ids) - LONGEST_PROMPT, count)
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def generate(model: str, folder: Path, count: int, *, on_gpu: bool) -> tuple[list, list, list]:
    """Prompts, greedy outputs and their log-probabilities."""
    import jpd

    llm = jpd.LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=model != BOX,
        max_model_len=LONGEST_PROMPT + NEW_TOKENS,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        batch_buckets=(16,),
        token_buckets=(512,),
        num_pages=1024,
        kernels={"pallas_only": on_gpu},
    )
    try:
        prompts = prompts_of(model, llm.model_config.vocab_size, llm.tokenizer, count)
        params = jpd.SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=NEW_TOKENS, logprobs=1
        )
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    finally:
        llm.close()
    best = [output.outputs[0] for output in outputs]
    tokens = [list(map(int, b.token_ids)) for b in best]
    logprobs = [
        float(step[token].logprob)
        for b, ids in zip(best, tokens, strict=True)
        for token, step in zip(ids, b.logprobs, strict=True)
    ]
    return prompts, tokens, logprobs


def judge(logprobs: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Fields of a model's row, see the module.

    Args:
        logprobs: of the engine's tokens, as it reported them.
        scores: of the same tokens, from `hf_logits score`.
    """

    def rms(values: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(values))))

    return {
        "tokens": len(logprobs),
        "top1_agreement": float(np.mean(scores["gap"] == 0)),
        "hf_bf16_top1_agreement": float(np.mean(scores["gap_bf16"] == 0)),
        "wrong_tokens": int(np.sum(scores["gap"] > 2 * scores["noise"])),
        "median_noise": float(np.median(scores["noise"])),
        "logprob_rms": rms(logprobs - scores["logprob"]),
        "hf_bf16_logprob_rms": rms(scores["logprob_bf16"] - scores["logprob"]),
    }


def complaint(fields: dict[str, Any]) -> str | None:
    """Why a model's row is a failed one."""
    if fields["wrong_tokens"]:
        return f"{fields['wrong_tokens']} of {fields['tokens']} tokens are wrong"
    limit = MAX_RATIO * fields["hf_bf16_logprob_rms"]
    if not fields["logprob_rms"] <= limit:
        return f"log-probabilities are off by {fields['logprob_rms']:.3g}, more than {limit:.3g}"
    return None


def run_model(model: str, count: int, on_gpu: bool) -> tuple[dict[str, Any], float]:
    """Fields of one model's row, and the seconds that it took."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fields = judged(model, Path(folder), count, on_gpu=on_gpu)
    return fields, time.perf_counter() - began


def judged(model: str, work: Path, count: int, *, on_gpu: bool) -> dict[str, Any]:
    """Generates with the engine and has transformers judge: fields of the model's row.

    Args:
        model: its name.
        work: an empty folder.
        count: of prompts.
        on_gpu: on the kernels alone.
    """
    import jpd

    if model == BOX:
        folder = jpd.box.path()
    else:
        folder, config = work / "model", work / "config.json"
        config.write_text(json.dumps(CONFIGS[model]))
        hugging_face("make", config, folder)
    prompts, tokens, logprobs = generate(model, folder, count, on_gpu=on_gpu)
    file, scores = work / "tokens.json", work / "scores.npz"
    file.write_text(
        json.dumps(
            {
                "tokens": [p + t for p, t in zip(prompts, tokens, strict=True)],
                "starts": [len(p) for p in prompts],
            }
        )
    )
    hugging_face("score", folder, file, scores)
    with np.load(scores) as stored:
        return judge(np.array(logprobs), dict(stored))


def add_row(report: Report, model: str, done: Future[tuple[dict[str, Any], float]]) -> None:
    """Adds the row of a model that was judged, or that could not be."""
    try:
        fields, seconds = done.result()
    except Exception as error:  # one model must not cost the others
        report.fail(model, "jpd", error)
    else:
        reason = complaint(fields)
        if reason is None:
            report.add(model, "jpd", **fields)
        else:
            report.fail(model, "jpd", reason, **fields)
        print(f"{model}: {seconds:.0f} s")
    print(f"{model}: {report.rows[-1]['status']}", flush=True)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary's numbers from all rows that were judged."""
    judged = [row for row in rows if row.get("tokens")]
    if not judged:
        return {}
    tokens = sum(row["tokens"] for row in judged)

    def agreement(key: str) -> float:
        return sum(row[key] * row["tokens"] for row in judged) / tokens

    return {
        "models": len(judged),
        "tokens": tokens,
        "top1_agreement": agreement("top1_agreement"),
        "hf_bf16_top1_agreement": agreement("hf_bf16_top1_agreement"),
        "wrong_tokens": sum(row["wrong_tokens"] for row in judged),
        "logprob_rms_ratio_max": max(
            row["logprob_rms"] / row["hf_bf16_logprob_rms"] for row in judged
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hf_parity")
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=[BOX, *CONFIGS], help="[all]")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="models [%(default)s]")
    args = parser.parse_args()
    if args.at_once < 1:
        parser.error(f"--at-once must be 1 or more, got {args.at_once}")
    # Models share a GPU, and the judge runs on it too, in a process of its own.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report = Report(
        "hf_parity",
        "Are the tokens of whole models on the kernels those of Hugging Face, in bfloat16?",
        out=args.out,
    )
    report.summarise = summarise
    models = args.models or ([BOX] if args.quick else [BOX, *CONFIGS])
    report.expect([(model, "jpd") for model in models])
    count, on_gpu = 4 if args.quick else PROMPTS, report.env["gpu"] is not None
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.at_once, processes, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_model, model, count, on_gpu): model for model in models}
        for done in as_completed(running):
            add_row(report, running[done], done)
            report.save()
    report.finish()
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()
