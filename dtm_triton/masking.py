"""Masks of patches: which tokens the student does not see.

Block-wise masking is BEiT's: rectangles of random area and aspect ratio are laid over the grid until the wanted number
of patches is covered; patches already covered do not count again, and the last rectangle is cut so that every image has
exactly the same number. All images of a batch are drawn together, a rectangle each per round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_ROUNDS = 64  # rectangles tried per image before what is left is filled with single patches


def random_masks(
    batch_size: int,
    grid: tuple[int, int],
    num_masked: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Masks of patches drawn uniformly, without replacement, for every image on its own.

    Args:
        batch_size: number of images B, 0 allowed.
        grid: (height, width) in patches; N = height * width.
        num_masked: patches to mask in every image, 0..N.
        generator: source of randomness; torch's global one by default.
        device: where the result lies; by default the generator's device.

    Returns:
        bool [B, N], True = masked, exactly `num_masked` True in each row.

    Raises:
        ValueError: a count out of range or a grid that is not two positive integers.

    >>> masks = random_masks(2, (4, 4), 12, generator=torch.Generator().manual_seed(0))
    >>> masks.shape, masks.sum(1).tolist()
    (torch.Size([2, 16]), [12, 12])
    """
    num_patches = _check(batch_size, grid, num_masked)
    draw_on = generator.device if generator is not None else device
    scores = torch.rand(batch_size, num_patches, generator=generator, device=draw_on)
    masks = torch.zeros(batch_size, num_patches, dtype=torch.bool, device=scores.device)
    masks.scatter_(1, scores.topk(num_masked, dim=1).indices, True)
    return masks if device is None else masks.to(device)


def block_masks(
    batch_size: int,
    grid: tuple[int, int],
    num_masked: int,
    *,
    min_patches: int = 16,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    generator: torch.Generator | None = None,
) -> Tensor:
    """BEiT's block-wise masks: rectangles until exactly `num_masked` patches are covered.

    A rectangle's area is uniform between `min_patches` and what is still missing, its aspect ratio (height / width)
    log-uniform in `aspect`, its place uniform. Sides are whole patches; where rounding or the grid's edge makes the
    rectangle smaller than `min_patches`, its longer side grows, at the edge the other one: the aspect ratio gives way.
    A grid of fewer patches is covered whole. The last rectangle is cut, row by row from its top or its bottom, to the
    exact count. After 64 rectangles (only reached when nearly everything is masked) single patches at random places
    fill the rest.

    Args:
        batch_size: number of images B, 0 allowed.
        grid: (height, width) in patches; N = height * width.
        num_masked: patches to mask in every image, 0..N (the paper: 75 of 196).
        min_patches: smallest rectangle, before the cut of the last one.
        aspect: smallest and largest height / width.
        generator: source of randomness, also decides the device; torch's global CPU one by default.

    Returns:
        bool [B, N], True = masked, exactly `num_masked` True in each row.

    Raises:
        ValueError: a count out of range, a grid that is not two positive integers, an empty or non-positive `aspect`.

    Source: BEiT (arXiv 2106.08254), Algorithm 1; used by DTM (arXiv 2401.00254) with 75 of 196 patches.

    >>> masks = block_masks(2, (14, 14), 75, generator=torch.Generator().manual_seed(0))
    >>> masks.shape, masks.sum(1).tolist()
    (torch.Size([2, 196]), [75, 75])
    """
    _check(batch_size, grid, num_masked)
    if min_patches < 1:
        raise ValueError(f"min_patches must be at least 1, got {min_patches!r}")
    if not (len(aspect) == 2 and 0 < aspect[0] <= aspect[1] < math.inf):
        raise ValueError(f"aspect must be two positive ratios, smaller first, got {aspect!r}")
    height, width = grid
    device = generator.device if generator is not None else torch.device("cpu")
    rows = torch.arange(height, device=device)[None, :, None]
    columns = torch.arange(width, device=device)[None, None, :]
    masks = torch.zeros(batch_size, height, width, dtype=torch.bool, device=device)
    missing = torch.full((batch_size,), num_masked, device=device)
    for _ in range(MAX_ROUNDS):
        if not bool((missing > 0).any()):
            break
        draws = torch.rand(5, batch_size, generator=generator, device=device)
        tall, wide = _rectangles(draws[0], draws[1], missing, grid, min_patches, aspect)
        top = (draws[2] * (height - tall + 1)).long().view(-1, 1, 1)
        left = (draws[3] * (width - wide + 1)).long().view(-1, 1, 1)
        inside = (rows >= top) & (rows < top + tall.view(-1, 1, 1))
        inside = inside & (columns >= left) & (columns < left + wide.view(-1, 1, 1))
        new = _cut(inside & ~masks, missing, from_bottom=draws[4] < 0.5)
        masks |= new
        missing = missing - new.sum((1, 2))
    flat = masks.flatten(1)
    if bool((missing > 0).any()):
        scores = torch.rand(flat.shape, generator=generator, device=device).masked_fill_(flat, -1.0)
        flat |= scores.argsort(1, descending=True).argsort(1) < missing[:, None]
    return flat


def _rectangles(
    area_draw: Tensor,
    aspect_draw: Tensor,
    missing: Tensor,
    grid: tuple[int, int],
    min_patches: int,
    aspect: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Whole-patch heights and widths, each [B]: at least `min_patches` in area, inside the grid."""
    height, width = grid
    area = min_patches + area_draw * (missing - min_patches).clamp(min=0)
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(low + aspect_draw * (high - low))
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    # too small: the longer side grows, and where it meets the grid's edge the other one
    longer = torch.maximum(tall, (min_patches / wide).ceil()).clamp(max=height)
    tall = torch.where(tall >= wide, longer, tall)
    wide = torch.maximum(wide, (min_patches / tall).ceil()).clamp(max=width)
    tall = torch.maximum(tall, (min_patches / wide).ceil()).clamp(max=height)
    return tall.long(), wide.long()


def _cut(new: Tensor, missing: Tensor, from_bottom: Tensor) -> Tensor:
    """Keep at most `missing` [B] of the True patches of new [B, h, w], in raster order from the top or the bottom."""
    flat = new.flatten(1).long()
    rank = flat.cumsum(1)
    reverse = flat.sum(1, keepdim=True) - rank + 1
    rank = torch.where(from_bottom[:, None], reverse, rank)
    return new & (rank <= missing[:, None]).view_as(new)


def _check(batch_size: int, grid: tuple[int, int], num_masked: int) -> int:
    if batch_size < 0:
        raise ValueError(f"batch_size must be at least 0, got {batch_size!r}")
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise ValueError(f"grid must be (height, width), two positive integers, got {grid!r}")
    num_patches = grid[0] * grid[1]
    if not isinstance(num_masked, int):
        raise TypeError(f"num_masked must be an integer, got {num_masked!r}")
    if not 0 <= num_masked <= num_patches:
        raise ValueError(f"num_masked must be between 0 and {num_patches}, the patches of the grid, got {num_masked!r}")
    return num_patches
