"""The benchmark of the norm that reads a sum in tiles."""

import pytest

from benchmarks import packed_norm
from benchmarks.report import Report
from pallas_kernels import signal_gemm

TILING = signal_gemm.SignalConfig(128, 128, 2, "m", "n", 1)


@pytest.mark.parametrize("right", [True, False])
def test_a_sum_in_another_order_fails_its_row(right, tmp_path, monkeypatch):
    pack = signal_gemm.pack

    def packed(y, config):
        tiles = pack(y, config)
        return tiles if right else tiles[::-1]

    monkeypatch.setattr(signal_gemm, "pack", packed)
    report = Report("packed_norm", "?", out=tmp_path)
    packed_norm.run_case(report, packed_norm.Case(136, 384, TILING), 1e9)
    rows, tiles = report.rows
    assert (rows["impl"], rows["status"]) == ("rows", "ok")
    want = "ok" if right else "failed: ArithmeticError: not what the norm of rows is"
    assert (tiles["impl"], tiles["status"]) == ("tiles", want)
    assert ("slowdown" in packed_norm.summarise(report.rows)) == right
