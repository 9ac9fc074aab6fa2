"""The storage owner: a small process without JAX that holds weights and KV pages.

Executors map its blocks and come and go; the memory stays. It ends with its connection, and so with
the coordinator, whatever became of that; CUDA frees its blocks then. On a CPU a block is an
anonymous file that lives while anybody holds it (`native.memory`). Either way nothing is left.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from jpd.config import Dtype, LoadFormat
from jpd.errors import ConfigError, EngineDeadError
from jpd.semi_pd import loader
from jpd.semi_pd.child import Child, connect, spawn
from jpd.semi_pd.layout import Layout
from native.memory import Block, Handle, allocate, receive_handle, send_handle

_STOP_S = 10.0


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

    def __init__(self, child: Child, device: str, weights: Layout, pages: Layout) -> None:
        self._child = child
        self._device = device
        self._layouts = (weights, pages)
        self._handles: list[Handle] = []

    @classmethod
    def start(cls, weights: Layout, pages: Layout, device: str) -> StorageOwner:
        """Starts the process and makes room for the weights.

        Args:
          weights: Layout of the parameters.
          pages: Layout of the KV pages.
          device: "cpu" or "cuda:N".

        Raises:
          ConfigError: the device cannot be used, or has no room.
          EngineDeadError: the process ended.
        """
        owner = cls(spawn("jpd.semi_pd.storage"), device, weights, pages)
        try:
            owner._allocate(weights)
        except BaseException:
            owner.stop()
            raise
        return owner

    def load(
        self,
        folder: Path,
        *,
        dtype: Dtype,
        load_format: LoadFormat = "auto",
        seed: int = 0,
        show_progress: bool = True,
    ) -> None:
        """Fills the weights, then makes room for the pages; see `jpd.checkpoint.load`.

        In this order: the device holds the weights twice while they are loaded, and the pages are
        meant to take all that is left.

        Raises:
          ConfigError: as `jpd.checkpoint.load` does; or no room for the pages.
          EngineDeadError: the loader or the storage owner ended.
        """
        weights, pages = self._layouts
        options = {
            "dtype": dtype,
            "load_format": load_format,
            "seed": seed,
            "show_progress": show_progress,
        }
        loader.run(folder, options, self._handles[0], weights)
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
        self._child.connection.close()
        try:
            self._child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
        for handle in self._handles:
            for fd in handle.fds:
                os.close(fd)
        self._handles.clear()

    def _allocate(self, layout: Layout) -> None:
        try:
            self._child.connection.send((layout.nbytes, self._device))
            error = self._child.connection.recv()
            if error is not None:
                raise error
            self._handles.append(receive_handle(self._child.connection))
        except (EOFError, ConnectionError) as end:
            code = self._child.wait()
            raise EngineDeadError(f"the storage owner ended, exit code {code}") from end


def _main() -> None:
    connection = connect()
    blocks: list[Block] = []
    while True:
        try:
            nbytes, device = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            blocks.append(allocate(nbytes, device))
        except Exception as error:  # CuPy is missing, CUDA does not start, no memory is left, ...
            connection.send(ConfigError(f"device={device!r}: {type(error).__name__}: {error}"))
        else:
            connection.send(None)
            send_handle(connection, blocks[-1].handle())


if __name__ == "__main__":
    _main()
