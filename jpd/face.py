"""What the blocking and the concurrent face of the engine have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jpd import prompts as prompt_forms
from jpd.config import EngineConfig
from jpd.engine.lane import ExecutorInfo, Switch
from jpd.engine.metrics import EngineStats
from jpd.models import ModelConfig
from jpd.semi_pd.build import build
from jpd.text import Tokenizer


class EngineFace:
    """Builds an engine and shows what it is; how requests get to it is up to the subclass."""

    def __init__(self, model: str, **engine_args: Any) -> None:
        self._engine = build(EngineConfig.from_kwargs(model, **engine_args))

    @property
    def config(self) -> EngineConfig:
        """The configuration with everything decided."""
        return self._engine.config

    @property
    def model_config(self) -> ModelConfig:
        """Shape and options of the model."""
        return self._engine.model_config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None with `skip_tokenizer_init`."""
        return self._engine.tokenizer

    @property
    def stats(self) -> EngineStats:
        """What the engine did since it started, and holds now."""
        return self._engine.coordinator.stats()

    @property
    def executors(self) -> list[ExecutorInfo]:
        """Executors in processes of their own, with the SMs that each really got; none where
        everything runs in this process."""
        return self._engine.topology.executors

    @property
    def switches(self) -> list[Switch]:
        """When executors took over from others: `done_s - held_s` is the pause of a phase."""
        return self._engine.topology.switches

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the model's turn."""
        return prompt_forms.chat(messages, self.tokenizer)
