"""The blocking face of the engine."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

from jpd import prompts as prompt_forms
from jpd.errors import ConfigError, RequestError
from jpd.face import EngineFace
from jpd.models import Params, abstract_params
from jpd.types import Delta, RequestOutput, SamplingParams


class LLM(EngineFace):
    """A model that answers prompts.

    Args:
      model: folder of a checkpoint, or a Hugging Face name.
      **engine_args: fields of `jpd.EngineConfig`.

    Raises:
      ConfigError: the model cannot be served as asked; `UnknownArgumentError` for an unknown
        keyword.

    One thread at a time may use it; `AsyncLLM` serves concurrent callers.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        super().__init__(model, **engine_args)
        self._streams: dict[str, deque[Delta]] = {}
        self._num_requests = 0

    @property
    def params(self) -> Params:
        """The parameters, a plain pytree; assign a tree of the same shapes to swap them.

        With `tensor_parallel_size` above 1 the arrays lie on all devices, in the same order as on
        one; for that the weights of q, k, v and of gate, up are copied each time this is read.
        """
        executor = self._engine.executor
        return executor.placement.show(executor.params)

    @params.setter
    def params(self, params: Params) -> None:
        def signature(tree: Params) -> Any:
            return jax.tree.map(lambda a: (jnp.shape(a), str(jnp.result_type(a))), tree)

        executor = self._engine.executor
        if signature(params) != signature(abstract_params(self.model_config, self.config.dtype)):
            raise ConfigError("params must have the structure, shapes and dtypes of llm.params")
        executor.params = executor.placement.accept(params)
        self._engine.coordinator.forget_prefixes()

    # ---- requests

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answers all prompts and returns their outputs in the same order.

        Args:
          prompts: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`, or a list.
          sampling_params: for all prompts, or one for each.
          priority: one for each prompt, with `scheduling_policy="priority"`.
          use_tqdm: show a bar of finished requests.

        Raises:
          RequestError: a prompt or parameter is not allowed; then none of them was started.
        """
        outputs = self._queue(self._checked(prompts, sampling_params, priority))
        bar = tqdm(total=len(outputs), desc="generate", unit="req", disable=not use_tqdm)
        with bar, self._aborting(outputs):
            while not all(o.finished for o in outputs):
                self._step()
                bar.update(sum(o.finished for o in outputs) - bar.n)
        return outputs

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, each a list of `{"role", "content"}`."""
        conversations = prompt_forms.conversations(messages)
        prompts = [{"prompt_token_ids": self.chat_tokens(c)} for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> Iterator[Delta]:
        """Yields what each step adds to each of the prompts' sequences, as it comes.

        `request_id` of the deltas counts up in the order of the prompts. Arguments as in
        `generate`. They are checked at the call; the requests begin when the first delta is asked
        for. Closing the iterator aborts what is unfinished.
        """
        return self._stream(self._checked(prompts, sampling_params, priority))

    def _stream(self, requests: list[tuple[Any, ...]]) -> Iterator[Delta]:
        # Queued here and not in `stream`: an iterator that was never started is never closed.
        outputs = self._queue(requests)
        deltas: deque[Delta] = deque()
        self._streams.update((o.request_id, deltas) for o in outputs)
        try:
            with self._aborting(outputs):
                while deltas or not all(o.finished for o in outputs):
                    if deltas:
                        yield deltas.popleft()
                    else:
                        self._step()
        finally:
            for output in outputs:
                self._streams.pop(output.request_id, None)

    def _checked(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[tuple[str | None, list[int], SamplingParams, int]]:
        """Text, token ids, parameters and priority of each request, when all are allowed."""
        batch = prompts if prompt_forms.is_batch(prompts) else [prompts]
        params = sampling_params if sampling_params is not None else SamplingParams()
        params = [params] * len(batch) if isinstance(params, SamplingParams) else params
        priority = [0] * len(batch) if priority is None else priority
        for name, values, kind in (
            ("sampling_params", params, SamplingParams),
            ("priority", priority, int),
        ):
            if not isinstance(values, Sequence) or not all(isinstance(v, kind) for v in values):
                raise RequestError(
                    f"{name}={values!r} is not allowed: a list of {kind.__name__}, one a prompt"
                )
            if len(values) != len(batch):
                raise RequestError(f"{len(values)} {name} for {len(batch)} prompts")
        coordinator = self._engine.coordinator
        tokenized = [prompt_forms.tokenize(p, self.tokenizer) for p in batch]
        requests = []
        for (text, ids), param, order in zip(tokenized, params, priority, strict=True):
            coordinator.check(ids, param, order)
            requests.append((text, ids, param, order))
        return requests

    def _queue(self, requests: list[tuple[Any, ...]]) -> list[RequestOutput]:
        """Queues checked requests under the next numbers."""
        outputs = []
        for request in requests:
            outputs.append(self._engine.coordinator.add(str(self._num_requests), *request))
            self._num_requests += 1
        return outputs

    def close(self) -> None:
        """Ends all requests and frees the device's memory; the engine cannot be used after it."""
        self._engine.coordinator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(self) -> None:
        with _interrupts_after():
            for delta in self._engine.coordinator.step():
                stream = self._streams.get(delta.request_id)
                if stream is not None:
                    stream.append(delta)

    @contextlib.contextmanager
    def _aborting(self, outputs: list[RequestOutput]) -> Iterator[None]:
        """Gives up what is unfinished when the block is left, however it is left."""
        try:
            yield
        finally:
            for output in outputs:
                if not output.finished:
                    self._engine.coordinator.abort(output.request_id)


@contextlib.contextmanager
def _interrupts_after() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done: in the middle of a step it would end the engine.

    A second Ctrl-C is not held back: the device, or an executor, may hang.

    Python delivers signals to the main thread alone, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def hold(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)
    if caught:
        signal.raise_signal(signal.SIGINT)
