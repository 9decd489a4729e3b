"""Targets other than a timm model's: pixels of patches (MAE, SimMIM), oriented gradients (MaskFeat), a conv teacher's.

Shapes: images [B, C, H, W] in 0..1, targets [B, N, F] float32 with N = h * w patches in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtm_triton.train.data.augment import Normalise
from dtm_triton.train.models.teacher import ConvTeacher

BINS = 9  # orientations of a histogram


class PixelTargets(nn.Module):
    """The pixels of every patch, normalised as the student sees them, and standardised over the patch if so wished.

    Values in the order rows, columns, channels. Source: MAE (arXiv 2111.06377), standardised with the unbiased variance
    and eps 1e-6; SimMIM (2111.09886), not standardised.

    >>> targets = PixelTargets(image_size=(4, 6), patch_size=2, mean=(0.5,) * 3, std=(0.25,) * 3)
    >>> targets(torch.rand(5, 3, 4, 6)).shape, targets.out_features
    (torch.Size([5, 6, 12]), 12)
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        standardise: bool = True,
    ) -> None:
        super().__init__()
        self.normalise, self.standardise = Normalise(mean, std), standardise
        self.patch_size, self.out_features = patch_size, len(mean) * patch_size**2
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = F.unfold(self.normalise(images.float()), self.patch_size, stride=self.patch_size)  # [B, C p p, N]
        x = x.unflatten(1, (images.shape[1], -1)).permute(0, 3, 2, 1).flatten(2)
        if not self.standardise:
            return x
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt()


class HogTargets(nn.Module):
    """Histograms of oriented gradients of every channel, 9 unsigned orientations, in cells of half a patch.

    Central differences (zero at the border), each pixel votes for one orientation with its gradient's length, the
    histogram of a cell and channel has length 1. A patch holds its cells' histograms by channel, row, column.
    Source: MaskFeat (arXiv 2112.09133). A patch of an odd size is one cell.

    >>> targets = HogTargets(image_size=(32, 48), patch_size=16, channels=3)
    >>> targets(torch.rand(5, 3, 32, 48)).shape, targets.out_features
    (torch.Size([5, 6, 108]), 108)
    """

    def __init__(self, image_size: tuple[int, int], patch_size: int, channels: int) -> None:
        super().__init__()
        self.cells = 1 if patch_size % 2 else 2  # a side
        self.cell = patch_size // self.cells
        self.out_features = channels * self.cells**2 * BINS
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        down, right = torch.zeros_like(x), torch.zeros_like(x)
        down[..., 1:-1, :] = x[..., 2:, :] - x[..., :-2, :]
        right[..., 1:-1] = x[..., 2:] - x[..., :-2]
        length = torch.hypot(down, right)
        angle = torch.atan2(down, right).remainder(math.pi)
        bins = (angle * (BINS / math.pi)).long().clamp(max=BINS - 1)
        votes = [F.avg_pool2d(torch.where(bins == k, length, 0.0), self.cell) for k in range(BINS)]
        histograms = F.normalize(torch.stack(votes, dim=-1), dim=-1, eps=1e-5)  # [B, C, rows, columns, BINS]
        height, width = self.grid
        split = histograms.unflatten(3, (width, self.cells)).unflatten(2, (height, self.cells))
        return split.permute(0, 2, 4, 1, 3, 5, 6).flatten(3).flatten(1, 2)


class ConvTargets(nn.Module):
    """The tokens of a trained ConvTeacher, each standardised over its channels as a ViT's final norm does."""

    def __init__(self, network: ConvTeacher) -> None:
        super().__init__()
        self.network, self.out_features, self.grid = network, network.out_features, network.grid

    def forward(self, images: Tensor) -> Tensor:
        """Targets [B, N, C] for images [B, C, H, W] in 0..1."""
        return F.layer_norm(self.network.tokens(images), (self.out_features,))
