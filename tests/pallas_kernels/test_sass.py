"""What `make sass` looks for in ptxas' words, and what it compiles."""

import pytest

from tests.pallas_kernels import sass

KERNEL = """\
ptxas info    : Compiling entry function '{name}_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for {name}_mosaic_gpu_kernel
    {stack} bytes stack frame, {stack} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers, 1 bytes smem
"""


def test_takes_the_worst_of_all_kernels():
    text = KERNEL.format(name="a", stack=0, loads=0, registers=168)
    assert sass.parse(text) == (168, 0)
    text += KERNEL.format(name="b", stack=8, loads=12, registers=90)
    assert sass.parse(text) == (168, 20)


def test_says_nothing_of_what_was_not_compiled():
    with pytest.raises(RuntimeError, match="no Mosaic kernel"):
        sass.parse("ptxas info    : 0 bytes gmem")


def test_cases_have_one_form():
    cases = sass.cases()
    assert len({name for name, _, _ in cases}) == len(cases)
    assert all(callable(function) and isinstance(args, tuple) for _, function, args in cases)
