"""Masks of patches: which tokens the student does not see.

Block-wise masking is BEiT's: rectangles of random area and aspect ratio are laid over the grid until the wanted number
of patches is covered; patches already covered do not count again, and the last rectangle is cut so that every image has
exactly the same number. All images of a batch are covered together, a rectangle each per round.

Both kinds are functions of uniform numbers (`random_cover`, `block_cover`): whoever needs an image's mask again, or on
another device, keeps or sends its numbers. On a GPU neither waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtm_triton.backend import choose_backend
from dtm_triton.partition import Partition, grid_of_units, patches_of_units

MAX_ROUNDS = 64  # rectangles tried per image, at most, before what is left is filled with single patches


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
    masks = random_cover(scores, num_masked)
    return masks if device is None else masks.to(device)


def random_cover(draws: Tensor, num_masked: int) -> Tensor:
    """The mask that uniform numbers decide: the `num_masked` patches with the largest ones.

    Args:
        draws: [B, N], any device.
        num_masked: patches to mask in every image, 0..N.

    Returns:
        bool [B, N], True = masked.

    >>> random_cover(torch.tensor([[0.1, 0.9, 0.5]]), 2).tolist()
    [[False, True, True]]
    """
    masks = torch.zeros(draws.shape, dtype=torch.bool, device=draws.device)
    return masks.scatter_(1, draws.topk(num_masked, dim=1).indices, True)


def random_partition(
    draws: Tensor, grid: tuple[int, int], num_masked: int, num_thrown: int = 0, *, unit: int = 1
) -> Partition:
    """The partition that uniform numbers decide: units with the largest are masked, with the next largest thrown.

    Args:
        draws: [B, U] numbers, one for every unit of `unit` x `unit` patches in raster order, any device.
        grid: (height, width) in patches, multiples of `unit`.
        num_masked, num_thrown: patches of every image, multiples of unit^2.

    Raises ValueError for a grid, a count or draws that do not fit.

    >>> [part.tolist() for part in random_partition(torch.tensor([[0.1, 0.9, 0.5, 0.3]]), (1, 4), 1, 2)]
    [[[1]], [[2, 3]], [[0]]]
    """
    rows, columns = grid_of_units(grid, unit, num_masked, num_thrown)
    if draws.dim() != 2 or draws.shape[1] != rows * columns:
        raise ValueError(f"draws must be [B, {rows * columns}], got {list(draws.shape)}")
    masks = random_cover(draws, num_masked // unit**2)
    thrown = _thrown(draws, masks, num_thrown // unit**2)
    if thrown is not None:
        thrown = patches_of_units(thrown, grid, unit)
    return Partition.of(patches_of_units(masks, grid, unit), thrown, num_masked, num_thrown)


def block_partition(
    draws: Tensor, grid: tuple[int, int], num_masked: int, num_thrown: int = 0, *, min_patches: int = 16
) -> Partition:
    """Block-wise masks, `block_cover`'s, and of the patches that are left those with the largest numbers thrown.

    Args:
        draws: [B, 5 * rounds + N], as for `block_cover`; the last N decide what is thrown.
        grid, num_masked, min_patches: as in `block_masks`.
        num_thrown: patches to throw in every image.

    Raises ValueError for a grid or a count that does not fit.

    >>> [part.shape[1] for part in block_partition(torch.rand(2, 5 * 13 + 196), (14, 14), 75, 40)]
    [75, 40, 81]
    """
    grid_of_units(grid, 1, num_masked, num_thrown)
    masks = block_cover(draws, grid, num_masked, min_patches=min_patches)
    return Partition.of(masks, _thrown(draws[:, -masks.shape[1] :], masks, num_thrown), num_masked, num_thrown)


def _thrown(draws: Tensor, masks: Tensor, count: int) -> Tensor | None:
    """The `count` with the largest draws that are not masked, bool; None when that is none."""
    return random_cover(draws.masked_fill(masks, -torch.inf), count) if count else None


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
    exact count. What `block_rounds` rectangles leave (at 75 of 196: in 1 image of 10^5) is filled with single patches
    at random places.

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
    num_patches = _check(batch_size, grid, num_masked)
    if min_patches < 1:
        raise ValueError(f"min_patches must be at least 1, got {min_patches!r}")
    if not (len(aspect) == 2 and 0 < aspect[0] <= aspect[1] < math.inf):
        raise ValueError(f"aspect must be two positive ratios, smaller first, got {aspect!r}")
    device = generator.device if generator is not None else torch.device("cpu")
    numbers = 5 * block_rounds(num_patches, num_masked, min_patches) + num_patches
    draws = torch.rand(batch_size, numbers, generator=generator, device=device)
    return block_cover(draws, grid, num_masked, min_patches=min_patches, aspect=aspect)


def block_rounds(num_patches: int, num_masked: int, min_patches: int = 16) -> int:
    """Rectangles tried per image: so many that about 1 image in 10^4 at most is left over; 64 at most.

    Fitted to counts on grids from 6 x 6 to 32 x 32, up to 3/4 of the patches masked.

    >>> block_rounds(196, 75), block_rounds(196, 147), block_rounds(196, 75, min_patches=1)
    (13, 40, 24)
    """
    odds = num_masked / max(num_patches - num_masked, 1)
    smaller = max(math.log2(num_patches / 12 / min_patches), 0.0)
    return min(MAX_ROUNDS, 6 + math.ceil(11 * odds + (1.6 + 1.6 * odds) * smaller))


def block_cover(
    draws: Tensor,
    grid: tuple[int, int],
    num_masked: int,
    *,
    min_patches: int = 16,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """The block-wise mask that uniform numbers decide; `block_masks` says how. An image's mask depends on its row only.

    Args:
        draws: [B, 5 * rounds + N] in 0..1, any device: five numbers for every rectangle, one for every patch.
        grid, num_masked, min_patches, aspect: as in `block_masks`.

    Returns:
        bool [B, N], True = masked, exactly `num_masked` True in each row.

    >>> block_cover(torch.rand(2, 5 * 13 + 196), (14, 14), 75).sum(1).tolist()
    [75, 75]
    """
    height, width = grid
    count, device = len(draws), draws.device
    rounds = (draws.shape[1] - height * width) // 5
    # float64: what is rounded to whole patches below must not depend on how a device computes exp
    chosen = draws[:, : 5 * rounds].to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    numbers = chosen.view(count, rounds, 5)
    numbers[:, :, 1] = _ratios(numbers[:, :, 1], aspect)
    if choose_backend(None, device) == "triton":
        from dtm_triton.kernels import masks as kernels

        return kernels.block_cover(numbers, draws[:, 5 * rounds :], grid, num_masked, min_patches)
    numbers = numbers.permute(1, 2, 0).contiguous()
    rows = torch.arange(height, device=device)[None, :, None]
    columns = torch.arange(width, device=device)[None, None, :]
    covered = torch.full((count, height, width), -1, device=device)  # the round that covers a patch, or -1
    missing = torch.full((count,), num_masked, device=device)
    for number, (area, ratio, down, right, _) in enumerate(numbers):
        if device.type == "cpu" and not bool((missing > 0).any()):
            break
        tall, wide = _rectangles(area, ratio, missing, grid, min_patches)
        tall = tall * (missing > 0)  # an image that has enough gets a rectangle of no rows
        top = (down * (height - tall + 1)).long().view(-1, 1, 1)
        left = (right * (width - wide + 1)).long().view(-1, 1, 1)
        inside = (rows >= top) & (rows < top + tall.view(-1, 1, 1))
        inside = inside & (columns >= left) & (columns < left + wide.view(-1, 1, 1)) & (covered < 0)
        covered.masked_fill_(inside, number)
        missing = missing - inside.sum((1, 2))
    flat = covered.flatten(1)
    masks = flat >= 0
    if rounds and num_masked:
        last = flat.amax(1, keepdim=True)
        from_bottom = numbers[:, 4].gather(0, last.clamp(min=0).T).T < 0.5
        masks &= ~_excess((flat == last) & masks, -missing, from_bottom)
    scores = draws[:, 5 * rounds :].masked_fill(masks, -1.0)
    return masks | (scores.argsort(dim=1, descending=True, stable=True).argsort(1) < missing[:, None])


def _ratios(draws: Tensor, aspect: tuple[float, float]) -> Tensor:
    """Aspect ratios, log-uniform in `aspect`, in the shape of the draws."""
    low, high = math.log(aspect[0]), math.log(aspect[1])
    return torch.exp(low + draws.contiguous() * (high - low))


def _rectangles(
    area_draw: Tensor, ratio: Tensor, missing: Tensor, grid: tuple[int, int], min_patches: int
) -> tuple[Tensor, Tensor]:
    """Whole-patch heights and widths, each [B]: at least `min_patches` in area, inside the grid."""
    height, width = grid
    area = min_patches + area_draw * (missing - min_patches).clamp(min=0)
    tall = ((area * ratio).sqrt() + 0.5).floor().clamp(1, height)
    wide = ((area / ratio).sqrt() + 0.5).floor().clamp(1, width)
    # too small: the longer side grows, and where it meets the grid's edge the other one
    longer = torch.maximum(tall, (min_patches / wide).ceil()).clamp(max=height)
    tall = torch.where(tall >= wide, longer, tall)
    wide = torch.maximum(wide, (min_patches / tall).ceil()).clamp(max=width)
    tall = torch.maximum(tall, (min_patches / wide).ceil()).clamp(max=height)
    return tall.long(), wide.long()


def _excess(last: Tensor, excess: Tensor, from_bottom: Tensor) -> Tensor:
    """The final `excess` [B] True patches of last [B, N] in raster order, or the first where from_bottom [B, 1]."""
    flat = last.long()
    rank = flat.cumsum(1)
    rank = torch.where(from_bottom, rank, flat.sum(1, keepdim=True) - rank + 1)
    return last & (rank <= excess[:, None])


def _check(batch_size: int, grid: tuple[int, int], num_masked: int) -> int:
    if batch_size < 0:
        raise ValueError(f"batch_size must be at least 0, got {batch_size!r}")
    grid_of_units(grid, 1, num_masked)
    return grid[0] * grid[1]
