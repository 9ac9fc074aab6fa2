"""The storage owner, the loader, and weights and pages as executors see them."""

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpd import CheckpointError, ConfigError, EngineDeadError, checkpoint
from jpd.models.family import flatten
from jpd.parallel import RULES, OneDevice, Split
from jpd.semi_pd import arrays, storage
from jpd.semi_pd.layout import Layout, pages_layout
from jpd.semi_pd.storage import StorageOwner
from native.memory import ALIGNMENT_BYTES, open_block
from tests import tiny_models
from tests.processes import PATIENCE_S, open_files, wait_for_end, wait_until

DEVICE = "cpu" if os.environ["JAX_PLATFORMS"] == "cpu" else "cuda:0"
MODEL = "llama32_v5"
PAGES = pages_layout(
    num_layers=2, num_pages=3, page_size=4, num_kv_heads=2, head_dim=32, dtype="float32"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_checkpoint(MODEL, tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def config(folder):
    return checkpoint.read_config(folder)


@pytest.fixture
def start():
    """Starts owners, and stops them."""
    owners = []

    def start():
        owners.append(StorageOwner.start([DEVICE]))
        return owners[-1]

    yield start
    for owner in owners:
        owner.stop()
        assert not owner.alive


@pytest.fixture(scope="module")
def loaded(load, folder):
    """One owner with random weights of seed 3, for tests that only look at it."""
    owner = StorageOwner.start([DEVICE])
    load(owner, folder, load_format="dummy", seed=3)
    yield owner
    owner.stop()


@pytest.fixture
def no_loader(monkeypatch):
    """The weights stay zeros: a loader takes seconds to start."""
    monkeypatch.setattr(storage.loader, "run", lambda *arguments: None)


@pytest.fixture(scope="module")
def load(config):
    """Loads into room for the tiny model in `room`."""

    def load(owner, folder, room="float32", **options):
        options = {"dtype": "float32", "show_progress": False} | options
        owner.load(arrays.weights_layout(config, room), PAGES, folder, Split(config, 1), **options)

    return load


def children():
    """Ids of the processes that this one started and that are not gone."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            status = (process / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == os.getpid():
                found.add(int(process.name))
    return found


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
            st.sampled_from(["float32", "bfloat16", "float16"]),
        )
    )
)
def test_arrays_are_aligned_and_do_not_overlap(shapes):
    layout = Layout.of(((i,), shape, dtype) for i, (shape, dtype) in enumerate(shapes))
    assert [(f.shape, f.dtype) for f in layout.fields] == shapes
    end = 0
    for field in layout.fields:
        assert field.offset % ALIGNMENT_BYTES == 0
        assert end <= field.offset < end + ALIGNMENT_BYTES
        end = field.offset + field.nbytes
    assert end <= layout.nbytes < end + ALIGNMENT_BYTES


def test_a_layout_names_what_it_does_not_take():
    with pytest.raises(ValueError, match="two arrays have the path"):
        Layout.of([(("a",), (1,), "float32"), (("a",), (2,), "float32")])
    with pytest.raises(ValueError, match="dtype='int8' is not allowed"):
        Layout.of([(("a",), (1,), "int8")])


def check_weights(owner, layout, expected):
    with open_block(owner.handles.weights[0]) as block:
        params = arrays.params([block], layout, OneDevice(jax.devices()[0]))
        assert jax.tree.structure(params) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        assert all(
            a.dtype == b.dtype
            for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True)
        )
        base = block.jax_array(0, (1,), "uint8").unsafe_buffer_pointer()
        addresses = [leaf.unsafe_buffer_pointer() for _, leaf in flatten(params)]
        assert addresses == [base + field.offset for field in layout.fields]


def test_weights_are_those_of_the_checkpoint_without_a_copy(start, folder, config, load):
    owner = start()
    load(owner, folder, room="bfloat16", dtype="bfloat16")
    _, expected = checkpoint.load(folder, dtype="bfloat16", show_progress=False)
    check_weights(owner, arrays.weights_layout(config, "bfloat16"), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="there may be only one GPU")
def test_each_rank_has_its_part_by_the_rules_of_the_one_who_asked(
    folder, config, load, monkeypatch
):
    """The loader runs in another process, where the tables are as they were."""
    monkeypatch.setitem(RULES, "vocab", None)
    split = Split(config, 2)
    owner = StorageOwner.start(["cpu", "cpu"])
    try:
        layout = arrays.weights_layout(split.rank_model, "float32")
        owner.load(layout, PAGES, folder, split, dtype="float32", show_progress=False)
        assert len({handle.fd for handle in owner.handles.pages}) == 2
        _, whole = checkpoint.load(folder, dtype="float32", show_progress=False)
        stored = dict(flatten(whole))
        for rank, handle in enumerate(owner.handles.weights):
            with open_block(handle) as block:
                for field in layout.fields:
                    cut, want = split.cut(field.path), np.asarray(stored[field.path])
                    if cut is not None:
                        want = cut.part(want, rank)
                    got = block.array(field.offset, field.shape, field.dtype)
                    np.testing.assert_array_equal(got, want, err_msg=str(field.path))
        assert split.cut(("embed", "weight")) is None
    finally:
        owner.stop()


def test_random_weights_follow_the_seed(loaded, folder, config):
    _, expected = checkpoint.load(folder, dtype="float32", load_format="dummy", seed=3)
    check_weights(loaded, arrays.weights_layout(config, "float32"), expected)


def test_all_that_map_the_pages_see_one_memory(loaded):
    (handle,) = loaded.handles.pages
    with open_block(handle) as one, open_block(handle) as other:
        pages = arrays.kv_pages([one], PAGES, OneDevice(jax.devices()[0]))
        assert [(k.shape, v.shape) for k, v in pages] == [((3, 4, 2, 32),) * 2] * 2
        for number, field in enumerate(PAGES.fields):
            other.write(field.offset, jnp.full(field.shape, number, field.dtype))
        assert [[float(a.mean()) for a in layer] for layer in pages] == [[0, 1], [2, 3]]


def test_a_broken_checkpoint_fails_as_without_processes(start, folder, config, tmp_path, load):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as expected:
        checkpoint.load(broken, dtype="float32", show_progress=False)
    owner = start()
    with pytest.raises(CheckpointError) as found:
        load(owner, broken)
    assert (type(found.value), str(found.value)) == (type(expected.value), str(expected.value))
    # It is still of use.
    load(owner, folder)
    assert [handle.nbytes for handle in owner.handles.pages] == [PAGES.nbytes]
    _, expected = checkpoint.load(folder, dtype="float32", show_progress=False)
    check_weights(owner, arrays.weights_layout(config, "float32"), expected)


def test_other_errors_of_the_configuration_come_back(start, folder, tmp_path, load):
    owner = start()
    with pytest.raises(ConfigError, match=r"config\.json") as found:
        load(owner, tmp_path)
    assert type(found.value) is ConfigError
    with pytest.raises(ConfigError, match=r"other parameters than room was made for.*embed"):
        load(owner, folder, dtype="bfloat16")


def test_a_loader_that_breaks(start, folder, capfd, load):
    with pytest.raises(EngineDeadError, match="the loader failed: TypeError"):
        load(start(), folder, seed="x", load_format="dummy")
    assert "Traceback" in capfd.readouterr().err


def test_a_killed_loader(start, folder, monkeypatch, load):
    spawn = storage.loader.spawn

    def spawn_and_kill(*arguments, **options):
        child = spawn(*arguments, **options)
        os.kill(child.process.pid, signal.SIGKILL)
        return child

    owner = start()
    monkeypatch.setattr(storage.loader, "spawn", spawn_and_kill)
    with pytest.raises(EngineDeadError, match=r"the loader of .* ended, exit code -9"):
        load(owner, folder)


def test_an_interrupted_load_leaves_no_loader(start, folder, monkeypatch, load):
    owner = start()
    before = children()
    spawn = storage.loader.spawn

    def recv():
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the interrupt did not arrive")

    def spawn_and_interrupt(*arguments, **options):
        child = spawn(*arguments, **options)
        monkeypatch.setattr(child.connection, "recv", recv)
        return child

    monkeypatch.setattr(storage.loader, "spawn", spawn_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(owner, folder)
    assert children() <= before


def test_the_owner_runs_no_jax(start):
    owner = start()
    libraries = Path(f"/proc/{owner._child.process.pid}/maps").read_text()
    assert "python" in libraries
    assert "jaxlib" not in libraries
    assert modules_after("jpd.semi_pd.storage") & {"jax", "jaxlib", "flax", "cupy"} == set()


def modules_after(module):
    code = f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_coordinator_sees_the_end_of_a_killed_owner(start, folder, no_loader, load):
    owner = start()
    os.kill(owner._child.process.pid, signal.SIGKILL)
    assert owner.connection.poll(PATIENCE_S)
    with pytest.raises(EngineDeadError, match="the storage owner ended, exit code -9"):
        load(owner, folder)
    assert not owner.alive


def test_an_interrupt_does_not_end_the_owner(start, folder, no_loader, load):
    owner = start()
    os.kill(owner._child.process.pid, signal.SIGINT)
    load(owner, folder)
    assert owner.alive


def test_handles_are_there_between_load_and_stop(start, folder, no_loader, load):
    owner = start()
    with pytest.raises(RuntimeError, match="from the end of `load` until `stop`"):
        _ = owner.handles
    load(owner, folder)
    (weights,), (pages,) = owner.handles.weights, owner.handles.pages
    assert owner.handles.fds == (*weights.fds, *pages.fds)
    owner.stop()
    with pytest.raises(RuntimeError, match="from the end of `load` until `stop`"):
        _ = owner.handles


def test_a_device_that_cannot_be_used():
    before = children()
    with pytest.raises(ConfigError, match="device='cuda:99': "):
        StorageOwner.start(["cuda:99"])
    with pytest.raises(ConfigError, match=r"device='tpu'.*'cpu' or 'cuda:N'"):
        StorageOwner.start([DEVICE, "tpu"])
    assert children() <= before


def left():
    gc.collect()  # arrays of JAX may be part of cycles
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line for line in lines if "memfd:" in line}
    return open_files() | mapped | set(os.listdir("/dev/shm")) | children()


def test_nothing_is_left(folder, load):
    jax.devices()  # it opens files of its own
    before = left()
    owner = StorageOwner.start([DEVICE])
    load(owner, folder, load_format="dummy")
    with open_block(owner.handles.pages[0]) as block:
        arrays.kv_pages([block], PAGES, OneDevice(jax.devices()[0]))
    owner.stop()
    owner.stop()
    # Other processes, too, may have names in /dev/shm for a moment.
    wait_until(lambda: left() <= before, "something is left")


@pytest.mark.skipif(DEVICE != "cpu", reason="an allocation on a GPU ends with its process")
def test_a_killed_coordinator_leaves_nothing(tmp_path):
    """With its owner stopped by a signal: only the kernel can end that."""
    script = """
import os, signal
from jpd.semi_pd.storage import StorageOwner
owner = StorageOwner.start(["cpu"])
os.kill(owner._child.process.pid, signal.SIGSTOP)
print(owner._child.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    wait_for_end(int(run.stdout))
