"""The engine's loop: plan -> launch -> commit, for each lane of the topology.

The coordinator owns requests, pages and the topology with its executors. `step` plans and launches
the next step before it reads the tokens of the one that runs, so the device does not wait for the
host.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from jpd.config import EngineConfig, PrefillPolicy, SchedulingPolicy, require
from jpd.engine import output as outputs
from jpd.engine.lane import ExecutorLostError, Lane, OneExecutor, PagesLostError, Topology
from jpd.engine.metrics import EngineStats
from jpd.engine.output import Request
from jpd.engine.plan import Committed, StepPlan, StepResult
from jpd.engine.recent import Recent, RecentSteps
from jpd.engine.sampler_inputs import sequence_key
from jpd.engine.scheduler import Scheduler
from jpd.engine.sequence import Sequence
from jpd.engine.shapes import shape_table
from jpd.errors import EngineDeadError, PromptTooLongError, RequestError
from jpd.models import ModelConfig
from jpd.text import Tokenizer
from jpd.types import MAX_STOP_TOKEN_IDS, Delta, FinishReason, RequestOutput, SamplingParams

_OVERTAKEN_S = 0.005
"""For each token of its prompt: how much later than a request another may come that goes before it
with the policy "shortest", which is many times as long as to compute a token takes on a GPU."""


class Coordinator:
    """Serves requests on the executors of a topology.

    Args:
      config: resolved engine configuration.
      model: the model.
      topology: runs the steps.
      tokenizer: None serves token ids only.
      eos_token_ids: tokens that end a sequence.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        topology: Topology,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = Scheduler(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            most_tokens=shape_table(config).most_tokens,
            max_prefills_per_step=config.max_prefills_per_step,
            num_pages=config.num_pages,
            page_size=config.page_size,
            max_stop_ids=MAX_STOP_TOKEN_IDS + len(eos_token_ids),
            enable_prefix_caching=config.enable_prefix_caching,
            one_executor=isinstance(topology, OneExecutor),
            two_pools=config.topology == "disaggregated",
            tag_pages=config.semi_pd.check_ownership,
        )
        self._stats = EngineStats()
        self._recent = RecentSteps()
        self.clock = clock
        self._config = config
        self._vocab_size = model.vocab_size
        self._topology = topology
        self._mode = self._mode_of(topology)
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._deadlines: list[tuple[float, int, RequestOutput]] = []
        self._cause: BaseException | None = None
        self._given_up: list[Delta] = []
        self._seeds = np.random.default_rng(config.seed)
        self._most_mixed_tokens = self.max_num_mixed_tokens

    @property
    def prefill_policy(self) -> PrefillPolicy:
        """See `EngineConfig`. May be assigned: another one holds from the next step on.

        Raises:
          ConfigError: the topology or the name does not allow it.
        """
        return self._config.prefill_policy

    @prefill_policy.setter
    def prefill_policy(self, policy: PrefillPolicy) -> None:
        self._config = self._config.replace(prefill_policy=policy)

    @property
    def max_num_mixed_tokens(self) -> int:
        """See `EngineConfig`. May be assigned, up to the engine's own: another one holds from the
        next step on. Steps are padded to the shapes that the engine has (`token_buckets`), so one
        that is no bucket gains nothing over the next bucket.

        Raises:
          ConfigError: it is not between `max_num_seqs` and the engine's own.
        """
        return self._config.max_num_mixed_tokens or self._config.max_num_batched_tokens

    @max_num_mixed_tokens.setter
    def max_num_mixed_tokens(self, tokens: int) -> None:
        changed = self._config.replace(max_num_mixed_tokens=tokens)
        most = self._most_mixed_tokens
        known = tokens is not None and tokens <= most
        require(known, "max_num_mixed_tokens", tokens, f"at most the engine's {most}")
        self._config, self.scheduler.most_tokens = changed, shape_table(changed).most_tokens

    @property
    def scheduling_policy(self) -> SchedulingPolicy:
        """See `EngineConfig`. May be assigned: another one holds for requests to come.

        Raises:
          ConfigError: there is none of that name.
        """
        return self._config.scheduling_policy

    @scheduling_policy.setter
    def scheduling_policy(self, policy: SchedulingPolicy) -> None:
        self._config = self._config.replace(scheduling_policy=policy)

    # ---- requests

    @property
    def has_work(self) -> bool:
        """A request is unfinished or a step is running."""
        return self.scheduler.has_work or any(lane.in_flight for lane in self._topology.lanes)

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        scheduler = self.scheduler
        return replace(
            self._stats,
            preemptions=scheduler.stats.preemptions,
            prompt_tokens=scheduler.stats.prompt_tokens,
            cached_tokens=scheduler.stats.cached_tokens,
            requeued=scheduler.stats.requeued,
            recompiles=self._topology.recompiles,
            mode=self._mode,
            break_even_estimate=self._topology.break_even_estimate,
            executors_lost=self._topology.num_lost,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_pages=scheduler.pool.num_free,
        )

    def recent(self) -> Recent:
        """What happened since the last call; for whoever steers the topology."""
        scheduler, recent = self.scheduler, self._recent.take()
        recent.now_s = self.clock()
        recent.waiting_requests = scheduler.num_without_token
        recent.waiting_tokens = scheduler.prefill_tokens()
        recent.decoding_requests = scheduler.num_decoding
        recent.free_pages_fraction = scheduler.pool.num_free / scheduler.pool.num_usable
        return recent

    def forget_prefixes(self) -> None:
        """Drops the prefix cache, because the parameters that made its pages changed."""
        self.scheduler.forget_prefixes()

    def check(self, prompt_token_ids: list[int], params: SamplingParams, priority: int = 0) -> None:
        """Raises `RequestError` for a request that this engine can never serve."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params={params!r} is not allowed: SamplingParams")
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise RequestError(f"priority={priority!r} is not allowed: an int")
        if self._config.scheduling_policy != "priority" and priority != 0:
            raise RequestError(f"priority={priority} needs scheduling_policy='priority'")
        count, limit = len(prompt_token_ids), self._config.max_model_len
        if count == 0:
            raise RequestError("the prompt is empty: at least one token is needed")
        if count >= limit:
            raise PromptTooLongError(
                f"the prompt has {count} tokens; max_model_len={limit} leaves room for a prompt "
                f"of at most {limit - 1}"
            )
        if params.max_tokens is not None and count + params.max_tokens > limit:
            raise PromptTooLongError(
                f"prompt of {count} tokens + max_tokens={params.max_tokens} exceeds "
                f"max_model_len={limit}"
            )
        if count + params.min_tokens > limit:
            raise PromptTooLongError(
                f"prompt of {count} tokens + min_tokens={params.min_tokens} exceeds "
                f"max_model_len={limit}"
            )
        ids = {
            "prompt token id": prompt_token_ids,
            "stop_token_ids": params.stop_token_ids,
            "logit_bias token id": tuple(params.logit_bias or ()),
        }
        for name, values in ids.items():
            if len(values) and not 0 <= min(values) <= max(values) < self._vocab_size:
                bad = next(v for v in values if not 0 <= v < self._vocab_size)
                raise RequestError(f"{name} {bad} is not in [0, {self._vocab_size})")
        if params.stop and self._tokenizer is None:
            raise RequestError(f"stop={params.stop!r} needs a tokenizer; use stop_token_ids")
        pages = self.scheduler.pages_for(self._length_limit(count, params))
        if pages > self.scheduler.pool.num_usable:
            raise PromptTooLongError(
                f"prompt of {count} tokens + max_tokens={params.max_tokens} needs {pages} pages of "
                f"{self._config.page_size} tokens; the engine has "
                f"{self.scheduler.pool.num_usable}"
            )

    def _length_limit(self, prompt_tokens: int, params: SamplingParams) -> int:
        if params.max_tokens is None:
            return self._config.max_model_len
        return prompt_tokens + params.max_tokens

    def add(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
    ) -> RequestOutput:
        """Accepts a request; its output object is filled as tokens come.

        Raises:
          RequestError: it can never be served, or the id is in use.
        """
        self.check(prompt_token_ids, params, priority)
        if not isinstance(request_id, str):
            raise RequestError(f"request_id={request_id!r} is not allowed: a string")
        if request_id in self._requests:
            raise RequestError(f"request_id {request_id!r} is in use")
        request = outputs.make_request(
            request_id, prompt, prompt_token_ids, params, self._tokenizer, self.clock()
        )
        seed = params.seed if params.seed is not None else int(self._seeds.integers(2**63))
        eos = () if params.ignore_eos else self._eos_token_ids
        shortest = self._config.scheduling_policy == "shortest"
        overtaken_s = _OVERTAKEN_S * len(prompt_token_ids) if shortest else 0.0
        for index in range(params.n):
            sequence = Sequence(
                request_id=request_id,
                index=index,
                tokens=np.array(prompt_token_ids, np.int32),
                params=params,
                order=(priority, self._arrivals),
                arrival_s=request.output.metrics.arrival_s,
                overtaken_s=overtaken_s,
                max_length=self._length_limit(len(prompt_token_ids), params),
                stop_ids=tuple({*eos, *params.stop_token_ids}),
                key=sequence_key(seed, index),
            )
            self._arrivals += 1
            request.sequences.append(sequence)
            self.scheduler.add(sequence)
        self._requests[request_id] = request
        if params.timeout_s is not None:
            deadline = request.output.metrics.arrival_s + params.timeout_s
            heapq.heappush(self._deadlines, (deadline, self._arrivals, request.output))
        return request.output

    def abort(self, request_id: str) -> list[Delta]:
        """Ends a request in whatever state it is; an unknown or finished one is left alone."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        self._stats.requests_aborted += 1
        return self._end_all(request, FinishReason.ABORT)

    def _time_out(self) -> list[Delta]:
        """Ends the requests whose time is over, in whatever state they are."""
        deltas, now = [], self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, output = heapq.heappop(self._deadlines)
            request = self._requests.get(output.request_id)
            # The id may be in use again, by a later request.
            if request is not None and request.output is output:
                del self._requests[output.request_id]
                self._stats.requests_timed_out += 1
                deltas += self._end_all(request, FinishReason.TIMEOUT)
        return deltas

    def _patience_s(self) -> float:
        """How long it is until the time of a request is over."""
        if not self._deadlines:
            return math.inf
        return max(self._deadlines[0][0] - self.clock(), 0.0)

    def _end_all(self, request: Request, reason: FinishReason) -> list[Delta]:
        """Ends what is left of a request."""
        deltas = []
        for sequence, completion in zip(request.sequences, request.output.outputs, strict=True):
            if completion.finish_reason is None:
                self.scheduler.finish(sequence, reason)
                deltas.append(self._end(request, sequence, reason))
        return deltas

    def _end(self, request: Request, sequence: Sequence, reason: FinishReason) -> Delta:
        """Tells the caller that a sequence ended without another token."""
        request.output.metrics.num_preemptions += sequence.num_preemptions
        detokenizer = request.detokenizers[sequence.index]
        text = detokenizer.flush() if detokenizer is not None else ""
        request.output.outputs[sequence.index].text += text
        return outputs.end(request, sequence.index, reason, text, [], self.clock())

    # ---- the loop

    def step(self) -> list[Delta]:
        """Launches the next step of each lane, then delivers the tokens of one that has run; or
        ends the requests whose time is over.

        Raises:
          EngineDeadError: an earlier step failed, or the engine was closed. What fails in the
            middle of a step leaves plan and device apart, so nothing can go on after it.
        """
        if self._cause is not None:
            raise EngineDeadError(
                f"the engine has stopped: {type(self._cause).__name__}: {self._cause}"
            ) from self._cause
        try:
            # Who has run out of time is told before anything is waited for.
            deltas = self._time_out() or self._step()
        except BaseException as error:
            self._cause = error
            raise
        given_up, self._given_up = self._given_up, []
        return given_up + deltas

    def rest(self) -> None:
        """Looks after the executors while there is nothing to compute."""
        assert not self.has_work
        self._tend()

    def close(self) -> None:
        """Ends all requests, waits for the devices and lets go of their memory."""
        try:
            for request_id in list(self._requests):
                self.abort(request_id)
        finally:
            self._cause = self._cause or RuntimeError("it was closed")
            for lane in self._topology.lanes:
                lane.in_flight.clear()
            self._topology.close()

    def wake(self) -> None:
        """Lets a `step` in another thread return without waiting for an executor."""
        self._topology.wake()

    def _step(self) -> list[Delta]:
        if not self._tend():
            return []
        lanes = self._topology.lanes
        launched = [self._launch(lane) for lane in lanes if lane.may_launch]
        # A lane with room is filled before anything is waited for.
        if any(launched) and not any(len(lane.in_flight) == lane.depth for lane in lanes):
            return []
        if not self.has_work:
            return []
        lane = self._topology.wait(self._patience_s())
        if lane is None:
            return []
        finished = lane.in_flight[0]
        try:
            result = finished.result()
        except ExecutorLostError as error:
            self._lost(lane, error)
            return []
        lane.in_flight.popleft()
        for other in lanes:
            if other is not lane:
                other.forget(finished.plan)
        self._stats.softmax_recomputed_rows += result.softmax_recomputed_rows
        if finished.plan.chunks:
            held_up = self.scheduler.num_decoding, self.scheduler.num_without_token
            self._recent.held_up(finished.plan, *held_up)
        committed = self.scheduler.commit(finished.plan, result.tokens)
        return self._deliver(finished.plan, committed, result)

    def _plan(self, lane: Lane) -> StepPlan | None:
        scheduler = self.scheduler
        # Each phase runs in the order of its plans: never in two lanes at once, also when it moves.
        others = [other for other in self._topology.lanes if other is not lane]
        prefill = lane.prefill and not any(other.has_chunks for other in others)
        decode = lane.decode and not any(other.has_rows for other in others)
        both = lane.prefill and lane.decode
        if self._config.prefill_policy == "first" and prefill:
            plan = scheduler.plan(decode=False, decodes_on=both)
            if plan is not None or not decode:
                return plan
            return scheduler.plan(prefill=False, decodes_on=both)
        return scheduler.plan(prefill=prefill, decode=decode, decodes_on=both)

    def _launch(self, lane: Lane) -> bool:
        """Plans and launches the next step of a lane, if there is one."""
        plan = self._plan(lane)
        if plan is None:
            return False
        for sequence in plan.admitted:
            self._admitted(sequence)
        try:
            lane.launch(plan, [self.scheduler.admission(row) for row in lane.unknown_rows(plan)])
        except ExecutorLostError as error:
            self._lost(lane, error, plan)
            return False
        self._stats.steps += 1
        self._stats.step_tokens += plan.num_tokens
        return True

    def _tend(self) -> bool:
        """Lets the topology change its executors; False if all was lost with them."""
        try:
            self._topology.tend(self.recent)
        except PagesLostError:
            self._start_over()
            return False
        mode = self._mode_of(self._topology)
        if mode != self._mode:
            self._mode = mode
            self._stats.mode_changes += 1
        return True

    def _mode_of(self, topology: Topology) -> str:
        """As in `EngineStats`."""
        if any(lane.prefill and lane.decode for lane in topology.lanes):
            return "unified"
        return "disaggregated" if self._config.topology == "disaggregated" else "semi_pd"

    def _start_over(self) -> None:
        """Computes every sequence again from what was published of it."""
        for lane in self._topology.lanes:
            plans = [step.plan for step in lane.in_flight]
            lane.in_flight.clear()
            lane.executor = None
            for plan in plans:
                self.scheduler.lost(plan, ran=False)
        self.scheduler.start_over()
        self._stats.pages_lost += 1
        self._topology.renew()

    def _lost(self, lane: Lane, error: ExecutorLostError, *unlaunched: StepPlan) -> None:
        """Takes back what an executor that is gone was to compute."""
        blamed = self._topology.lost(lane, error)
        plans = [*(step.plan for step in lane.in_flight), *unlaunched]
        lane.in_flight.clear()
        lane.executor = None
        for i, plan in enumerate(plans):
            for sequence in self.scheduler.lost(plan, ran=blamed and i == 0):
                request = self._requests[sequence.request_id]
                self._given_up.append(self._end(request, sequence, FinishReason.ERROR))
                if request.output.finished:
                    del self._requests[sequence.request_id]
                    self._stats.requests_failed += 1

    def _admitted(self, sequence: Sequence) -> None:
        metrics = self._requests[sequence.request_id].output.metrics
        if metrics.first_scheduled_s is None:
            metrics.first_scheduled_s = self.clock()
            metrics.num_cached_tokens = sequence.num_cached_tokens

    def _deliver(self, plan: StepPlan, committed: Committed, result: StepResult) -> list[Delta]:
        now, deltas = self.clock(), []
        self._recent.committed(plan, now)
        rows = zip(committed.sequences, committed.tokens, committed.result_rows, strict=True)
        for sequence, token, row in rows:
            request = self._requests[sequence.request_id]
            metrics, before = request.output.metrics, request.output.metrics.first_token_s
            delta = outputs.append_token(request, sequence, token, row, result, now)
            deltas.append(delta)
            if before is None:
                self._recent.recent.ttft_s.append(metrics.ttft_s)
            if delta.finish_reason is not None:
                self.scheduler.finish(sequence, delta.finish_reason)
                metrics.num_preemptions += sequence.num_preemptions
                if request.output.finished:
                    del self._requests[sequence.request_id]
                    self._stats.requests_finished += 1
                    if metrics.tpot_s is not None:
                        self._recent.recent.tpot_s.append(metrics.tpot_s)
        self._stats.generated_tokens += len(deltas)
        return deltas
