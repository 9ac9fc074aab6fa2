"""Reuse of KV pages between sequences with the same beginning. No jax here.

A full page is named by the hash of its tokens and of everything before them, so equal names mean
equal content. Only full pages are shared, and nobody writes into a full page.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from jpd.engine.pages import PagePool


def page_hash(previous: bytes, tokens: np.ndarray) -> bytes:
    """Name of a full page: 16 bytes from the page before (b"" for none) and its int32 tokens."""
    return blake2b(previous + tokens.tobytes(), digest_size=16).digest()


def extend_hashes(hashes: list[bytes], tokens: np.ndarray, page_size: int) -> None:
    """Appends the names of the full pages of `tokens` `[n]` int32 that `hashes` lacks."""
    for start in range(len(hashes) * page_size, len(tokens) - page_size + 1, page_size):
        previous = hashes[-1] if hashes else b""
        hashes.append(page_hash(previous, tokens[start : start + page_size]))


class PrefixCache:
    """Which page holds which named content."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._page_of)

    def match(self, names: list[bytes]) -> list[int]:
        """Pages of the longest known beginning of `names`; take them with `PagePool.share`."""
        pages = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, name: bytes, page: int) -> bool:
        """Makes a full, held page findable; the first page of a name stays the one.

        Returns:
          Whether it is this page.
        """
        if name in self._page_of:
            return False
        self._page_of[name] = page
        self._name_of[page] = name
        self._pool.keep(page)
        return True

    def remove(self, page: int) -> None:
        """Forgets a page: what its name promised was never computed."""
        if page in self._name_of:
            self._pool.drop(page)
            self._forget(page)

    def clear(self) -> None:
        """Forgets every page; those that nobody holds become empty."""
        for page in list(self._name_of):
            self._pool.drop(page)
            self._forget(page)

    def _forget(self, page: int) -> None:
        del self._page_of[self._name_of.pop(page)]
