"""Orders: every image once an epoch or shards read in pools, the same for any number of processes, at any step."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_triton.train.data.order import LANE, POOL, ExactOrder, Order, ResampledOrder

ENDS = [40, 75, 130, 200, 241, 300]


def orders(batch_size: int, seed: int) -> list[Order]:
    return [ExactOrder(ENDS[-1], batch_size, seed), ResampledOrder(ENDS, batch_size, seed)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 60), st.sampled_from([1, 2, 3, 4, 7]))
def test_any_division_of_a_batch_gives_the_same_rows(batch_size: int, seed: int, step: int, parts: int) -> None:
    for whole, divided in zip(orders(batch_size, seed), orders(batch_size, seed), strict=True):
        rows = whole.rows(step, 0, batch_size)
        cuts = [batch_size * part // parts for part in range(parts + 1)]
        again = [divided.rows(step, first, last - first) for first, last in pairwise(cuts)]
        assert [row for part in again for row in part] == rows and len(rows) == batch_size
        assert all(0 <= row < ENDS[-1] for row in rows)


@pytest.mark.parametrize("kind", [0, 1])
def test_there_is_no_state(kind: int) -> None:
    """A run that goes on at step 17 sees what the undisturbed one saw; steps may come in any order."""
    undisturbed = orders(96, 0)[kind]
    seen = [undisturbed.rows(step, 0, 96) for step in range(25)]
    resumed = orders(96, 0)[kind]
    assert [resumed.rows(step, 0, 96) for step in range(17, 25)] == seen[17:]
    assert [resumed.rows(step, 0, 96) for step in (20, 3, 11)] == [seen[20], seen[3], seen[11]]
    assert orders(96, 1)[kind].rows(0, 0, 96) != seen[0]
    assert seen[0] != seen[1] and seen[0] != seen[3]


@given(st.integers(1, 300), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_an_exact_epoch_shows_every_image_once(batch_size: int, seed: int) -> None:
    order = ExactOrder(300, batch_size, seed)
    steps = 300 // batch_size
    for epoch in range(2):
        shown = [row for step in range(steps) for row in order.rows(epoch * steps + step, 0, batch_size)]
        assert len(shown) == len(set(shown)) == steps * batch_size


def test_resampled_lanes_read_a_few_shards_at_a_time() -> None:
    order = ResampledOrder([100 * (n + 1) for n in range(50)], batch_size=160, seed=0)
    shown = POOL * 100  # of every pool
    for first, width in ((0, LANE), (LANE, LANE), (2 * LANE, 160 - 2 * LANE)):
        stream = [row for step in range(60) for row in order.rows(step, first, width)]
        for start in range(0, len(stream) - shown, shown):
            pool = stream[start : start + shown]
            assert len({row // 100 for row in pool}) <= POOL
            counts = Counter(pool)
            if len({row // 100 for row in pool}) == POOL:
                assert set(counts.values()) == {1}, "a pool of different shards shows every image once"
            assert pool != sorted(pool)
        assert len({row // 100 for row in stream}) > 2 * POOL


def test_resampled_images_are_equally_likely() -> None:
    """Shards of different sizes too: a shard is drawn as often as it is large."""
    order = ResampledOrder([10, 20, 100, 400], batch_size=400, seed=1)
    counts = Counter(row for step in range(1000) for row in order.rows(step, 0, 400))
    share = [sum(counts[n] for n in range(a, b)) for a, b in ((0, 20), (20, 100), (100, 400))]
    total = sum(share)
    for got, expected in zip(share, (0.05, 0.2, 0.75), strict=True):
        assert abs(got / total - expected) < 0.04


def test_pools_are_announced_once() -> None:
    told: list[list[int]] = []
    order = ResampledOrder(ENDS, batch_size=64, seed=0, announce=told.append)
    read = [{sum(row >= end for end in ENDS) for row in order.rows(step, 0, 64)} for step in range(12)]
    assert 3 <= len(told) <= 5 and all(len(shards) == POOL for shards in told)
    assert set().union(*read) <= set().union(*told)


def test_a_shard_without_images_is_never_drawn() -> None:
    order = ResampledOrder([0, 30, 30, 60, 60], batch_size=50, seed=2)
    assert {row for step in range(20) for row in order.rows(step, 0, 50)} == set(range(60))
