"""Programs that other processes lower are those that this one would have lowered."""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax import export

import benchmarks
from benchmarks import device_time, lowered
from benchmarks.budget import Budget
from benchmarks.gemm_cases import Gemm
from benchmarks.gemm_chains import gemm_chain
from benchmarks.lower_ahead import start_lowering
from benchmarks.lowered import Gpu, Lowering, LoweringProcessError, module_name
from benchmarks.lowering_worker import sendable
from jpd.child import spawn

pytest.importorskip("flatbuffers", reason="jax.export writes no modules without it")

ROOT = Path(benchmarks.__file__).parents[1]
H200 = Gpu("NVIDIA H200", 132)
CASE = Gemm(8, 256, 128)
FLAT = partial(gemm_chain, CASE, "flat_gemm", 2)
DIRECTLY = f"""
import sys
from pathlib import Path
from benchmarks.gemm_cases import Gemm
from benchmarks.gemm_chains import gemm_chain
from pallas_kernels import mosaic
with mosaic.tracing_for(*{tuple(H200)}):
    chain = gemm_chain({CASE}, "flat_gemm", 2)
    traced = chain._program().trace(*chain.specs)
    Path(sys.argv[1]).write_text(traced.lower(lowering_platforms=("cuda",)).as_text())
"""


@pytest.fixture
def started(monkeypatch):
    """The processes that are started."""
    found = []

    def noted(*args, **options):
        found.append(spawn(*args, **options))
        return found[-1]

    monkeypatch.setattr(lowered, "spawn", noted)
    return found


def body(text):
    """A module without the numbers that a process gives kernels, which their hashes have too.

    And without places in sources, and an empty attribute that is lost on the way.
    """
    text = text[text.index("func.func public @main") :]
    text = re.sub(
        r'kernel_hash = "(?:[^"\\]|\\.)*", |flat_gemm_\d|(?<=\{)backend_config = "", ', "", text
    )
    return re.sub(r' loc\("[^"]*"\)| loc\(#?\w+\)|^#loc.*\n', "", text, flags=re.MULTILINE).strip()


def test_they_are_the_programs_that_one_process_lowers(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # who called is another story
    directly = tmp_path / "directly"
    command = [sys.executable, "-c", DIRECTLY, str(directly)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    with Lowering({(CASE, "flat_gemm"): FLAT}, H200) as run:
        subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=600)
        module = run.modules[CASE, "flat_gemm"].result()
    exported = export.deserialize(bytearray(module))
    assert exported.platforms == ("cuda",)
    text = body(exported.mlir_module())
    assert text.count("@mosaic_gpu_v2") == 1
    assert text == body(directly.read_text())


def test_errors_come_back_and_a_process_that_ends_takes_one_program_with_it(started):
    wide = Gemm(8, 256, 100)
    chains = {
        ("unsent", "flat_gemm"): partial(lambda: None),
        ("refused", "flat_gemm"): partial(gemm_chain, wide, "flat_gemm", 2),
        ("dead", "flat_gemm"): partial(os._exit, 3),
        ("good", "flat_gemm"): FLAT,
        ("here", "xla"): partial(gemm_chain, CASE, "xla", 2),
    }
    with Lowering(chains, H200, processes=1) as run:
        assert run.modules.keys() == {*chains} - {("here", "xla")}
        assert "lambda" in str(run.modules["unsent", "flat_gemm"].exception())
        refused = run.modules["refused", "flat_gemm"].exception(60)
        with pytest.raises(LoweringProcessError, match=r"lower \('dead', 'flat_gemm'\).* exit 3"):
            run.modules["dead", "flat_gemm"].result()
        assert run.modules["good", "flat_gemm"].result()
    from pallas_kernels.flat_gemm import flat_gemm

    with pytest.raises(NotImplementedError) as info:
        flat_gemm(jnp.ones((8, 100), jnp.bfloat16), jnp.ones((256, 100), jnp.bfloat16))
    assert (type(refused), str(refused)) == (NotImplementedError, str(info.value))
    assert len(started) == 2
    assert all(child.process.returncode is not None for child in started)


def test_a_folder_keeps_them(tmp_path, started):
    chains = {(CASE, "flat_gemm"): FLAT}
    for _ in range(2):
        with Lowering(chains, H200, folder=tmp_path / "new") as run:
            module = run.modules[CASE, "flat_gemm"].result()
    assert (run.found, len(started)) == (1, 1)
    assert [file.read_bytes() for file in (tmp_path / "new").iterdir()] == [module]
    names = [
        module_name(FLAT, H200),
        module_name(FLAT, Gpu("NVIDIA H200", 66)),
        module_name(FLAT, Gpu("NVIDIA H100 80GB HBM3", 132)),
        module_name(partial(gemm_chain, CASE, "flat_gemm", 3), H200),
        module_name(partial(gemm_chain, CASE, "table", 2), H200),
    ]
    assert len({*names}) == len(names)


def test_the_end_of_a_run_leaves_no_process(started):
    cases = [Gemm(rows, 256, 128) for rows in (8, 16)]
    chains = {(case, "flat_gemm"): partial(gemm_chain, case, "flat_gemm", 2) for case in cases}
    with Lowering(chains, H200, processes=2):
        pass
    assert len(started) == 2
    assert all(child.process.returncode is not None for child in started)


def test_programs_for_another_gpu_are_not_used(capsys):
    with Lowering({}, H200) as run:
        run.modules["key"] = Future()
        assert run.modules_for(H200) is run.modules
        assert capsys.readouterr().out == ""
        for gpu in (None, Gpu("NVIDIA H200", 66)):
            assert run.modules_for(gpu) == {}
            assert "in vain for Gpu(kind='NVIDIA H200', sms=132)" in capsys.readouterr().out


def a_chain(calls):
    x = jnp.ones((4,))
    return device_time.Chain(lambda a, b: a + b, x, x, calls)


def on_cpu(chain):
    """What `Chain.export` gives, for a program that runs here."""
    return bytes(export.export(chain._program(), platforms=["cpu"])(*chain.specs).serialize())


def test_a_program_is_loaded_as_it_was():
    x, module = jnp.ones((4,)), on_cpu(a_chain(3))
    outs = a_chain(3).load(module).compile()(x, [x, 2 * x, 3 * x])
    assert [float(y[0]) for y in outs] == [2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="pytree"):
        a_chain(2).load(module)


def test_chains_are_compiled_from_what_other_processes_lowered(monkeypatch):
    calls = {"ready": 3, "late": 4, "refused": 5, "here": 6, "never": 7}
    monkeypatch.setattr(device_time, "gpu_of_jax", lambda: H200)
    lowered_here = []
    lower = device_time.Chain.lower
    monkeypatch.setattr(
        device_time.Chain, "lower", lambda self: lowered_here.append(self.calls) or lower(self)
    )
    with Lowering({}, H200) as run:
        run.modules |= {key: Future() for key in calls if key != "here"}
        run.modules["ready"].set_result(on_cpu(a_chain(3)))
        run.modules["refused"].set_exception(NotImplementedError("M = 5"))
        chains = {key: partial(a_chain, n) for key, n in calls.items()}
        with device_time.CompileAhead(chains, lowering=run, ahead=9) as ahead:
            assert ahead.take("ready").calls == 3
            run.modules["late"].set_result(on_cpu(a_chain(4)))
            x = jnp.ones((4,))
            assert len(ahead.take("late").programs["stream"](x, [x] * 4)) == 4
            refused = ahead.take("refused")
            assert (type(refused), str(refused)) == (NotImplementedError, "M = 5")
            assert ahead.take("here").calls == 6
        assert lowered_here == [6]
        assert run.modules["never"].cancelled()


def test_the_name_of_a_program_has_all_sources_that_make_it():
    code = (
        "import sys, benchmarks.attention_chains, benchmarks.gemm_chains, benchmarks.device_time, "
        "benchmarks.gemm_impls, benchmarks.lowering_worker\n"
        "print(*(m for m in sys.modules if m.startswith('benchmarks.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    used = {f"{name.partition('.')[2]}.py" for name in done.stdout.split()}
    assert used <= {*lowered.SOURCES["benchmarks"]}
    for folder, patterns in lowered.SOURCES.items():
        for pattern in patterns:
            assert any((ROOT / folder).glob(pattern)), (folder, pattern)


class _Odd(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def test_an_error_that_is_not_pickled_keeps_its_name_and_message():
    error = NotImplementedError("M = 3")
    assert sendable(error) is error
    odd = sendable(_Odd(1, 2))
    assert (type(odd), str(odd)) == (RuntimeError, "_Odd: 1 2")


def test_a_gpu_is_named_with_its_sms():
    assert Gpu.parse("NVIDIA H200:132") == H200
    for text in ("NVIDIA H200", ":132", "NVIDIA H200:0", "NVIDIA H200:many"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not like"):
            Gpu.parse(text)


class Driver:
    """As libcuda answers on a machine with a GPU."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 5 + ordinal
        return 0

    def cuDeviceGetName(self, name, size, device):
        assert device.value == 5
        name.value = b"NVIDIA H200"[:size]
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {16: 132}[attribute]
        return 0


def test_the_driver_says_which_gpu_it_is(monkeypatch):
    monkeypatch.setattr(lowered.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert Gpu.of_driver() == H200
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert Gpu.of_driver() == H200
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert Gpu.of_driver() is None
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)  # CUDA_ERROR_NO_DEVICE
    assert Gpu.of_driver() is None


def test_a_folder_without_a_gpu_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Gpu, "of_driver", lambda: None)
    args = argparse.Namespace(lowered=tmp_path)
    with pytest.raises(SystemExit, match="no GPU that jax may use"):
        start_lowering(args, Budget(), dict)
    for budget, folder in ((Budget(0), tmp_path), (Budget(), None)):
        with start_lowering(argparse.Namespace(lowered=folder), budget, pytest.fail) as run:
            assert run is None


def test_a_machine_without_a_gpu_fills_the_folder(tmp_path):
    command = [sys.executable, "-m", "benchmarks.decode_attention", "--quick", "--cases", "B=1"]
    command += ["--softmax", "async", "--out", str(tmp_path), "--lower-for", "NVIDIA H200:132"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "--lower-for needs --lowered" in done.stderr
    command += ["--lowered", str(tmp_path / "modules")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "0 programs found, 1 lowered, 0 refused, 0 failed" in done.stdout
    assert "1 others are lowered where they run (jax_triton)" in done.stdout
    assert done.returncode == 0
    assert len([*(tmp_path / "modules").iterdir()]) == 1
    assert [*tmp_path.iterdir()] == [tmp_path / "modules"]
