"""One copy of weights and KV pages, and the executors that are started on it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from multiprocessing.connection import Connection

from jpd.child import spawn
from jpd.config import SemiPDConfig
from jpd.engine.build import Prepared
from jpd.semi_pd import arrays, collectives
from jpd.semi_pd.layout import pages_layout
from jpd.semi_pd.messages import WorkerSpec
from jpd.semi_pd.mode import phases_of
from jpd.semi_pd.remote import RemoteExecutor
from jpd.semi_pd.storage import StorageOwner
from native.memory import Handle
from native.shares import SmShares


class SharedModel:
    """Loads the model into a storage owner, and again into another if that one is lost.

    Args:
      owner: started, with nothing in it.
      prepared: the engine.
      env: variables for the owner and the loader.
      generations: see `WorkerSpec`.
    """

    def __init__(
        self,
        owner: StorageOwner,
        prepared: Prepared,
        env: Mapping[str, str],
        generations: Handle | None,
    ) -> None:
        config = prepared.config
        self._owner = owner
        self._prepared = prepared
        self._env = env
        self._generations = generations
        part = prepared.split.rank_model
        self._weights = arrays.weights_layout(part, config.dtype)
        self._pages = pages_layout(
            num_layers=part.num_layers,
            num_pages=config.num_pages,
            page_size=config.page_size,
            num_kv_heads=part.num_kv_heads,
            head_dim=part.head_dim,
            dtype=config.dtype,
        )
        # How executors are chosen is the coordinator's business.
        self._config = config.replace(
            topology="unified", semi_pd=SemiPDConfig(), show_progress=False
        )
        self._started: dict[tuple[int, bool, bool], list[RemoteExecutor]] = defaultdict(list)
        """Executors that were to compare their kernels, by share and by phases of their steps."""
        self._load(config.show_progress)

    def _load(self, show_progress: bool) -> None:
        config = self._config
        self._owner.load(
            self._weights,
            self._pages,
            config.model,
            self._prepared.split,
            dtype=config.dtype,
            load_format=config.load_format,
            seed=config.seed,
            show_progress=show_progress,
        )

    @property
    def connection(self) -> Connection:
        """To wait on: readable when the memory is lost."""
        return self._owner.connection

    @property
    def is_lost(self) -> bool:
        """The process that held the memory has ended."""
        return self._owner.connection.poll()

    def renew(self) -> None:
        """Another owner, with the weights and empty pages; nobody may map the old one any more.

        Raises:
          ConfigError: see `StorageOwner.load`.
        """
        self._owner.stop()
        self._owner = StorageOwner.start(self._owner.devices, self._env)
        self._started.clear()
        self._load(show_progress=False)

    @property
    def pages(self) -> tuple[Handle, ...]:
        """The KV pages of each rank."""
        return self._owner.handles.pages

    def start_executor(
        self,
        phase: str,
        shares: SmShares | None,
        target: SharedModel | None,
        share: int,
    ) -> RemoteExecutor:
        """Starts an executor's process; it says `Ready` when it can run steps.

        Args:
          phase: "prefill" or "decode"; which steps it prepares for, see `phases_of`.
          shares: gives it its share; None gives it none.
          target: whose pages it sends the KV of prompts to; None where decode reads these.
          share: percent of the SMs.
        """
        prefill, decode = phases_of(self._prepared.config.topology, phase, share)
        same = self._started[share, prefill, decode]
        spec = WorkerSpec(
            config=self._config,
            split=self._prepared.split,
            eos_token_ids=self._prepared.eos_token_ids,
            phi=self._prepared.phi,
            weights=self._weights,
            pages=self._pages,
            handles=self._owner.handles,
            prefill=prefill,
            decode=decode,
            target_pages=() if target is None else target.pages,
            generations=self._generations,
            check_kernels=not any(executor.ready for executor in same),
        )
        env: dict[str, str] = {}
        if shares is not None:
            env |= shares.environment(share) | collectives.environment(self._owner.devices)
        child = spawn("jpd.semi_pd.worker", fds=spec.fds, env=env)
        try:
            with contextlib.suppress(ConnectionError):  # it has ended: its connection will tell
                child.connection.send(spec)
        except BaseException:
            child.kill()
            raise
        executor = RemoteExecutor(child, share)
        if spec.check_kernels:
            same.append(executor)
        return executor

    def stop(self) -> None:
        """Lets the memory go."""
        self._owner.stop()
