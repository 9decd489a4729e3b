"""Masks of a batch, in two halves: numbers drawn for every image by the workers, masks made of them on the device."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from dtm_triton.masking import block_cover, block_rounds, random_cover
from dtm_triton.train.config.model import MaskConfig


class Masks(nn.Module):
    """Which patches of a `grid` (height, width) the student does not see; an image's mask is a function of its numbers.

    The same numbers give the same mask in any batch; no step waits for the device. The numbers of two runs with the
    same seed are equal on every machine, the masks then too, up to the rounding of float64.

    Raises ValueError when more patches are to be masked than there are.

    >>> masks = Masks(MaskConfig(kind="block", masked=75), (14, 14))
    >>> draws = masks.draw(3, generator=Generator().manual_seed(0))
    >>> masks(draws).sum(1).tolist(), bool((masks(draws[1:2]) == masks(draws)[1:2]).all())
    ([75, 75, 75], True)
    """

    def __init__(self, config: MaskConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patches = grid[0] * grid[1]
        if config.masked > self.patches:
            raise ValueError(f"mask.masked must be at most {self.patches}, the patches, got {config.masked}")
        self.config, self.grid = config, grid
        self.numbers = self.patches
        if config.kind == "block":
            self.numbers += 5 * block_rounds(self.patches, config.masked, config.min_patches)

    def draw(self, count: int, *, generator: Generator) -> Tensor:
        """Uniform numbers for `count` images, float32 [count, D] on the generator's device."""
        return torch.rand(count, self.numbers, generator=generator, device=generator.device)

    def forward(self, draws: Tensor) -> Tensor:
        """Numbers [B, D] -> masks bool [B, N], True = masked, on the numbers' device."""
        if self.config.kind == "random":
            return random_cover(draws, self.config.masked)
        return block_cover(draws, self.grid, self.config.masked, min_patches=self.config.min_patches)
