"""What all tests share: they run on the CPU unless GPU tests are asked for by their marker."""

import os

import pytest
from hypothesis import settings

# Before any test module imports jax, which reads it once. `make test-gpu` sets it otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Wall-clock limits on single examples fail on a busy machine and say nothing about jpd.
settings.register_profile("jpd", deadline=None)
settings.load_profile("jpd")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fails a selected GPU test where JAX sees no GPU, skips a multi-GPU test where it sees one."""
    needs_many = item.get_closest_marker("multigpu") is not None
    if not needs_many and item.get_closest_marker("gpu") is None:
        return
    import jax

    try:
        gpus = len(jax.devices("gpu"))
    except RuntimeError as error:
        pytest.fail(f"this test needs a GPU (run it by `make test-gpu`): {error}", pytrace=False)
    if needs_many and gpus < 2:
        pytest.skip(f"needs 2 GPUs, JAX sees {gpus}")
