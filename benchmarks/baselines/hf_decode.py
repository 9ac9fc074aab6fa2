"""How long does Hugging Face transformers take for one decode step?

Runs in a process of its own: it imports torch and never JAX, so nothing of jpd's engine::

    python -m benchmarks.baselines.hf_decode --model llama2-7b \
        --case 1:512:eager 1:512:static_compile 8:1024:eager --json hf.json

All cases share one model with random weights, made on the device. Implementations:

``eager``
    `DynamicCache` and SDPA attention: what `generate` does by default, without what it does around
    the model (stopping criteria, logits processors, a growing attention mask), which would only
    add to the time.
``static_compile``
    `StaticCache` and one compiled decode function, the documented recipe for fast decoding:
    ``torch.compile(..., mode="reduce-overhead", fullgraph=True)``, so each step is one CUDA graph.
    Mask and greedy choice are inside the graph. Each case compiles for its own static shapes.
``static_compile_max_autotune``
    The same with ``mode="max-autotune"``: minutes of compilation, sometimes faster products.

Steps are queued without waiting for the previous token, so Python may run ahead of the device;
`ms` is the median distance between the ends of consecutive steps on the device (CUDA events),
`wall_ms` the host's clock over a whole run divided by its steps. `compile_s` is the host's time for
the first steps of the case, compilation included.

Every case is checked before it is timed: logits after a few cached steps against one pass over the
same tokens without a cache, in float32 with the same weights (`rel_err`). In bfloat16 the cached
steps may be `MAX_ERROR_RATIO` times as far from it as a bfloat16 pass without a cache is.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.models import MODELS, case_name, decode_cost
from benchmarks.report import Report
from benchmarks.rows import NOT_REACHED, failed_row, make_row
from benchmarks.rows import write as write_file

if TYPE_CHECKING:
    import torch

COMPILE_MODE = {
    "eager": None,
    "static_compile": "reduce-overhead",
    "static_compile_max_autotune": "max-autotune",
}
# Steps before the clock starts. The first compiles, the second records the CUDA graph.
WARMUP = 4
# Relative error of float32 logits that still counts as the same function.
MAX_FLOAT32_ERROR = 1e-4
# bfloat16 alone puts the logits of 32 random layers some percent off, so its error is measured too.
MAX_ERROR_RATIO = 2.0


class Case(NamedTuple):
    """One measurement: `batch` sequences that attend to `context` tokens each."""

    batch: int
    context: int
    impl: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads BATCH:CONTEXT:IMPL."""
        try:
            batch, context, impl = text.split(":")
            case = cls(int(batch), int(context), impl)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not BATCH:CONTEXT:IMPL: {text!r}") from None
        if case.batch < 1 or case.context < 1 or case.impl not in COMPILE_MODE:
            raise argparse.ArgumentTypeError(
                f"BATCH and CONTEXT must be positive, IMPL one of {', '.join(COMPILE_MODE)}: "
                f"{text!r}"
            )
        return case


class Clock:
    """Marks moments on the device's time line; on a CPU, on the host's."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._cuda = torch.cuda if device.type == "cuda" else None
        self._marks: list[Any] = []

    def wait(self) -> None:
        """Waits until everything queued on the device is done."""
        if self._cuda is not None:
            self._cuda.synchronize()

    def mark(self) -> None:
        if self._cuda is None:
            self._marks.append(time.perf_counter())
        else:
            event = self._cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)

    def gaps_ms(self) -> list[float]:
        """Times between consecutive marks; forgets the marks."""
        self.wait()
        marks, self._marks = self._marks, []
        pairs = list(itertools.pairwise(marks))
        if self._cuda is None:
            return [(b - a) * 1e3 for a, b in pairs]
        return [a.elapsed_time(b) for a, b in pairs]


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of this shape with random weights, made on the device, ready for inference."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name])
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    wrong = {str(p.dtype) for p in model.parameters() if p.dtype != dtype}
    wrong |= {str(p.device) for p in model.parameters() if p.device.type != device.type}
    if wrong:
        raise RuntimeError(f"weights should be {dtype} on {device}, some are {sorted(wrong)}")
    return model


def make_step(model: Any, cache: Any, mode: str | None) -> Callable[[Any], tuple[Any, Any]]:
    """The decode step: tokens `[B, 1]` → (greedy next tokens `[B, 1]`, logits `[B, V]`)."""
    import torch

    def decode(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1]
        return logits.argmax(-1, keepdim=True), logits

    if mode is None:
        return decode
    # Static shapes only: a second batch size would otherwise switch to slower dynamic shapes.
    compiled = torch.compile(decode, mode=mode, fullgraph=True, dynamic=False)

    def step(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The graph's outputs live in memory that its next replay overwrites: pass a copy in.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(tokens.clone())

    return step


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """`||got - want|| / ||want||`."""
    return ((got - want).norm() / want.norm()).item()


def measure(
    model: Any, case: Case, *, tokens: int, repeats: int, max_cache_len: int
) -> dict[str, Any]:
    """Checks and times one case.

    Returns:
        Keyword arguments for :func:`benchmarks.rows.make_row`.

    Raises:
        RuntimeError: the logits differ from those of a float32 pass without a cache.
    """
    import torch
    from transformers import DynamicCache, StaticCache

    device, dtype = model.device, str(model.dtype).removeprefix("torch.")
    # The timed steps attend to context - tokens/2 + 1 … context + tokens/2 tokens.
    prompt_len = case.context - tokens // 2 - WARMUP
    shape = (case.batch, prompt_len + WARMUP)
    prompt = torch.randint(0, model.config.vocab_size, shape, device=device)
    mode = COMPILE_MODE[case.impl]
    # One cache object per case: a compiled step is bound to its buffers.
    if mode is None:
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=max_cache_len)
    step = make_step(model, cache, mode)
    clock = Clock(device)

    def prefill() -> torch.Tensor:
        """Fills the cache with the prompt (never compiled); returns the next tokens `[B, 1]`."""
        if mode is not None:
            cache.reset()
        elif cache.get_seq_length():
            cache.crop(-cache.get_seq_length())
        out = model(
            input_ids=prompt[:, :prompt_len],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def whole(model: Any) -> torch.Tensor:
        """Logits after the last token of the prompt, from one pass without a cache."""
        return model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits[:, -1].float()

    reference = whole(copy.deepcopy(model).float())

    limit = MAX_FLOAT32_ERROR
    if dtype != "float32":
        limit = MAX_ERROR_RATIO * relative_error(whole(model), reference)
    prefill()
    clock.wait()
    start = time.perf_counter()
    for i in range(WARMUP):
        _, logits = step(prompt[:, prompt_len + i : prompt_len + i + 1])
    error = relative_error(logits.float(), reference)
    first_steps_s = time.perf_counter() - start
    if not error <= limit:  # written so that NaN fails
        raise RuntimeError(f"logits differ: relative error {error:.2e} > {limit:.2e}")
    del reference, logits

    times_ms: list[float] = []
    walls_ms: list[float] = []
    for _ in range(repeats):
        token = prefill()
        for _ in range(WARMUP):
            token, _ = step(token)
        clock.wait()
        start = time.perf_counter()
        clock.mark()
        for _ in range(tokens):
            token, _ = step(token)
            clock.mark()
        clock.wait()
        walls_ms.append((time.perf_counter() - start) * 1e3 / tokens)
        times_ms += clock.gaps_ms()
    result = {
        "samples": times_ms,
        "unit": "ms",
        "rel_err": error,
        "wall_ms": statistics.median(walls_ms),
    }
    if mode is not None:
        result |= {"compile_s": first_steps_s, "max_cache_len": max_cache_len}
    return result


def run_cases(args: argparse.Namespace, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """Measures all cases; calls `write` with all rows after each, unreached ones as failed."""
    rows = []
    for case in args.case:
        name = case_name(args.model, case.batch, case.context)
        rows.append(failed_row(name, f"hf_{case.impl}", NOT_REACHED))

    def record(index: int, row: dict[str, Any]) -> None:
        rows[index] = row
        write(rows)

    write(rows)
    try:
        import torch

        device, dtype = torch.device(args.device), getattr(torch, args.dtype)
        model = build_model(args.model, device, dtype)
    except Exception as error:  # without a model every case has failed, for this reason
        for index, row in enumerate(rows):
            record(index, failed_row(row["case"], row["impl"], error))
        return
    for index, case in enumerate(args.case):
        name, impl = rows[index]["case"], rows[index]["impl"]
        try:
            # generate() runs under no_grad too; a graph kept for gradients would keep every cache.
            with torch.no_grad():
                result = measure(
                    model,
                    case,
                    tokens=args.tokens,
                    repeats=args.repeats,
                    max_cache_len=args.max_cache_len or default_cache_len(case, args.tokens),
                )
            cost = decode_cost(
                MODELS[args.model], case.batch, case.context, bytes_per_value=dtype.itemsize
            )
            record(index, make_row(name, impl, nbytes=cost.nbytes, flops=cost.flops, **result))
        except Exception as error:  # one case out of memory must not cost the others
            record(index, failed_row(name, impl, error))
        # Compiled code and its graphs hold the old cache: let go of both before the next case.
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def longest_sequence(case: Case, tokens: int) -> int:
    """Tokens that the last timed step of the case attends to."""
    return case.context + tokens - tokens // 2


def default_cache_len(case: Case, tokens: int) -> int:
    """Length of the static cache: the longest sequence of the case, rounded up to 16 tokens."""
    return -(-longest_sequence(case, tokens) // 16) * 16


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines.hf_decode",
        description="Time one decode step of Hugging Face transformers.",
    )
    parser.add_argument("--model", choices=MODELS, default="llama2-7b")
    parser.add_argument(
        "--case",
        nargs="+",
        type=Case.parse,
        metavar="BATCH:CONTEXT:IMPL",
        help=f"cases to run on one model; IMPL is one of {', '.join(COMPILE_MODE)}",
    )
    parser.add_argument("--batch", type=int, help="of a single case [1]")
    parser.add_argument("--context", type=int, help="of a single case, tokens [512]")
    parser.add_argument("--impl", choices=COMPILE_MODE, help="of a single case [eager]")
    parser.add_argument("--tokens", type=int, default=32, help="timed steps per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--max-cache-len",
        type=int,
        metavar="TOKENS",
        help="of the static cache [longest sequence of the case, rounded up to 16]",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    single = (args.batch, args.context, args.impl)
    if args.case is None:
        args.case = [Case.parse(f"{args.batch or 1}:{args.context or 512}:{args.impl or 'eager'}")]
    elif any(value is not None for value in single):
        parser.error("--case replaces --batch, --context and --impl: give one or the other")
    if args.tokens < 1 or args.repeats < 1:
        parser.error(
            f"--tokens and --repeats must be at least 1, got {args.tokens}, {args.repeats}"
        )
    longest = MODELS[args.model]["max_position_embeddings"]
    for case in args.case:
        first, last = args.tokens // 2 + WARMUP + 1, longest - args.tokens
        if not first <= case.context <= last:
            parser.error(f"context must be in {first}..{last}, got {case.context}")
        needed = longest_sequence(case, args.tokens)
        if args.max_cache_len is not None and args.max_cache_len < needed:
            parser.error(f"--max-cache-len must be at least {needed}, got {args.max_cache_len}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    report = Report("hf_decode", f"How long is one decode step of {args.model} in transformers?")

    def write(rows: list[dict[str, Any]]) -> None:
        report.rows = rows
        if args.json is not None:
            write_file(report.document(), args.json)

    run_cases(args, write)
    report.show()
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
