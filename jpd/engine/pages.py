"""KV pages: who holds which. No jax here; a page is a number.

Page 0 is never handed out: padded rows of a step write there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np


class OutOfPagesError(Exception):
    """More pages were asked for than are free; nothing was handed out."""


class PagePool:
    """Pages with reference counts.

    A page is free, held (one reference per sequence that reads it), or kept: nobody holds it, but
    the prefix cache still knows what it contains. Kept pages count as free and are given out, least
    recently released first, when no empty page is left.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._empty = list(range(num_pages - 1, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._worth_keeping = [False] * num_pages
        self.generations = np.zeros(num_pages, np.int64)
        """How often each page was handed out; another such array may take its place."""
        self.on_evict: Callable[[int], None] = lambda page: None
        """Called with a kept page just before it is given to somebody else."""

    @property
    def num_usable(self) -> int:
        """Pages that sequences can hold at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._empty) + len(self._kept)

    def allocate(self, count: int) -> list[int]:
        """Hands out `count` pages with one reference each.

        Raises:
          OutOfPagesError: fewer are free.
        """
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages asked for, {self.num_free} free")
        pages = []
        for _ in range(count):
            if self._empty:
                page = self._empty.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                self._worth_keeping[page] = False
                self.on_evict(page)
            self._references[page] = 1
            self.generations[page] += 1
            pages.append(page)
        return pages

    def share(self, page: int) -> None:
        """Adds a reference to a held or kept page."""
        if self._references[page] == 0:
            del self._kept[page]
        self._references[page] += 1

    def keep(self, page: int) -> None:
        """When the last reference goes, the content of this held page stays reusable."""
        assert self._references[page] > 0, page
        self._worth_keeping[page] = True

    def drop(self, page: int) -> None:
        """Takes `keep` back: the content of this page is worth nothing any more."""
        self._worth_keeping[page] = False
        if page in self._kept:
            del self._kept[page]
            self._empty.append(page)

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference of each page; kept pages are reused in the order of their release."""
        for page in pages:
            references = self._references[page] - 1
            assert references >= 0, f"page {page} released twice"
            self._references[page] = references
            if references == 0:
                if self._worth_keeping[page]:
                    self._kept[page] = None
                else:
                    self._empty.append(page)

    def references(self, page: int) -> int:
        """Sequences that hold the page."""
        return self._references[page]

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Asserts that every page is in exactly one state and every reference has a holder."""
        counted = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counted[page] += 1
        assert counted == self._references, "references without a holder, or the reverse"
        empty, kept = set(self._empty), set(self._kept)
        held = {page for page, count in enumerate(counted) if count}
        assert len(empty) == len(self._empty), "a page is in the free list twice"
        counts = len(empty) + len(kept) + len(held)
        assert counts == len(empty | kept | held), "a page is in two states"
        assert empty | kept | held == set(range(1, self.num_pages)), "a page is lost"
