"""Pages that nobody holds any more but that a running step may still touch. No jax here."""

from __future__ import annotations

from collections.abc import Iterator

from jpd.engine.pages import PagePool


class PageFence:
    """Gives pages back to their pool when every step launched before their release has ended.

    Steps of one executor run in order, so what a later step writes comes after all that an earlier
    one reads. Two executors have no order between them: a page freed under a running step of one
    must not be written to by the other.
    """

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._held: list[tuple[set[int], PagePool, list[int]]] = []
        self._tickets = 0

    def begin(self) -> int:
        """A step is about to be launched; returns its ticket, from 1."""
        self._tickets += 1
        self._running.add(self._tickets)
        return self._tickets

    def end(self, ticket: int) -> None:
        """A step has run, or its executor is gone."""
        self._running.remove(ticket)
        for steps, pool, pages in self._held:
            steps.discard(ticket)
            if not steps:
                pool.release(pages)
        self._held = [entry for entry in self._held if entry[0]]

    def release(self, pool: PagePool, pages: list[int]) -> None:
        """Drops one reference of each page, as soon as no running step can touch it."""
        if self._running:
            self._held.append((set(self._running), pool, pages))
        else:
            pool.release(pages)

    def holds(self, pool: PagePool) -> bool:
        """Pages of a pool are held back."""
        return any(entry[1] is pool for entry in self._held)

    def held(self, pool: PagePool) -> Iterator[list[int]]:
        """References of a pool's pages that are held back."""
        return (pages for _, of, pages in self._held if of is pool)
