"""Runs steps on the device: plan -> padded arrays -> compiled step -> tokens.

An executor owns parameters, KV pages and the token history. `launch` returns at once; the
result is read later, when the next step is already under way.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpd import ops
from jpd.config import EngineConfig
from jpd.engine import batch as batches
from jpd.engine.compile import CompiledSteps, step_options, step_store
from jpd.engine.lowering import StepLowering, source_of
from jpd.engine.plan import Admission, Chunk, StepPlan, StepResult, TokenLogprobs
from jpd.engine.rank_lowering import RankLowering, StepCommunicators
from jpd.engine.sampler import Sampled
from jpd.engine.sampler_inputs import SamplingInputs, SamplingTable
from jpd.engine.shapes import ShapeTable, StepShape, shape_table
from jpd.engine.step import KVPages, Progress
from jpd.models import ModelConfig, Params
from jpd.parallel import ManyDevices, OneDevice, Placement
from jpd.types import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS


class InFlight:
    """A launched step; `result` waits for it.

    Args:
      plan: of the step.
      shape: it was padded to.
      out: its tokens, or `Sampled`.
      recomputed: number of softmax rows that were computed twice.
      communicators: by which its sums over ranks overlap.
    """

    def __init__(
        self,
        plan: StepPlan,
        shape: StepShape,
        out: Any,
        recomputed: jax.Array | None = None,
        communicators: Sequence[Any] = (),
    ) -> None:
        self.plan = plan
        self._shape = shape
        self._out = out
        self._recomputed = recomputed
        self._communicators = communicators
        for leaf in jax.tree.leaves((out, recomputed)):
            # A CPU's results are on the host already. Asking for a copy there would leave a
            # callback that takes Python's lock after the result was read: jax 0.11 aborts a
            # process that ends before it ran.
            if all(device.platform != "cpu" for device in leaf.devices()):
                leaf.copy_to_host_async()

    def result(self) -> StepResult:
        """Blocks until the device is done.

        Raises:
          RuntimeError: the step failed, or a collective of it, which then made its sums NaN and let
            the device go on.
        """
        result = self.read()
        for communicator in self._communicators:
            communicator.check()
        return result

    def read(self) -> StepResult:
        """Blocks until the device is done; what a failed collective left is returned as well."""
        count, first_chunk = len(self.plan.rows), self._shape.batch

        def used(values: jax.Array) -> np.ndarray:
            host = np.asarray(values)
            chunks = host[first_chunk : first_chunk + len(self.plan.chunks)]
            return np.concatenate([host[:count], chunks]) if len(chunks) else host[:count]

        recomputed = 0 if self._recomputed is None else int(self._recomputed)
        if isinstance(self._out, Sampled):
            out = jax.tree.map(used, self._out)
            logprobs = TokenLogprobs(out.logprobs, out.ranks, out.top_tokens, out.top_logprobs)
            return StepResult(out.tokens, logprobs, recomputed)
        return StepResult(used(self._out), None, recomputed)


def _plan_for_nobody(shape: StepShape, unowned_row: int) -> StepPlan:
    """The least that steps of a shape compute; nobody has its row of the history, nor page 0."""
    rows = min(1, shape.batch)
    zeros, table = np.zeros(rows, np.int32), np.zeros((rows, 1), np.int32)
    prompt = Chunk(None, unowned_row, 0, 0, np.zeros(1, np.int32), last=True)
    chunks = [prompt] if shape.tokens else []
    return StepPlan(
        rows=zeros + unowned_row,
        serials=zeros,
        sequences=[],
        tokens=zeros,
        positions=zeros,
        page_table=table,
        chunks=chunks,
        chunk_page_table=np.zeros((len(chunks), 1), np.int32),
        admitted=[],
        context_tokens=1,
        plain_greedy=shape.greedy,
    )


def _finish(newest: list[InFlight]) -> None:
    """Waits for a step: its arrays must not go, nor Python end, while the device works on it."""
    for step_in_flight in newest:
        step_in_flight.read()  # unchecked: communicators may be closed where Python ends


class Executor:
    """One device that runs steps, or several that run each step together.

    Args:
      config: resolved engine configuration.
      model_config: the model.
      params: its parameters, on the device or as `placement` has them.
      device: where everything lives.
      eos_token_ids: banned until a sequence has its `min_tokens`.
      phi: `[L, Hq]` float32, see `jpd.ops.decode_attention`; None takes the kernels' default.
      kv: the KV pages, which jax may update in place; made here when not given.
      shapes: what steps are padded to; for both phases when not given.
      placement: the devices, if the model is split over several; `device` is the first of them.
      progress: told by running steps how far they are.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        params: Params,
        device: jax.Device,
        eos_token_ids: tuple[int, ...],
        phi: np.ndarray | None = None,
        kv: KVPages | None = None,
        shapes: ShapeTable | None = None,
        placement: Placement | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.params = params
        self.placement = placement or OneDevice(device)
        self.shapes = shapes or shape_table(config)
        self.compiled = CompiledSteps(
            step_options(config.kernels) if ops.may_run(config.kernels, device.platform) else None
        )
        self._communicators = StepCommunicators()
        # The step launched last: it may still run when this executor goes, or Python ends.
        self._newest: list[InFlight] = []
        weakref.finalize(self, _finish, self._newest)
        self._config = config
        self._model = model_config = self.placement.rank_model or model_config
        self._device = device
        self._phi = phi
        self._progress = progress
        # Its last row, for padding, has the number of the history's unowned row.
        self._sampling = SamplingTable(
            config.max_num_seqs, MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + len(eos_token_ids)
        )
        self._unbiased: dict[int, tuple[jax.Array, jax.Array]] = {}
        self._eos_token_ids = eos_token_ids
        self._prompt_lengths = np.zeros(config.max_num_seqs + 1, np.int32)
        page = (config.page_size, model_config.num_kv_heads, model_config.head_dim)
        shape, place = self.placement.pages((config.num_pages, *page))
        zeros = jax.jit(lambda: jnp.zeros(shape, config.dtype), out_shardings=place)
        self.kv = kv or [(zeros(), zeros()) for _ in range(model_config.num_layers)]
        everywhere = self.placement.everywhere
        rows = (config.max_num_seqs + 1, config.max_model_len + 1)
        self.history = jax.jit(lambda: jnp.zeros(rows, jnp.int32), out_shardings=everywhere)()
        self._set_history = jax.jit(
            lambda history, row, tokens: history.at[row].set(tokens),
            donate_argnums=0,
            out_shardings=everywhere,
        )

    def _lowering(self) -> StepLowering:
        config = self._config
        several = isinstance(self.placement, ManyDevices)
        source = source_of(
            self._model,
            chunks=config.max_prefills_per_step,
            page_size=config.page_size,
            phi=self._phi,
            kernels=config.kernels,
            platform=self._device.platform,
            progress=self._progress,
            split=self.placement.split if several else None,
        )
        arrays = (self.params, self.kv, self.history)

        def inputs(shape: StepShape) -> Any:
            return *arrays, *self._host_inputs(shape, None)

        store = step_store(config.compilation_cache_dir)
        if several:
            return RankLowering(source, self.placement, inputs, store, self._communicators)
        return StepLowering(source, self.placement.everywhere, inputs, store)

    def _lower(self, shape: StepShape) -> Any:
        return self._lowering().lower(shape)

    @property
    def recompiles(self) -> int:
        """Step shapes that were compiled while requests waited."""
        return self.compiled.recompiles

    def compile_ahead(self) -> None:
        """Compiles every step shape and the history update."""
        self.compiled.compile_ahead(
            self.shapes.all(),
            self._lowering().lower_ahead,
            show_progress=self._config.show_progress,
        )
        self.load_history(self._config.max_num_seqs, np.zeros(0, np.int32))

    def run_for_nobody(self) -> None:
        """Runs each step shape once, with a row and a prompt of one token on page 0.

        A GPU takes in the kernels of a program when it first runs, which requests would wait for.
        """
        for shape in self.shapes.all():
            inputs = self._host_inputs(shape, _plan_for_nobody(shape, self._config.max_num_seqs))
            compiled = self.compiled.get(shape, self._lower)
            self.kv, self.history, *out = compiled(self.params, self.kv, self.history, *inputs)
            jax.block_until_ready(out)

    def release(self) -> None:
        """Waits for the device and lets go of parameters, pages, history and communicators, also if
        it failed."""
        try:
            _finish(self._newest)
        finally:
            self._newest.clear()
            self.params = self.kv = self.history = None
            self._communicators.release()

    def load_history(self, row: int, tokens: np.ndarray) -> None:
        """Puts the tokens of a row on the device; penalties are computed from them there."""
        padded = np.zeros(self.history.shape[1], np.int32)
        padded[: len(tokens)] = tokens
        self.history = self._set_history(self.history, np.int32(row), padded)

    def _host_inputs(
        self, shape: StepShape, plan: StepPlan | None
    ) -> tuple[np.ndarray, SamplingInputs | None, np.ndarray | None]:
        """The padded inputs of a step; those of an empty one without a plan."""
        config, chunks = self._config, self._config.max_prefills_per_step
        if plan is None:
            packed = np.zeros(batches.packed_size(shape, chunks, config.page_size), np.int32)
        else:
            packed = batches.pack(
                plan,
                shape,
                chunks=chunks,
                page_size=config.page_size,
                unowned_row=config.max_num_seqs,
            )
        if shape.greedy:
            return packed, None, None
        batch = batches.unpack(packed, shape, chunks, config.page_size)
        rows = np.concatenate([batch.rows, batch.chunk_rows])
        lengths = np.concatenate([batch.positions + 1, batch.chunk_contexts])
        prompts = self._prompt_lengths[rows]
        return packed, self._keep_unbiased(self._sampling.rows(rows, lengths - prompts)), prompts

    def _keep_unbiased(self, inputs: SamplingInputs) -> SamplingInputs:
        """Sends the bias arrays of a step without biases only once for each size."""
        if inputs.bias_ids.flags.writeable:
            return inputs
        size = len(inputs.bias_ids)
        if size not in self._unbiased:
            self._unbiased[size] = jax.device_put(
                (inputs.bias_ids, inputs.bias_values), self.placement.everywhere
            )
        ids, values = self._unbiased[size]
        return replace(inputs, bias_ids=ids, bias_values=values)

    def admit(self, admissions: list[Admission]) -> None:
        """Takes in rows that the next steps may hold."""
        for new in admissions:
            self._sampling.set(new.row, new.params, new.key, self._eos_token_ids)
            self._prompt_lengths[new.row] = new.prompt_length
            if new.tokens is not None:
                self.load_history(new.row, new.tokens)

    def launch(self, plan: StepPlan) -> InFlight:
        """Starts a step on the device and returns without waiting for it."""
        self.admit(plan.admissions)
        shape = self.shapes.pick(
            len(plan.rows),
            sum(len(c.tokens) for c in plan.chunks),
            plan.context_tokens,
            plan.plain_greedy,
        )
        inputs = self._host_inputs(shape, plan)
        compiled = self.compiled.get(shape, self._lower)
        results = compiled(self.params, self.kv, self.history, *inputs)
        self.kv, self.history, out, recomputed = results
        self._written(plan)
        used = self._communicators.of(shape)
        self._newest[:] = [InFlight(plan, shape, out, recomputed, used)]
        return self._newest[0]

    def _written(self, plan: StepPlan) -> None:
        """Called when `kv` is what a step will have made of the pages."""
