"""The concurrent face of the engine: one background thread, callers on any number of event loops.

The thread owns the coordinator. Callers put commands in its inbox; it puts what each step produced
into the mailboxes of the requests, by one `call_soon_threadsafe` for each step and event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jpd import prompts as prompt_forms
from jpd.config import EngineConfig
from jpd.engine.build import build
from jpd.engine.coordinator import Coordinator
from jpd.engine.metrics import EngineStats
from jpd.errors import EngineDeadError, RequestError
from jpd.types import Delta, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)


class AsyncLLM:
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
        self._engine = build(EngineConfig.from_kwargs(model, **engine_args))
        self._thread = _EngineThread(self._engine.coordinator)
        self._numbers = itertools.count()
        # Dropping the last reference stops the thread too, which does not refer to this object.
        weakref.finalize(self, self._thread.stop).atexit = False  # the thread has its own hook

    @property
    def config(self) -> EngineConfig:
        """The configuration with everything decided."""
        return self._engine.config

    @property
    def model_config(self) -> Any:
        """Shape and options of the model."""
        return self._engine.model_config

    @property
    def tokenizer(self) -> Any:
        """`jpd.text.Tokenizer`, or None."""
        return self._engine.tokenizer

    @property
    def stats(self) -> EngineStats:
        """What the engine did since it started, and holds now."""
        return self._engine.coordinator.stats()

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
        return self._submit(prompt, sampling_params, request_id, priority, _Snapshots)

    def stream(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Delta]:
        """As `generate`, but yields only what each step adds, and never misses any of it."""
        return self._submit(prompt, sampling_params, request_id, priority, _Deltas)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a conversation of `{"role", "content"}`."""
        return self.generate(self.chat_tokens(messages), sampling_params, request_id, priority)

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the model's turn."""
        if self.tokenizer is None:
            raise RequestError("chat needs a tokenizer: skip_tokenizer_init=True was given")
        return self.tokenizer.apply_chat_template(messages)

    async def abort(self, request_id: str) -> None:
        """Ends a request, whose iterator then ends with `FinishReason.ABORT`.

        An unknown or finished one is left alone.
        """
        mailbox = self._thread.find(request_id)
        if mailbox is not None:
            self._thread.abort(mailbox)

    def close(self) -> None:
        """Ends unfinished requests with `FinishReason.ABORT` and waits for the engine to stop."""
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
        kind: type[_Mailbox],
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

    def __init__(self, llm: AsyncLLM, mailbox: _Mailbox) -> None:
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


class _Mailbox:
    """Where the engine's thread leaves what a request produced. Used on its event loop only.

    The thread itself touches `request_id`, `loop`, `output` and `contents` alone.
    """

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.output: RequestOutput | None = None
        """The engine's own, which grows with each step."""
        self._items: deque[Any] = deque()
        self._ended = False
        self._error: EngineDeadError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_awaited(self) -> bool:
        """A task waits for the next item."""
        return self._waiter is not None and not self._waiter.done()

    def contents(self, deltas: list[Delta]) -> list[Any]:
        """What a step leaves here."""
        raise NotImplementedError

    def put(self, items: list[Any], ended: bool, error: EngineDeadError | None = None) -> None:
        """Leaves items; nothing comes after `ended`, because of `error` if there is one."""
        self._items.extend(items)
        self._ended, self._error = ended, error
        if self.is_awaited:
            self._waiter.set_result(None)

    async def take(self) -> Any:
        """The next item, when there is one; raises at the end."""
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = self.loop.create_future()
            await self._waiter
        return self._items.popleft()


class _Deltas(_Mailbox):
    """Holds every delta until it is taken."""

    def contents(self, deltas: list[Delta]) -> list[Any]:
        return deltas


class _Snapshots(_Mailbox):
    """Holds the newest state of the request."""

    def contents(self, deltas: list[Delta]) -> list[Any]:
        completions = [
            replace(
                c,
                token_ids=c.token_ids.copy(),
                logprobs=None if c.logprobs is None else c.logprobs.copy(),
            )
            for c in self.output.outputs
        ]
        metrics = replace(self.output.metrics)
        return [replace(self.output, outputs=completions, metrics=metrics)]

    def put(self, items: list[Any], ended: bool, error: EngineDeadError | None = None) -> None:
        if items:
            self._items.clear()
        super().put(items, ended, error)


class _EngineThread:
    """Runs the coordinator while there is work, and waits for commands while there is none."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        # A SimpleQueue may be put to from `__del__`, even in the middle of another put.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # `__del__` may run, and take it, wherever it is held
        self._open: dict[str, _Mailbox] = {}
        """Requests that callers know of; with the lock."""
        self._live: dict[str, _Mailbox] = {}
        """Requests that the coordinator knows of; of the thread alone."""
        self._closed = False
        self._cause: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="jpd-engine", daemon=True)
        self._thread.start()
        # Python stops daemon threads wherever they are, which may be inside XLA.
        atexit.register(self.stop)

    # ---- called by anyone

    @property
    def is_running(self) -> bool:
        """It takes requests."""
        return not self._closed and self._cause is None

    def submit(self, mailbox: _Mailbox, *request: Any) -> None:
        """Queues a request that was checked; `request` as in `Coordinator.add` after the id."""
        with self._lock:
            if not self.is_running:
                raise self._dead_error()
            if mailbox.request_id in self._open:
                raise RequestError(f"request_id {mailbox.request_id!r} is in use")
            self._open[mailbox.request_id] = mailbox
            self._inbox.put(partial(self._add, mailbox, *request))

    def find(self, request_id: str) -> _Mailbox | None:
        """The mailbox of an unfinished request."""
        with self._lock:
            return self._open.get(request_id)

    def abort(self, mailbox: _Mailbox) -> None:
        """Ends a request; its mailbox gets the end."""
        self._inbox.put(partial(self._abort, mailbox))

    def abandon(self, mailbox: _Mailbox) -> None:
        """Ends a request whose caller has left; its id is free at once."""
        if self._forget(mailbox):
            self.abort(mailbox)

    def stop(self) -> None:
        """Ends all requests and waits for the thread. Does nothing the second time."""
        with self._lock:
            self._closed = True
        atexit.unregister(self.stop)
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:  # the garbage collector runs anywhere
            self._thread.join()

    def _forget(self, mailbox: _Mailbox) -> bool:
        """Frees the id of a request, if it has not been freed yet."""
        with self._lock:
            known = self._open.get(mailbox.request_id) is mailbox
            if known:
                del self._open[mailbox.request_id]
            return known

    def _dead_error(self) -> EngineDeadError:
        """A new one for each caller: each adds its own traceback."""
        if self._cause is None:
            return EngineDeadError("the engine is closed")
        error = EngineDeadError(
            f"the engine has stopped: {type(self._cause).__name__}: {self._cause}"
        )
        error.__cause__ = self._cause
        return error

    # ---- the thread

    def _run(self) -> None:
        try:
            while self._obey():
                self._publish(self._coordinator.step())
            self._end_all()
        except BaseException as error:  # nobody may be left waiting, whatever it is
            logger.exception("the engine has stopped")
            self._die(error)

    def _obey(self) -> bool:
        """Does what callers asked for; waits for it if there is nothing to compute.

        Returns:
          False if it was to stop.
        """
        wait = not self._coordinator.has_work
        while True:
            try:
                command = self._inbox.get(wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _add(self, mailbox: _Mailbox, *request: Any) -> None:
        mailbox.output = self._coordinator.add(mailbox.request_id, *request)
        self._live[mailbox.request_id] = mailbox

    def _abort(self, mailbox: _Mailbox) -> None:
        # A finished request may have passed its id on to another.
        if self._live.get(mailbox.request_id) is mailbox:
            self._publish(self._coordinator.abort(mailbox.request_id))

    def _publish(self, deltas: list[Delta]) -> None:
        """Puts what a step or an abort produced into the mailboxes."""
        by_request: dict[str, list[Delta]] = {}
        for delta in deltas:
            by_request.setdefault(delta.request_id, []).append(delta)
        posts: dict[asyncio.AbstractEventLoop, list[Any]] = {}
        for request_id, new in by_request.items():
            mailbox = self._live[request_id]
            ended = mailbox.output.finished
            if ended:
                del self._live[request_id]
                self._forget(mailbox)
            posts.setdefault(mailbox.loop, []).append((mailbox, mailbox.contents(new), ended))
        self._post(posts)

    def _post(self, posts: dict[asyncio.AbstractEventLoop, list[Any]]) -> None:
        for loop, mail in posts.items():
            try:
                loop.call_soon_threadsafe(_put_all, mail)
            except RuntimeError:  # the loop was closed: its callers are gone
                for mailbox, *_ in mail:
                    self.abandon(mailbox)

    def _end_all(self) -> None:
        for mailbox in list(self._live.values()):
            self._abort(mailbox)
        while self._coordinator.has_work:  # the device ends the step that runs
            self._coordinator.step()

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self._cause = error
            mailboxes = {*self._open.values(), *self._live.values()}
            self._open.clear()
        posts: dict[asyncio.AbstractEventLoop, list[Any]] = {}
        for mailbox in mailboxes:
            posts.setdefault(mailbox.loop, []).append((mailbox, [], True, self._dead_error()))
        self._post(posts)


def _put_all(mail: list[tuple[_Mailbox, *tuple[Any, ...]]]) -> None:
    for mailbox, *arguments in mail:
        mailbox.put(*arguments)
