"""The engine on a thread of its own: commands go in, and what each step produced comes out.

The thread owns the coordinator. Callers put commands in its inbox; it puts what each step produced
into the mailboxes of the requests, by one `call_soon_threadsafe` for each step and event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jpd.engine.coordinator import Coordinator
from jpd.errors import EngineDeadError, JpdError, RequestError
from jpd.types import Delta, RequestOutput

logger = logging.getLogger(__name__)

_IDLE_S = 1.0
"""How often an idle engine looks after its executors."""


class Mailbox:
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
        self._error: JpdError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_awaited(self) -> bool:
        """A task waits for the next item."""
        return self._waiter is not None and not self._waiter.done()

    def contents(self, deltas: list[Delta]) -> list[Any]:
        """What a step leaves here."""
        raise NotImplementedError

    def put(self, items: list[Any], ended: bool, error: JpdError | None = None) -> None:
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


class DeltaMailbox(Mailbox):
    """Holds every delta until it is taken."""

    def contents(self, deltas: list[Delta]) -> list[Any]:
        return deltas


class SnapshotMailbox(Mailbox):
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

    def put(self, items: list[Any], ended: bool, error: JpdError | None = None) -> None:
        if items:
            self._items.clear()
        super().put(items, ended, error)


class EngineThread:
    """Runs the coordinator while there is work, and waits for commands while there is none."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        # A SimpleQueue may be put to from `__del__`, even in the middle of another put.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # `__del__` may run, and take it, wherever it is held
        self._open: dict[str, Mailbox] = {}
        """Requests that callers know of; with the lock."""
        self._live: dict[str, Mailbox] = {}
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

    def submit(self, mailbox: Mailbox, *request: Any) -> None:
        """Queues a request that was checked; `request` as in `Coordinator.add` after the id."""
        with self._lock:
            if not self.is_running:
                raise self._dead_error()
            if mailbox.request_id in self._open:
                raise RequestError(f"request_id {mailbox.request_id!r} is in use")
            self._open[mailbox.request_id] = mailbox
            self._tell(partial(self._add, mailbox, *request))

    def find(self, request_id: str) -> Mailbox | None:
        """The mailbox of an unfinished request."""
        with self._lock:
            return self._open.get(request_id)

    def abort(self, mailbox: Mailbox) -> None:
        """Ends a request; its mailbox gets the end."""
        self._tell(partial(self._abort, mailbox))

    def abandon(self, mailbox: Mailbox) -> None:
        """Ends a request whose caller has left; its id is free at once."""
        if self._forget(mailbox):
            self.abort(mailbox)

    def stop(self) -> None:
        """Ends all requests and waits for the thread. Does nothing the second time."""
        with self._lock:
            self._closed = True
        atexit.unregister(self.stop)
        self._tell(None)
        if threading.current_thread() is not self._thread:  # the garbage collector runs anywhere
            self._thread.join()

    def _tell(self, command: Callable[[], None] | None) -> None:
        self._inbox.put(command)
        self._coordinator.wake()

    def _forget(self, mailbox: Mailbox) -> bool:
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
            for mailbox in list(self._live.values()):
                self._abort(mailbox)
            self._coordinator.close()
        except BaseException as error:  # nobody may be left waiting, whatever it is
            logger.exception("the engine has stopped")
            self._die(error)
            self._coordinator.close()

    def _obey(self) -> bool:
        """Does what callers asked for; waits for it if there is nothing to compute.

        Returns:
          False if it was to stop.
        """
        wait = not self._coordinator.has_work
        while True:
            try:
                command = self._inbox.get(wait, _IDLE_S)
            except queue.Empty:
                if not wait:
                    return True
                self._coordinator.rest()
                continue
            if command is None:
                return False
            command()
            wait = False

    def _add(self, mailbox: Mailbox, *request: Any) -> None:
        try:
            mailbox.output = self._coordinator.add(mailbox.request_id, *request)
        except RequestError as error:  # of this request alone
            self._forget(mailbox)
            self._post({mailbox.loop: [(mailbox, [], True, error)]})
            return
        self._live[mailbox.request_id] = mailbox

    def _abort(self, mailbox: Mailbox) -> None:
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

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self._cause = error
            mailboxes = {*self._open.values(), *self._live.values()}
            self._open.clear()
        posts: dict[asyncio.AbstractEventLoop, list[Any]] = {}
        for mailbox in mailboxes:
            posts.setdefault(mailbox.loop, []).append((mailbox, [], True, self._dead_error()))
        self._post(posts)


def _put_all(mail: list[tuple[Mailbox, *tuple[Any, ...]]]) -> None:
    for mailbox, *arguments in mail:
        mailbox.put(*arguments)
