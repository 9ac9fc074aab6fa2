"""A process that opens blocks of memory and does what its connection says; see `OtherProcess`."""

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from native import memory


class OtherProcess:
    """Starts this module; every method of `Commands` can be called on it."""

    def __init__(self, *handles):
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno(), *(fd for handle in handles for fd in handle.fds)]
            command = [sys.executable, "-m", "tests.native.other_process", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=fds)
        self.connection = Connection(ours.detach())

    def __getattr__(self, name):
        def call(*arguments):
            self.connection.send((name, arguments))
            answer = self.connection.recv()
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.connection.close()


def settle(block):
    """Waits until the device has done what was asked of it."""
    if block.device != "cpu":
        import cupy

        cupy.cuda.runtime.deviceSynchronize()


class Commands:
    """What the other process can do; blocks are numbered in the order in which they came."""

    def __init__(self, connection):
        self.blocks = []
        self.connection = connection

    def allocate(self, nbytes, device):
        self.blocks.append(memory.allocate(nbytes, device))
        return self.blocks[-1].handle()

    def open(self, handle):
        self.blocks.append(memory.open_block(handle))

    def receive(self):
        self.connection.send("ready")
        handle = memory.receive_handle(self.connection)
        self.open(handle)
        for fd in handle.fds:
            os.close(fd)

    def give(self):
        memory.send_handle(self.connection, self.blocks[-1].handle())

    def add(self, number, offset, shape, dtype, value):
        """Adds in place, through NumPy or CuPy."""
        view = self.blocks[number].array(offset, shape, dtype)
        view += view.dtype.type(value)
        settle(self.blocks[number])

    def jax_sum(self, number, offset, shape, dtype):
        """The sum that JAX sees, and whether it reads the block's own memory."""
        block = self.blocks[number]
        array = block.jax_array(offset, shape, dtype)
        view = block.array(offset, shape, dtype)
        address = view.ctypes.data if block.device == "cpu" else view.data.ptr
        return float(array.astype(np.float32).sum()), array.unsafe_buffer_pointer() == address

    def addresses(self):
        views = [block.array(0, (1,), np.uint8) for block in self.blocks]
        return [v.ctypes.data if isinstance(v, np.ndarray) else v.data.ptr for v in views]

    def close(self, number):
        self.blocks[number].close()

    def open_files(self):
        return len(list(Path("/proc/self/fd").iterdir()))


def main():
    connection = Connection(int(sys.argv[1]))
    commands = Commands(connection)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(getattr(commands, name)(*arguments))
        except Exception as error:
            connection.send(error)


if __name__ == "__main__":
    main()
