"""How the tests on several GPUs are run; no GPU is needed to ask."""

import os
import subprocess
import sys

import pytest

FILES = ("tests/native/test_overlap_gpu.py", "tests/overlap/test_gpus.py")


def output_of(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={key: os.environ[key] for key in os.environ if key != "NCCL_NVLS_ENABLE"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("file", FILES)
def test_multigpu_means_all_tests_of_several_ranks(file):
    asked = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", file)
    collected = [line for line in output_of(*asked, JAX_PLATFORMS="cpu") if "::" in line]
    marked = output_of(*asked, "-m", "multigpu", JAX_PLATFORMS="cpu")
    others = [line for line in collected if line not in marked]
    assert len(others) < len(collected)
    assert all("[one" in line for line in others), others


def test_several_gpus_do_without_multicast_unless_told():
    show = "import tests.conftest, os; print(os.environ['NCCL_NVLS_ENABLE'])"
    assert output_of("-c", show) == ["0"]
    assert output_of("-c", show, NCCL_NVLS_ENABLE="1") == ["1"]
