"""Serves the model in the box to several prompts at once, as `make demo` shows it.

    python -m jpd.demo [MODEL]

Fewer sequences run at once than there are prompts, so that a waiting one is seen to start when
another ends. On the CPU, unless JAX_PLATFORMS names something else.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jpd import RequestOutput, SamplingParams, box
from jpd.console import LinePrinter
from jpd.errors import JpdError

if TYPE_CHECKING:
    from jpd import AsyncLLM

PROMPTS = (
    ("It was a bright morning, and Elizabeth", 192),
    ("The captain looked at the sea, and", 128),
    (
        '"My dear sister," said Elizabeth, as they walked together through the park, "I have had a '
        "letter from London this morning, and I hardly know how to tell you what is in it. You "
        'must promise me that you will not be angry."',
        256,
    ),
    ("Alice", 64),
    ("It is a truth universally acknowledged, that", 160),
    (
        "The white whale rose out of the water before them. Every man in the boat pulled at his "
        "oar, and no one spoke, for they all knew what",
        192,
    ),
)
"""Prompts and the tokens that each may generate."""

ENGINE = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "max_model_len": 512,
    "num_pages": 130,
    # Three step shapes, so that compiling takes seconds.
    "batch_buckets": (4,),
    "token_buckets": (128,),
    "context_buckets": (512,),
    # Prefill and decode each in a process of its own, on one copy of weights and KV pages.
    "topology": "semi_pd",
}


class _Lines:
    """Shows continuous batching in a file or pipe."""

    def __init__(self) -> None:
        self._printer = LinePrinter()
        self._shown = [-1] * len(PROMPTS)

    def update(self, i: int, output: RequestOutput) -> None:
        """Prints what is new in request `i`."""
        label, completion = f"[{i}]", output.outputs[0]
        if self._shown[i] < 0:
            self._printer.write(label, PROMPTS[i][0])
            self._shown[i] = 0
        self._printer.write(label, completion.text[self._shown[i] :])
        self._shown[i] = len(completion.text)
        if output.finished:
            self._printer.end(label, completion.finish_reason)


class _Panel:
    """Shows continuous batching on a terminal: one line for each request."""

    def __init__(self) -> None:
        self._outputs: dict[int, RequestOutput] = {}

    def update(self, i: int, output: RequestOutput) -> None:
        """Takes the new state of request `i`."""
        self._outputs[i] = output

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 1))
        room = max(options.max_width - 24, 8)
        for i, (prompt, _) in enumerate(PROMPTS):
            output = self._outputs.get(i)
            if output is None:
                table.add_row(f"[{i}]", Text("waits", "yellow"), "", Text(prompt[:room], "dim"))
                continue
            state = Text("done", "dim") if output.finished else Text("writes", "green")
            completion = output.outputs[0]
            tail = (prompt + completion.text).replace("\n", " ")[-room:]
            table.add_row(f"[{i}]", state, f"{len(completion.token_ids)} tok", Text(tail))
        yield table

    def print_texts(self, console: Console) -> None:
        """Prints every text in full."""
        for i, (prompt, _) in enumerate(PROMPTS):
            text = Text(f"[{i}] ").append(prompt, "dim").append(self._outputs[i].outputs[0].text)
            console.print(text, end="\n\n")


async def _answer_all(
    llm: AsyncLLM, update: Callable[[int, RequestOutput], None]
) -> list[RequestOutput]:
    """Sends all prompts at once; returns their last outputs."""

    async def answer(i: int) -> RequestOutput:
        prompt, max_tokens = PROMPTS[i]
        params = SamplingParams(temperature=0.7, seed=i, max_tokens=max_tokens)
        async for output in llm.generate(prompt, params):
            update(i, output)
        return output

    return await asyncio.gather(*(answer(i) for i in range(len(PROMPTS))))


def _print_table(console: Console, outputs: list[RequestOutput], seconds: float) -> None:
    table = Table(title="What each request took", title_justify="left")
    columns = ("request", "prompt tokens", "generated tokens", "TTFT ms", "TPOT ms", "finish")
    for column in columns:
        table.add_column(column, justify="right")
    for i, output in enumerate(outputs):
        metrics = output.metrics
        tpot = "-" if metrics.tpot_s is None else f"{1e3 * metrics.tpot_s:.1f}"
        table.add_row(
            f"[{i}]",
            str(len(output.prompt_token_ids)),
            str(metrics.num_generated_tokens),
            f"{1e3 * metrics.ttft_s:.1f}",
            tpot,
            output.outputs[0].finish_reason,
        )
    console.print(table)
    total = sum(output.metrics.num_generated_tokens for output in outputs)
    print(
        f"{total} tokens in {seconds:.2f} s: {total / seconds:.1f} tokens/s, "
        f"{ENGINE['max_num_seqs']} sequences at a time"
    )


def _print_processes(llm: AsyncLLM) -> None:
    phases = [f"{e.phase} in process {e.pid}, CPUs: {e.units}" for e in llm.executors]
    print(f"One copy of weights and KV pages; {'; '.join(phases)}.", flush=True)


def run(model: str) -> None:
    """Builds the engine, shows the answers, prints the table."""
    from jpd import AsyncLLM

    console = Console()
    print(f"Loading {model} and compiling its steps (kept for the next time).", flush=True)
    # Under MPS all is Pallas kernels, and none of them takes the demo's float32.
    on_cpu = os.environ["JAX_PLATFORMS"].startswith("cpu")
    llm = AsyncLLM(model, **ENGINE, semi_pd={"sm_shares": on_cpu})
    _print_processes(llm)
    try:
        start = time.perf_counter()
        if console.is_terminal:
            panel = _Panel()
            with Live(panel, console=console, refresh_per_second=12, transient=True):
                outputs = asyncio.run(_answer_all(llm, panel.update))
        else:
            outputs = asyncio.run(_answer_all(llm, _Lines().update))
        seconds = time.perf_counter() - start
    finally:
        llm.close()
    if console.is_terminal:
        panel.print_texts(console)
    _print_table(console, outputs, seconds)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; the return value is the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        print("usage: python -m jpd.demo [MODEL]", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before the engine imports jax
    try:
        run(argv[0] if argv else box.check_packaged_model())
    except JpdError as error:
        print(f"jpd.demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
