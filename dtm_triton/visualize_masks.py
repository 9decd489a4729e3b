"""Pictures of what a student sees: masked and thrown patches, attention maps, reconstructions.

Shapes: B images, N patches of a grid (height, width).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtm_triton import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAT = "inferno"
OPACITY = 0.6  # of the heat over a grey image


def draw_masks(
    images: Tensor, masks: Tensor, grid: tuple[int, int], path: Path | str, thrown: Tensor | None = None
) -> Path:
    """Images above what the student sees of them: masked patches are greyed out, thrown ones black.

    Args:
        images: [B, 3, H, W] or [B, 1, H, W], floats in 0..1, H and W multiples of the grid's sides. A column each.
        masks: bool [B, N], True = masked.
        grid: (height, width) in patches; N = height * width.
        path: the PNG to write; folders on the way are made.
        thrown: bool [B, N], none of them masked; None: nothing is thrown.

    Returns:
        the path.

    Raises:
        ValueError: shapes that do not belong together, a patch both masked and thrown.

    >>> import tempfile
    >>> masks = torch.tensor([[True, False, False, True]])
    >>> draw_masks(torch.rand(1, 3, 8, 8), masks, (2, 2), Path(tempfile.mkdtemp(), "masks.png")).name
    'masks.png'
    """
    masks, thrown = _check_masks(images, masks, thrown, grid)
    figure, axes = canvas.picture_grid(2, len(images), images.shape[-2:], _titles(masks, thrown))
    for column, image in enumerate(images.detach().float().cpu()):
        canvas.show(axes[0][column], image)
        _show_seen(axes[1][column], image, masks[column].view(grid), thrown[column].view(grid))
    return canvas.save(figure, path)


def draw_maps(
    images: Tensor,
    maps: Tensor,
    grid: tuple[int, int],
    path: Path | str,
    masks: Tensor | None = None,
    thrown: Tensor | None = None,
) -> Path:
    """Images above their attention maps, as heat over them: dark is nothing, yellow the image's strongest patch.

    Every title says how few patches, the strongest ones, hold half of the map.

    Args:
        images: as in `draw_masks`.
        maps: [B, N], 0 or more on any scale, floats or integers.
        grid, path: as in `draw_masks`.
        masks, thrown: as in `draw_masks`; when masks are given a third row shows them.

    Returns:
        the path.

    Raises:
        ValueError: shapes that do not belong together, a map below 0 or not finite, and as `draw_masks`.

    >>> import tempfile
    >>> maps = torch.tensor([[0, 128, 255, 0]], dtype=torch.uint8)
    >>> draw_maps(torch.rand(1, 3, 8, 8), maps, (2, 2), Path(tempfile.mkdtemp(), "maps.png")).name
    'maps.png'
    """
    from matplotlib import colormaps

    patches = canvas.check_images(images, grid)
    if maps.shape != (len(images), patches):
        raise ValueError(f"maps must be [{len(images)}, {patches}], got {list(maps.shape)}")
    maps = maps.detach().double().cpu()
    if not bool((maps.isfinite() & (maps >= 0)).all()):
        raise ValueError(f"maps must be finite and not below 0, got {maps.min():g} .. {maps.max():g}")
    rows = 2
    if masks is not None:
        rows = 3
        masks, thrown = _check_masks(images, masks, thrown, grid)
    figure, axes = canvas.picture_grid(rows, len(images), images.shape[-2:], [_focus(row) for row in maps])
    for column, image in enumerate(images.detach().float().cpu()):
        canvas.show(axes[0][column], image)
        heat = canvas.to_pixels((maps[column] / maps[column].max().clamp(min=1e-30)).view(grid), image.shape[-2:])
        colour = torch.from_numpy(colormaps[HEAT](heat.numpy())[..., :3]).permute(2, 0, 1).float()
        canvas.show(axes[1][column], image.mean(0, keepdim=True).lerp(colour, OPACITY))
        if masks is not None and thrown is not None:
            _show_seen(axes[2][column], image, masks[column].view(grid), thrown[column].view(grid))
    return canvas.save(figure, path)


def draw_reconstructions(
    images: Tensor,
    predictions: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    path: Path | str,
    thrown: Tensor | None = None,
) -> Path:
    """Images, what the student saw of them (masked patches grey, thrown ones black), and what it predicts in the masked
    patches' place: a row per image.

    Args:
        images: as in `draw_masks`.
        predictions: pixels like the images'; only those of masked patches are shown.
        masks, grid, path, thrown: as in `draw_masks`.

    Returns:
        the path.

    Raises:
        ValueError: shapes that do not belong together, a patch both masked and thrown.

    >>> import tempfile
    >>> image, masks = torch.rand(1, 3, 8, 8), torch.tensor([[True, False, False, True]])
    >>> draw_reconstructions(image, 1 - image, masks, (2, 2), Path(tempfile.mkdtemp(), "again.png")).name
    'again.png'
    """
    masks, thrown = _check_masks(images, masks, thrown, grid)
    if predictions.shape != images.shape:
        raise ValueError(f"predictions must be {list(images.shape)} as the images, got {list(predictions.shape)}")
    figure, axes = canvas.picture_grid(len(images), 3, images.shape[-2:], ["image", "what it sees", "predicted"])
    both = zip(images.detach().float().cpu(), predictions.detach().float().cpu(), strict=True)
    for row, (image, predicted) in enumerate(both):
        masked, away = masks[row].view(grid), thrown[row].view(grid)
        canvas.show(axes[row][0], image)
        hidden = canvas.to_pixels(masked, image.shape[-2:])
        _show_seen(axes[row][1], image.masked_fill(hidden, 0.5), torch.zeros_like(masked), away)
        pasted = torch.where(hidden, predicted, image)
        canvas.show(axes[row][2], pasted.masked_fill(canvas.to_pixels(away, image.shape[-2:]), 0.0))
    return canvas.save(figure, path)


def _show_seen(axis: Axes, image: Tensor, masked: Tensor, thrown: Tensor) -> None:
    """image [C, H, W] without what bool [h, w] hide."""
    size = image.shape[-2:]
    seen = torch.where(canvas.to_pixels(masked, size), 0.25 * image.mean(0) + 0.5, image)
    canvas.show(axis, seen.masked_fill(canvas.to_pixels(thrown, size), 0.0))
    canvas.draw_borders(axis, masked.long() + 2 * thrown.long(), image)


def _titles(masks: Tensor, thrown: Tensor) -> list[str]:
    counts = zip(masks.sum(1).tolist(), thrown.sum(1).tolist(), strict=True)
    return [f"{masked} masked, {away} thrown" if away else f"{masked} of {masks.shape[1]} masked"
            for masked, away in counts]  # fmt: skip


def _focus(weights: Tensor) -> str:
    """How few of the weights [N] hold half of their sum."""
    strongest = weights.sort(descending=True).values.cumsum(0)
    if not strongest[-1]:
        return "all 0"
    half = int((strongest < strongest[-1] / 2).sum()) + 1
    return f"half in {half} of {len(weights)}"


def _check_masks(images: Tensor, masks: Tensor, thrown: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both masks on the CPU, bool [B, N]."""
    patches = canvas.check_images(images, grid)
    thrown = torch.zeros_like(masks) if thrown is None else thrown
    for name, hidden in (("masks", masks), ("thrown", thrown)):
        if hidden.dtype != torch.bool or hidden.shape != (len(images), patches):
            shape = f"{hidden.dtype} {list(hidden.shape)}"
            raise ValueError(f"{name} must be bool [{len(images)}, {patches}], got {shape}")
    masks, thrown = masks.cpu(), thrown.cpu()
    if (both := int((masks & thrown).sum())) > 0:
        raise ValueError(f"thrown must not be masked too, got {both} patches that are")
    return masks, thrown
