"""An engine in virtual time: the coordinator, scheduler, pools and seats of the real one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jpd.config import EngineConfig, require
from jpd.engine import build as engine_build
from jpd.engine.build import Prepared
from jpd.engine.coordinator import Coordinator
from jpd.engine.lane import Lane, OneExecutor, Switch
from jpd.engine.shapes import shape_table
from jpd.semi_pd import build as semi_pd_build
from jpd.semi_pd.controller import Shares
from jpd.semi_pd.mode import phases_of
from jpd.semi_pd.pool import ExecutorPool
from jpd.semi_pd.topology import TwoPhases
from jpd.simulate.device import SimulatedExecutor, VirtualGpu
from jpd.simulate.latency import LatencyModel


@dataclass(frozen=True, slots=True)
class SimulatedEngine:
    """What `jpd.engine.build.Engine` is to a real one."""

    config: EngineConfig
    gpu: VirtualGpu
    topology: OneExecutor | TwoPhases
    coordinator: Coordinator

    def close(self) -> None:
        """Ends what is left of it."""
        self.coordinator.close()

    @property
    def switches(self) -> list[Switch]:
        """Changes of executors, in the order of time; none at the start."""
        if not isinstance(self.topology, TwoPhases):
            return []
        seats = (self.topology.prefill, self.topology.decode)
        found = [switch for seat in seats for switch in seat.switches[1:]]
        return sorted(found, key=lambda switch: switch.done_s)


def prepare(config: EngineConfig, memory_bytes: int, gpu_name: str) -> Prepared:
    """Decides everything that is open, as the real engine would on GPUs with this much memory each.

    The folder needs a `config.json` only. The prefix cache is off: prompts have no content here.

    Raises:
      ConfigError: the configuration does not fit the model or the memory.
    """
    config = semi_pd_build.decided(config).replace(
        load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=False
    )
    executors = 1
    if config.topology in ("semi_pd", "auto"):
        executors = semi_pd_build.num_executors(config)
    return engine_build.prepare(
        config, on_cpu=False, limit=memory_bytes, device=gpu_name, executors=executors
    )


def build(prepared: Prepared, latencies: LatencyModel) -> SimulatedEngine:
    """An engine whose executors are ready; its clock stands at 0.

    Args:
      prepared: by `prepare`. A controller that is an object serves one engine only.
      latencies: how long everything takes.

    Raises:
      ConfigError: the latencies are of another number of GPUs.
    """
    config, gpu = prepared.config, VirtualGpu(latencies)
    known = latencies.tensor_parallel_size
    require(
        config.tensor_parallel_size == known,
        "tensor_parallel_size",
        config.tensor_parallel_size,
        f"{known}, which the latencies are of ({latencies.source})",
    )
    if config.topology == "unified":
        executor = SimulatedExecutor(gpu, shape_table(config), 100)
        topology = OneExecutor(executor, config.max_num_seqs, depth=1 + config.async_scheduling)
    else:
        gpu.now_s = -latencies.start_s
        topology = _two_phases(config, gpu)
        topology.seat()
        gpu.advance_to(0.0)
        topology.seat()
    coordinator = Coordinator(
        config, prepared.model, topology, None, prepared.eos_token_ids, clock=gpu.clock
    )
    return SimulatedEngine(config, gpu, topology, coordinator)


class _TwoPhases(TwoPhases):
    """Two phases that wait in virtual time."""

    def __init__(self, gpu: VirtualGpu, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, clock=gpu.clock)
        self._gpu = gpu

    def wait(self, patience_s: float = math.inf) -> Lane | None:
        until_s = self._gpu.now_s + patience_s
        return self._gpu.wait(self.lanes, [*self.ready_times_s(), until_s])

    def ready_times_s(self) -> list[float]:
        """When each executor that is being started can serve."""
        executors = [e for seat in self._seats for e in seat.pool.connections()]
        return [executor.ready_s for executor in executors if executor.ready is None]


def _two_phases(config: EngineConfig, gpu: VirtualGpu) -> _TwoPhases:
    options, model = config.semi_pd, gpu.model
    controller = semi_pd_build.make_controller(config)

    def pool(phase: str) -> ExecutorPool:
        place = int(config.topology == "disaggregated" and phase == "decode")

        def start(share: int) -> SimulatedExecutor:
            prefill, decode = phases_of(config.topology, phase, share)
            return SimulatedExecutor(
                gpu,
                shape_table(config, prefill=prefill, decode=decode),
                share,
                place=place,
                ready_s=gpu.now_s + model.start_s,
                message_s=model.overheads.message_s,
            )

        kept = semi_pd_build.kept_shares(config, phase)
        return ExecutorPool(phase, start, None, kept, clock=gpu.clock)  # no start hangs

    return _TwoPhases(
        gpu,
        (),  # weights and pages that nobody loses
        pool("prefill"),
        pool("decode"),
        Shares(options.prefill_share, options.decode_share),
        config.max_num_seqs,
        depth=1 + config.async_scheduling,
        controller=controller,
        mode_policy=semi_pd_build.make_mode_policy(config, controller),
        control_interval_s=options.control_interval_s,
        step_timeout_s=options.step_timeout_s,
        on_close=lambda: None,
    )
