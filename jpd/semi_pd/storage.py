"""The storage owner: a small process without JAX that holds weights and KV pages.

Executors map its blocks and come and go; the memory stays. It ends with its connection, and so with
the coordinator, whatever became of that; CUDA frees its blocks then. On a CPU a block is an
anonymous file that lives while anybody holds it (`native.memory`). Either way nothing is left.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpd.child import Child, connect, spawn
from jpd.config import Dtype, LoadFormat
from jpd.errors import ConfigError, EngineDeadError
from jpd.semi_pd import loader
from jpd.semi_pd.layout import Layout
from native.memory import Block, Handle, allocate, memory_of, receive_handle, send_handle

if TYPE_CHECKING:
    from jpd.parallel import Split


@dataclass(frozen=True)
class Handles:
    """What an executor needs to map weights and KV pages; can be pickled, `fds` go beside it."""

    weights: tuple[Handle, ...]
    """Of each rank, as are `pages`."""
    pages: tuple[Handle, ...]

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(fd for handle in (*self.weights, *self.pages) for fd in handle.fds)


class StorageOwner:
    """The coordinator's side of the storage owner. `start`, `load`, then `handles`."""

    def __init__(self, child: Child, devices: Sequence[str], env: Mapping[str, str]) -> None:
        self.devices = tuple(devices)
        self._child = child
        self._env = env
        self._handles: list[tuple[Handle, ...]] = []
        self._close_handles = weakref.finalize(self, _close, self._handles)
        self.free_bytes = 0
        """Of each device at least, before anything was allocated."""

    @classmethod
    def start(cls, devices: Sequence[str], env: Mapping[str, str] | None = None) -> StorageOwner:
        """Starts the process.

        Args:
          devices: Of each rank, "cpu" or "cuda:N".
          env: Variables for the process, and for the loader, beside this process's own.

        Raises:
          ConfigError: a device cannot be used.
          EngineDeadError: the process ended.
        """
        owner = cls(spawn("jpd.semi_pd.storage", env=env), devices, env or {})
        try:
            owner.free_bytes = owner._ask(owner.devices)
        except BaseException:
            owner.stop()
            raise
        return owner

    def load(
        self,
        weights: Layout,
        pages: Layout,
        folder: Path,
        split: Split,
        *,
        dtype: Dtype,
        load_format: LoadFormat = "auto",
        seed: int = 0,
        show_progress: bool = True,
    ) -> None:
        """Makes room for weights, fills them, makes room for pages; see `jpd.checkpoint.load`.

        In this order: a device holds its weights twice while they are loaded, and the pages are
        meant to take all that is left. After an error it may be called again.

        Args:
          weights: Layout of a rank's parameters.
          pages: Layout of a rank's KV pages.
          folder: A model folder.
          split: Of its model, over as many ranks as there are devices.
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
        loader.run(folder, options, self._handles[0], weights, split, self._env)
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
        self._handles.append(tuple(receive_handle(self._child.connection) for _ in self.devices))

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


def _close(handles: list[tuple[Handle, ...]]) -> None:
    for handle in (handle for of_ranks in handles for handle in of_ranks):
        for fd in handle.fds:
            os.close(fd)
    handles.clear()


def _on_each[T](devices: Sequence[str], do: Callable[[str], T]) -> list[T]:
    """What `do` gives for each device.

    Raises:
      ConfigError: it failed, on the device that is named.
    """
    results = []
    for device in devices:
        try:
            results.append(do(device))
        except Exception as error:  # CuPy is missing, CUDA does not start, no memory is left, ...
            text = f"device={device!r}: {type(error).__name__}: {error}"
            raise ConfigError(text) from error
    return results


def _main() -> None:
    """Answers devices with the bytes that are free, then each number of bytes with blocks."""
    connection = connect()
    kept: list[Block] = []
    devices: tuple[str, ...] = ()
    while True:
        try:
            question = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if not devices:
                free = _on_each(question, lambda device: memory_of(device)[0])
                devices = question
                connection.send(min(free))
                continue
            blocks = _on_each(devices, functools.partial(allocate, question))
        except ConfigError as error:
            connection.send(error)
            continue
        kept += blocks
        connection.send(None)
        for block in blocks:
            send_handle(connection, block.handle())


if __name__ == "__main__":
    _main()
