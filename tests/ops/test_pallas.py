"""What the kernels say of the machine."""

import pytest

from jpd import ops
from jpd.config import KernelConfig
from jpd.ops import pallas, registry


def described(kind: str, sms: int, capability: str = "9.0") -> dict[str, str]:
    gpu = pallas.Gpu(kind, sms, capability)
    with registry.using(KernelConfig(), "gpu"), pallas.tracing_for(gpu):
        return ops.describe_kernels()


def test_says_what_the_table_has_for_a_gpu_that_was_tuned() -> None:
    found = described("NVIDIA H200", 132)
    assert found["kernels"] == "used"
    assert found["gpu"] == "NVIDIA H200"
    assert found["streaming multiprocessors seen"] == "132"
    table = found["dataflow table"]
    for part in ("nvidia_h200.json", "132 SMs", " products on 132", "64, 128", "a rule decides"):
        assert part in table


@pytest.mark.parametrize(
    ("kind", "sms", "words"),
    [
        ("NVIDIA H200", 13, "SMs, here are 13: a rule decides"),
        ("NVIDIA H100 80GB HBM3", 132, "none for NVIDIA H100 80GB HBM3: a rule decides"),
    ],
)
def test_says_that_a_rule_decides_for_others(kind: str, sms: int, words: str) -> None:
    assert words in described(kind, sms)["dataflow table"]


def test_says_why_the_kernels_are_not_used() -> None:
    assert described("NVIDIA A100", 108, "8.0") == {
        "kernels": "not used: the kernels are written for compute capability 9.0, this GPU has 8.0"
    }
