"""The page pool against a model that knows each page's holders by name."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jpd.engine.pages import OutOfPagesError, PagePool

counted = {"rules": 0, "evictions": 0}


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share and give back pages; `kept` lists unheld pages, oldest release first."""

    @initialize(num_pages=st.integers(2, 9))
    def start(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.pool.on_evict = self._evicted
        self.holders: list[list[int]] = []
        self.worth_keeping: set[int] = set()
        self.kept: list[int] = []
        self.evicted: list[int] = []

    def _evicted(self, page: int) -> None:
        self.evicted.append(page)

    def held(self) -> list[int]:
        return sorted({page for pages in self.holders for page in pages})

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        held, empty = self.held(), self.pool.num_usable - len(self.held()) - len(self.kept)
        self.evicted.clear()
        if count > self.pool.num_usable - len(held):
            with pytest.raises(OutOfPagesError, match=f"{count} pages asked for"):
                self.pool.allocate(count)
            assert not self.evicted
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert 0 not in pages
        assert not set(pages) & set(held)
        # Empty pages go first, then the ones released longest ago.
        assert self.evicted == self.kept[: max(0, count - empty)]
        counted["evictions"] += len(self.evicted)
        self.kept = self.kept[len(self.evicted) :]
        self.worth_keeping -= set(self.evicted)
        assert not set(pages) & set(self.kept)
        self.holders.append(pages)

    @precondition(lambda self: self.held() or self.kept)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted({*self.held(), *self.kept})))
        self.pool.share(page)
        if page in self.kept:
            self.kept.remove(page)
        self.holders.append([page])

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held()))
        self.pool.keep(page)
        self.worth_keeping.add(page)

    @precondition(lambda self: self.worth_keeping)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.worth_keeping)))
        self.pool.drop(page)
        self.worth_keeping.remove(page)
        if page in self.kept:
            self.kept.remove(page)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        pages = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        for page in pages if keep else []:
            self.pool.keep(page)
            self.worth_keeping.add(page)
        self.pool.release(pages)
        still_held = self.held()
        self.kept += [p for p in pages if p in self.worth_keeping and p not in still_held]

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        counted["rules"] += 1
        self.pool.check_integrity(self.holders)
        assert self.pool.num_free == self.pool.num_usable - len(self.held())
        for page in range(self.pool.num_pages):
            assert self.pool.references(page) == sum(page in h for h in self.holders)


def test_no_order_of_calls_loses_or_doubles_a_page() -> None:
    counted.update(rules=0, evictions=0)
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=200,
            stateful_step_count=50,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert counted["rules"] >= 5_000
    assert counted["evictions"] >= 50


def test_page_zero_is_never_handed_out() -> None:
    pool = PagePool(4)
    assert pool.num_usable == pool.num_free == 3
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    with pytest.raises(OutOfPagesError, match="1 pages asked for, 0 free"):
        pool.allocate(1)


def test_a_failed_allocation_hands_out_nothing() -> None:
    pool = PagePool(4)
    pool.allocate(1)
    with pytest.raises(OutOfPagesError):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_page_released_twice_is_noticed() -> None:
    pool = PagePool(4)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


@pytest.mark.parametrize("holders", [[], [[1], [1]]])
def test_integrity_fails_on_a_wrong_count_of_holders(holders: list[list[int]]) -> None:
    pool = PagePool(3)
    assert pool.allocate(1) == [1]
    pool.check_integrity([[1]])
    with pytest.raises(AssertionError, match="holder"):
        pool.check_integrity(holders)
