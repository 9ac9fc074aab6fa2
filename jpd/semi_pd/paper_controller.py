"""The controller of the paper: Algorithm 1 over the models of Eq. 4 (arXiv 2504.19867 §5)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jpd.config import require
from jpd.semi_pd.controller import Observation, Shares, Slo, SwitchInFlight
from jpd.semi_pd.share_models import TpotModel, TtftModel


@dataclass(kw_only=True)
class PaperController:
    """Algorithm 1: once a window, moves SMs to the phase that misses its SLO while the other holds.

    After `window_size` finished requests it takes the SLO percentile of their TPOT and of the TTFT
    seen meanwhile, adds them to the models at x' = x / (x + y) and y' = y / (x + y), and

    - TTFT fails, TPOT holds: raises x (past 100: lowers y instead) until the model says that TTFT
      holds, at most `max_step` times by `step_size`;
    - TPOT fails, TTFT holds: the same for y;
    - both hold, or both fail: keeps the shares.

    As printed the algorithm never counts its steps; it does here, as its text says.

    It departs from the released code (`DynamicPartitioner`) where that departs from the paper:

    - the models are fitted to what this server shows, by least squares, and use x / (x + y); the
      released ones are polynomials with fixed coefficients, over x, and their waiting term is not
      monotonic: 1.119 at 80 %, 1.112 at 98 %, 1 at 100 %;
    - both SLOs failing keeps the shares; the released code goes to (100, 100);
    - TPOT is (E2E - TTFT) / (n - 1); the released one leaves out what decode waits;
    - shares reach down to `min_share`; the released ones to 80 only;
    - the percentile interpolates; the released index runs past the end of a small window.

    As there, a window without a TTFT holds its SLO, and requests that finish or start while a
    switch is under way are not counted. Requests that still wait are not seen: it is the paper's
    blind spot, and `SloController` has none.
    """

    slo: Slo
    window_size: int = 400
    """Finished requests a decision (released code: 400)."""
    step_size: int = 2
    """Percent of the SMs a step (released code: 2)."""
    max_step: int = 3
    """Steps a decision at most (released code: 3)."""
    min_share: int = 10
    """Percent of the SMs that neither phase goes below. The paper names no floor."""
    max_points: int = 32
    """Windows that the models remember, latest ones. The paper names no limit; the load changes."""
    switch_timeout_s: float = 60.0
    """A switch that does not serve after this long is given up."""

    ttft_model: TtftModel = field(init=False)
    tpot_model: TpotModel = field(init=False)

    def __post_init__(self) -> None:
        for name in ("window_size", "step_size", "max_step"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(1 <= self.min_share <= 100, "min_share", self.min_share, "1..100 percent")
        self.ttft_model = TtftModel(self.max_points)
        self.tpot_model = TpotModel(self.max_points)
        self._switch = SwitchInFlight(self.switch_timeout_s)
        self._seen_under: Shares | None = None
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []

    def decide(self, observation: Observation, current: Shares) -> Shares:
        """Algorithm 1; `current` until `window_size` requests have finished under it."""
        under_way = self._switch.waiting_for(current, observation.now_s)
        if under_way is not None:
            self._empty_window()
            return under_way
        if current != self._seen_under:  # what is reported now was seen under other shares
            self._empty_window()
            self._seen_under = current
            return current
        self._ttft_s += observation.ttft_s
        self._tpot_s += observation.tpot_s
        if len(self._tpot_s) < self.window_size:
            return current
        wanted = self._plan(current)
        self._empty_window()
        if wanted != current:
            self._switch.ask(wanted, observation.now_s)
        return wanted

    def _plan(self, shares: Shares) -> Shares:
        prefill_part = shares.prefill / (shares.prefill + shares.decode)
        tpot_s = float(np.quantile(self._tpot_s, self.slo.percentile))
        self.tpot_model.update(1 - prefill_part, tpot_s)
        ttft_fails, tpot_fails = False, tpot_s > self.slo.tpot_s
        if self._ttft_s:
            ttft_s = float(np.quantile(self._ttft_s, self.slo.percentile))
            self.ttft_model.update(prefill_part, ttft_s)
            ttft_fails = ttft_s > self.slo.ttft_s
        if ttft_fails == tpot_fails:
            return shares
        x, y = shares.prefill, shares.decode
        for _ in range(self.max_step):
            if ttft_fails:
                if self.ttft_model.predict(x / (x + y)) <= self.slo.ttft_s:
                    break
                x, y = self._raise_first(x, y)
            else:
                if self.tpot_model.predict(y / (x + y)) <= self.slo.tpot_s:
                    break
                y, x = self._raise_first(y, x)
        return Shares(x, y)

    def _raise_first(self, first: int, second: int) -> tuple[int, int]:
        """One step towards the first; what would pass 100 is taken from the second instead."""
        beyond = max(0, first + self.step_size - 100)
        # A share that already lies below the floor is left there.
        return min(100, first + self.step_size), max(second - beyond, min(self.min_share, second))

    def _empty_window(self) -> None:
        self._ttft_s, self._tpot_s = [], []
