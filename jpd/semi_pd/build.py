"""From a configuration to a running semi-PD engine: owner, weights, executors, coordinator."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from contextlib import ExitStack

from tqdm.auto import tqdm

from jpd.config import EngineConfig, SemiPDConfig, require
from jpd.engine import build as engine_build
from jpd.engine.build import Engine
from jpd.engine.lane import PagesLostError
from jpd.errors import ConfigError
from jpd.semi_pd import collectives
from jpd.semi_pd.controller import Controller, Shares, Slo
from jpd.semi_pd.mode import UNIFIED_SHARE, BreakEven, ForeseenMode, ModePolicy
from jpd.semi_pd.paper_controller import PaperController
from jpd.semi_pd.pool import ExecutorPool
from jpd.semi_pd.shared_model import SharedModel
from jpd.semi_pd.slo_controller import SloController
from jpd.semi_pd.storage import StorageOwner
from jpd.semi_pd.topology import TwoPhases
from native.affinity import CpuShares
from native.memory import allocate
from native.mps import Mps, MpsError
from native.shares import SmShares

logger = logging.getLogger(__name__)

_CONTEXT_BYTES = 700 << 20
"""What a process on a GPU takes beside what it allocates: CUDA's context, loaded programs."""
_NCCL_BYTES = 1 << 30
"""And what NCCL takes on each GPU of a process that has several: its buffers for XLA's collectives
and for those that overlap."""


_KEPT = ((100, 100), (70, 30))
"""Shares kept ready for `topology="auto"` where nothing else is said, as it was served on arxiv
(`benchmarks/results/h200/semi_pd_serving.json`)."""


def build(config: EngineConfig) -> Engine:
    """Builds the engine of the topology that the configuration names.

    Raises:
      ConfigError: the configuration, the checkpoint or the machine does not allow it.
    """
    if config.topology == "unified":
        return engine_build.build(config)
    try:
        return _build_apart(config)
    except _NoSharesError as error:
        if config.topology != "auto":
            raise
        logger.warning("topology='auto' becomes 'unified': %s", error)
        return engine_build.build(config.replace(topology="unified", semi_pd=SemiPDConfig()))


class _NoSharesError(ConfigError):
    """MPS does not run here."""


def _uses_gpu() -> bool:
    """Whether executors will run on a GPU, decided without starting CUDA in this process."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return os.path.exists("/dev/nvidiactl") and not platforms.startswith("cpu")


def _build_apart(config: EngineConfig) -> Engine:
    """Prefill and decode executors, on the same devices or each on its own."""
    config = decided(config)
    on_gpu = _uses_gpu()
    options = config.semi_pd
    apart = config.topology == "disaggregated"
    in_shares = options.sm_shares and not apart
    if on_gpu and in_shares:
        # cuBLAS and cuDNN compute wrong numbers, or hang, on a part of the SMs.
        config = config.replace(kernels=dataclasses.replace(config.kernels, pallas_only=True))
    resources = ExitStack()
    try:
        prefill_shares, decode_shares, env = None, None, {}
        if in_shares:
            prefill_shares, decode_shares, env = _shares(on_gpu, resources)
        ranks = config.tensor_parallel_size
        owners = []
        for first in range(0, ranks * (1 + apart), ranks):
            places = [f"cuda:{first + rank}" if on_gpu else "cpu" for rank in range(ranks)]
            owners.append(_owner(config, places, env))
            resources.callback(owners[-1].stop)
        executors = 1 if apart else num_executors(config)
        if in_shares:
            collectives.check_executors(owners[0].devices, executors)
        each = _CONTEXT_BYTES + (_NCCL_BYTES if ranks > 1 else 0)
        contexts = executors * each if on_gpu else 0
        sharing = 1 if on_gpu else len(owners) * ranks  # all of a CPU's ranks share its memory
        prepared = engine_build.prepare(
            config,
            on_cpu=not on_gpu,
            limit=min(owner.free_bytes for owner in owners) // sharing - contexts,
            device="a GPU" if on_gpu else "this machine",
            executors=executors,
        )
        counts = None
        if options.check_ownership:
            counts = resources.enter_context(allocate(8 * prepared.config.num_pages, "cpu"))
        handle = None if counts is None else counts.handle()
        models = []
        for owner in owners:
            models.append(SharedModel(owner, prepared, env, handle))
            resources.callback(models[-1].stop)
        prefill, decode = models[0], models[-1]
        controller = make_controller(prepared.config)
        topology = TwoPhases(
            models,
            _pool("prefill", prefill, decode if apart else None, prefill_shares, config),
            _pool("decode", decode, None, decode_shares, config),
            Shares(options.prefill_share, options.decode_share),
            prepared.config.max_num_seqs,
            depth=1 + prepared.config.async_scheduling,
            controller=controller,
            mode_policy=make_mode_policy(config, controller),
            control_interval_s=options.control_interval_s,
            step_timeout_s=options.step_timeout_s,
            on_close=resources.close,
        )
        resources.callback(topology.close)
        _wait_until_seated(topology, prepared.config.show_progress)
        engine = engine_build.assemble(prepared, topology)
        if counts is not None:
            pool = engine.coordinator.scheduler.pool
            pool.generations = counts.array(0, (pool.num_pages,), "int64")
        return engine
    except BaseException:
        resources.close()
        raise


def _owner(config: EngineConfig, places: list[str], env: dict[str, str]) -> StorageOwner:
    """A storage owner on the devices of all ranks.

    Raises:
      ConfigError: one of them cannot be used.
    """
    try:
        return StorageOwner.start(places, env)
    except ConfigError as error:
        raise ConfigError(
            f"topology={config.topology!r} with tensor_parallel_size="
            f"{config.tensor_parallel_size} needs {', '.join(places)}: {error}"
        ) from error


def _shares(on_gpu: bool, resources: ExitStack) -> tuple[SmShares, SmShares, dict[str, str]]:
    """What gives prefill and decode executors their shares, and the variables of other processes.

    Raises:
      _NoSharesError: MPS does not run here.
    """
    if not on_gpu:
        return CpuShares("low"), CpuShares("high"), {}
    try:
        daemon = Mps.start()
    except MpsError as error:
        raise _NoSharesError(
            f"semi_pd.sm_shares=True is not possible here (False gives both phases slices of the "
            f"GPU's time): {error}"
        ) from error
    resources.callback(daemon.stop)
    # Who shares memory by CUDA IPC with a client of MPS is to be one too.
    return daemon, daemon, daemon.environment(100)


def decided(config: EngineConfig) -> EngineConfig:
    """With one of jpd's controllers where `controller="auto"` stands for it, and its shares.

    Warns of SLOs that nobody will aim at.

    Raises:
      ConfigError: that controller has one SLO and not the other.
    """
    options = config.semi_pd
    slos = {"ttft_slo_s": options.ttft_slo_s, "tpot_slo_s": options.tpot_slo_s}
    given = [name for name, value in slos.items() if value is not None]
    left_open = (
        options.controller == "auto"
        and options.break_even is None
        and options.sm_shares
        and (options.prefill_share, options.decode_share) == (100, 100)
    )
    if not left_open or config.topology != "auto" or config.prefill_policy != "mixed":
        if given and options.controller in ("auto", "static", "mean"):
            logger.warning(
                "semi_pd.%s: nobody aims at it with semi_pd.controller=%r; 'slo' and 'paper' do",
                given[0],
                options.controller,
            )
        return config
    for name, value in slos.items():
        also = f"a time in seconds, like semi_pd.{given[0]}, or neither" if given else ""
        require(not given or value is not None, f"semi_pd.{name}", value, also)
    own = dataclasses.replace(
        options,
        controller="slo" if given else "mean",
        kept_shares=options.kept_shares or _KEPT,
    )
    return config.replace(semi_pd=own)


def kept_shares(config: EngineConfig, phase: str) -> frozenset[int]:
    """Shares of one phase that always have a ready executor, beside the one that serves."""
    options = config.semi_pd
    kept = {getattr(Shares(*pair), phase) for pair in options.kept_shares}
    if config.topology == "auto" and phase == "decode":
        kept |= {options.decode_share, UNIFIED_SHARE}
    return frozenset(kept)


def num_executors(config: EngineConfig) -> int:
    """Executors that run at once at most, those that switches start in the background included."""
    options = config.semi_pd
    # Both phases may switch at the same time, and from shares that are not kept. The shares that
    # jpd's own controller takes are those that are kept, where there are any.
    stays = options.controller in ("slo", "mean") and options.kept_shares
    starts = options.is_controlled and not stays
    count = 0
    for phase in ("prefill", "decode"):
        kept = kept_shares(config, phase)
        begun = getattr(options, f"{phase}_share")
        count += len(kept) + 2 if starts else len(kept | {begun})
    return count


def make_controller(config: EngineConfig) -> Controller | None:
    """Who is asked for shares; None where nobody changes them.

    Args:
        config: with nothing left open, as `Prepared.config`.

    Raises:
        ConfigError: `max_num_batched_tokens` is open, and the controller needs it.
    """
    options = config.semi_pd
    if not isinstance(options.controller, str):
        return options.controller
    if options.controller in ("static", "auto"):
        return None
    slo = None
    if options.controller != "mean":
        slo = Slo(ttft_s=options.ttft_slo_s, tpot_s=options.tpot_slo_s)
    if options.controller == "paper":
        return PaperController(slo=slo)
    tokens = config.max_num_batched_tokens
    known = f"an int >= 1, as after `prepare`, for semi_pd.controller={options.controller!r}"
    require(tokens is not None, "max_num_batched_tokens", tokens, known)
    return SloController(
        slo=slo,
        allowed=[Shares(*pair) for pair in options.kept_shares] or None,
        max_num_batched_tokens=tokens,
        max_num_mixed_tokens=config.max_num_mixed_tokens,
    )


def make_mode_policy(config: EngineConfig, controller: Controller | None) -> ModePolicy | None:
    """Who decides between one executor and two; None where the topology does."""
    policy = config.semi_pd.break_even
    if config.topology != "auto":
        return None
    if policy is None:
        foresees = hasattr(controller, "decide_mode") and config.prefill_policy == "mixed"
        return ForeseenMode(controller) if foresees else BreakEven()
    return BreakEven(ratio=policy) if isinstance(policy, int | float) else policy


def _pool(
    phase: str,
    model: SharedModel,
    target: SharedModel | None,
    shares: SmShares | None,
    config: EngineConfig,
) -> ExecutorPool:
    start = functools.partial(model.start_executor, phase, shares, target)
    kept, timeout_s = kept_shares(config, phase), config.semi_pd.start_timeout_s
    return ExecutorPool(phase, start, shares, kept, timeout_s)


def _wait_until_seated(topology: TwoPhases, show_progress: bool) -> None:
    """Waits for the first executor of each phase and for those to be kept ready.

    Raises:
      ConfigError: one of them could not be built, or not in time, or what they map is gone.
    """
    pools = (topology.prefill.pool, topology.decode.pool)
    with tqdm(desc="executors", unit="ready", disable=not show_progress) as bar:
        while True:
            try:
                topology.seat()
            except PagesLostError as error:
                raise ConfigError("the storage owner ended while executors were started") from error
            for pool in pools:
                if pool.last_failure is not None:
                    raise ConfigError(
                        f"the {pool.phase} executor could not be started: {pool.last_failure}"
                    )
            ready = sum(pool.num_ready for pool in pools)
            bar.total = ready + sum(pool.num_starting for pool in pools)
            bar.update(ready - bar.n)
            if ready == bar.total:
                return
            topology.wait()
