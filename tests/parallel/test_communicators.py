"""Which NCCL communicators an engine makes for its plans; with stand-ins for NCCL and a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jpd.ops.overlap import communicators as module
from jpd.ops.overlap import gpu
from jpd.overlap import Plan, PlanTable, Tiling, Topology
from pallas_kernels import mosaic

TILING = Tiling(128, 128, 4, "m", "m", 4)
HERE = Topology("NVIDIA H200", "nvlink", "2.28")


class NoNCCL(RuntimeError):
    pass


def plan(m: int, ctas: int, *, overlap: bool = True) -> Plan:
    shape = {"op": "all_reduce", "ranks": 1, "m": m, "n": 4096, "k": 2048}
    more = {"tiling": TILING, "sms": 100, "ctas": ctas, "waves": (1,)} if overlap else {}
    return Plan(**shape, overlap=overlap, **more)


class StandIn:
    """For a `native.overlap.Communicator`."""

    def __init__(self, max_ctas: int) -> None:
        self.max_ctas, self.failed, self.closed = max_ctas, False, False

    def check(self) -> None:
        if self.failed or self.closed:
            raise NoNCCL("all_reduce number 0 is not complete after 60 s")

    def close(self) -> None:
        self.closed = True


class User:
    pass


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    made: list[int] = []

    def for_axis(mesh: Any, axis: str, *, max_ctas: int) -> Any:
        made.append(max_ctas)
        if max_ctas == 13:
            raise NoNCCL("no connection")
        return StandIn(max_ctas)

    native = SimpleNamespace(
        Communicator=SimpleNamespace(for_axis=for_axis),
        OverlapError=NoNCCL,
        BuildError=NoNCCL,
        start=lambda: None,
    )
    plans = [plan(256, 8), plan(2048, 16), plan(16384, 13), plan(65536, 4, overlap=False)]
    monkeypatch.setattr(gpu, "_check_device", lambda: None)
    monkeypatch.setattr(gpu, "_native", lambda: native)
    monkeypatch.setattr(gpu, "topology", lambda: HERE)
    monkeypatch.setattr(PlanTable, "shipped", lambda topology: PlanTable(topology, plans))
    monkeypatch.setattr(module, "_MADE", {})
    module._has_native.cache_clear()
    yield made
    module._has_native.cache_clear()


def mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tp",))


def found(*ms: int, user: object = None) -> list[StandIn]:
    products = [(m, 4096, 2048) for m in ms]
    return module.communicators(mesh(), "tp", products, user).get("tp", [])


def ctas(*ms: int, user: object = None) -> list[int]:
    return [comm.max_ctas for comm in found(*ms, user=user)]


def test_one_for_each_number_of_sms_that_plans_leave(made: list[int]) -> None:
    assert ctas(256, 2048, 300) == [8, 16]
    assert ctas(2048) == [16]
    assert made == [8, 16], "a communicator is made once"
    assert ctas(65536) == []


def test_none_for_plans_that_leave_no_room_under_an_mps_share(made: list[int]) -> None:
    with mosaic.tracing_for("NVIDIA H200", 110):
        assert ctas(256, 2048) == [8]
    assert made == [8]


def test_what_cannot_connect_is_said_once(
    made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    assert ctas(16384, 2048) == [16]
    assert ctas(16384) == []
    assert made.count(13) == 1
    assert caplog.text.count("do not overlap with products: no connection") == 1


def test_one_that_failed_is_closed_and_made_anew(
    made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    small, large = found(256, 2048)
    large.failed = True
    again = found(256, 2048)
    assert again[0] is small
    assert made == [8, 16, 16]
    assert large.closed
    assert not again[1].closed
    assert found(2048) == again[1:]
    assert "is made, the old one failed: all_reduce number 0 is not complete" in caplog.text


def test_the_last_user_closes_them(made: list[int]) -> None:
    first, second, third = User(), User(), User()
    small, large = found(256, 2048, user=first)
    assert found(2048, user=second) == [large]
    module.release(first)
    assert (small.closed, large.closed) == (True, False)
    module.release(first)
    module.release(third)
    assert not large.closed
    module.release(second)
    assert large.closed
    assert ctas(256, 2048) == [8, 16]
    assert made == [8, 16, 8, 16]


def test_one_that_cannot_be_closed_keeps_no_other_open(
    made: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise NoNCCL("unspecified launch failure")

    user = User()
    small, large = found(256, 2048, user=user)
    monkeypatch.setattr(small, "close", broken)
    module.release(user)
    assert large.closed
    assert "could not be closed" in caplog.text
    assert "unspecified launch failure" in caplog.text
    assert ctas(256, 2048) == [8, 16]
    assert made == [8, 16, 8, 16]


def test_who_had_one_that_failed_does_not_close_the_new_one(made: list[int]) -> None:
    old, new = User(), User()
    (failed,) = found(2048, user=old)
    failed.failed = True
    (fresh,) = found(2048, user=new)
    module.release(old)
    assert not fresh.closed
    module.release(new)
    assert fresh.closed


def test_what_could_not_connect_is_tried_again_by_a_later_engine(made: list[int]) -> None:
    user = User()
    assert ctas(16384, user=user) == ctas(16384, user=user) == []
    module.release(user)
    assert ctas(16384) == []
    assert made == [13, 13]


def test_without_nccl_there_are_none_which_is_said_once(
    made: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> None:
        raise NoNCCL("no libnccl.so.2")

    monkeypatch.setattr(gpu._native(), "start", start)
    assert ctas(2048) == ctas(256) == made == []
    assert caplog.text.count("do not overlap with products: no libnccl.so.2") == 1


def test_without_a_gpu_there_are_none() -> None:
    assert module.communicators(mesh(), "tp", [(2048, 4096, 2048)]) == {}
