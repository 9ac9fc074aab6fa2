"""What importing a package brings in, seen in a fresh interpreter."""

import importlib.util
import subprocess
import sys

import pytest

# Modules that plan and translate in processes which must start fast and never touch a GPU.
HOST_ONLY = ["jpd.errors", "jpd.types", "jpd.config", "jpd.text"]
HOST_ONLY += ["jpd.engine.scheduler", "jpd.engine.pages", "jpd.engine.prefix_cache"]
HOST_ONLY += ["jpd.box", "jpd.bench.environment", "jpd.console"]
HOST_ONLY += ["jpd.engine.batch", "jpd.engine.shapes", "jpd.engine.sampler_inputs", "jpd.prompts"]


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded by `statement` in a new Python with this one's import path."""
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("package", ["jpd", "pallas_kernels", "native"])
def test_packages_are_importable(package):
    assert package in modules_after(f"import {package}")


def test_import_jpd_is_light():
    """`import jpd` and `jpd --help` must not wait for libraries that take seconds to import."""
    assert modules_after("import jpd") & {"jax", "transformers", "torch", "orbax"} == set()


@pytest.mark.parametrize("module", HOST_ONLY)
def test_host_modules_import_no_jax(module):
    assert importlib.util.find_spec(module) is not None, f"{module} is gone: mend HOST_ONLY"
    assert modules_after(f"import {module}") & {"jax", "jaxlib", "flax", "torch"} == set()


def test_kernels_and_native_do_not_import_jpd():
    assert "jpd" not in modules_after("import pallas_kernels, native")
