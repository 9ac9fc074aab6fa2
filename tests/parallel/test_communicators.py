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


class NoNCCL(Exception):
    pass


def plan(m: int, ctas: int, *, overlap: bool = True) -> Plan:
    shape = {"op": "all_reduce", "ranks": 1, "m": m, "n": 4096, "k": 2048}
    more = {"tiling": TILING, "sms": 100, "ctas": ctas, "waves": (1,)} if overlap else {}
    return Plan(**shape, overlap=overlap, **more)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    made: list[int] = []

    def for_axis(mesh: Any, axis: str, *, max_ctas: int) -> Any:
        made.append(max_ctas)
        if max_ctas == 13:
            raise NoNCCL("no connection")
        return SimpleNamespace(max_ctas=max_ctas)

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
    remembered = module._communicator, module._has_native
    for function in remembered:
        function.cache_clear()
    yield made
    for function in remembered:
        function.cache_clear()


def mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tp",))


def ctas(*ms: int) -> list[int]:
    found = module.communicators(mesh(), "tp", [(m, 4096, 2048) for m in ms])
    return [comm.max_ctas for comm in found.get("tp", [])]


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
