"""Random erasing (arXiv 1708.04896): a rectangle of some images becomes noise.

The rectangle is decided with the other random numbers of an image; the noise is a hash of a seed and a pixel's number,
made on the device, so that nothing large travels and a resumed run sees the same.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Generator, Tensor

from dtm_triton.sampling import random_bits, shifted
from dtm_triton.train.data.mixing import inside_box

AREA = (0.02, 1 / 3)  # smallest and largest share of the image: the paper's and timm's, as the next
ASPECT = (0.3, 1 / 0.3)
TRIES = 10
BITS = 23  # of a uniform number: with a half behind them a float32 holds them exactly


class Erasing:
    """Erases a rectangle of a share `probability` of all images; a class, so that workers can be sent one.

    >>> erasing = Erasing(1.0, (8, 8))
    >>> numbers = erasing.draw(2, generator=Generator().manual_seed(0))
    >>> erased = erasing(torch.zeros(2, 1, 8, 8), numbers)
    >>> _, top, bottom, left, right = numbers[0].tolist()
    >>> int((erased[0] != 0).sum()) == (bottom - top) * (right - left) > 0
    True
    """

    def __init__(self, probability: float, image_size: tuple[int, int]) -> None:
        self.probability, self.image_size = probability, image_size

    def draw(self, count: int, *, generator: Generator) -> Tensor:
        """Numbers of `count` images, int64 [count, 5]: seed of the noise; top, bottom, left and right."""
        seeds = torch.randint(2**63 - 1, (count,), generator=generator).tolist()
        return torch.tensor([(seed, *self._box(random.Random(seed))) for seed in seeds])

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] with noise of mean 0 and deviation 1 in their rectangles."""
        seeds, *sides = numbers.unbind(1)
        noise = normal(seeds, images[0].numel()).view_as(images)
        return torch.where(inside_box(sides, self.image_size), noise.to(images.dtype), images)

    def _box(self, draw: random.Random) -> tuple[int, int, int, int]:
        height, width = self.image_size
        if draw.random() >= self.probability:
            return 0, 0, 0, 0
        for _ in range(TRIES):
            area = draw.uniform(*AREA) * height * width
            aspect = math.exp(draw.uniform(*map(math.log, ASPECT)))
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if high < height and wide < width:
                top, left = draw.randint(0, height - high), draw.randint(0, width - wide)
                return top, top + high, left, left + wide
        return 0, 0, 0, 0


def normal(seeds: Tensor, count: int) -> Tensor:
    """`count` normal numbers for each of seeds int64 [B]: float32 [B, count], functions of seed and place.

    >>> normal(torch.tensor([1, 2, 1]), 3)[[0, 2]].diff(dim=0).abs().max().item()
    0.0
    """
    uniform = (shifted(random_bits(seeds, count), 64 - BITS) + 0.5) * 2.0 ** (1 - BITS) - 1
    return math.sqrt(2) * torch.erfinv(uniform)
