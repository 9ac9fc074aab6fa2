"""The engines that the semi-PD benchmarks compare: one model and its sizes, several topologies.

All of them get the same weights, step shapes and number of KV pages, so they differ in who computes
what alone. An engine that a benchmark compares with others runs in a process of its own
(`EngineProcess`): when it ends, all of the device's memory is free for the next one.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Self

from benchmarks.dummy import dummy_folder
from benchmarks.stopping import end_on_sigterm
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
        "max_num_mixed_tokens": 2048,  # what implementations without a number in their name have
        "num_pages": 18_432,  # 36 GiB: a unified engine and one of semi-PD fit on an H200 together
        "batch_buckets": (16, 32, 48, 64, 96, 128, 256),
        "token_buckets": (256, 512, 1024, 2048),
        "context_buckets": (8192,),
        "kernels": {"pallas_only": True},
    },
    # For `--quick` on a GPU: kernels take no float32.
    "small": {
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "num_pages": 16 * 64 + 1,
        "batch_buckets": (16,),
        "token_buckets": (512,),
        "context_buckets": (1024,),
        "kernels": {"pallas_only": True},
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
"""Sizes of the engines for each model. The same for all benchmarks, and few step shapes: each is
compiled for every SM share once, and kept for whoever starts an engine on that machine later. Under
SM shares only jpd's kernels compute right numbers on a GPU, so the engines without shares have no
others either. Kernels read page tables as far as a context goes: one size of them is enough."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` and `--num-pages`; `sizes` reads them."""
    parser.add_argument(
        "--model", choices=[*SIZES], help="[llama31-8b; with --quick small on a GPU, tiny on a CPU]"
    )
    parser.add_argument("--num-pages", type=int, help="KV pages of every engine [by the model]")


def sizes(args: argparse.Namespace, env: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Model and engine sizes that the command line asks for.

    Args:
        args: with the options of `add_arguments`, and `quick`.
        env: a report's.
    """
    quick = "small" if on_gpu(env) else "tiny"
    model = args.model or (quick if args.quick else "llama31-8b")
    chosen = SIZES[model]
    return model, chosen if args.num_pages is None else chosen | {"num_pages": args.num_pages}


def typical_length(sizes: Mapping[str, Any]) -> int:
    """Most tokens of a request in benchmarks that are not about long ones."""
    return min(2048, sizes["max_model_len"])


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

_PATIENCE_S = 60.0
"""For an engine to end; then its process is ended."""


def _run(
    connection: Connection, make: Callable[..., Any], args: dict[str, Any], env: dict[str, str]
) -> None:
    """In the child: makes the engine, then answers calls until the parent hangs up."""
    end_on_sigterm()
    threading.Thread(target=_follow_the_parent, daemon=True).start()
    os.environ |= env
    engine = None
    try:
        engine = make(**args)
        connection.send((True, None))
        while True:
            function, values = connection.recv()
            _answer(connection, function, engine, *values)
    except EOFError:
        pass
    except Exception as error:  # of `make`
        traceback.print_exc()
        connection.send((False, _for_the_parent(error)))
    finally:
        if engine is not None:
            (engine.coordinator if isinstance(engine, Engine) else engine).close()


def _answer(connection: Connection, function: Callable[..., Any], *args: Any) -> None:
    try:
        connection.send((True, function(*args)))
    except Exception as error:  # also of an answer that cannot be pickled: nothing of it was sent
        traceback.print_exc()
        connection.send((False, _for_the_parent(error)))


def _for_the_parent(error: Exception) -> RuntimeError:
    """One that can be pickled, whatever it was."""
    return RuntimeError(f"{type(error).__name__}: {error}")


def _follow_the_parent() -> None:
    """Ends this process when its parent has died: in order if it can be."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_S)
    os._exit(1)


class EngineProcess:
    """An engine in a process of its own, and calls of functions there, as a context manager.

    The process ends in order, and with it whatever it started, when the block is left, when its
    parent dies and when it gets a SIGTERM.

    Args:
        make: builds the engine, such as `build` or `jpd.AsyncLLM`.
        args: its keywords.
        env: environment variables, set before JAX starts.
    """

    def __init__(self, make: Callable[..., Any], args: dict[str, Any], **env: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, make, args, env), daemon=True)
        self._theirs = theirs

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(engine, *args)` in the process; both ways as pickles.

        Raises:
            RuntimeError: it failed, or the process ended.
        """
        with contextlib.suppress(OSError):  # it may have said why it ended
            self._connection.send((function, args))
        return self._result()

    def _result(self) -> Any:
        try:
            ok, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_PATIENCE_S)
            raise RuntimeError(
                f"the engine's process ended, exit code {self._process.exitcode}"
            ) from error
        if not ok:
            raise answer
        return answer

    def begin(self) -> None:
        """Starts the process and does not wait for the engine."""
        self._process.start()
        self._theirs.close()

    def wait(self) -> None:
        """Until the engine of a process that was begun is ready.

        Raises:
            RuntimeError: it could not be built.
        """
        self._result()

    def __enter__(self) -> Self:
        """Begins and waits.

        Raises:
            RuntimeError: the engine could not be built.
        """
        self.begin()
        try:
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the engine and ends the process."""
        self._connection.close()
        for end in (None, self._process.terminate, self._process.kill):
            if end is not None:
                end()
            self._process.join(_PATIENCE_S)
            if self._process.exitcode is not None:
                return
