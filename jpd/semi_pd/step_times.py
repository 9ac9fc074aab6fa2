"""The times of both phases' steps as they are now, under any shares and on one executor."""

from __future__ import annotations

from jpd.semi_pd.controller import FULL, Shares
from jpd.semi_pd.flow import Load
from jpd.semi_pd.mixed_steps import MixedSteps
from jpd.semi_pd.share_models import DecodeTimeModel, Interference, PrefillTimeModel, Work


class StepTimes:
    """Two models that say what other shares would change, and what was seen last over what they say
    of it, which sets the scale: contexts are as they are now.

    Args:
        interference: of the two phases.
        memory_s: age at which a time is forgotten.
        noise: see the models.
        most_tokens: prompt tokens of a step.
        most_mixed_tokens: rows and prompt tokens of one that has both.
    """

    def __init__(
        self,
        interference: Interference,
        memory_s: float,
        noise: float,
        most_tokens: int,
        most_mixed_tokens: int,
    ) -> None:
        self.prefill = PrefillTimeModel(interference, memory_s, noise)
        self.decode = DecodeTimeModel(interference, memory_s, noise)
        self._most_tokens, self._most_mixed_tokens = most_tokens, most_mixed_tokens
        self._prefill_scale = self._decode_scale = 1.0

    @property
    def are_known(self) -> bool:
        """Whether a time of each phase was seen."""
        return bool(self.prefill.points and self.decode.points)

    def see_token(self, now_s: float, work: Work, seconds: float) -> None:
        """Takes the time of a prompt token of a prefill executor."""
        self.prefill.update(now_s, work, seconds)
        self._prefill_scale = seconds / self.prefill.predict(work)

    def see_step(self, now_s: float, work: Work, seconds: float) -> None:
        """Takes the time of a decode step."""
        self.decode.update(now_s, work, seconds)
        self._decode_scale = seconds / self.decode.predict(work)

    def see_mixed_token(self, now_s: float, seconds: float) -> None:
        """Takes the time by which a prompt token makes a step of one executor longer."""
        seconds += self._weights_s()  # a prefill executor reads them for itself
        self.see_token(now_s, Work(shares=FULL, other_busy=0.0), seconds)

    def token_s(self, shares: Shares, busy: float) -> float:
        """Of a prompt token under shares, while decode works this part of the time, 0..1."""
        return self._prefill_scale * self.prefill.predict(Work(shares=shares, other_busy=busy))

    def step_s(self, shares: Shares, decoding: float, busy: float) -> float:
        """Of a decode step under shares, while prefill works this part of the time, 0..1."""
        work = Work(shares=shares, other_busy=busy, sequences=decoding)
        return self._decode_scale * self.decode.predict(work)

    def alone_s(self, decoding: float) -> float:
        """Of a decode step on all SMs with no prompts beside or in it."""
        return self.step_s(FULL, decoding, 0.0)

    def mixed(self, load: Load) -> MixedSteps:
        """Steps of one executor that serves both phases."""
        return MixedSteps(
            load=load,
            decode_s=self.alone_s,
            token_s=max(0.0, self.token_s(FULL, 0.0) - self._weights_s()),
            most_tokens=max(1.0, self._most_mixed_tokens - load.decoding),
        )

    def _weights_s(self) -> float:
        """A prompt token's part of the time to read the weights, in a full step of prompts."""
        return self.alone_s(0.0) / self._most_tokens
