"""Programs of kernels that other processes lower.

Mosaic takes seconds to lower a kernel, in Python and in one thread of a process (jax 0.11 keeps
state in globals). So several processes do it (`benchmarks.lowering_worker`), on CPUs and for a GPU
that they need not see, while the baselines run and while this process compiles and measures. They
give back what `jax.export` writes. A folder keeps it for the next run, under names that hold for
the same kernels, versions and GPU only.

A chain that can be lowered elsewhere is a `functools.partial` of a function that any process can
import, with arguments that are pickled and printed whole.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import queue
import sys
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jpd.child import Child, spawn

WORKER = "benchmarks.lowering_worker"
PATIENCE_S = 300
"""Longest time for one program."""
MOST_PROCESSES = 16
IN_PLACE = ("xla", "jax_triton")
"""Implementations whose programs are lowered where they run: in no time; Triton's needs a GPU."""
SOURCES = {
    "benchmarks": (
        "__init__.py",
        "attention_cases.py",
        "attention_chains.py",
        "device_time.py",
        "gemm_cases.py",
        "gemm_chains.py",
        "gemm_impls.py",
        "lowered.py",
        "lowering_worker.py",
    ),
    "jpd/ops": ("**/*.py",),
    "pallas_kernels": ("**/*.py", "**/*.json"),
}
"""What programs are made by, tuned tables too."""
_ROOT = Path(__file__).parents[1]
_AWAY = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""Variables that keep a process off the GPUs."""
_NOT_LOWERING = ("CACHE", "PLATFORM", "LOG", "DEBUG")
"""Parts of names of jax's variables that do not change a program."""

Chains = Mapping[Any, functools.partial[Any]]
"""By (..., implementation), what makes each chain (`benchmarks.device_time.Chain`)."""


class Gpu(NamedTuple):
    """What programs of kernels depend on of a GPU."""

    kind: str
    """As the driver and jax name it, "NVIDIA H200"."""
    sms: int
    """SMs that the process may use."""

    @classmethod
    def parse(cls, text: str) -> Gpu:
        """Reads KIND:SMS, for `argparse`.

        Raises:
            ArgumentTypeError: it is something else.
        """
        kind, _, sms = text.rpartition(":")
        if not kind or not sms.isdecimal() or not int(sms):
            raise argparse.ArgumentTypeError(f"{text!r} is not like 'NVIDIA H200:132'")
        return cls(kind, int(sms))

    @classmethod
    def of_driver(cls) -> Gpu | None:
        """The first GPU of this process, or None. Nothing is started on it: a baseline comes first.

        None too where JAX_PLATFORMS keeps jax off it.
        """
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
            return None
        try:
            cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
        device, sms, kind = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
        multiprocessors = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
            return None
        failed = cuda.cuDeviceGetName(kind, len(kind), device)
        failed |= cuda.cuDeviceGetAttribute(ctypes.byref(sms), multiprocessors, device)
        return None if failed else cls(kind.value.decode(), sms.value)


class LoweringProcessError(RuntimeError):
    """A process that was to lower a program ended, or did not answer."""


@functools.cache
def _code() -> str:
    """Hash of versions, settings and sources."""
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for package in ("jax", "jaxlib", "numpy"):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    for name, value in sorted(os.environ.items()):
        if name.startswith("JAX_") and not any(part in name for part in _NOT_LOWERING):
            digest.update(f"{name}={value}\n".encode())
    for folder, patterns in SOURCES.items():
        for file in sorted(f for pattern in patterns for f in (_ROOT / folder).glob(pattern)):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(_ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def module_name(chain: functools.partial[Any], gpu: Gpu) -> str:
    """Names a program by everything that decides it."""
    made_by = (chain.func.__module__, chain.func.__qualname__, chain.args, chain.keywords)
    return hashlib.sha256(f"{_code()} {gpu!r} {made_by!r}".encode()).hexdigest()


class Lowering:
    """Programs of kernels that other processes lower, in the order of `chains`.

    Use as a context manager; at its end the processes are gone, whatever they did.

    Args:
        chains: those of :data:`IN_PLACE` are left out.
        gpu: what the programs are for.
        folder: where modules are found and kept.
        processes: at most; by default one for every second CPU.
    """

    def __init__(
        self,
        chains: Chains,
        gpu: Gpu,
        *,
        folder: Path | None = None,
        processes: int | None = None,
    ) -> None:
        self.gpu, self._folder = gpu, folder
        self.modules: dict[Any, Future[bytes]] = {}
        """By the keys of `chains`: what `Chain.export` gave, or the error that it raised."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._closed = False
        self._children: list[Child] = []
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        missing = {}
        for key, chain in chains.items():
            if key[-1] in IN_PLACE:
                continue
            file = self._file(chain)
            if file is not None and file.exists():
                self.modules[key] = Future()
                self.modules[key].set_result(file.read_bytes())
            else:
                missing[key] = chain
        self.found = len(self.modules)
        """How many the folder had."""
        most = processes or max(1, (os.cpu_count() or 1) // 2)
        count = min(most, len(missing), MOST_PROCESSES)
        self._pool = ThreadPoolExecutor(max(1, count), thread_name_prefix="lowering")
        for _ in range(count):
            self._idle.put(self._start())
        for key, chain in missing.items():
            self.modules[key] = self._pool.submit(self._lower, key, chain)

    def __enter__(self) -> Lowering:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.process.kill()
        self._pool.shutdown()
        for child in self._children:
            child.kill()

    def modules_for(self, gpu: Gpu | None) -> dict[Any, Future[bytes]]:
        """:attr:`modules` if they are for this GPU; else none, which is said."""
        if gpu == self.gpu:
            return self.modules
        print(f"kernels were lowered in vain for {self.gpu}: jax runs on {gpu or 'a CPU'}")
        return {}

    def _file(self, chain: functools.partial[Any]) -> Path | None:
        return self._folder and self._folder / f"{module_name(chain, self.gpu)}.module"

    def _start(self) -> Child:
        child = spawn(WORKER, env=_AWAY)
        self._children.append(child)
        with contextlib.suppress(OSError):  # it is gone already: whoever asks it is told
            child.connection.send(self.gpu)
        return child

    def _lower(self, key: Any, chain: functools.partial[Any]) -> bytes:
        child = self._idle.get()
        try:
            child.connection.send(chain)
            if not child.connection.poll(PATIENCE_S):
                raise TimeoutError(f"no answer in {PATIENCE_S} s")
            answer = child.connection.recv()
        except (OSError, EOFError) as error:
            child.process.kill()
            why = str(error) if isinstance(error, TimeoutError) else f"exit {child.wait()}"
            if not self._closed:
                self._idle.put(self._start())
            message = f"the process that was to lower {key} failed: {why}"
            raise LoweringProcessError(message) from error
        except Exception:  # of pickling, before or after the process had a part in it
            self._idle.put(child)
            raise
        self._idle.put(child)
        if isinstance(answer, Exception):
            raise answer
        file = self._file(chain)
        if file is not None:  # whoever reads sees all of it or none
            draft = file.with_suffix(f".{uuid.uuid4().hex}")
            draft.write_bytes(answer)
            draft.replace(file)
        return answer
