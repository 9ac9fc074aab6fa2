"""Names of pages, and which pages a new sequence finds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jpd.engine.pages import PagePool
from jpd.engine.prefix_cache import PrefixCache, extend_hashes
from jpd.engine.sequence import State
from tests.engine.world import World

PAGE = 4


def names_of(tokens: list[int], page_size: int = PAGE) -> list[bytes]:
    names: list[bytes] = []
    extend_hashes(names, np.array(tokens, np.int32), page_size)
    return names


@given(
    st.lists(st.integers(0, 2), max_size=20),
    st.lists(st.integers(0, 2), max_size=20),
    st.sampled_from([1, 2, 4]),
)
def test_names_are_equal_exactly_as_far_as_the_tokens_are(
    left: list[int], right: list[int], page_size: int
) -> None:
    a, b = names_of(left, page_size), names_of(right, page_size)
    assert len(a) == len(left) // page_size
    for i in range(min(len(a), len(b))):
        end = (i + 1) * page_size
        assert (a[i] == b[i]) == (left[:end] == right[:end])


@given(st.lists(st.integers(0, 2**31 - 1), max_size=24), st.integers(0, 24))
def test_names_do_not_depend_on_how_they_were_extended(tokens: list[int], cut: int) -> None:
    names: list[bytes] = []
    extend_hashes(names, np.array(tokens[:cut], np.int32), PAGE)
    extend_hashes(names, np.array(tokens, np.int32), PAGE)
    assert names == names_of(tokens)


def test_equal_pages_after_different_beginnings_have_different_names() -> None:
    a, b = names_of([1, 1, 1, 1, 5, 5, 5, 5]), names_of([2, 2, 2, 2, 5, 5, 5, 5])
    assert a[1] != b[1]
    assert len({*a, *b}) == 4


def test_match_stops_at_the_first_unknown_page() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool)
    names = names_of(list(range(16)))
    pages = pool.allocate(4)
    for i in (0, 1, 3):
        cache.insert(names[i], pages[i])
    assert cache.match(names) == pages[:2]
    assert cache.match(names[1:]) == pages[1:2]
    assert cache.match([]) == []


def test_the_first_page_of_a_name_stays_the_one() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool)
    (name,) = names_of([1, 2, 3, 4])
    first, second = pool.allocate(2)
    cache.insert(name, first)
    cache.insert(name, second)
    assert cache.match([name]) == [first]
    pool.release([second])  # not kept: its name is another's
    pool.check_integrity([[first]])
    assert len(cache) == 1


def test_a_page_that_is_given_away_is_forgotten() -> None:
    pool = PagePool(3)
    cache = PrefixCache(pool)
    names = names_of(list(range(8)))
    pages = pool.allocate(2)
    for name, page in zip(names, pages, strict=True):
        cache.insert(name, page)
    pool.release(reversed(pages))
    assert cache.match(names) == pages
    # The later page was released first, so the beginning stays findable longest.
    assert pool.allocate(1) == pages[1:]
    assert cache.match(names) == pages[:1]


def test_clear_forgets_held_and_kept_pages_and_frees_the_kept() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool)
    names = names_of(list(range(8)))
    held, kept = pool.allocate(2)
    cache.insert(names[0], held)
    cache.insert(names[1], kept)
    pool.release([kept])
    cache.clear()
    assert len(cache) == 0
    assert cache.match(names) == []
    pool.check_integrity([[held]])
    pool.release([held])
    pool.check_integrity([])
    assert pool.num_free == 3


# ---- through the scheduler


def test_a_prompt_finds_the_full_pages_of_an_earlier_one() -> None:
    world = World(page_size=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    first = world.add(prompt, 2)
    world.drain()
    second = world.add([*prompt[:9], 5, 5], 2)
    world.drain()
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 8
    assert world.scheduler.stats.cached_tokens == 8
    assert world.scheduler.stats.prompt_tokens == len(prompt) + 11


def test_at_least_one_token_of_a_known_prompt_is_computed() -> None:
    world = World(page_size=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 0]
    world.add(prompt, 2)
    world.drain()
    again = world.add(prompt, 2)
    world.drain()
    assert again.num_cached_tokens == 4


def test_running_sequences_share_the_pages_of_their_prompt() -> None:
    world = World(page_size=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 0, 1]
    first = world.add(prompt, 10)
    world.step()
    world.step()
    second = world.add(prompt, 10)
    world.step()
    assert first.state is second.state is State.RUNNING
    assert first.pages[:2] == second.pages[:2]
    assert not set(first.pages[2:]) & set(second.pages[2:])
    world.drain()


def test_generated_tokens_are_found_too() -> None:
    world = World(page_size=4)
    first = world.add([1, 2, 3], 10)
    world.drain()
    second = world.add([1, 2, 3, *world.got[first]], 2)
    world.drain()
    # 13 tokens, of which the last was never stored.
    assert second.num_cached_tokens == 12


def test_without_prefix_caching_nothing_is_found() -> None:
    world = World(page_size=4, caching=False)
    for _ in range(2):
        world.add([1, 2, 3, 4, 5, 6, 7, 0, 1], 2)
        world.drain()
    assert world.scheduler.stats.cached_tokens == 0


def test_pages_of_replaced_parameters_are_never_found() -> None:
    world = World(page_size=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 0, 1]
    running = world.add(prompt, 12)
    world.step()  # its prompt is on the device, not yet known to the cache
    world.device.params_version += 1
    world.scheduler.forget_prefixes()
    world.step()
    again = world.add(prompt, 1)
    world.drain()
    assert again.num_cached_tokens == 0
    longer = world.add([*prompt, *world.got[running]], 1)
    world.drain()
    # The first two pages are those of `again`; the third was made from old ones.
    assert longer.num_cached_tokens == 8
