"""Mixup (arXiv 1710.09412) and CutMix (1905.04899): every image takes something of its neighbour in the batch.

Neighbours are the rows 2i and 2i + 1, whose images are random ones: a pair meets whatever the number of processes and
micro-batches. Every image has a share and a rectangle of its own, where timm gives them to a whole batch by default.
Shapes: images float [B, C, H, W] with even B, numbers [B, 5].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

CUTMIX_SHARE = 0.5  # of the images, where both are asked for: timm's


class Mixing:
    """Blends (mixup) or cuts (cutmix) images of a size; a class, so that workers can be sent one.

    mixup, cutmix: parameter of the Beta distribution of an image's own share, 0 for none; one of them is positive.

    >>> mixing = Mixing(0.0, 1.0, (4, 4))
    >>> images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, -1, 4, 4)
    >>> mixed, shares = mixing(images, torch.tensor([[0, 0, 2, 0, 4], [0.75, 0, 4, 0, 4]]))
    >>> mixed[:, 0, :, 0].tolist(), shares.tolist()
    ([[1.0, 1.0, 0.0, 0.0], [0.75, 0.75, 0.75, 0.75]], [0.5, 0.75])
    """

    def __init__(self, mixup: float, cutmix: float, image_size: tuple[int, int]) -> None:
        self.mixup, self.cutmix, self.image_size = mixup, cutmix, image_size

    def draw(self, count: int, *, generator: Generator) -> Tensor:
        """Numbers of `count` images, float32 [count, 5]: share of itself that an image keeps inside a rectangle, and
        the rectangle's top, bottom, left and right; outside it keeps everything."""
        draw = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
        chance, spread = draw.random(count), {}
        for kind in ("mixup", "cutmix"):  # both drawn, used or not
            alpha = getattr(self, kind)
            spread[kind] = draw.beta(alpha, alpha, count) if alpha else np.ones(count)
        cut = (chance < CUTMIX_SHARE) if self.mixup and self.cutmix else np.full(count, bool(self.cutmix))
        sides = []
        for length in self.image_size:
            # a square root of the area on each side, around a centre anywhere: what lies outside is cut off
            part = (length * np.sqrt(1 - spread["cutmix"])).astype(int)
            centre = draw.integers(0, length, count)
            first, last = (np.clip(side, 0, length) for side in (centre - part // 2, centre + (part + 1) // 2))
            sides += [np.where(cut, first, 0), np.where(cut, last, length)]
        numbers = np.stack([np.where(cut, 0.0, spread["mixup"]), *sides], axis=1)
        return torch.from_numpy(numbers).to(torch.float32)

    def __call__(self, images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images, and the share [B] of each that is its own; the rest is its neighbour's (`neighbours`).

        Raises ValueError for an odd number of images.
        """
        kept, *sides = numbers.unbind(1)
        inside = inside_box(sides, self.image_size)
        shares = torch.where(inside, kept.view(-1, 1, 1, 1), 1.0)
        mixed = torch.lerp(neighbours(images), images, shares.to(images.dtype))
        return mixed, shares.mean((1, 2, 3))


def neighbours(rows: Tensor) -> Tensor:
    """Rows with those of every pair swapped. Raises ValueError when one is left over.

    >>> neighbours(torch.arange(6)).tolist()
    [1, 0, 3, 2, 5, 4]
    """
    if len(rows) % 2:
        raise ValueError(f"run.batch_size must give every process pairs of images to mix, got {len(rows)} of them")
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def inside_box(sides: list[Tensor], image_size: tuple[int, int]) -> Tensor:
    """Whether a pixel lies in its image's rectangle, bool [B, 1, H, W]; sides: top, bottom, left, right, each [B]."""
    top, bottom, left, right = (side.view(-1, 1) for side in sides)
    rows, columns = (torch.arange(length, device=top.device) for length in image_size)
    high, wide = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return high[:, None, :, None] & wide[:, None, None, :]
