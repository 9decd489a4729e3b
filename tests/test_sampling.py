"""Draws without replacement: exact probabilities of small cases, noise, logarithms, and statistics that can fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtm_triton.sampling import draw_keys, draw_ranks, gumbel_noise, logarithm

DRAWS = 100_000
WEIGHTS = torch.tensor([0.05, 0.6, 1.0, 0.2, 0.9, 0.02, 0.3], dtype=torch.float64)
SETTINGS = [(1.0, 0.0), (1.0, 0.01), (0.5, 0.1), (3.0, 0.0)]
"""Temperature and uniform share."""

Draw = Callable[[Tensor, Tensor, float, float], Tensor]


def tempered(weights: Tensor, temperature: float, uniform: float) -> list[float]:
    return ((weights / weights.max() + uniform) ** (1 / temperature)).tolist()


def permutations(weights: list[float]) -> dict[tuple[int, ...], float]:
    """The probability of every order, unit by unit."""
    found = {}
    for order in itertools.permutations(range(len(weights))):
        chance, left = 1.0, sum(weights)
        for unit in order:
            chance *= weights[unit] / left
            left -= weights[unit]
        found[order] = chance
    return found


def first_sets(weights: list[float], count: int) -> dict[frozenset[int], float]:
    """The probability of every set of the first `count` units, by a recursion over smaller sets."""
    sets = {frozenset[int](): 1.0}
    for _ in range(count):
        grown: dict[frozenset[int], float] = {}
        for drawn, chance in sets.items():
            left = sum(weights[unit] for unit in range(len(weights)) if unit not in drawn)
            for unit in set(range(len(weights))) - drawn:
                grown[drawn | {unit}] = grown.get(drawn | {unit}, 0.0) + chance * weights[unit] / left
        sets = grown
    return sets


def orders(weights: Tensor, temperature: float, uniform: float, draw: Draw = draw_ranks) -> Tensor:
    """Units in the order drawn, int64 [DRAWS, U], one row a seed."""
    ranks = draw(weights.expand(DRAWS, -1), torch.arange(DRAWS), temperature, uniform)
    return ranks.argsort(1)


def chi_square(weights: Tensor, temperature: float, uniform: float, draw: Draw = draw_ranks) -> float:
    """Of the 24 orders of four units: below 60 but once in 30,000 when all is right."""
    found = orders(weights, temperature, uniform, draw)
    counts = torch.bincount((found * torch.tensor([64, 16, 4, 1])).sum(1), minlength=256)
    total = 0.0
    for order, chance in permutations(tempered(weights, temperature, uniform)).items():
        count = counts[order[0] * 64 + order[1] * 16 + order[2] * 4 + order[3]].item()
        total += (count - DRAWS * chance) ** 2 / (DRAWS * chance)
    return total


def deviations(weights: Tensor, temperature: float, uniform: float, draw: Draw = draw_ranks) -> Tensor:
    """How many standard errors the shares of single units [U] and of pairs [U, U] among the first three are off."""
    drawn = torch.zeros(DRAWS, len(weights), dtype=torch.float64)
    drawn.scatter_(1, orders(weights, temperature, uniform, draw)[:, :3], 1.0)
    exact = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for units, chance in first_sets(tempered(weights, temperature, uniform), 3).items():
        for pair in itertools.product(units, repeat=2):
            exact[pair] += chance
    return (drawn.T @ drawn / DRAWS - exact) / (exact * (1 - exact) / DRAWS).sqrt()


def test_the_exact_probabilities_are_exact() -> None:
    """Two ways of computing them agree, and both sum to 1."""
    weights = [0.2, 1.0, 0.5, 0.7]
    orders, sets = permutations(weights), first_sets(weights, 2)
    assert math.isclose(sum(orders.values()), 1) and math.isclose(sum(sets.values()), 1)
    for units, chance in sets.items():
        assert math.isclose(chance, sum(p for order, p in orders.items() if frozenset(order[:2]) == units))


@pytest.mark.parametrize(("temperature", "uniform"), SETTINGS)
def test_orders_have_their_probabilities(temperature: float, uniform: float) -> None:
    assert chi_square(torch.tensor([0.3, 1.0, 0.1, 0.6], dtype=torch.float64), temperature, uniform) < 60


@pytest.mark.parametrize(("temperature", "uniform"), SETTINGS)
def test_units_and_pairs_are_drawn_as_often_as_they_should(temperature: float, uniform: float) -> None:
    """First and second order: single units are the diagonal."""
    assert deviations(WEIGHTS, temperature, uniform).abs().max() < 4.5


def steeper(weights: Tensor, seeds: Tensor, temperature: float, uniform: float) -> Tensor:
    return draw_ranks(weights**1.05, seeds, temperature, uniform)


def normal(weights: Tensor, seeds: Tensor, temperature: float, uniform: float) -> Tensor:
    """Normal noise of the same variance in the place of Gumbel's."""
    keys, noise = draw_keys(weights, seeds, temperature, uniform)
    other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (keys - noise + other * math.pi / 6**0.5).argsort(1, descending=True).argsort(1)


def without_uniform(weights: Tensor, seeds: Tensor, temperature: float, uniform: float) -> Tensor:
    return draw_ranks(weights, seeds, temperature, 0.0)


def shared_noise(weights: Tensor, seeds: Tensor, temperature: float, uniform: float) -> Tensor:
    """Two units that always have the same noise."""
    keys, noise = draw_keys(weights, seeds, temperature, uniform)
    keys[:, 1] += noise[:, 2] - noise[:, 1]
    return keys.argsort(1, descending=True).argsort(1)


@pytest.mark.parametrize("wrong", [steeper, normal, without_uniform, shared_noise])
def test_the_statistics_reject_wrong_samplers(wrong: Draw) -> None:
    four = torch.tensor([0.3, 1.0, 0.1, 0.6], dtype=torch.float64)
    assert chi_square(four, 1.0, 0.02, wrong) > 150
    assert deviations(WEIGHTS, 1.0, 0.02, wrong).abs().max() > 8


def test_units_without_weight_come_last_in_random_order() -> None:
    found = orders(torch.tensor([0.0, 0.7, -3.0, 1.0, torch.nan]), 1.0, 0.0)
    assert torch.equal(found[:, :2].sort(1).values, torch.tensor([1, 3]).expand(DRAWS, 2))
    last = torch.bincount(found[:, 2] * 25 + found[:, 3] * 5 + found[:, 4])
    assert (last > 0).sum() == 6 and (last[last > 0] - DRAWS / 6).abs().max() < 5 * (DRAWS * 5 / 36) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 0.01])
@pytest.mark.parametrize("value", [0.0, 3.0, -1.0, math.nan, math.inf, 1e-310])
def test_equal_weights_are_drawn_uniformly(value: float, uniform: float) -> None:
    """An image of one colour, or one whose map is broken, is masked at random."""
    weights = torch.full((6,), value, dtype=torch.float64)
    first = torch.bincount(orders(weights, 1.0, uniform)[:, :2].flatten(), minlength=6)
    assert (first - DRAWS / 3).abs().max() < 5 * (DRAWS * 2 / 9) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 0.01])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, -math.inf, 1e-310])
def test_what_is_no_weight_counts_as_zero(value: float, uniform: float) -> None:
    """And the others' weights stay what they are."""
    weights, seeds = torch.rand(500, 9, dtype=torch.float64), torch.arange(500)
    weights[:, 4] = 0
    expected = draw_ranks(weights, seeds, 1.0, uniform)
    weights[:, 4] = value
    assert torch.equal(draw_ranks(weights, seeds, 1.0, uniform), expected)


def test_equal_keys_are_decided_by_noise() -> None:
    """At such a temperature a double holds no noise beside the weight: equal weights still take turns."""
    first = orders(torch.tensor([1.0, 1.0, 0.5]), 1e-30, 0.01)
    assert (first[:, 2] == 2).all() and abs((first[:, 0] == 0).double().mean() - 0.5) < 0.006


def test_noise_is_gumbels() -> None:
    """Its distribution function is exp(-exp(-x)): 1,000 bins equally likely; neighbours are independent."""
    noise = gumbel_noise(torch.arange(-500, 500), 400)
    bins = torch.bincount((torch.exp(-torch.exp(-noise)) * 1000).long().flatten(), minlength=1000)
    assert ((bins - 400) ** 2 / 400).sum() < 999 + 5 * 1998**0.5
    for neighbours in (noise[:, 1:].flatten(), noise[1:, :].flatten()):
        own = noise[:, :-1].flatten() if len(neighbours) == 1000 * 399 else noise[:-1].flatten()
        assert abs(torch.corrcoef(torch.stack([own, neighbours]))[0, 1]) < 5 / len(own) ** 0.5
    assert len(noise.unique()) == noise.numel()


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 47, 63])
def test_noise_hangs_on_every_bit_of_a_seed(bit: int) -> None:
    """Both words are hashed, and seeds that differ in one bit share nothing."""
    seeds = torch.arange(2000)
    other = seeds ^ torch.tensor(1 << bit if bit < 63 else -(1 << 63))
    own, another = gumbel_noise(seeds, 20).flatten(), gumbel_noise(other, 20).flatten()
    assert (own != another).all() and abs(torch.corrcoef(torch.stack([own, another]))[0, 1]) < 0.025


def test_noise_is_a_function_of_seed_and_unit() -> None:
    """Written down: a run that is resumed with another version must draw the same masks."""
    seeds = torch.tensor([0, -1, 2**63 - 1, 7])
    noise = gumbel_noise(seeds, 6)
    assert torch.equal(gumbel_noise(seeds[[3, 1]], 3), noise[[3, 1], :3])
    bits = noise[:, [0, 5]].contiguous().view(torch.int64).tolist()
    assert bits == [
        [4605839600224541580, -4619309273766954354],
        [-4651590596065920138, -4619556044694786918],
        [4593570527846219870, 4603802392709151146],
        [4607721032346722822, -4620405786304127018],
    ]


def independent_noise(seed: int, unit: int) -> float:
    """splitmix64 twice and Python's logarithm."""

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    state = mix((seed + 0x9E3779B97F4A7C15) % 2**64)
    bits = mix((state + (unit + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 40))
def test_noise_in_integers_without_bounds(seed: int, unit: int) -> None:
    found = gumbel_noise(torch.tensor([seed]), unit + 1)[0, unit].item()
    assert math.isclose(found, independent_noise(seed, unit), rel_tol=1e-14, abs_tol=1e-14)


@given(st.floats(2.0**-1022, 1.7e308))
def test_logarithms(number: float) -> None:
    found = logarithm(torch.tensor(number, dtype=torch.float64)).item()
    assert math.isclose(found, math.log(number), rel_tol=4e-16, abs_tol=1e-300)


@given(st.floats(-0.4, 0.4))
def test_logarithms_near_one(offset: float) -> None:
    found = logarithm(torch.tensor(1 + offset, dtype=torch.float64)).item()
    assert math.isclose(found, math.log(1 + offset), rel_tol=1e-15, abs_tol=1e-300)


def test_only_ratios_matter() -> None:
    """A power of two changes no bit; any factor changes no draw but where two keys are equal to 15 digits."""
    weights, seeds = torch.rand(500, 49, dtype=torch.float64), torch.arange(500)
    ranks = draw_ranks(weights, seeds, 1.0, 0.01)
    for factor in (2.0**-900, 2.0**900, 1 / 3):
        assert torch.equal(draw_ranks(weights * factor, seeds, 1.0, 0.01), ranks)


@given(st.integers(0, 30), st.integers(0, 5), st.integers(0, 2**40))
def test_ranks_are_a_permutation_of_any_weights(units: int, rows: int, seed: int) -> None:
    values = [0.0, -0.0, 1.0, 1e308, 1e-308, 5e-324, torch.nan, torch.inf, -torch.inf, -2.0, 0.3]
    chosen = torch.tensor(values, dtype=torch.float64)[
        torch.randint(len(values), (rows, units), generator=torch.Generator().manual_seed(seed))
    ]
    for uniform in (0.0, 0.5, 1e308):
        ranks = draw_ranks(chosen, torch.arange(rows) + seed, 0.01, uniform)
        assert torch.equal(ranks.sort(1).values, torch.arange(units).expand(rows, units))
