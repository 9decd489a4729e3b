"""One program divides one image's patches: weights, noise, order and the three lists of indices, in one launch.

The steps of `dtm_triton.sampling`, operation by operation, so that the bits are the same: float64, compiled without
contraction, and a logarithm made of these operations. A unit's rank is the number of units that come before it.

N = HEIGHT x WIDTH patches, UNITS of UNIT x UNIT patches, maps of MAP_HEIGHT x MAP_WIDTH cells.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEP = tl.constexpr(-7046029254386353131)
LN2, ROOT2 = tl.constexpr(0.6931471805599453), tl.constexpr(1.4140625)
MANTISSA, ONE = tl.constexpr((1 << 52) - 1), tl.constexpr(1023 << 52)
TINY, FINEST = tl.constexpr(2.0**-1022), tl.constexpr(2.0**-52)


@triton.jit
def _shifted(bits, PLACES: tl.constexpr):
    return (bits >> PLACES) & ((1 << (64 - PLACES)) - 1)


@triton.jit
def _mix(bits):
    bits = (bits ^ _shifted(bits, 30)) * -4658895280553007687
    bits = (bits ^ _shifted(bits, 27)) * -7723592293110705685
    return bits ^ _shifted(bits, 31)


@triton.jit
def _logarithm(numbers):
    bits = numbers.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) - 1023
    part = ((bits & MANTISSA) | ONE).to(tl.float64, bitcast=True)
    large = part > ROOT2
    part = tl.where(large, part * 0.5, part)
    exponent = exponent + large.to(tl.int64)
    s = (part - 1.0) / (part + 1.0)
    square = s * s
    series = square * (1.0 / 23) + (1.0 / 21)
    for odd in tl.static_range(19, 0, -2):
        series = series * square + 1.0 / odd
    return exponent.to(tl.float64) * LN2 + (s + s) * series


@triton.jit
def _edge(start, end, number, PARTS: tl.constexpr, CELLS: tl.constexpr):
    """Where the equal part `number` of start..end begins, in cells of the map, within the map."""
    edge = (start * (PARTS - number) + end * number) * CELLS / PARTS
    edge = tl.where(edge > 0, edge, 0)
    return tl.where(edge < CELLS, edge, CELLS)


@triton.jit
def _overlap(low, high, cell):
    cell = cell.to(tl.float64)
    return tl.minimum(high, cell + 1.0) - tl.maximum(low, cell)


@triton.jit
def _area(map, top, left, bottom, right, row, column, ROWS, COLUMNS, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr):
    """Integrals of the map over the parts (row, column): sums over its rows, then over its columns, as they touch."""
    row, column = row.to(tl.float64), column.to(tl.float64)
    low, high = _edge(top, bottom, row, ROWS, MAP_HEIGHT), _edge(top, bottom, row + 1.0, ROWS, MAP_HEIGHT)
    near, far = _edge(left, right, column, COLUMNS, MAP_WIDTH), _edge(left, right, column + 1.0, COLUMNS, MAP_WIDTH)
    first_row, first_column = tl.floor(low).to(tl.int32), tl.floor(near).to(tl.int32)
    rows = tl.max(tl.ceil(high).to(tl.int32) - first_row, 0)
    columns = tl.max(tl.ceil(far).to(tl.int32) - first_column, 0)
    total = tl.zeros_like(low)
    for across in range(columns):
        wide = _overlap(near, far, first_column + across)
        strip = tl.zeros_like(low)
        for down in range(rows):
            tall = _overlap(low, high, first_row + down)
            cell = (first_row + down) * MAP_WIDTH + first_column + across
            value = tl.load(map + cell, mask=(tall > 0) & (wide > 0), other=0).to(tl.float64)
            strip += tl.where(tall > 0, tall * value, 0)
        total += tl.where(wide > 0, wide * strip, 0)
    return total


@triton.jit
def sample_kernel(
    weights,  # floats [B, UNITS], or maps uint8 or floats [B, MAP_HEIGHT, MAP_WIDTH]
    places,  # float64 [B, 4] of crops: top, left, bottom, right; None without maps
    flips,  # uint8 [B]: crops that are mirrored; None where none is
    seeds,  # int64 [B]
    scratch,  # float64 [B, 2, UNITS]: keys, noise
    masked,  # int64 [B, MASKED]
    thrown,  # int64 [B, THROWN]
    visible,  # int64 [B, N - MASKED - THROWN]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    MAP_HEIGHT: tl.constexpr,
    MAP_WIDTH: tl.constexpr,
    CORNER_HEIGHT: tl.constexpr,  # share of the map that stands in for every crop; 0: the crops' places
    CORNER_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,  # patches
    THROWN: tl.constexpr,
    FIRST_MASKED: tl.constexpr,  # units that are drawn before
    FIRST_THROWN: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    UNIFORM: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    COLUMNS: tl.constexpr = WIDTH // UNIT
    ROWS: tl.constexpr = HEIGHT // UNIT
    UNITS: tl.constexpr = ROWS * COLUMNS
    N: tl.constexpr = HEIGHT * WIDTH
    image = tl.program_id(0).to(tl.int64)
    scratch += image * 2 * UNITS
    lanes = tl.arange(0, TILE)

    # weights, and the largest of them
    largest = tl.zeros([TILE], tl.float64)
    for start in range(0, UNITS, TILE):
        unit = start + lanes
        if places is None:
            weight = tl.load(weights + image * UNITS + unit, mask=unit < UNITS, other=0).to(tl.float64)
        else:
            row, column = unit // COLUMNS, unit % COLUMNS
            if flips is not None:
                column = tl.where(tl.load(flips + image) != 0, COLUMNS - 1 - column, column)
            map = weights + image * MAP_HEIGHT * MAP_WIDTH
            place = places + image * 4
            top, left, bottom, right = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
            if CORNER_HEIGHT > 0:
                top, left, bottom, right = 0.0, 0.0, CORNER_HEIGHT, CORNER_WIDTH
            weight = _area(map, top, left, bottom, right, row, column, ROWS, COLUMNS, MAP_HEIGHT, MAP_WIDTH)
        weight = tl.where((weight >= TINY) & (weight < float("inf")) & (unit < UNITS), weight, 0)
        largest = tl.maximum(largest, weight)
        tl.store(scratch + unit, weight, mask=unit < UNITS)
    most = tl.max(largest, 0)
    tl.debug_barrier()

    # keys, and noise for equal ones
    seed = _mix(tl.load(seeds + image) + STEP)
    for start in range(0, UNITS, TILE):
        unit = start + lanes
        weight = tl.load(scratch + unit, mask=unit < UNITS, other=0)
        weight = weight / tl.where(most > 0, most, 1) + UNIFORM
        bits = _mix(seed + (unit + 1).to(tl.int64) * STEP)
        uniform = (_shifted(bits, 12).to(tl.float64) + 0.5) * FINEST
        noise = -_logarithm(-_logarithm(uniform))
        some = weight >= TINY
        key = _logarithm(tl.where(some, weight, 1)) / TEMPERATURE + noise
        key = tl.where(some, key, float("-inf"))
        tl.debug_barrier()
        tl.store(scratch + unit, key, mask=unit < UNITS)
        tl.store(scratch + UNITS + unit, noise, mask=unit < UNITS)
    tl.debug_barrier()

    # ranks by counting, places in the lists by cumulative sums
    masked_before = tl.program_id(0) * 0
    thrown_before = tl.program_id(0) * 0
    for start in range(0, N, TILE):
        patch = start + lanes
        own = (patch // WIDTH // UNIT * COLUMNS + patch % WIDTH // UNIT)[None, :]
        key = tl.load(scratch + own, mask=own < UNITS, other=0)
        noise = tl.load(scratch + UNITS + own, mask=own < UNITS, other=0)
        rank = tl.zeros([TILE], tl.int32)
        for first in range(0, UNITS, CHUNK):
            other = (first + tl.arange(0, CHUNK))[:, None]
            others = tl.load(scratch + other, mask=other < UNITS, other=0)
            noises = tl.load(scratch + UNITS + other, mask=other < UNITS, other=0)
            sooner = (noises > noise) | ((noises == noise) & (other < own))
            sooner = ((others > key) | ((others == key) & sooner)) & (other < UNITS)
            rank += tl.sum(sooner.to(tl.int32), 0)
        valid = patch < N
        is_masked = valid & (rank >= FIRST_MASKED) & (rank < FIRST_MASKED + MASKED // (UNIT * UNIT))
        is_thrown = valid & (rank >= FIRST_THROWN) & (rank < FIRST_THROWN + THROWN // (UNIT * UNIT))
        at_masked = masked_before + tl.cumsum(is_masked.to(tl.int32), 0)
        at_thrown = thrown_before + tl.cumsum(is_thrown.to(tl.int32), 0)
        index = patch.to(tl.int64)
        tl.store(masked + image * MASKED + at_masked - 1, index, mask=is_masked)
        tl.store(thrown + image * THROWN + at_thrown - 1, index, mask=is_thrown)
        is_visible = valid & ~is_masked & ~is_thrown
        at_visible = index - at_masked - at_thrown  # patches before it that are neither
        tl.store(visible + image * (N - MASKED - THROWN) + at_visible, index, mask=is_visible)
        masked_before = tl.max(at_masked, 0)
        thrown_before = tl.max(at_thrown, 0)
