"""Blocks that several processes map: on the device that JAX runs on, and files of a CPU."""

import contextlib
import gc
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from native.memory import (
    ALIGNMENT_BYTES,
    allocate,
    open_block,
    receive_handle,
    send_handle,
)
from tests.native.other_process import OtherProcess, settle
from tests.processes import open_files, wait_until

DEVICE = "cpu" if os.environ["JAX_PLATFORMS"] == "cpu" else "cuda:0"
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="JAX runs on the GPU alone")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: make test-gpu")


@pytest.fixture
def block():
    with allocate(1 << 20, DEVICE) as block:
        yield block


def on_host(view):
    return view if isinstance(view, np.ndarray) else view.get()


def address(view):
    return view.ctypes.data if isinstance(view, np.ndarray) else view.data.ptr


def holders(inode):
    """Ids of the processes that map an anonymous file or hold it open."""
    return {
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if maps(process, inode) or opens(process, inode)
    }


def maps(process, inode):
    try:
        lines = (process / "maps").read_text().splitlines()
    except OSError:  # it ended
        return False
    return any(line.split()[4] == str(inode) for line in lines if "memfd:" in line)


def opens(process, inode):
    try:
        fds = list((process / "fd").iterdir())
    except OSError:
        return False
    for fd in fds:
        try:
            if "memfd:" in os.readlink(fd) and os.stat(fd).st_ino == inode:
                return True
        except OSError:  # it was closed
            continue
    return False


def test_a_block_is_zeros(block):
    assert not on_host(block.array(0, (block.nbytes,), np.uint8)).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_processes_see_the_same_memory(block, dtype):
    offset, shape = 3 * ALIGNMENT_BYTES, (5, 7)
    here = block.jax_array(offset, shape, dtype)
    assert str(here.dtype) == dtype
    assert here.unsafe_buffer_pointer() == address(block.array(offset, shape, dtype))
    handle = pickle.loads(pickle.dumps(block.handle()))
    with OtherProcess(handle) as other:
        other.open(handle)
        one = np.ones((), dtype)
        bits = np.uint32 if dtype == "float32" else np.uint16
        block.array(offset, shape, bits)[...] = int(one.view(bits))
        settle(block)
        assert other.jax_sum(0, offset, shape, dtype) == (35.0, True)
        if dtype != "bfloat16" or block.device == "cpu":  # CuPy cannot add bfloat16
            other.add(0, offset, shape, dtype, 2)
            # Written by the other process, read through the array that this one made before.
            assert float(np.asarray(here).astype(np.float32).sum()) == 105.0
    around = on_host(block.array(0, (block.nbytes,), np.uint8))
    end = offset + 35 * np.dtype(dtype).itemsize
    assert not around[:offset].any()
    assert not around[end:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write_copies_an_array_in(block, dtype):
    import jax.numpy as jnp

    values = jnp.arange(12, dtype=dtype).reshape(3, 4)
    block.write(512, values)
    np.testing.assert_array_equal(np.asarray(block.jax_array(512, (3, 4), dtype)), values)


def test_a_handle_sent_to_a_running_process(block):
    with OtherProcess() as other:
        other.connection.send(("receive", ()))
        assert other.connection.recv() == "ready"
        send_handle(other.connection, block.handle())
        assert other.connection.recv() is None
        other.add(0, 256, (2,), "float32", 1.5)
    assert on_host(block.array(256, (2,), "float32")).tolist() == [1.5, 1.5]


def test_opened_twice_closed_once(block):
    handle = block.handle()
    with OtherProcess(handle) as other:
        other.open(handle)
        other.open(handle)
        first, second = other.addresses()
        if block.device != "cpu":
            assert first == second
        other.close(0)
        other.add(1, 0, (1,), "float32", 1)
        with pytest.raises(ValueError, match="closed"):
            other.add(0, 0, (1,), "float32", 1)
        assert on_host(block.array(0, (1,), "float32")) == 1
        other.close(1)
        other.open(handle)
        other.add(2, 0, (1,), "float32", 1)
    assert on_host(block.array(0, (1,), "float32")) == 2


def test_opening_and_closing_leaks_no_file(block):
    handle = block.handle()
    with OtherProcess(handle) as other:
        for number in range(20):
            other.open(handle)
            other.add(number, 0, (1,), "float32", 1)
            other.close(number)
            if number == 0:  # CUDA, when it starts, opens files of its own
                before = other.open_files()
        assert other.open_files() == before


def test_making_and_closing_leaks_no_file():
    before = open_files()
    for _ in range(20):
        allocate(4096, "cpu").close()
    assert open_files() - before == set()


@on_cpu
def test_views_outlive_the_block_that_made_them():
    block = allocate(4096, "cpu")
    view, array = block.array(0, (4,), "float32"), block.jax_array(0, (4,), "bfloat16")
    inode = os.fstat(block.handle().fd).st_ino
    block.close()
    block.close()
    view[...] = 3
    assert holders(inode) == {os.getpid()}
    del view
    assert holders(inode) == {os.getpid()}
    assert np.asarray(array).view(np.uint16).tolist() == [0, 0x4040, 0, 0x4040]
    del array
    gc.collect()  # an array of JAX may be part of a cycle
    assert holders(inode) == set()
    for use in (block.handle, lambda: block.array(0, (1,), "float32")):
        with pytest.raises(ValueError, match="the block of 4096 bytes on cpu is closed"):
            use()


def test_nothing_is_left_whoever_is_killed():
    names = set(os.listdir("/dev/shm"))
    with OtherProcess() as maker:
        maker.allocate(1 << 20, "cpu")
        maker.connection.send(("give", ()))
        handle = receive_handle(maker.connection)
        assert maker.connection.recv() is None
        inode = os.fstat(handle.fd).st_ino
        with OtherProcess(handle) as reader:
            reader.open(handle)
            assert holders(inode) == {os.getpid(), maker.process.pid, reader.process.pid}
            maker.add(0, 0, (1,), "float32", 1)
            maker.kill()
            # The memory outlives its maker while anybody holds it.
            assert holders(inode) == {os.getpid(), reader.process.pid}
            reader.add(0, 0, (1,), "float32", 1)
            with open_block(handle) as block:
                reader.kill()
                assert block.array(0, (1,), "float32") == 2
    os.close(handle.fd)
    assert holders(inode) == set()
    # Of others there may be names for a moment.
    wait_until(lambda: set(os.listdir("/dev/shm")) <= names, "a name is left")


@on_gpu
def test_a_killed_process_gives_gpu_memory_back():
    import cupy

    def free():
        return cupy.cuda.runtime.memGetInfo()[0]

    before = free()
    with OtherProcess() as maker:
        handle = maker.allocate(1 << 30, "cuda:0")
        with open_block(handle) as block:
            block.array(0, (1,), "float32")[...] = 1
        assert free() < before - (1 << 30)
    assert free() > before - (1 << 29)


@pytest.mark.parametrize("nbytes", [1, (2 << 20) - 1, 2 << 20, (2 << 20) + 1])
def test_gpu_memory_is_made_of_whole_pages(nbytes, monkeypatch):
    """Other processes read what is not at half the rate."""
    sizes = []

    class Pointer:
        ptr = 0

        def __init__(self, memory, offset):
            pass

        def memset(self, value, size):
            sizes.append(size)

    device = contextlib.nullcontext(SimpleNamespace(synchronize=lambda: None))
    runtime = SimpleNamespace(CUDARuntimeError=RuntimeError, ipcGetMemHandle=lambda pointer: b"")
    cuda = SimpleNamespace(
        Device=lambda ordinal: device, Memory=sizes.append, MemoryPointer=Pointer, runtime=runtime
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    with allocate(nbytes, "cuda:0") as block:
        assert block.nbytes == nbytes
    assert sizes == [-(-nbytes // (2 << 20)) * (2 << 20), nbytes]


def test_the_maker_does_not_open_its_own_handle(block):
    with pytest.raises(ValueError, match="this process made the block"):
        open_block(block.handle())


@given(
    nbytes=st.integers(1, 2048),
    offset=st.integers(-1, 9).map(ALIGNMENT_BYTES.__mul__) | st.integers(-100, 100),
    shape=st.lists(st.sampled_from([-1, 0, 1, 2, 5, 40]), max_size=3),
    dtype=st.sampled_from(["uint8", "bfloat16", "float32"]),
)
def test_views_lie_in_the_block_or_are_refused(nbytes, offset, shape, dtype):
    with allocate(nbytes, "cpu") as block:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        possible = (
            all(n >= 0 for n in shape)
            and offset >= 0
            and offset % ALIGNMENT_BYTES == 0
            and offset + size <= nbytes
        )
        if not possible:
            with pytest.raises(ValueError, match=r"is not allowed: |ends at byte"):
                block.array(offset, shape, dtype)
            return
        view = block.array(offset, shape, dtype)
        assert (view.shape, str(view.dtype)) == (tuple(shape), dtype)
        view[...] = 1
        if size:
            raw = block.array(0, (nbytes,), "uint8").tobytes()
            ones = np.ones(shape, view.dtype).tobytes()
            assert raw == bytes(offset) + ones + bytes(nbytes - offset - size)


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:-1", ""])
def test_unknown_devices_are_named(device):
    with pytest.raises(ValueError, match=f"device={device!r} is not allowed: 'cpu' or 'cuda:N'"):
        allocate(4096, device)


def test_empty_blocks_are_refused():
    with pytest.raises(ValueError, match="nbytes=0 is not allowed: at least 1"):
        allocate(0, "cpu")


def test_a_handle_that_promises_too_much():
    with allocate(4096, "cpu") as block:
        wrong = replace(block.handle(), nbytes=8192, maker=0)
        with pytest.raises(ValueError, match="greater than file size"):
            open_block(wrong)
