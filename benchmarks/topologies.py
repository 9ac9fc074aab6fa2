"""The engines that the semi-PD benchmarks compare: one model and its sizes, several topologies.

All of them get the same weights, step shapes and number of KV pages, so they differ in who computes
what alone. An engine that a benchmark compares with others runs in a process of its own
(`EngineProcess`): when it ends, all of the device's memory is free for the next one.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from benchmarks.dummy import dummy_folder
from jpd.config import EngineConfig
from jpd.engine.build import Engine
from jpd.semi_pd import build as semi_pd_build

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "chunked": {"prefill_policy": "mixed"},
    "prefill_first": {"prefill_policy": "first"},
    "semi_pd": {"topology": "semi_pd"},
    "auto": {"topology": "auto"},
    "time_slices": {"topology": "semi_pd", "semi_pd": {"sm_shares": False}},
    "disaggregated": {"topology": "disaggregated"},
}
"""Options of each engine. The first two are vLLM's two policies on one executor. `auto` has the
executors of `semi_pd`, of which one may serve both phases. `time_slices` has two executors without
MPS (without pinned CPUs where there is no GPU), `disaggregated` one on each of two GPUs."""

SIZES: dict[str, dict[str, Any]] = {
    "llama31-8b": {
        "max_model_len": 8192,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "num_pages": 24_576,  # 48 GiB
        "batch_buckets": (8, 32, 64, 128, 256),
        "token_buckets": (512, 2048),
        "context_buckets": (2048, 8192),
    },
    # On a CPU. In float32, so that tokens do not depend on what else is in a step.
    "tiny": {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "num_pages": 8 * 32 + 1,
        "batch_buckets": (8,),
        "token_buckets": (128,),
        "context_buckets": (512,),
    },
}
"""Sizes of the engines for each model."""
SHORT: dict[str, dict[str, Any]] = {
    "llama31-8b": {
        "max_model_len": 2048,
        "max_num_seqs": 128,
        "num_pages": 16_384,  # 32 GiB
        "batch_buckets": (32, 128),
        "context_buckets": (2048,),
    },
    "tiny": {},
}
"""What differs where few step shapes are enough: they are compiled for each SM share anew."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` and `--num-pages`; `sizes` reads them."""
    parser.add_argument("--model", choices=[*SIZES], help="[llama31-8b; tiny with --quick]")
    parser.add_argument("--num-pages", type=int, help="KV pages of every engine [by the model]")


def sizes(args: argparse.Namespace, *, short: bool = False) -> tuple[str, dict[str, Any]]:
    """Model and engine sizes that the command line asks for; changed by `SHORT` if `short`."""
    model = args.model or ("tiny" if args.quick else "llama31-8b")
    chosen = SIZES[model] | (SHORT[model] if short else {})
    return model, chosen if args.num_pages is None else chosen | {"num_pages": args.num_pages}


def on_gpu(env: Mapping[str, Any]) -> bool:
    """Whether engines run on a GPU, by a report's `env`; nothing is started to find out."""
    return env["gpu"] is not None and not os.environ.get("JAX_PLATFORMS", "").startswith("cpu")


@functools.cache
def model_folder(model: str) -> str:
    """A folder with nothing but the model's `config.json`; it goes with this process."""
    folder = str(dummy_folder(model))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def can_switch(topology: str) -> bool:
    """Whether its executors have shares."""
    chosen = TOPOLOGIES[topology]
    return chosen.get("topology") in ("semi_pd", "auto") and "semi_pd" not in chosen


def engine_args(model: str, topology: str, **changes: Any) -> dict[str, Any]:
    """Arguments of `jpd.LLM` for an engine with random weights that serves token ids.

    Args:
        model: an entry of `benchmarks.models.MODELS`.
        topology: an entry of `TOPOLOGIES`.
        **changes: sizes and other engine options; `semi_pd` adds to the topology's own.
    """
    chosen = TOPOLOGIES[topology]
    group = chosen.get("semi_pd", {}) | changes.pop("semi_pd", {})
    return {
        "model": model_folder(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "show_progress": False,
        **chosen,
        **({"semi_pd": group} if group else {}),
        **changes,
    }


def build(**args: Any) -> Engine:
    """An engine in this process."""
    return semi_pd_build.build(EngineConfig.from_kwargs(**args))


# --- engines in processes of their own -------------------------------------------------------

_engine: Any = None
"""In the child: what `make` gave."""


def _start(make: Callable[..., Any], args: dict[str, Any], env: dict[str, str]) -> None:
    global _engine

    def follow_the_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_the_parent, daemon=True).start()
    os.environ |= env
    _engine = make(**args)


def _close(engine: Any) -> None:
    (engine.coordinator if isinstance(engine, Engine) else engine).close()


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(_engine, *args)


class EngineProcess:
    """An engine in a process of its own, and calls of functions there.

    Args:
        make: builds the engine, such as `build` or `jpd.AsyncLLM`.
        args: its keywords.
        env: environment variables, set before JAX starts.
    """

    def __init__(self, make: Callable[..., Any], args: dict[str, Any], **env: str) -> None:
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _start, (make, args, env)
        )

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(engine, *args)` in the process; both ways as pickles.

        Raises:
            BrokenProcessPool: the engine could not be built, or its process ended.
        """
        return self._pool.submit(_call, function, args).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the engine and ends the process."""
        try:
            self.call(_close)
        except BrokenProcessPool:
            pass  # whoever called it last was told
        finally:
            self._pool.shutdown()
