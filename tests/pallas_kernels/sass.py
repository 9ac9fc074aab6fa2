"""Compiles the kernels to an H200's machine code and fails if one spills registers; needs no GPU.

`python -m tests.pallas_kernels.sass [word ...]`, or `make sass`, which makes the environment that
it needs: see `tests/aot.py`. Only cases whose names contain all the words are compiled.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

PLACES = (
    "tests.pallas_kernels.test_gemv",
    "tests.pallas_kernels.test_flat_gemm",
    "tests.pallas_kernels.test_dense_gemm",
    "tests.pallas_kernels.test_dataflow",
    "pallas_kernels.decode_attention.shapes",
    "pallas_kernels.prefill_attention.shapes",
    "pallas_kernels.signal_gemm.shapes",
    "tests.pallas_kernels.test_rms_norm",
    "tests.pallas_kernels.test_rope_write",
)
"""Modules with a `sass_cases()`."""
MAX_WORKERS = 8


class Usage(NamedTuple):
    """What ptxas says of the Mosaic kernels of a program: the most of any of them."""

    registers: int
    spilled: int
    """Bytes of spill stores and loads."""


def cases() -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Name, function and argument shapes of what is compiled."""
    return [case for place in PLACES for case in importlib.import_module(place).sass_cases()]


def parse(text: str) -> Usage:
    """The registers and spills in what ptxas printed with `--verbose`.

    Raises:
      RuntimeError: it compiled no Mosaic kernel.
    """
    kernels = re.findall(
        r"Function properties for \w*mosaic_gpu_kernel\w*\s+\d+ bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\s.*?Used (\d+) registers",
        text,
        flags=re.DOTALL,
    )
    if not kernels:
        raise RuntimeError(f"ptxas compiled no Mosaic kernel: {text}")
    return Usage(
        registers=max(int(registers) for _, _, registers in kernels),
        spilled=max(int(stores) + int(loads) for stores, loads, _ in kernels),
    )


@contextlib.contextmanager
def captured() -> Iterator[Any]:
    """A file with what this process and its children print, C++ included."""
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)


def compile_case(index: int) -> Usage:
    """Compiles one of `cases()`."""
    from tests.aot import compile_for_h200

    _, function, args = cases()[index]
    with captured() as file:
        compile_for_h200(function, args)
        file.seek(0)
        return parse(file.read())


def main(words: list[str]) -> int:
    """Prints a line a case and what went wrong; the exit status."""
    # Before jax is imported, here and in the workers.
    os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    begin = time.perf_counter()
    chosen = [
        (i, name) for i, (name, _, _) in enumerate(cases()) if all(word in name for word in words)
    ]
    if not chosen:
        print(f"no case with {' '.join(words)} in its name")
        return 1
    failed: dict[str, str] = {}
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        results: list[tuple[str, Future[Usage]]] = [
            (name, pool.submit(compile_case, i)) for i, name in chosen
        ]
        print("registers  spilled bytes  case")
        for name, result in results:
            try:
                usage = result.result()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                print(f"{'-':>9}  {'-':>13}  {name}", flush=True)
                continue
            print(f"{usage.registers:9}  {usage.spilled:13}  {name}", flush=True)
            if usage.spilled:
                failed[name] = f"{usage.spilled} bytes spilled"
    print(f"\n{len(chosen)} cases, {len(failed)} failed, {time.perf_counter() - begin:.0f} s")
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
