"""Crops of maps against exact fractions; partitions by weight: counts, order, units, edge cases, what they hang on."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtm_triton.attention_masking import ORDER, attention_partition, crop_weights, sample_partition
from dtm_triton.partition import Partition, patches_of_units
from dtm_triton.sampling import draw_ranks

WHOLE = (0.0, 0.0, 1.0, 1.0)


def place(*shares: float) -> Tensor:
    return torch.tensor([shares], dtype=torch.float64)


def integral(map: list[list[float]], shares: tuple[float, ...], grid: tuple[int, int]) -> list[Fraction]:
    """Of every patch, with fractions: no rounding at all."""
    top, left, bottom, right = map_shares = [Fraction(share) for share in shares]
    assert len(map_shares) == 4
    heights, widths = len(map), len(map[0])

    def overlaps(start: Fraction, end: Fraction, part: int, parts: int, cells: int) -> list[Fraction]:
        low, high = (cells * (start + (end - start) * Fraction(n, parts)) for n in (part, part + 1))
        return [max(min(high, Fraction(cell + 1)) - max(low, Fraction(cell)), Fraction(0)) for cell in range(cells)]

    found = []
    for row in range(grid[0]):
        tall = overlaps(top, bottom, row, grid[0], heights)
        for column in range(grid[1]):
            wide = overlaps(left, right, column, grid[1], widths)
            cells = ((y, x) for y in range(heights) for x in range(widths))
            found.append(sum((tall[y] * wide[x] * Fraction(map[y][x]) for y, x in cells), Fraction(0)))
    return found


shares = st.floats(-0.5, 1.5).map(lambda number: round(number, 3))


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    shares=st.tuples(shares, shares, shares, shares),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
@example(size=(3, 3), grid=(3, 3), shares=WHOLE, dtype=torch.uint8, seed=0)
@example(size=(3, 3), grid=(2, 5), shares=(-1.0, -1.0, 2.0, 2.0), dtype=torch.uint8, seed=0)
def test_weights_are_integrals(size: Any, grid: Any, shares: Any, dtype: torch.dtype, seed: int) -> None:
    """Inside and outside the map, patches of several cells and of a part of one, places of no extent."""
    map = (torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 250).to(dtype)
    found = crop_weights(map[None], place(*shares), grid)
    assert found.dtype == torch.float64 and found.shape == (1, grid[0] * grid[1])
    for one, expected in zip(found[0].tolist(), integral(map.tolist(), shares, grid), strict=True):
        assert math.isclose(one, float(expected), rel_tol=1e-12, abs_tol=1e-10)


def test_a_whole_map_on_its_own_grid_is_itself() -> None:
    maps = torch.randint(256, (3, 14, 14), dtype=torch.uint8)
    weights = crop_weights(maps, place(*WHOLE).expand(3, 4), (14, 14))
    assert torch.equal(weights, maps.flatten(1).double())


def test_crops_of_several_images_are_flipped_one_by_one() -> None:
    maps, places = torch.rand(3, 5, 6), torch.rand(3, 4, dtype=torch.float64).sort(1).values
    flip = torch.tensor([True, False, True])
    plain, found = crop_weights(maps, places, (4, 3)), crop_weights(maps, places, (4, 3), flip=flip)
    mirrored = plain.view(3, 4, 3).flip(2).flatten(1)
    for row in range(3):
        assert torch.equal(found[row], (mirrored if flip[row] else plain)[row])
        assert torch.equal(plain[row], crop_weights(maps[row : row + 1], places[row : row + 1], (4, 3))[0])


def test_broken_cells_stay_where_they_are() -> None:
    """NaN and infinity reach the patches that touch them, no others."""
    map = torch.ones(1, 4, 4)
    map[0, 0, 0], map[0, 3, 3] = torch.nan, torch.inf
    weights = crop_weights(map, place(*WHOLE), (2, 2))[0]
    assert weights[0].isnan() and weights[3].isinf() and weights[1:3].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("broken", [(0, 0, math.nan, 1), (0, math.inf, 1, 1), (1, 0, 0, 1), (0.5, 0.5, 0.5, 0.5)])
def test_places_without_area_give_no_weight(broken: tuple[float, ...]) -> None:
    assert crop_weights(torch.ones(1, 4, 4), place(*broken), (2, 2)).tolist() == [[0.0] * 4]


def test_the_released_crop_is_the_corner() -> None:
    """The same 2 x 2 cells for every crop, one to each quarter of its patches."""
    maps = torch.rand(2, 14, 14)
    places = torch.tensor([[0.5, 0.5, 0.9, 0.8], [0.0, 0.3, 0.4, 1.0]], dtype=torch.float64)
    weights = crop_weights(maps, places, (14, 14), crop="released").view(2, 2, 7, 2, 7)
    for image in range(2):
        quarters = weights[image].permute(0, 2, 1, 3).flatten(2)
        assert torch.allclose(quarters, maps[image, :2, :2, None].double() / 49, rtol=1e-12)
    flipped = crop_weights(maps, places, (14, 14), crop="released", flip=torch.tensor([True, False]))
    assert torch.equal(flipped[0].view(14, 14), weights[0].reshape(14, 14).flip(1))
    narrow = crop_weights(maps[:, :1, :], places, (2, 2), crop="released")
    assert torch.allclose(narrow[:, :2], maps[:, 0, :2].double() / 2) and torch.equal(narrow[:, :2], narrow[:, 2:])


def parts_of(ranks: Tensor, first: int, count: int) -> Tensor:
    return ((ranks >= first) & (ranks < first + count)).nonzero()[:, 1].view(len(ranks), count)


@pytest.mark.parametrize("order", [ORDER, ("visible", "thrown", "masked"), ("thrown", "masked", "visible")])
def test_units_become_what_the_order_says(order: Any) -> None:
    weights, seeds = torch.rand(5, 20), torch.arange(5)
    counts = {"masked": 7, "thrown": 4, "visible": 9}
    parts = sample_partition(weights, seeds, (4, 5), 7, 4, order=order)
    ranks, first = draw_ranks(weights, seeds, 1.0, 0.01), 0
    for part in order:
        assert torch.equal(getattr(parts, part), parts_of(ranks, first, counts[part]))
        first += counts[part]


def test_strong_patches_are_masked_and_middling_ones_thrown() -> None:
    """With AMT's counts; reversed, the strongest stay visible."""
    weights = torch.linspace(0.0, 1.0, 196).expand(2000, 196)
    means = [part.double().mean() for part in sample_partition(weights, torch.arange(2000), (14, 14), 88, 78)]
    assert means[0] > 120 and 88 < means[1] < 100 and means[2] < 35
    sure = sample_partition(weights, torch.arange(2000), (14, 14), 88, 78, temperature=0.01, uniform=0.0)
    assert sure.masked.double().mean() > means[0] + 20
    turned = sample_partition(weights, torch.arange(2000), (14, 14), 88, 78, order=ORDER[::-1])
    assert turned.visible.double().mean() > 120 and turned.masked.double().mean() < 75


@pytest.mark.parametrize(("grid", "unit"), [((14, 14), 2), ((4, 6), 2), ((6, 3), 3)])
def test_units_share_their_fate(grid: tuple[int, int], unit: int) -> None:
    units = grid[0] // unit, grid[1] // unit
    count = units[0] * units[1]
    weights, seeds = torch.rand(4, count), torch.arange(4)
    masked, thrown = count // 2, count // 4
    parts = sample_partition(weights, seeds, grid, masked * unit**2, thrown * unit**2, unit=unit)
    whole = sample_partition(weights, seeds, units, masked, thrown)
    for part, expected in zip(parts, whole, strict=True):
        chosen = torch.zeros(4, count, dtype=torch.bool).scatter(1, expected, True)
        assert torch.equal(part, patches_of_units(chosen, grid, unit).nonzero()[:, 1].view(4, -1))


def test_an_image_is_a_function_of_its_row() -> None:
    weights, seeds = torch.rand(6, 30), torch.randint(-(2**63), 2**63 - 1, (6,))
    parts = sample_partition(weights, seeds, (5, 6), 12, 9)
    some = [4, 1]
    again = sample_partition(weights[some], seeds[some], (5, 6), 12, 9)
    assert all(torch.equal(one, part[some]) for one, part in zip(again, parts, strict=True))
    moved = sample_partition(weights, seeds + 1, (5, 6), 12, 9)
    assert (moved.masked != parts.masked).any(1).all()


def test_drawn_from_maps_as_from_their_weights() -> None:
    maps, places = torch.rand(8, 14, 14), torch.rand(8, 4, dtype=torch.float64).sort(1).values
    flip, seeds = torch.arange(8) % 2 == 0, torch.arange(8)
    for crop in ("exact", "released"):
        for unit, thrown in ((1, 78), (2, 52)):
            options: Any = dict(unit=unit, temperature=0.7, uniform=0.05, order=("thrown", "masked", "visible"))
            found = attention_partition(maps, places, seeds, (14, 14), 88, thrown, flip=flip, crop=crop, **options)
            weights = crop_weights(maps, places, (14 // unit, 14 // unit), flip=flip, crop=crop)
            expected = sample_partition(weights, seeds, (14, 14), 88, thrown, **options)
            assert all(map(torch.equal, found, expected))


def test_a_marked_patch_is_masked() -> None:
    """One bright cell: wherever the crop puts it, and mirrored or not, its patch is drawn first."""
    maps = torch.zeros(200, 7, 7, dtype=torch.uint8)
    maps[:, 2, 5] = 255
    top, left = torch.rand(2, 200, dtype=torch.float64) * 0.2
    places = torch.stack([top, left + 0.3, top + 0.5, left + 0.8], 1)
    flip = torch.arange(200) % 2 == 0
    parts = attention_partition(maps, places, torch.arange(200), (10, 10), 1, 0, flip=flip, uniform=0.0)
    row, column = parts.masked[:, 0] // 10, parts.masked[:, 0] % 10
    column = torch.where(flip, 9 - column, column)
    reached = (top + row * 0.05, top + (row + 1) * 0.05), (left + 0.3 + column * 0.05, left + 0.35 + column * 0.05)
    for (low, high), cell in zip(reached, (2, 5), strict=True):
        assert ((low < (cell + 1) / 7) & (high > cell / 7)).all()


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 7),
    unit=st.integers(1, 2),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(-(2**63), 2**63 - 4),
    data=st.data(),
)
def test_every_patch_is_in_one_list(
    batch: int, rows: int, columns: int, unit: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    masked = data.draw(st.integers(0, rows * columns))
    thrown = data.draw(st.integers(0, rows * columns - masked))
    numbers = st.sampled_from([0.0, 1.0, 0.5, -1.0, math.nan, math.inf, -math.inf])
    values = data.draw(st.lists(numbers, min_size=batch * rows * columns, max_size=batch * rows * columns))
    weights = torch.tensor(values, dtype=dtype).view(batch, rows * columns)
    counts = masked * unit**2, thrown * unit**2
    grid = rows * unit, columns * unit
    parts = sample_partition(weights, torch.arange(batch) + seed, grid, *counts, unit=unit, uniform=0.0)
    assert [part.shape for part in parts[:2]] == [(batch, counts[0]), (batch, counts[1])]
    assert all(part.dtype == torch.int64 for part in parts)
    assert torch.equal(torch.cat(parts, 1).sort(1).values, torch.arange(grid[0] * grid[1]).expand(batch, -1))
    assert all(torch.equal(part, part.sort(1).values) for part in parts)


def digest(parts: Partition) -> str:
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def test_the_same_bits_as_ever() -> None:
    """Written down: a run that is resumed elsewhere, or with another version, must see the same partitions."""
    numbers = torch.arange(4 * 196).view(4, 14, 14)
    maps = (numbers * 7919 % 251).to(torch.uint8)
    places = torch.tensor([[0.1, 0.2, 0.7, 0.9]], dtype=torch.float64).expand(4, 4)
    parts = attention_partition(maps, places, torch.tensor([0, 1, -5, 2**62]), (14, 14), 88, 78)
    assert digest(parts) == "b4e62efb8573f4a5"


GOOD: dict[str, Any] = dict(weights=torch.ones(2, 4), seeds=torch.zeros(2, dtype=torch.int64), grid=(2, 2))
MAPS: dict[str, Any] = dict(maps=torch.ones(2, 3, 3), places=torch.ones(2, 4, dtype=torch.float64))
META = torch.zeros(2, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "weights .* torch.int64"),
        ({"weights": torch.ones(2, 5)}, ValueError, r"weights .* 4.* \[2, 5\]"),
        ({"weights": torch.ones(4)}, ValueError, r"weights .* \[4\]"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds .* torch.float32"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds .* \[2\], got \[3\]"),
        ({"seeds": META}, ValueError, "seeds .* cpu, got meta"),
        ({"grid": (2, 0)}, ValueError, r"grid .* \(2, 0\)"),
        ({"unit": 3}, ValueError, "unit .* 3"),
        ({"num_masked": 5}, ValueError, "num_masked .* 5"),
        ({"num_thrown": 4}, ValueError, "num_thrown .* 4"),
        ({"temperature": 0.0}, ValueError, "temperature .* 0.0"),
        ({"temperature": math.inf}, ValueError, "temperature .* inf"),
        ({"temperature": math.nan}, ValueError, "temperature .* nan"),
        ({"uniform": -0.1}, ValueError, "uniform .* -0.1"),
        ({"uniform": math.nan}, ValueError, "uniform .* nan"),
        ({"order": ("masked", "thrown")}, ValueError, r"order .* \('masked', 'thrown'\)"),
        ({"backend": "reference"}, ValueError, "backend .* 'reference'"),
        ({"backend": "cuda"}, ValueError, "backend .* 'cuda'"),
    ],
)
def test_bad_samples(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = GOOD | {"num_masked": 1, "num_thrown": 1}
    assert sample_partition(**arguments).patches == 4
    with pytest.raises(error, match=message):
        sample_partition(**arguments | change)
    if "weights" not in change:
        rest = {name: value for name, value in (arguments | change).items() if name != "weights"}
        with pytest.raises(error, match=message):
            attention_partition(**MAPS, **rest)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": torch.ones(2, 3, 3, dtype=torch.bfloat16)}, TypeError, "maps .* torch.bfloat16"),
        ({"maps": torch.ones(2, 9)}, ValueError, r"maps .* \[2, 9\]"),
        ({"maps": torch.ones(2, 0, 3)}, ValueError, r"maps .* \[2, 0, 3\]"),
        ({"places": torch.ones(2, 4)}, TypeError, "places .* torch.float32"),
        ({"places": torch.ones(2, 3, dtype=torch.float64)}, ValueError, r"places .* \[2, 4\], got \[2, 3\]"),
        ({"flip": torch.zeros(2)}, TypeError, "flip .* torch.float32"),
        ({"flip": torch.zeros(1, dtype=torch.bool)}, ValueError, r"flip .* \[2\], got \[1\]"),
        ({"crop": "centre"}, ValueError, "crop .* 'centre'"),
        ({"grid": (1, -1)}, ValueError, r"grid .* \(1, -1\)"),
    ],
)
def test_bad_crops(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = MAPS | {"grid": (2, 2)}
    assert crop_weights(**arguments).shape == (2, 4)
    with pytest.raises(error, match=message):
        crop_weights(**arguments | change)
    with pytest.raises(error, match=message):
        attention_partition(**arguments | change, seeds=GOOD["seeds"], num_masked=1, num_thrown=1)
