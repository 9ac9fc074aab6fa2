"""Which decode attention of a step may read pages before the kernel ahead of it has ended."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import pallas_kernels.decode_attention as kernels
from jpd import ops
from jpd.config import KernelConfig
from jpd.engine.compile import step_options
from jpd.engine.shapes import StepShape
from tests.aot import compile_for_h200, needs_wheels
from tests.engine.test_pallas_step import ONLY, gpu_step, lowered_for_gpu, make_executor

DECODE, MIXED = StepShape(2, 0, 64, True), StepShape(2, 32, 64, False)
SHAPES = pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The `early` of every call of the kernel."""
    found: list[bool] = []
    kernel = kernels.decode_attention

    def watched(*args: Any, early: bool, **options: Any) -> Any:
        found.append(early)
        return kernel(*args, early=early, **options)

    monkeypatch.setattr(kernels, "decode_attention", watched)
    return found


@SHAPES
def test_all_layers_but_the_first_are_early(shape: StepShape, early: list[bool]) -> None:
    _, executor = make_executor(layers=3)
    lowered_for_gpu(executor, shape)
    assert early == [False, True, True]


def test_the_first_layer_of_each_window_is_not(early: list[bool]) -> None:
    """Its tiles are planned for it, and XLA may do that directly ahead of it."""
    _, executor = make_executor(layers=4)
    executor._model = dataclasses.replace(executor._model, windows=(16, None, 16, None))
    lowered_for_gpu(executor, DECODE)
    assert early == [False, False, True, True]


def test_none_is_where_xla_writes_the_pages(early: list[bool]) -> None:
    _, executor = make_executor(kernels=KernelConfig(rope_write="xla"), layers=3)
    lowered_for_gpu(executor, DECODE)
    assert early == [False] * 3


@needs_wheels
@SHAPES
def test_layers_share_what_an_early_one_reads(shape: StepShape) -> None:
    """Page table, lengths and plan: the very buffers that the first layer's attention read."""
    _, executor = make_executor(layers=3)
    fn, inputs = gpu_step(executor, shape)
    with ops.kernels_without_gpu(), ops.using(ONLY, "gpu"):
        compiled = compile_for_h200(fn, inputs, donate=(1, 2), options=step_options(ONLY))
    text = re.sub(r'module = "[^"]*"', "", compiled.as_text())
    entry = text[text.index("ENTRY") :]
    # Recognised by the partial sums beside the output.
    calls = re.findall(
        r"= \(bf16\[2,4,64\]\S* s32\[2,2\]\S* f32\[.*? (?:custom-call|fusion)\((.*?)\)", entry
    )
    operands = [re.findall(r"%[\w.\-]+", call) for call in calls]
    assert len(operands) == 3
    shared = [names[3:7] for names in operands]
    assert len(set(shared[0])) == 4
    assert shared == [shared[0]] * 3
