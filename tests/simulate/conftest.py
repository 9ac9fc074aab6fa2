"""The model of all tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulate import simulated


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated.model_folder(tmp_path_factory.mktemp("simulate"))


@pytest.fixture(autouse=True)
def _close_engines() -> Iterator[None]:
    yield
    while simulated.made:
        simulated.made.pop().close()
