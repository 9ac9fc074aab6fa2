"""The concurrent face of the engine: callers on any number of threads and event loops.

The engine runs on a thread of its own, see `jpd.engine.thread`.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from jpd import prompts as prompt_forms
from jpd.engine.thread import DeltaMailbox, EngineThread, Mailbox, SnapshotMailbox
from jpd.face import EngineFace
from jpd.types import Delta, RequestOutput, SamplingParams


class AsyncLLM(EngineFace):
    """A model that answers prompts of concurrent callers.

    Args:
      model: folder of a checkpoint, or a Hugging Face name.
      **engine_args: fields of `jpd.EngineConfig`.

    Raises:
      ConfigError: the model cannot be served as asked; `UnknownArgumentError` for an unknown
        keyword.

    Building it loads and compiles, which blocks; then it may be used from any number of threads,
    each with its own event loop. Close it, or use it as an async context manager.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        super().__init__(model, **engine_args)
        self._thread = EngineThread(self._engine.coordinator)
        self._numbers = itertools.count()
        # Dropping the last reference stops the thread too, which does not refer to this object.
        weakref.finalize(self, self._thread.stop).atexit = False  # the thread has its own hook

    @property
    def is_running(self) -> bool:
        """It takes requests: neither closed nor dead."""
        return self._thread.is_running

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Answers one prompt. The request is queued by the call, which needs a running event loop.

        Yields what it has produced so far, `finished` in the last one. Each is a copy that later
        steps do not change, but for the prompt, which all share. A caller slower than the engine
        misses some in between. Leaving the iterator (break, cancellation, `aclose`) aborts.

        Args:
          prompt: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`.
          sampling_params: `SamplingParams()` when not given.
          request_id: must not be in use; a number when not given.
          priority: lower is served first, with `scheduling_policy="priority"`.

        Raises:
          RequestError: the prompt or a parameter is not allowed.
          EngineDeadError: the engine has failed or is closed; the iterator raises it too.
        """
        return self._submit(prompt, sampling_params, request_id, priority, SnapshotMailbox)

    def stream(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Delta]:
        """As `generate`, but yields only what each step adds, and never misses any of it."""
        return self._submit(prompt, sampling_params, request_id, priority, DeltaMailbox)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a conversation of `{"role", "content"}`."""
        return self.generate(self.chat_tokens(messages), sampling_params, request_id, priority)

    async def abort(self, request_id: str) -> None:
        """Ends a request, whose iterator then ends with `FinishReason.ABORT`.

        An unknown or finished one is left alone.
        """
        mailbox = self._thread.find(request_id)
        if mailbox is not None:
            self._thread.abort(mailbox)

    def close(self) -> None:
        """Ends unfinished requests with `FinishReason.ABORT`, then frees the device's memory."""
        self._thread.stop()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # The step that runs may take a while, in which the caller's loop should go on.
        await asyncio.to_thread(self.close)

    def _submit(
        self,
        prompt: Any,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        kind: type[Mailbox],
    ) -> _Stream:
        params = params if params is not None else SamplingParams()
        text, ids = prompt_forms.tokenize(prompt, self.tokenizer)
        self._engine.coordinator.check(ids, params, priority)
        name = request_id if request_id is not None else f"#{next(self._numbers)}"
        mailbox = kind(name, asyncio.get_running_loop())
        self._thread.submit(mailbox, text, ids, params, priority)
        return _Stream(self, mailbox)


class _Stream:
    """What a caller iterates over; to leave it is to abort the request."""

    def __init__(self, llm: AsyncLLM, mailbox: Mailbox) -> None:
        self._llm = llm  # an engine with open streams is in use
        self._mailbox = mailbox
        self._left = False

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Any:
        if self._left:
            raise StopAsyncIteration
        if self._mailbox.is_awaited:
            raise RuntimeError(f"request {self._mailbox.request_id!r} is awaited by another task")
        try:
            return await self._mailbox.take()
        except BaseException:  # its end, a dead engine, or the cancellation of the caller
            self._leave()
            raise

    async def aclose(self) -> None:
        """Aborts the request if it is unfinished."""
        self._leave()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._llm._thread.abandon(self._mailbox)

    def __del__(self) -> None:
        self._leave()
