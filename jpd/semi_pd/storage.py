"""The storage owner: a small process without JAX that holds weights and KV pages.

Executors map its blocks and come and go; the memory stays. It ends with its connection, and so with
the coordinator, whatever became of that; CUDA frees its blocks then. On a CPU a block is an
anonymous file that lives while anybody holds it (`native.memory`). Either way nothing is left.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jpd.child import Child, connect, spawn
from jpd.config import Dtype, LoadFormat
from jpd.errors import ConfigError, EngineDeadError
from jpd.semi_pd import loader
from jpd.semi_pd.layout import Layout
from native.memory import Block, Handle, allocate, memory_of, receive_handle, send_handle


@dataclass(frozen=True)
class Handles:
    """What an executor needs to map weights and KV pages; can be pickled, `fds` go beside it."""

    weights: Handle
    pages: Handle

    @property
    def fds(self) -> tuple[int, ...]:
        return (*self.weights.fds, *self.pages.fds)


class StorageOwner:
    """The coordinator's side of the storage owner. `start`, `load`, then `handles`."""

    def __init__(self, child: Child, device: str, env: Mapping[str, str]) -> None:
        self.device = device
        self._child = child
        self._env = env
        self._handles: list[Handle] = []
        self._close_handles = weakref.finalize(self, _close, self._handles)
        self.free_bytes = self.total_bytes = 0
        """Of the device, before anything was allocated."""

    @classmethod
    def start(cls, device: str, env: Mapping[str, str] | None = None) -> StorageOwner:
        """Starts the process.

        Args:
          device: "cpu" or "cuda:N".
          env: Variables for the process, and for the loader, beside this process's own.

        Raises:
          ConfigError: the device cannot be used.
          EngineDeadError: the process ended.
        """
        owner = cls(spawn("jpd.semi_pd.storage", env=env), device, env or {})
        try:
            owner.free_bytes, owner.total_bytes = owner._ask(device)
        except BaseException:
            owner.stop()
            raise
        return owner

    def load(
        self,
        weights: Layout,
        pages: Layout,
        folder: Path,
        *,
        dtype: Dtype,
        load_format: LoadFormat = "auto",
        seed: int = 0,
        show_progress: bool = True,
    ) -> None:
        """Makes room for weights, fills them, makes room for pages; see `jpd.checkpoint.load`.

        In this order: the device holds the weights twice while they are loaded, and the pages are
        meant to take all that is left. After an error it may be called again.

        Args:
          weights: Layout of the parameters.
          pages: Layout of the KV pages.
          folder: A model folder.
          dtype, load_format, seed, show_progress: As of `jpd.checkpoint.load`.

        Raises:
          ConfigError: as `jpd.checkpoint.load` does; or no room.
          EngineDeadError: the loader or the storage owner ended.
        """
        if not self._handles:
            self._allocate(weights)
        options = {
            "dtype": dtype,
            "load_format": load_format,
            "seed": seed,
            "show_progress": show_progress,
        }
        loader.run(folder, options, self._handles[0], weights, self._env)
        self._allocate(pages)

    @property
    def handles(self) -> Handles:
        """Of weights and pages; `stop` closes their file descriptors.

        Raises:
          RuntimeError: before `load`, or after `stop`.
        """
        if len(self._handles) != 2:
            raise RuntimeError("the handles are there from the end of `load` until `stop`")
        return Handles(*self._handles)

    @property
    def connection(self) -> Connection:
        """To wait on: it can be read when the process has ended, whatever ended it."""
        return self._child.connection

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child.process.poll() is None

    def stop(self) -> None:
        """Ends the process, and with it the memory, once no executor maps it any more.

        A second call does nothing.
        """
        self._child.kill()  # it runs nothing that could be interrupted
        self._close_handles()

    def _allocate(self, layout: Layout) -> None:
        self._ask(layout.nbytes)
        self._handles.append(receive_handle(self._child.connection))

    def _ask(self, question: Any) -> Any:
        try:
            self._child.connection.send(question)
            answer = self._child.connection.recv()
        except (EOFError, ConnectionError) as end:
            code = self._child.wait()
            raise EngineDeadError(f"the storage owner ended, exit code {code}") from end
        if isinstance(answer, Exception):
            raise answer
        return answer


def _close(handles: list[Handle]) -> None:
    for handle in handles:
        for fd in handle.fds:
            os.close(fd)
    handles.clear()


def _main() -> None:
    """Answers a device with its memory, then each number of bytes with a block."""
    connection = connect()
    blocks: list[Block] = []
    device = None
    while True:
        try:
            question = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if device is None:
                answer = memory_of(question)
                device = question
            else:
                blocks.append(allocate(question, device))
                answer = None
        except Exception as error:  # CuPy is missing, CUDA does not start, no memory is left, ...
            where = repr(device or question)
            connection.send(ConfigError(f"device={where}: {type(error).__name__}: {error}"))
            continue
        connection.send(answer)
        if answer is None:
            send_handle(connection, blocks[-1].handle())


if __name__ == "__main__":
    _main()
