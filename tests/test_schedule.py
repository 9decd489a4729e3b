"""MorphSchedule: the numbers of the method."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtm_triton.morph import MorphSchedule


@given(st.lists(st.integers(0, 300), max_size=20), st.integers(1, 300), st.integers(0, 1))
def test_capped_counts_are_what_can_merge(removed: list[int], tokens: int, protected: int) -> None:
    schedule, left = MorphSchedule(tuple(removed)), tokens
    for wanted, count in zip(removed, schedule.capped(tokens, protected), strict=True):
        assert count == max(0, min(wanted, (left - protected) // 2))
        left -= count
    assert left == schedule.num_groups(tokens, protected) >= 1


@given(st.integers(0, 400), st.integers(1, 40))
def test_uniform_sums_up_and_is_even(total: int, iterations: int) -> None:
    removed = MorphSchedule.uniform(total, iterations).removed
    assert sum(removed) == total and len(removed) == iterations
    assert max(removed) - min(removed) <= 1 and list(removed) == sorted(removed, reverse=True)


def test_draws_have_the_statistics_of_the_method() -> None:
    """At the paper's setting: 98.6 of 196 tokens left on average, 8 at least, r = 0 in 0.5 %, 7.4 iterations."""
    generator = torch.Generator().manual_seed(0)
    draws = [MorphSchedule.sample(196, 196, 14, generator) for _ in range(8000)]
    left = torch.tensor([float(draw.num_groups(196, 1)) for draw in draws])
    assert abs(left.mean() - 98.6) < 5 * left.std() / len(draws) ** 0.5
    assert 6 <= left.min() <= 10
    assert left.quantile(0.05) == pytest.approx(15, abs=3) and left.quantile(0.95) == pytest.approx(184, abs=3)
    still = [draw for draw in draws if not any(draw.removed)]
    assert 0.002 < len(still) / len(draws) < 0.009
    capped = [draw for draw in draws if draw.capped(196, 1) != draw.removed]
    assert abs(len(capped) / len(draws) - 0.185) < 5 * (0.185 * 0.815 / len(draws)) ** 0.5
    active = sum(sum(count > 0 for count in draw.capped(196, 1)) for draw in draws) / len(draws)
    assert active == pytest.approx(7.4, abs=0.2)


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 20), st.integers(0, 2**31))
def test_draws_remove_the_same_in_every_iteration_and_never_too_much(
    tokens: int, most: int, iterations: int, seed: int
) -> None:
    removed = MorphSchedule.sample(tokens, most, iterations, torch.Generator().manual_seed(seed)).removed
    assert len(set(removed)) == 1 and 1 <= len(removed) <= iterations
    assert sum(removed) <= min(tokens, most)
    assert removed == MorphSchedule.sample(tokens, most, iterations, torch.Generator().manual_seed(seed)).removed


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MorphSchedule((3, -1)), ValueError, "every count in removed must be at least 0, got -1"),
        (lambda: MorphSchedule((3, 1.5)), TypeError, "every count in removed must be an integer, got 1.5"),
        (lambda: MorphSchedule((True,)), TypeError, "every count in removed must be an integer, got True"),
        (lambda: MorphSchedule(7), TypeError, "removed must be a sequence of integers, got 7"),
        (lambda: MorphSchedule("77"), TypeError, "removed must be a sequence of integers, got '77'"),
        (lambda: MorphSchedule({3, 2}), TypeError, "removed must be a sequence of integers, got {2, 3}"),
        (lambda: MorphSchedule((1,)).num_groups(10.5), TypeError, "num_tokens must be an integer, got 10.5"),
        (lambda: MorphSchedule((1,)).num_groups(-1), ValueError, "num_tokens must be at least 0, got -1"),
        (lambda: MorphSchedule.sample(9, 9, 2**63), ValueError, "max_iterations must be at most 1048576, got"),
        (lambda: MorphSchedule.uniform(-1, 2), ValueError, "total must be at least 0, got -1"),
        (lambda: MorphSchedule.uniform(4, 0), ValueError, "iterations must be at least 1, got 0"),
        (lambda: MorphSchedule.sample(0, 4, 2), ValueError, "num_tokens must be at least 1, got 0"),
        (lambda: MorphSchedule.sample(4, -4, 2), ValueError, "max_removed must be at least 0, got -4"),
        (lambda: MorphSchedule.sample(4, 4, 0), ValueError, "max_iterations must be at least 1, got 0"),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_counts_may_come_from_numpy_and_torch() -> None:
    for removed in (np.array([3, 2]), torch.tensor([3, 2]), [np.int64(3), 2]):
        assert MorphSchedule(removed) == MorphSchedule((3, 2))  # type: ignore[arg-type]
