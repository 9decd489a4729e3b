"""Masks: exact counts, block shapes, fairness, determinism, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_triton import masking
from dtm_triton.masking import (
    block_cover,
    block_masks,
    block_partition,
    block_rounds,
    random_cover,
    random_masks,
    random_partition,
)
from dtm_triton.partition import patches_of_units


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 4),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    share=st.floats(0, 1),
    min_patches=st.integers(1, 40),
    low=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)
def test_every_row_has_exactly_the_count(batch, height, width, share, min_patches, low, seed):
    count = round(share * height * width)
    block = block_masks(
        batch, (height, width), count, min_patches=min_patches, aspect=(low, 1 / low), generator=seeded(seed)
    )
    for masks in (block, random_masks(batch, (height, width), count, generator=seeded(seed))):
        assert masks.shape == (batch, height * width) and masks.dtype == torch.bool
        assert masks.sum(1).tolist() == [count] * batch


def test_defaults_of_the_paper():
    masks = block_masks(64, (14, 14), 75, generator=seeded()).view(64, 14, 14)
    assert masks.sum((1, 2)).tolist() == [75] * 64
    # blocks: few borders between masked and seen patches; 75 single patches have about 170 of them
    borders = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    scattered = random_masks(64, (14, 14), 75, generator=seeded()).view(64, 14, 14)
    loose = (scattered[:, 1:] != scattered[:, :-1]).sum((1, 2)) + (scattered[:, :, 1:] != scattered[:, :, :-1]).sum(
        (1, 2)
    )
    assert borders.float().mean() < 55 and loose.float().mean() > 150


def test_a_single_block_is_one_rectangle_cut_at_one_edge():
    masks = block_masks(200, (14, 14), 16, generator=seeded(1)).view(200, 14, 14)
    shapes = set()
    for mask in masks:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert len(rows) == height and len(columns) == width
        assert 0 <= height * width - 16 <= width, "more than one row was cut"
        full = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(1)
        assert full.sum() >= height - 1 and (full[1:].all() or full[:-1].all())
        shapes.add((height, width))
    assert shapes >= {(2, 8), (8, 2), (3, 6), (6, 3), (4, 4)}


def test_rectangles_have_the_area_and_log_uniform_aspect():
    draws = torch.rand(2, 20_000, generator=seeded(2))
    missing = torch.full((20_000,), 90_000)
    tall, wide = masking._rectangles(draws[0], masking._ratios(draws[1], (0.3, 1 / 0.3)), missing, (2000, 2000), 10_000)
    area = (tall * wide).float()
    assert area.min() >= 10_000 and area.max() < 91_000
    assert torch.allclose(area.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([30e3, 50e3, 70e3]), rtol=0.03)
    logs = (tall / wide).log()
    assert abs(logs.min() - math.log(0.3)) < 0.02 and abs(logs.max() + math.log(0.3)) < 0.02
    expected = torch.linspace(math.log(0.3), -math.log(0.3), 9)[1:-1]
    assert torch.allclose(logs.quantile(torch.linspace(0, 1, 9)[1:-1]), expected, atol=0.03)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(1, 15), st.integers(1, 60), st.integers(0, 225), st.integers(0, 99))
def test_rectangles_reach_the_least_area_inside_any_grid(height, width, min_patches, missing, seed):
    draws = torch.rand(2, 30, generator=seeded(seed))
    ratios = masking._ratios(draws[1], (0.3, 1 / 0.3))
    tall, wide = masking._rectangles(draws[0], ratios, torch.full((30,), missing), (height, width), min_patches)
    assert (tall >= 1).all() and (wide >= 1).all() and (tall <= height).all() and (wide <= width).all()
    assert (tall * wide >= min(min_patches, height * width)).all()


def test_grid_smaller_than_a_block():
    assert block_masks(3, (2, 3), 4, min_patches=16, generator=seeded()).sum(1).tolist() == [4, 4, 4]
    assert block_masks(2, (14, 14), 196, generator=seeded()).all()
    assert not block_masks(2, (14, 14), 0, generator=seeded()).any()


def test_the_rest_is_filled_when_rectangles_run_out(monkeypatch):
    monkeypatch.setattr(masking, "MAX_ROUNDS", 1)
    masks = block_masks(50, (8, 8), 40, min_patches=4, generator=seeded())
    assert masks.sum(1).tolist() == [40] * 50
    monkeypatch.setattr(masking, "MAX_ROUNDS", 0)
    masks = block_masks(4000, (4, 4), 4, generator=seeded())
    assert masks.sum(1).tolist() == [4] * 4000
    assert (masks.float().mean(0) - 0.25).abs().max() < 0.04


def test_no_place_is_preferred():
    random = random_masks(4000, (4, 5), 5, generator=seeded()).float().mean(0)
    assert (random - 0.25).abs().max() < 0.04
    block = block_masks(4000, (14, 14), 75, generator=seeded()).float().mean(0).view(14, 14)
    # rectangles reach the middle more often than the edge; mirror images are equally likely
    assert (block - block.flip(0)).abs().max() < 0.06 and (block - block.flip(1)).abs().max() < 0.06
    assert (block - block.T).abs().max() < 0.06 and block.min() > 0.02


@pytest.mark.parametrize("draw", [block_masks, random_masks])
def test_the_generator_decides_alone(draw):
    first, second = draw(4, (14, 14), 75, generator=seeded(3)), draw(4, (14, 14), 75, generator=seeded(3))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(4, (14, 14), 75, generator=seeded(4)))
    assert len({tuple(row.tolist()) for row in first}) == 4, "every image has its own mask"
    state = torch.get_rng_state()
    draw(4, (14, 14), 75, generator=seeded(3))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    unseeded = draw(4, (14, 14), 75)
    torch.manual_seed(5)
    assert torch.equal(unseeded, draw(4, (14, 14), 75))


def test_random_masks_on_a_device():
    assert random_masks(2, (3, 3), 4, generator=seeded(), device="meta").device.type == "meta"


@pytest.mark.parametrize("draw", [block_masks, random_masks])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, (4, 4), 2), r"batch_size .* -1"),
        ((2, (4, 0), 2), r"grid .* \(4, 0\)"),
        ((2, (4, 4.0), 2), r"grid .* \(4, 4.0\)"),
        ((2, (4, 4, 4), 2), r"grid .* \(4, 4, 4\)"),
        ((2, (4, 4), 17), r"num_masked .* 16.* 17"),
        ((2, (4, 4), -1), r"num_masked .* -1"),
    ],
)
def test_bad_input(draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_patches": 0}, "min_patches .* 0"),
        ({"aspect": (0.0, 1.0)}, r"aspect .* \(0.0, 1.0\)"),
        ({"aspect": (2.0, 1.0)}, r"aspect .* \(2.0, 1.0\)"),
        ({"aspect": (1.0, math.inf)}, "aspect .* inf"),
    ],
)
def test_bad_blocks(options, message):
    with pytest.raises(ValueError, match=message):
        block_masks(1, (4, 4), 2, **options)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 4),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    unit=st.integers(1, 3),
    levels=st.sampled_from([3, 1000]),  # few: many numbers are equal
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_random_partitions(batch, rows, columns, unit, levels, seed, data):
    """Masks are random_cover's, whatever is thrown; no visible unit has a larger number than a thrown one."""
    grid, units = (rows * unit, columns * unit), rows * columns
    masked = data.draw(st.integers(0, units))
    thrown = data.draw(st.integers(0, units - masked))
    draws = torch.randint(levels, (batch, units), generator=seeded(seed)) / levels
    parts = random_partition(draws, grid, masked * unit**2, thrown * unit**2, unit=unit)
    masks = patches_of_units(random_cover(draws, masked), grid, unit)
    assert torch.equal(parts.mask, masks)
    assert [part.shape[1] for part in parts] == [n * unit**2 for n in (masked, thrown, units - masked - thrown)]
    assert torch.equal(torch.cat(parts, 1).sort(1).values, torch.arange(units * unit**2).expand(batch, -1))
    numbers = patches_of_units(draws, grid, unit)
    of_thrown, of_visible = numbers.gather(1, parts.thrown), numbers.gather(1, parts.visible)
    if batch and of_thrown.shape[1] and of_visible.shape[1]:
        assert (of_thrown.amin(1) >= of_visible.amax(1)).all()
    state = torch.zeros(batch, units * unit**2, dtype=torch.bool).scatter(1, parts.thrown, True)
    inside = state.view(batch, rows, unit, columns, unit)
    assert torch.equal(inside.amax((2, 4)), inside.amin((2, 4))), "a unit is thrown whole or not at all"


def test_random_partitions_throw_without_preference():
    draws = torch.rand(20_000, 12, generator=seeded())
    parts = random_partition(draws, (3, 4), 4, 3)
    for part, share in zip(parts, (4 / 12, 3 / 12, 5 / 12), strict=True):
        found = torch.bincount(part.flatten(), minlength=12) / 20_000
        assert (found - share).abs().max() < 5 * (share * (1 - share) / 20_000) ** 0.5


@pytest.mark.parametrize(("masked", "thrown"), [(75, 0), (75, 40), (75, 121), (0, 196), (196, 0), (0, 0)])
def test_block_partitions(masked, thrown):
    """Masks are block_cover's; the others' largest numbers are thrown."""
    draws = torch.rand(30, 5 * block_rounds(196, masked) + 196, generator=seeded())
    parts = block_partition(draws, (14, 14), masked, thrown)
    masks = block_cover(draws, (14, 14), masked)
    assert torch.equal(parts.mask, masks)
    left = draws[:, -196:].masked_fill(masks, -1)
    assert torch.equal(parts.thrown, left.topk(thrown).indices.sort(1).values)
    assert parts.visible.shape == (30, 196 - masked - thrown)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_partition(torch.rand(2, 15), (4, 4), 2), r"draws .* 16.* \[2, 15\]"),
        (lambda: random_partition(torch.rand(16), (4, 4), 2), r"draws .* \[16\]"),
        (lambda: random_partition(torch.rand(2, 4), (4, 4), 4, 14, unit=2), "num_thrown .* 14"),
        (lambda: block_partition(torch.rand(2, 81), (4, 4), 4, 13), "num_thrown .* 12.* 13"),
        (lambda: block_partition(torch.rand(2, 81), (4, 4), 17), "num_masked .* 17"),
    ],
)
def test_bad_partitions(make, message):
    with pytest.raises(ValueError, match=message):
        make()
