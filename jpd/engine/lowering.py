"""Steps lowered to modules that outlive the process that traced them.

To trace and lower a step of kernels takes Python seconds, and one thread: Mosaic's lowering (jax
0.11) keeps state in globals. So a module is made once: in this process or, several at a time, in
others (`jpd.engine.lowering_pool`), by `jax.export`; it is kept on disk (`jpd.engine.stored_steps`)
under a key of everything that it depends on. Where that cannot be told, steps are lowered in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform as python
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from jpd import ops
from jpd.config import KernelConfig
from jpd.engine import lowering_pool
from jpd.engine.rank_step import input_shardings, on_all_ranks, overlaps
from jpd.engine.sampler import Sampled
from jpd.engine.shapes import StepShape
from jpd.engine.step import Progress, step
from jpd.engine.stored_steps import StepStore, StoredStep
from jpd.models import ModelConfig
from jpd.ops import registry
from jpd.ops.pallas import Gpu, gpu_seen, pretending, tracing_for
from jpd.parallel import Split

logger = logging.getLogger(__name__)

SHAPES_WORTH_PROCESSES = 4
"""A process takes seconds to import jax: fewer steps than these are lowered in this one."""

DONATED = (1, 2)
"""Pages and history, among the arguments of a step."""

_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy")
_NOT_LOWERING = (
    "compilation_cache",
    "persistent_cache",
    "visible_devices",
    "jax_platform",  # jax_platforms, jax_platform_name
    "jax_default_device",
    "jax_num_cpu_devices",
    "jax_log",
    "jax_debug_log_modules",
    "jax_explain_cache_misses",
    "jax_export_ignore_forward_compatibility",  # see `_for_this_version`
)
"""Parts of names of jax's settings that differ between processes and do not change a module."""

_LAYOUT = "LayoutConstraint"
"""What jax lowers `with_layout_constraint` to; `jax.export` does not know its own."""

_LOWERING = threading.RLock()
"""Held while a step is traced and lowered: Mosaic does one at a time."""

export.register_pytree_node_serialization(
    Sampled,
    serialized_name="jpd.engine.sampler.Sampled",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)


@dataclass(frozen=True)
class StepSource:
    """What the steps of an executor are made from, but for their shapes and inputs."""

    model: ModelConfig
    chunks: int
    """Prompt chunks of a step, at most."""
    page_size: int
    """Tokens."""
    phi: np.ndarray | None
    """`[L, Hq]` float32, see `jpd.ops.decode_attention`."""
    kernels: KernelConfig
    platform: str
    """What the steps run on, as jax names a device's platform."""
    gpu: Gpu | None
    """The GPU of that platform; None takes what is traced as this process finds it."""
    progress: Progress | None = None
    """Told by steps with prompt tokens how far they are."""
    split: Split | None = None
    """Over the ranks that run each step together, of which `model` is one's; None on one device."""

    def function(self, shape: StepShape) -> Callable[..., Any]:
        """The step as a function of its inputs."""
        progress = self.progress if shape.tokens else None
        run = partial(step, self.model, shape, self.chunks, self.page_size, progress=progress)
        if self.split is None:
            return partial(run, phi=self.phi)
        return on_all_ranks(run, self.split, self.phi, overlap=overlaps(shape))

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """The step is to be traced inside the block, by one thread at a time."""
        for_gpu = contextlib.nullcontext() if self.gpu is None else tracing_for(self.gpu)
        with _LOWERING, ops.using(self.kernels, self.platform), for_gpu:
            yield

    def export(self, shape: StepShape, inputs: Any) -> StoredStep:
        """Traces and lowers the step, on whatever machine this is.

        Args:
          shape: the step's.
          inputs: of the step: arrays, or what has their shapes and types.

        Raises:
          ConfigError: no selected implementation takes the step.
          ValueError: `jax.export` does not keep what the step consists of.
          ImportError: flatbuffers is not installed.
        """
        leaves, tree = jax.tree.flatten(_abstract(inputs))
        if self.split is not None:
            places = jax.tree.leaves(input_shardings(self.split, inputs))
            leaves = [leaf.update(sharding=p) for leaf, p in zip(leaves, places, strict=True)]
        function = self.function(shape)

        # The leaves and not the tree: jax.export takes no dict with other keys than names.
        def step_of_leaves(*leaves: Any) -> Any:
            return function(*jax.tree.unflatten(tree, leaves))

        platform = "cuda" if self.platform == "gpu" else self.platform
        # A module is kept for this version of the code alone, so these calls are what they are.
        targets = () if self.progress is None else self.progress.targets
        known = [export.DisabledSafetyCheck.custom_call(t) for t in (_LAYOUT, *targets)]
        exporting = export.export(
            jax.jit(step_of_leaves), platforms=[platform], disabled_checks=known
        )
        with self.tracing(), _for_this_version(), registry.recording() as choices:
            exported = exporting(*leaves)
        return StoredStep(bytes(exported.serialize()), tuple(choices))


@contextlib.contextmanager
def _for_this_version() -> Iterator[None]:
    """Modules exported inside the block are those that jax itself compiles.

    Others are written so that an older jax can read them: kernels in an older form of their IR. The
    setting is the process's, there is no public one of a thread.
    """
    name = "jax_export_ignore_forward_compatibility"
    before = jax.config.values[name]
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def settings() -> dict[str, Any]:
    """jax's settings that a module may depend on, as they hold in this thread."""
    return {
        name: value
        for name, value in jax.config.values.items()
        if not any(part in name for part in _NOT_LOWERING)
    }


@functools.cache
def _can_export() -> bool:
    """Whether jax can write modules; says once if not."""
    if importlib.util.find_spec("flatbuffers") is not None:
        return True
    logger.warning("steps are lowered one by one at every start: flatbuffers is not installed")
    return False


@functools.cache
def _code() -> str | None:
    """Hash of versions and of the sources that trace a step; None where they are not files."""
    digest = hashlib.sha256(f"{python.python_version()}".encode())
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    sources = {"jpd": ["*.py"], "native": ["*.py"], "pallas_kernels": ["*.py", "*.json"]}
    for package, kinds in sources.items():
        found = importlib.util.find_spec(package)
        folders = [] if found is None else found.submodule_search_locations or []
        files = [f for folder in folders for kind in kinds for f in Path(folder).rglob(kind)]
        if not files:
            return None
        for file in sorted(files):
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def fingerprint() -> str | None:
    """What modules depend on that no `StepSource` says; None if it cannot be told."""
    code = _code()
    return None if code is None else f"{code} {sorted(settings().items())!r}"


def known_implementations(kernels: KernelConfig) -> dict[str, list[str]] | None:
    """What each op may run with this selection; None if something of it is not jpd's own."""
    found = {}
    for name, op in registry.ops().items():
        found[name] = op.candidates(getattr(kernels, name))
        for candidate in found[name]:
            fn = op.implementations[candidate]
            module = getattr(fn, "__module__", None) or ""
            own = getattr(sys.modules.get(module), getattr(fn, "__name__", ""), None)
            if not module.startswith("jpd.ops.") or own is not fn:
                return None
    return found


def key(source: StepSource, shape: StepShape, inputs: Any) -> str | None:
    """Names a step by everything that its module depends on.

    Returns:
      A hash, or None where something cannot be told: an implementation that somebody registered,
      kernels that are interpreted, sources that are no files.
    """
    known, common = known_implementations(source.kernels), fingerprint()
    if known is None or common is None or pretending():
        return None
    leaves, tree = jax.tree.flatten(inputs)
    phi = source.phi
    parts = [
        common,
        known,
        dataclasses.replace(source.kernels, self_check=True),
        source.model,
        (source.chunks, source.page_size, source.platform, source.gpu),
        None if phi is None else (phi.shape, str(phi.dtype), phi.tobytes()),
        source.progress,
        source.split,
        shape,
        tree,
        [(leaf.shape, str(leaf.dtype)) for leaf in leaves],
    ]
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def _processes(source: StepSource, shapes: int) -> int:
    """How many processes are to lower so many shapes; 0 for this one.

    XLA's ops are lowered sooner than a process starts; it is kernels that take their time.
    """
    if source.gpu is None or shapes < SHAPES_WORTH_PROCESSES:
        return 0
    if not ops.may_run(source.kernels, source.platform):
        return 0
    return min(len(os.sched_getaffinity(0)), shapes, lowering_pool.MOST_PROCESSES)


class StepLowering:
    """Lowers the steps of an executor, or finds them lowered.

    Args:
      source: what they are made from.
      everywhere: where inputs are brought that are not on devices yet.
      inputs: the inputs of a shape: arrays, or what has their shapes and types.
      store: where modules are kept.
    """

    def __init__(
        self,
        source: StepSource,
        everywhere: jax.sharding.Sharding,
        inputs: Callable[[StepShape], Any],
        store: StepStore | None,
    ) -> None:
        self._source = source
        self._everywhere = everywhere
        self._inputs_of = inputs
        self._inputs: dict[StepShape, Any] = {}
        self._places: dict[StepShape, Any] = {}
        self._store = store

    def lower(self, shape: StepShape) -> Any:
        """The step of a shape as `jax.stages.Lowered`, from the store or traced now.

        Raises:
          ConfigError: no selected implementation takes the step.
        """
        self._look_at([shape])
        stored = self._find(shape)
        if stored is None:
            return self._here(shape)
        registry.replay(stored.choices)
        return self._take(shape, stored)

    def lower_ahead(
        self, shapes: list[StepShape]
    ) -> Generator[tuple[StepShape, Callable[[], Any]]]:
        """Each shape, in any order, with a function that gives it lowered, and soon, in any thread.

        What takes long is done between them: by other processes if there are several to lower for
        a GPU, else by this one.
        """
        self._look_at(shapes)
        missing = []
        for shape in shapes:
            stored = self._find(shape)
            if stored is None:
                missing.append(shape)
            else:
                registry.replay(stored.choices)
                yield shape, partial(self._take, shape, stored)
        with contextlib.closing(self._answers(missing)) as answers:
            for shape, answer in answers:
                if isinstance(answer, StoredStep):
                    registry.replay(answer.choices)
                    self._keep(shape, answer)
                    yield shape, partial(self._take, shape, answer)
                else:
                    if answer:
                        logger.warning("%s is lowered by this process: %s", shape, answer)
                    lowered = self._here(shape)
                    yield shape, lambda lowered=lowered: lowered
        if missing and self._store is not None:
            self._store.prune()

    def _answers(self, shapes: list[StepShape]) -> Generator[tuple[StepShape, StoredStep | str]]:
        """What other processes made of each shape, or why they did not; "" if none was asked."""
        jobs = []
        if _processes(self._source, len(shapes)) > 1:
            # What has no key depends on this process: another would make something else.
            keyed = [shape for shape in shapes if self._key(shape) is not None]
            jobs = [(shape, self._inputs[shape]) for shape in keyed]
        count = _processes(self._source, len(jobs))
        if count < 2:
            yield from ((shape, "") for shape in shapes)
            return
        yield from lowering_pool.lower(self._source, jobs, count, settings(), fingerprint())
        asked = dict(jobs)
        yield from ((shape, "") for shape in shapes if shape not in asked)

    def _look_at(self, shapes: list[StepShape]) -> None:
        """Notes what the inputs of shapes look like; here, in one thread."""
        for shape in shapes:
            inputs = self._inputs_of(shape)
            self._inputs[shape] = _abstract(inputs)
            self._places[shape] = jax.tree.map(
                lambda a: getattr(a, "sharding", None) or self._everywhere, inputs
            )

    def _key(self, shape: StepShape) -> str | None:
        return key(self._source, shape, self._inputs[shape]) if _can_export() else None

    def _find(self, shape: StepShape) -> StoredStep | None:
        name = None if self._store is None else self._key(shape)
        return None if name is None else self._store.get(name)

    def _keep(self, shape: StepShape, stored: StoredStep) -> None:
        name = None if self._store is None else self._key(shape)
        if name is not None:
            self._store.put(name, stored)

    def _take(self, shape: StepShape, stored: StoredStep) -> Any:
        """A module from elsewhere; traced here if jax does not take it after all."""
        try:
            return self._load(shape, stored)
        except Exception as error:  # of any kind: the bytes are jax's
            logger.warning("%s is lowered again, its module cannot be used: %s", shape, error)
        return self._directly(shape)

    def _load(self, shape: StepShape, stored: StoredStep) -> Any:
        exported = export.deserialize(bytearray(stored.module))

        def step(*inputs: Any) -> Any:
            return exported.call(*jax.tree.leaves(inputs))

        return self._lower(step, shape)

    def _here(self, shape: StepShape) -> Any:
        """Traced by this process, and kept if there is a store."""
        if self._store is None or self._key(shape) is None:
            return self._directly(shape)
        try:
            stored = self._source.export(shape, self._inputs[shape])
            # From the module here too: at the next start XLA's cache is to know what comes of it.
            lowered = self._load(shape, stored)
        except Exception as error:  # where the step itself is wrong, it is so again
            why = str(error)
        else:
            self._keep(shape, stored)
            return lowered
        lowered = self._directly(shape)
        logger.warning("%s is lowered at every start, jax.export refuses it: %s", shape, why)
        return lowered

    def _directly(self, shape: StepShape) -> Any:
        with self._tracing(shape):
            return self._lower(self._source.function(shape), shape)

    def _tracing(self, shape: StepShape) -> contextlib.AbstractContextManager[None]:
        """The step is to be traced inside the block, for this process alone."""
        del shape
        return self._source.tracing()

    def _lower(self, function: Callable[..., Any], shape: StepShape) -> Any:
        inputs = jax.tree.map(
            lambda a, place: a.update(sharding=place), self._inputs[shape], self._places[shape]
        )
        return jax.jit(function, donate_argnums=DONATED).lower(*inputs)


def _abstract(inputs: Any) -> Any:
    """Shapes and types of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)


def source_of(
    model: ModelConfig,
    *,
    chunks: int,
    page_size: int,
    phi: np.ndarray | None,
    kernels: KernelConfig,
    platform: str,
    progress: Progress | None = None,
    split: Split | None = None,
) -> StepSource:
    """What steps are made from on this process's devices of a platform."""
    gpu = gpu_seen() if platform == "gpu" and not pretending() else None
    return StepSource(model, chunks, page_size, phi, kernels, platform, gpu, progress, split)
