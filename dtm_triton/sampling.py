"""Draws without replacement in proportion to weights, in plain PyTorch: the same order of units on every machine.

The unit with the largest log(weight) / temperature + noise comes first, with Gumbel noise -log(-log(u)): that is
drawing units one after another, each time in proportion to the weights that are left (Gumbel top-k, Yellott 1977).

u is a hash of the row's seed and the unit's number. All else, the logarithm too, is float64 addition, multiplication
and division, which are rounded alike everywhere: `kernels.sample_kernel` takes the same steps and gives the same bits.
Shapes: B rows, U units.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = -7046029254386353131  # 2^64 / golden ratio, as int64: splitmix64's step
MIX = ((30, -4658895280553007687), (27, -7723592293110705685))  # and its shifts and factors, then a shift by 31
LN2 = 0.6931471805599453
ROOT2 = 1.4140625  # nearly; Triton 3.6 compares with what it has rounded to float32, and this needs no rounding
MANTISSA, ONE = (1 << 52) - 1, 1023 << 52  # bits of float64
TINY = 2.0**-1022
"""The smallest normal float64; smaller weights count as 0."""
TERMS = tuple(1 / odd for odd in range(23, 0, -2))
"""1/23, ..., 1/3, 1: log((1 + s) / (1 - s)) = 2 s (1 + s^2/3 + s^4/5 + ...); at |s| < 0.172 2e-20 is left out."""


def draw_ranks(weights: Tensor, seeds: Tensor, temperature: float, uniform: float) -> Tensor:
    """When every unit is drawn: int64 [B, U], 0 first.

    Args:
        weights: [B, U] floats; what is not a positive finite number counts as 0.
        seeds: int64 [B].
        temperature, uniform: weights are (weight / the row's largest + uniform) ^ (1 / temperature). Where that is 0,
            units come last, in random order.

    >>> draw_ranks(torch.tensor([[0.0, 1.0, 1e-9]]), torch.tensor([7]), 1.0, 0.0).tolist()
    [[2, 0, 1]]
    """
    keys, noise = draw_keys(weights, seeds, temperature, uniform)
    by_noise = noise.argsort(dim=1, descending=True, stable=True)  # who decides among equal keys
    order = by_noise.gather(1, keys.gather(1, by_noise).argsort(dim=1, descending=True, stable=True))
    numbers = torch.arange(weights.shape[1], device=weights.device)
    return torch.empty_like(order).scatter_(1, order, numbers.expand_as(order))


def draw_keys(weights: Tensor, seeds: Tensor, temperature: float, uniform: float) -> tuple[Tensor, Tensor]:
    """What the units are sorted by, largest first: keys and, where these are equal, noise; float64 [B, U] each."""
    weights = weights.to(torch.float64)
    weights = torch.where((weights >= TINY) & (weights < torch.inf), weights, 0.0)
    if weights.shape[1]:
        largest = weights.amax(1, keepdim=True)
        weights = weights / torch.where(largest > 0, largest, 1.0) + uniform
    noise = gumbel_noise(seeds, weights.shape[1])
    some = weights >= TINY
    keys = _quotient(logarithm(torch.where(some, weights, 1.0)), temperature) + noise
    return torch.where(some, keys, -torch.inf), noise


def gumbel_noise(seeds: Tensor, units: int) -> Tensor:
    """-log(-log(u)) of uniform numbers, float64 [B, U]: a function of a row's seed and a unit's number, no more.

    >>> gumbel_noise(torch.tensor([1, 2]), 3)[1:].equal(gumbel_noise(torch.tensor([2]), 5)[:, :3])
    True
    """
    bits = random_bits(_mix(seeds + STEP), units)
    uniform = ((shifted(bits, 12)).to(torch.float64) + 0.5) * 2.0**-52  # above 0 and below 1, all 53 bits of it exact
    return -logarithm(-logarithm(uniform))


def random_bits(seeds: Tensor, count: int) -> Tensor:
    """`count` random int64 numbers for each of seeds int64 [B]: [B, count], functions of seed and place.

    Splitmix64 (Steele, Lea and Flood, 2014) in wrapping arithmetic.

    >>> random_bits(torch.tensor([1, 2]), 3)[1:].equal(random_bits(torch.tensor([2]), 5)[:, :3])
    True
    """
    return _mix(seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * STEP)


def logarithm(numbers: Tensor) -> Tensor:
    """Natural logarithms of normal positive float64 numbers, within a few units in the last place.

    >>> abs(float(logarithm(torch.tensor(10.0, dtype=torch.float64))) - 2.302585092994046) < 1e-15
    True
    """
    bits = numbers.view(torch.int64)
    exponent = (bits >> 52) - 1023
    part = ((bits & MANTISSA) | ONE).view(torch.float64)  # in 1..2
    large = part > ROOT2
    part = torch.where(large, part * 0.5, part)
    exponent = exponent + large.to(torch.int64)
    s = (part - 1.0) / (part + 1.0)
    square = s * s
    series = torch.full_like(s, TERMS[0])
    for term in TERMS[1:]:
        series = series * square + term
    return exponent.to(torch.float64) * LN2 + (s + s) * series


def _quotient(numbers: Tensor, divisor: float) -> Tensor:
    """Rounded once: on a GPU PyTorch multiplies by the reciprocal of a divisor that is not in a tensor there."""
    return numbers / numbers.new_full((1,), divisor)


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finalizer: every bit of the result hangs on every bit given."""
    for shift, factor in MIX:
        bits = (bits ^ shifted(bits, shift)) * factor
    return bits ^ shifted(bits, 31)


def shifted(bits: Tensor, places: int) -> Tensor:
    """To the right, zeros from the left: int64's own shift repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def area_weights(maps: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Integrals of piecewise constant maps [B, h0, w0] over the cells of a grid laid on places float64 [B, 4].

    float64 [B, h * w]. A cell's sum runs over the map's rows and then over its columns, one after another: the kernel
    adds in that order. What a cell does not touch is left out, be it NaN.
    """
    top, left, bottom, right = places.unbind(1)
    maps = maps.to(torch.float64)
    tall = _overlaps(top, bottom, grid[0], maps.shape[1])
    wide = _overlaps(left, right, grid[1], maps.shape[2])
    rows = maps.new_zeros(len(maps), grid[0], maps.shape[2])
    for row, share in enumerate(tall.unbind(2)):
        rows = rows + torch.where(share[:, :, None] > 0, share[:, :, None] * maps[:, row, None], 0.0)
    cells = maps.new_zeros(len(maps), *grid)
    for column, share in enumerate(wide.unbind(2)):
        cells = cells + torch.where(share[:, None] > 0, share[:, None] * rows[:, :, column, None], 0.0)
    return cells.flatten(1)


def _overlaps(start: Tensor, end: Tensor, parts: int, cells: int) -> Tensor:
    """How much of every one of a map's `cells` lies in each of the equal `parts` of start..end: [B, parts, cells]."""
    number = torch.arange(parts + 1, dtype=torch.float64, device=start.device)
    edges = _quotient((start[:, None] * (parts - number) + end[:, None] * number) * cells, parts)
    edges = torch.where(edges > 0, edges, 0.0)  # NaN becomes 0
    edges = torch.where(edges < cells, edges, float(cells))[:, :, None]
    cell = torch.arange(cells, dtype=torch.float64, device=start.device)
    return torch.minimum(edges[:, 1:], cell + 1.0) - torch.maximum(edges[:, :-1], cell)
