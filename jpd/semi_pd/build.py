"""From a configuration to a running semi-PD engine: owner, weights, executors, coordinator."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import wait as wait_for_any

import numpy as np

from jpd.config import EngineConfig, SemiPDConfig
from jpd.engine import build as engine_build
from jpd.engine import memory
from jpd.engine.build import Engine
from jpd.engine.recent import Recent
from jpd.errors import ConfigError
from jpd.semi_pd import arrays
from jpd.semi_pd.child import spawn
from jpd.semi_pd.controller import Shares
from jpd.semi_pd.layout import pages_layout
from jpd.semi_pd.messages import WorkerSpec
from jpd.semi_pd.pool import ExecutorPool
from jpd.semi_pd.remote import RemoteExecutor
from jpd.semi_pd.storage import StorageOwner
from jpd.semi_pd.topology import SemiPD
from native.affinity import CpuShares
from native.memory import allocate
from native.shares import SmShares


def build(config: EngineConfig) -> Engine:
    """Builds the engine of the topology that the configuration names.

    Raises:
      ConfigError: the configuration, the checkpoint or the machine does not allow it.
    """
    if config.topology == "unified":
        return engine_build.build(config)
    return _build_semi_pd(config)


def _uses_gpu() -> bool:
    """Whether executors will run on a GPU, decided without starting CUDA in this process."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return os.path.exists("/dev/nvidiactl") and not platforms.startswith("cpu")


def _build_semi_pd(config: EngineConfig) -> Engine:
    if _uses_gpu():
        raise NotImplementedError("topology='semi_pd' on a GPU")
    limit = memory.host_memory()
    prepared = engine_build.prepare(config, on_cpu=True, limit=limit, device="this machine")
    config, model = prepared.config, prepared.model
    weights = arrays.weights_layout(model, config.dtype)
    pages = pages_layout(
        num_layers=model.num_layers,
        num_pages=config.num_pages,
        page_size=config.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=config.dtype,
    )
    with ExitStack() as undo:
        owner = StorageOwner.start(weights, pages, "cpu")
        undo.callback(owner.stop)
        owner.load(
            config.model,
            dtype=config.dtype,
            load_format=config.load_format,
            seed=config.seed,
            show_progress=config.show_progress,
        )
        generations = None
        if config.semi_pd.check_ownership:
            generations = allocate(8 * config.num_pages, "cpu")
        spec = functools.partial(
            WorkerSpec,
            # What a user's controller holds is the coordinator's business.
            config=config.replace(semi_pd=SemiPDConfig(), show_progress=False),
            model=model,
            eos_token_ids=prepared.eos_token_ids,
            phi=prepared.phi,
            weights=weights,
            pages=pages,
            handles=owner.handles,
            generations=None if generations is None else generations.handle(),
        )
        topology = _topology(config, spec, owner.stop)
        undo.callback(topology.close)
        _wait_until_seated(topology)
        engine = engine_build.assemble(prepared, topology)
        if generations is not None:
            pool = engine.coordinator.scheduler.pool
            pool.generations = generations.array(0, (config.num_pages,), np.int64)
        undo.pop_all()
    return engine


def _topology(
    config: EngineConfig, spec: Callable[..., WorkerSpec], on_close: Callable[[], None]
) -> SemiPD:
    options = config.semi_pd
    first = Shares(options.prefill_share, options.decode_share)
    kept = [Shares(*pair) for pair in options.kept_shares]
    prefill_cpus, decode_cpus = CpuShares("low"), CpuShares("high")
    if not options.sm_shares:
        prefill_cpus = decode_cpus = None
    prefill = ExecutorPool(
        "prefill",
        functools.partial(_start, spec(prefill=True, decode=False), prefill_cpus),
        prefill_cpus,
        frozenset(s.prefill for s in kept),
    )
    decode = ExecutorPool(
        "decode",
        functools.partial(_start, spec(prefill=False, decode=True), decode_cpus),
        decode_cpus,
        frozenset(s.decode for s in kept),
    )
    return SemiPD(
        prefill,
        decode,
        first,
        config.max_num_seqs,
        depth=1 + config.async_scheduling,
        controller=options.controller,
        control_interval_s=options.control_interval_s,
        on_close=on_close,
    )


def _start(spec: WorkerSpec, shares: SmShares | None, share: int) -> RemoteExecutor:
    """Starts an executor's process; it says `Ready` when it can run steps."""
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if shares is not None:
        env |= shares.environment(share)
    child = spawn("jpd.semi_pd.worker", fds=spec.fds, env=env)
    child.connection.send(spec)
    return RemoteExecutor(child, share)


def _wait_until_seated(topology: SemiPD) -> None:
    """Waits for the first executor of each phase and for those to be kept ready.

    Raises:
      ConfigError: one of them could not be built.
    """
    seats = (topology.prefill, topology.decode)
    while True:
        topology.tend(Recent)
        for seat in seats:
            if seat.pool.failures:
                raise ConfigError(
                    f"the {seat.pool.phase} executor could not be started: {seat.pool.failures[0]}"
                )
        if all(seat.executor is not None and not seat.pool.num_starting for seat in seats):
            return
        wait_for_any([c for seat in seats for c in seat.pool.connections()])
