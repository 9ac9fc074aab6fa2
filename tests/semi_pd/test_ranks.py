"""Models split over several devices in every executor: the same tokens as on one device."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jpd import LLM, EngineConfig, SamplingParams
from jpd.engine import build as engine_build
from jpd.errors import ConfigError
from jpd.parallel import RULES
from jpd.semi_pd import build as semi_pd_build
from jpd.semi_pd import collectives, shared_model
from jpd.semi_pd.shared_model import SharedModel
from jpd.semi_pd.storage import Handles
from jpd.types import RequestOutput
from tests import tiny_models
from tests.engine.tiny_engine import SIZES
from tests.processes import wait_until

OPTIONS = SIZES | {"num_pages": 33, "skip_tokenizer_init": True, "show_progress": False}
MODELS = ("llama_bias", "qwen2")


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of executors: nearly all of the time goes there, for programs that run for microseconds."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    # Devices that wait for each other end the process after 40 s, which a busy machine may take.
    for what in ("call_terminate_timeout", "timeout"):
        flags += f" --xla_cpu_collective_{what}_seconds=1200"
    jax.devices()  # has read them here
    monkeypatch.setenv("XLA_FLAGS", flags.strip())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: tiny_models.make_checkpoint(name, place / name) for name in MODELS}


def work(name: str) -> tuple[list[dict], list[SamplingParams]]:
    """Prompts longer than a step, half of them with a common beginning, greedy and sampled."""
    common = tiny_models.random_prompt(name, 40, stream=99)
    kinds = [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.9, "repetition_penalty": 1.3, "n": 2},
    ]
    prompts, params = [], []
    for i in range(24):
        own = tiny_models.random_prompt(name, 5 + 7 * i % 40, stream=i)
        prompts.append({"prompt_token_ids": common[: 20 + i] + own if i % 2 else own})
        kind = kinds[i % len(kinds)]
        params.append(SamplingParams(**kind, seed=i, max_tokens=10 + i % 9, ignore_eos=True))
    return prompts, params


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [c.token_ids for output in outputs for c in output.outputs]


@pytest.fixture(scope="module")
def on_one_device(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    found = {}
    for name in MODELS:
        llm = LLM(str(folders[name]), **OPTIONS)
        found[name] = tokens(llm.generate(*work(name)))
        llm.close()
    return found


@pytest.mark.parametrize(
    ("name", "topology", "ranks", "killed"),
    [
        ("llama_bias", "semi_pd", 2, "prefill"),
        ("llama_bias", "disaggregated", 4, "decode"),  # each of its two KV heads is on two ranks
        ("qwen2", "semi_pd", 4, None),
        ("qwen2", "disaggregated", 2, None),
    ],
)
def test_the_same_tokens_as_on_one_device(
    folders: dict[str, Path],
    on_one_device: dict[str, list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    topology: str,
    ranks: int,
    killed: str | None,
) -> None:
    """With chunks and shared prefixes; an executor is killed and another maps all parts."""
    if topology == "disaggregated":
        monkeypatch.setitem(RULES, "vocab", None)  # another split, which executors are told of
    more = {"semi_pd": {"check_ownership": True}} if topology == "semi_pd" else {}
    llm = LLM(str(folders[name]), topology=topology, tensor_parallel_size=ranks, **more, **OPTIONS)
    outputs = llm._queue(llm._checked(*work(name), None))
    if killed is not None:
        for _ in range(60):
            llm._step()
        os.kill(getattr(llm._engine.topology, killed).executor.pid, signal.SIGKILL)
    while not all(o.finished for o in outputs):
        llm._step()
    assert tokens(outputs) == on_one_device[name]
    lost = int(killed is not None)
    coordinator = llm._engine.coordinator
    wait_until(lambda: coordinator.rest() or llm.stats.executors_lost == lost, "a loss is not seen")
    stats = llm.stats
    assert stats.cached_tokens > 0
    assert stats.recompiles == 0
    scheduler = coordinator.scheduler
    scheduler.check_integrity()
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    llm.close()


# ---- two processes with collectives on the same GPUs


class SomeShares:
    """Stands in for MPS."""

    def environment(self, share: int) -> dict[str, str]:
        return {"SHARE": str(share)}


def test_an_executor_that_shares_several_gpus_limits_its_collectives(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    def spawn(module: str, *, fds: tuple[int, ...], env: dict[str, str]) -> Any:
        started.append(env)
        return SimpleNamespace(connection=SimpleNamespace(send=lambda spec: None))

    monkeypatch.setattr(shared_model, "spawn", spawn)
    config = EngineConfig(model=str(folders["qwen2"]), tensor_parallel_size=2, **OPTIONS)
    prepared = engine_build.prepare(config, on_cpu=False, limit=1 << 30, device="a GPU")
    owner = SimpleNamespace(
        devices=("cuda:0", "cuda:1"), handles=Handles((), ()), load=lambda *_, **__: None
    )
    model = SharedModel(owner, prepared, {}, None)
    for shares, devices in (
        (SomeShares(), ("cuda:0", "cuda:1")),
        (SomeShares(), ("cuda:0",)),
        (SomeShares(), ("cpu", "cpu")),
        (None, ("cuda:0", "cuda:1")),  # on time slices
    ):
        owner.devices = devices
        model.start_executor("decode", shares, None, 50)
    option = "xla_gpu_nccl_collective_max_nchannels"
    assert "optimization_level" in os.environ["XLA_FLAGS"]  # what the user set stays
    ours = f"{os.environ['XLA_FLAGS']} --{option}={collectives.MOST_SMS}"
    assert [env.get("XLA_FLAGS") for env in started] == [ours, None, None, None]
    assert [env.get("SHARE") for env in started] == ["50", "50", "50", None]
    # XLA knows the option: it refuses others.
    jax.jit(lambda x: x + 1).lower(1.0).compile({option: collectives.MOST_SMS})


def test_what_could_block_collectives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives.check_sms(["cuda:0", "cuda:1"], 16)
    collectives.check_sms(["cuda:0"], 12)
    with pytest.raises(ConfigError, match="share of 12 SMs is not allowed with tensor_parallel_s"):
        collectives.check_sms(["cuda:0", "cuda:1"], 12)
    collectives.check_executors(["cuda:0", "cuda:1"], 7)
    for devices in (["cuda:0"], ["cpu", "cpu"]):
        collectives.check_executors(devices, 12)
    with pytest.raises(ConfigError, match=r"^8 executors, .* are not allowed .*: at most 7"):
        collectives.check_executors(["cuda:0", "cuda:1"], 8)
    monkeypatch.setenv("NCCL_MIN_NCHANNELS", "32")
    assert collectives.environment(["cuda:0"]) == {}
    with pytest.raises(ConfigError, match="NCCL_MIN_NCHANNELS='32' is not allowed: at most 16"):
        collectives.environment(["cuda:0", "cuda:1"])


def test_gpus_that_are_not_there_are_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi_pd_build, "_uses_gpu", lambda: True)
    message = r"'disaggregated' with tensor_parallel_size=96 needs cuda:0, .*, cuda:95: device='cu"
    with pytest.raises(ConfigError, match=message):
        LLM(str(folders["qwen2"]), topology="disaggregated", tensor_parallel_size=96, **OPTIONS)
