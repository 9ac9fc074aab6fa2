"""One tiny model and one compiled engine for all tests of the faces."""

from dataclasses import replace

import pytest

from jpd import AsyncLLM, EngineConfig
from jpd.engine.build import build
from jpd.engine.coordinator import Coordinator
from tests.engine.tiny_engine import one_executor
from tests.faces.tiny import SHAPES, make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def engine(folder):
    engine = build(EngineConfig(model=str(folder), **SHAPES))
    engine.executor.release = lambda: None  # every test closes its own face of this one
    return engine


@pytest.fixture
def built(engine, folder, monkeypatch):
    """Faces get a new coordinator on one compiled executor; holds the configs they asked for.

    The executor is only right for the config that `SHAPES` give.
    """
    configs = []

    def rebuild(config):
        configs.append(config)
        assert config == EngineConfig(model=str(folder), **SHAPES)
        coordinator = Coordinator(
            engine.config,
            engine.model_config,
            one_executor(engine.config, engine.executor),
            engine.tokenizer,
            engine.model_config.eos_token_ids,
        )
        return replace(engine, coordinator=coordinator)

    monkeypatch.setattr("jpd.face.build", rebuild)
    return configs


@pytest.fixture
def llm(built, folder):
    """An AsyncLLM, closed and checked after the test."""
    llm = AsyncLLM(str(folder), **SHAPES)
    yield llm
    llm.close()
    llm._engine.coordinator.scheduler.check_integrity()
