"""native.kv_push on XLA's CPU: between blocks of host memory, and with stand-ins for libcuda
(fake_gpu.cc), whose streams are threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from native import build
from native.kv_push import Link, LinkError, ended, filled
from tests.processes import wait_until

LAYERS, PAGES, PAGE = 3, 12, (4, 2)
PAGE_BYTES = 4 * 4 * 2
SHAPE = (PAGES, *PAGE)
# Not in order, and with runs that go on on one side alone: 3-4, 5, 8-9-10, 1 on the source side.
SOURCE, TARGET = [3, 4, 5, 8, 9, 10, 1], [6, 7, 2, 8, 9, 10, 3]
RUNS = (2, 1, 3, 1)

pytestmark = pytest.mark.skipif(
    os.environ["JAX_PLATFORMS"] != "cpu", reason="stand-ins for a GPU are of no use on one"
)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The stand-ins; its `_name` is the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        library = ctypes.CDLL(str(build.build(Path(__file__).with_name("fake_gpu.cc"), ["-O0"])))
    library.fake_log.restype = ctypes.c_char_p
    library.fake_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    return library


class World:
    """Pages here and there, a link between them, and a step that fills those here."""

    def __init__(self, libcuda: str | None = None, *, pages: int = PAGES, **options: Any) -> None:
        self.there = np.zeros((LAYERS, 2, *SHAPE), np.float32)
        self.addresses = [a.ctypes.data for layer in self.there for a in layer]
        sources = options.pop("sources", [0] * len(self.addresses))
        self.link = Link(
            jax.devices()[0],
            sources,
            self.addresses,
            pages=pages,
            page_bytes=PAGE_BYTES,
            libcuda=libcuda,
        )
        self.kv = [(jnp.zeros(SHAPE), jnp.zeros(SHAPE)) for _ in range(LAYERS)]
        self.order, self.before_the_end, self.other_values = range(LAYERS), lambda: None, False
        self.step = jax.jit(self._step, donate_argnums=0)

    def _step(self, kv: Any, seed: jax.Array) -> tuple[Any, jax.Array]:
        kv = list(kv)
        for layer in self.order:
            k, v = kv[layer]
            k = k.at[:].set(seed + jnp.arange(k.size).reshape(k.shape) + 1000 * layer)
            v = -k
            seed = filled(layer, seed, k, jnp.flip(v) if self.other_values else v)
            kv[layer] = k, v

        def hook(value: np.ndarray) -> np.ndarray:
            self.before_the_end()
            return value

        seed = jax.pure_callback(hook, jax.typeof(seed), seed)
        return kv, ended(seed, [kind for layer in kv for kind in layer])

    def run(self, seed: float) -> None:
        """One step, until it has ended."""
        self.kv, last = self.step(self.kv, jnp.float32(seed))
        last.block_until_ready()

    def check(self, source: list[int], target: list[int]) -> None:
        """The target pages hold what the source pages do, and the others nothing."""
        for theirs, ours in zip(self.there, self.kv, strict=True):
            for there, here in zip(theirs, ours, strict=True):
                np.testing.assert_array_equal(there[target], np.asarray(here)[source])
                others = np.setdiff1d(np.arange(PAGES), target)
                assert not there[others].any()


@pytest.fixture
def make(fake: ctypes.CDLL) -> Iterator[Callable[..., World]]:
    """Makes worlds, whose links are closed in the end."""
    fake.fake_reset()
    worlds = []

    def world(*args: Any, **options: Any) -> World:
        worlds.append(World(*args, **options))
        return worlds[-1]

    yield world
    fake.fake_reset()  # what is held is let go
    for made in worlds:
        made.link.close()


@pytest.fixture(params=["host", "gpu"])
def world(request: pytest.FixtureRequest, make: Callable[..., World], fake: ctypes.CDLL) -> World:
    """On the CPU as it is, and on a GPU that is not there."""
    return make(fake._name if request.param == "gpu" else None)


@pytest.fixture
def on_host(make: Callable[..., World]) -> World:
    """For steps that fail: what they filled is gone then, which a GPU's pages are not."""
    return make()


def log(fake: ctypes.CDLL) -> list[str]:
    return fake.fake_log().decode().splitlines()


def test_pages_arrive_where_they_are_to_be_and_nothing_else_changes(world: World) -> None:
    number = world.link.announce(SOURCE, TARGET)
    world.run(5)
    arrival = world.link.wait(number)
    world.check(SOURCE, TARGET)
    assert arrival.nbytes == LAYERS * 2 * PAGE_BYTES * len(SOURCE)
    assert arrival.overlapped_bytes % (2 * PAGE_BYTES * len(SOURCE)) == 0
    assert 0 <= arrival.overlapped_bytes <= arrival.nbytes
    assert arrival.late_s >= 0


def test_steps_send_what_was_announced_in_the_same_order(world: World) -> None:
    numbers = [world.link.announce([page], [page + 1]) for page in (1, 4, 7)]
    for i, (number, page) in enumerate(zip(numbers, (1, 4, 7), strict=True)):
        world.run(100 * i)
        world.link.wait(number)
        np.testing.assert_array_equal(world.there[2][1][page + 1], world.kv[2][1][page])
    assert not world.there[:, :, [0, 1, 3, 4, 6, 7]].any()


def test_a_step_that_sends_nothing(world: World) -> None:
    number = world.link.announce([], [])
    world.run(1)
    assert world.link.wait(number).nbytes == 0
    assert not world.there.any()


def test_all_of_it_beside_the_step(world: World) -> None:
    """The step does not end before everything is there."""

    def until_it_is_there() -> None:
        wait_until(lambda: world.there[:, :, TARGET].all(), "nothing is copied while the step runs")

    world.before_the_end = until_it_is_there
    number = world.link.announce(SOURCE, TARGET)
    world.run(5)
    arrival = world.link.wait(number)
    world.check(SOURCE, TARGET)
    # Of the last layer the bytes were seen, perhaps not yet by who counts.
    assert arrival.overlapped_bytes >= arrival.nbytes * (LAYERS - 1) // LAYERS


def test_on_a_gpu_copies_may_end_after_the_step_and_are_waited_for(
    make: Callable[..., World], fake: ctypes.CDLL
) -> None:
    fake.fake_set(b"hold_copies", 1)
    world = make(fake._name)
    number = world.link.announce(SOURCE, TARGET)
    world.run(5)  # it ends, whatever the copies do
    assert not world.there.any()
    fake.fake_set(b"hold_copies", 0)
    arrival = world.link.wait(number)
    world.check(SOURCE, TARGET)
    assert arrival.overlapped_bytes == 0
    assert arrival.late_s > 0


def test_on_a_gpu_copies_wait_for_their_layer_and_runs_of_pages_are_one_copy(
    make: Callable[..., World], fake: ctypes.CDLL
) -> None:
    world = make(fake._name)
    number = world.link.announce(SOURCE, TARGET)
    world.run(5)
    world.link.wait(number)
    private = [e.split(" ", 2)[2] for e in log(fake) if e.startswith("d0 ")]
    copies = [f"copy {PAGE_BYTES * n}" for n in RUNS for _ in range(2)]
    assert private == ["priority -5", *["wait_event", *copies, "record"] * LAYERS]
    assert [e for e in log(fake) if e.startswith("xla ")] == ["xla record"] * (LAYERS + 1)


def test_the_events_of_a_step_are_used_again(make: Callable[..., World], fake: ctypes.CDLL) -> None:
    world = make(fake._name)
    fake.fake_events.restype = ctypes.c_int64
    counts = []
    for seed in range(6):
        number = world.link.announce([1], [2])
        world.run(seed)
        world.link.wait(number)
        counts.append(fake.fake_events())
    assert counts[-1] - counts[0] <= LAYERS  # of those that are given back by another thread
    assert counts[0] > 0


def test_a_copy_that_fails_is_the_links_end(make: Callable[..., World], fake: ctypes.CDLL) -> None:
    world = make(fake._name)
    fake.fake_set(b"copy_error_in", 3)
    number = world.link.announce(SOURCE, TARGET)

    def until_it_has_arrived() -> None:
        world.run(5)
        world.link.wait(number)

    with pytest.raises(Exception, match="CUDA_ERROR_ILLEGAL_ADDRESS"):  # of the step, or of wait
        until_it_has_arrived()
    with pytest.raises(LinkError, match=r"CUDA: Copy\(.* -> CUDA_ERROR_ILLEGAL_ADDRESS"):
        world.link.announce([1], [1])


def test_pages_that_xla_moved(make: Callable[..., World], fake: ctypes.CDLL) -> None:
    world = make(fake._name, sources=[1 << 20] * 2 * LAYERS)
    world.link.announce([1], [2])
    with pytest.raises(Exception, match="XLA moved the pages"):
        world.run(1)


def test_pages_that_are_elsewhere_when_the_step_ends(on_host: World) -> None:
    """On a CPU nobody knows before where they are."""
    on_host.other_values = True
    on_host.link.announce([1], [2])
    with pytest.raises(Exception, match="XLA moved the pages"):
        on_host.run(1)


def test_a_step_that_nobody_announced(world: World) -> None:
    with pytest.raises(Exception, match="a step ran whose pages nobody announced"):
        world.run(1)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (0, 0, 1)])
def test_layers_out_of_order(on_host: World, order: tuple[int, ...]) -> None:
    on_host.order = order
    on_host.link.announce([1], [2])
    with pytest.raises(Exception, match=r"came out of order|a step began before the one before"):
        on_host.run(1)


def test_a_step_that_leaves_layers_out(on_host: World) -> None:
    on_host.order = range(LAYERS - 1)
    on_host.link.announce([1], [2])
    with pytest.raises(Exception, match="a step ended before all its layers were filled"):
        on_host.run(1)


def test_arrays_of_another_size(make: Callable[..., World]) -> None:
    world = make(pages=PAGES - 1)
    world.link.announce([1], [2])
    with pytest.raises(Exception, match="the pages take 384 bytes, not 11 times 32"):
        world.run(1)


def test_what_cannot_be_asked_for(world: World) -> None:
    with pytest.raises(LinkError, match=r"page 12 is not in \[0, 12\)"):
        world.link.announce([3, 12], [1, 2])
    with pytest.raises(LinkError, match=r"page -1 is not in \[0, 12\)"):
        world.link.announce([3], [-1])
    with pytest.raises(ValueError, match="2 pages cannot go to 1"):
        world.link.announce([3, 4], [1])
    with pytest.raises(LinkError, match="step 7 was not announced, or waited for before"):
        world.link.wait(7)
    number = world.link.announce([3], [1])
    with pytest.raises(LinkError, match=f"step {number} has not run"):
        world.link.wait(number)
    world.run(1)
    world.link.wait(number)
    with pytest.raises(LinkError, match=f"step {number} was not announced, or waited for before"):
        world.link.wait(number)
    with pytest.raises(LinkError, match="device 0 has a link already"):
        World()
    world.link.close()
    world.link.close()
    with pytest.raises(LinkError, match="device 0 has no link"):
        world.link.announce([3], [1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [0]}, "1 sources and 4 targets are not keys and values of the same layers"),
        ({"targets": [8] * 3, "sources": [0] * 3}, "3 sources and 3 targets are not keys"),
        ({"pages": 0}, "pages=0 is not allowed: at least 1"),
        ({"page_bytes": -1}, "page_bytes=-1 is not allowed: at least 1"),
    ],
)
def test_arguments_that_are_not_allowed(changes: dict[str, Any], message: str) -> None:
    right = {"sources": [0] * 4, "targets": [8] * 4, "pages": 2, "page_bytes": 8}
    with pytest.raises(ValueError, match=message):
        Link(jax.devices()[0], **right | changes)


def test_a_driver_that_is_not_there() -> None:
    with pytest.raises(LinkError, match=r"cannot load libnowhere.so"):
        Link(jax.devices()[0], [0] * 2, [8] * 2, pages=1, page_bytes=8, libcuda="libnowhere.so")


def test_each_device_of_a_process_has_its_own_link() -> None:
    """Two ranks of one program send their halves; in a process of its own, with two devices."""
    script = textwrap.dedent(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from native.kv_push import Link, ended, filled

        devices = jax.devices()
        assert len(devices) == 2
        there = np.zeros((2, 2, 4, 8), np.float32)
        links = [
            Link(d, [0, 0], [a.ctypes.data for a in t], pages=4, page_bytes=32)
            for d, t in zip(devices, there)
        ]
        def ranked(k, v):
            k, v = k + 1, v - 1
            return k, v, ended(filled(0, k.sum()[None], k, v), [k, v])
        mesh = jax.sharding.Mesh(np.array(devices), ("tp",))
        program = jax.jit(jax.shard_map(
            ranked, mesh=mesh, in_specs=P("tp"), out_specs=P("tp"), check_vma=False
        ))
        k = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
        numbers = [link.announce([1 + i], [3]) for i, link in enumerate(links)]
        k, v, last = program(k, -k)
        last.block_until_ready()
        for rank, (link, number) in enumerate(zip(links, numbers)):
            assert link.wait(number).nbytes == 64
            for kind, whole in enumerate((k, v)):
                np.testing.assert_array_equal(there[rank, kind, 3], whole[4 * rank + 1 + rank])
                assert not there[rank, kind, :3].any()
        """
    )
    flags = "--xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=Path(__file__).parents[2],
        timeout=600,
        check=True,
    )
