"""Partitions: lists in raster order, what is derived from them, counts and units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtm_triton.partition import Partition, count_patches, grid_of_units, patches_of_units


@given(st.integers(0, 4), st.integers(1, 30), st.data())
def test_lists_and_what_follows_from_them(batch: int, patches: int, data: st.DataObject) -> None:
    """Against Python's sets, image by image."""
    masked_count = data.draw(st.integers(0, patches))
    thrown_count = data.draw(st.integers(0, patches - masked_count))
    drawn = torch.rand(batch, patches, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))).argsort(
        1
    )
    masked, thrown = torch.zeros(2, batch, patches, dtype=torch.bool)
    masked.scatter_(1, drawn[:, :masked_count], True)
    thrown.scatter_(1, drawn[:, masked_count : masked_count + thrown_count], True)
    parts = Partition.of(masked, thrown, masked_count, thrown_count)
    assert parts.patches == patches and all(part.dtype == torch.int64 for part in parts)
    assert torch.equal(parts.mask, masked)
    for row in range(batch):
        one = Partition(*(part[row : row + 1] for part in parts))
        sets = [set(part[0].tolist()) for part in one]
        assert all(part[0].tolist() == sorted(found) for part, found in zip(one, sets, strict=True))
        assert sets[0] == set(masked[row].nonzero().flatten().tolist())
        assert sets[1] == set(thrown[row].nonzero().flatten().tolist())
        assert sets[0] | sets[1] | sets[2] == set(range(patches)) and [len(s) for s in sets[:2]] == [
            masked_count,
            thrown_count,
        ]
        kept = sorted(sets[0] | sets[2])
        assert one.kept[0].tolist() == kept
        assert one.masked_among_kept[0].tolist() == [kept.index(patch) for patch in sorted(sets[0])]
        assert one.visible_among_kept[0].tolist() == [kept.index(patch) for patch in sorted(sets[2])]
    if not thrown_count:
        assert all(map(torch.equal, Partition.of(masked, None, masked_count), parts))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_units_lie_in_raster_order(rows: int, columns: int, unit: int, batch: int) -> None:
    grid = rows * unit, columns * unit
    assert grid_of_units(grid, unit) == (rows, columns)
    units = torch.arange(batch * rows * columns).view(batch, rows * columns)
    patches = patches_of_units(units, grid, unit)
    assert patches.shape == (batch, grid[0] * grid[1])
    for image in range(batch):
        for row in range(grid[0]):
            for column in range(grid[1]):
                own = units[image, row // unit * columns + column // unit]
                assert patches[image, row * grid[1] + column] == own


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((4, 0), 1), ValueError, r"grid .* \(4, 0\)"),
        (((4, 4.0), 1), ValueError, r"grid .* \(4, 4.0\)"),
        (((4, 4, 4), 1), ValueError, r"grid .* \(4, 4, 4\)"),
        (((4, 6), 4), ValueError, r"unit .* \(4, 6\), got 4"),
        (((4, 6), 0), ValueError, r"unit .* got 0"),
        (((4, 6), -2), ValueError, r"unit .* got -2"),
        (((4, 4), 1, 2.0), TypeError, r"num_masked .* 2.0"),
        (((4, 4), 1, -1), ValueError, r"num_masked .* -1"),
        (((4, 4), 1, 17), ValueError, r"num_masked .* 16.* 17"),
        (((4, 4), 2, 6), ValueError, r"num_masked .* 4.* 6"),
        (((4, 4), 2, 4, 6), ValueError, r"num_thrown .* 4.* 6"),
        (((4, 4), 1, 10, 7), ValueError, r"num_thrown .* 6.* 7"),
        (((4, 4), 1, 10, -7), ValueError, r"num_thrown .* -7"),
    ],
)
def test_bad_units(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grid_of_units(*arguments)  # type: ignore[arg-type]


@given(st.integers(0, 400), st.integers(0, 100))
def test_counts_are_of_the_decimal_number(patches: int, percent: int) -> None:
    assert count_patches(patches, percent / 100) == patches * percent // 100


@pytest.mark.parametrize("share", [-0.1, 1.01])
def test_bad_shares(share: float) -> None:
    with pytest.raises(ValueError, match=f"share .* {share}"):
        count_patches(4, share)
