"""Masks of a batch in two halves: numbers drawn for every image by the workers, partitions made on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from dtm_triton.attention_masking import Crop, attention_partition, sample_partition
from dtm_triton.masking import block_partition, block_rounds, random_partition
from dtm_triton.partition import Partition
from dtm_triton.train.config.attention import AttentionConfig
from dtm_triton.train.config.model import MaskConfig


class Masks(nn.Module):
    """Which patches of a `grid` (height, width) are masked, thrown and visible; a function of an image's numbers.

    The same numbers give the same partition in any batch; no step waits for the device. The numbers of two runs with
    the same seed are equal on every machine, the partitions then too, up to the rounding of float64 in block-wise ones.

    attention: how masks of kind "attention" begin, before there are maps, and how maps are cropped.

    Raises ValueError when more patches are to be masked than there are.

    >>> masks = Masks(MaskConfig(kind="block", masked=75), (14, 14))
    >>> draws = masks.draw(3, generator=Generator().manual_seed(0))
    >>> masks({"mask": draws}).mask.sum(1).tolist()
    [75, 75, 75]
    """

    whole: Tensor

    def __init__(self, config: MaskConfig, grid: tuple[int, int], attention: AttentionConfig | None = None) -> None:
        super().__init__()
        self.patches = grid[0] * grid[1]
        if config.masked + config.thrown > self.patches:
            what, count = ("mask.masked and mask.thrown", config.masked + config.thrown)
            raise ValueError(f"{what} must be at most {self.patches} together, the patches, got {count}")
        self.config, self.grid, self.attention = config, grid, attention or AttentionConfig()
        whole = torch.tensor((0.0, 0.0, 1.0, 1.0), dtype=torch.float64)
        self.register_buffer("whole", whole, persistent=False)  # on the device: no step waits for a copy
        self.numbers = self.patches // config.unit**2
        if config.kind == "block":
            self.numbers += 5 * block_rounds(self.patches, config.masked, config.min_patches)

    def draw(self, count: int, *, generator: Generator) -> Tensor:
        """Numbers for `count` images: uniform float32 [count, D], for "attention" one int64 seed each [count]."""
        if self.config.kind == "attention":
            return torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device)
        return torch.rand(count, self.numbers, generator=generator, device=generator.device)

    def forward(self, batch: Mapping[str, Tensor], attended: Tensor | None = None) -> Partition:
        """The partition of a batch.

        batch: "mask", what `draw` gave; for "attention" also "map" [B, h, w] of the whole images, if there are any yet,
            with "place" [B, 4] and, when images are flipped, "flip" [B].
        attended: maps of the crops themselves, flipped as they are, [B, N].
        """
        config, draws = self.config, batch["mask"]
        if config.kind == "random":
            return random_partition(draws, self.grid, config.masked, config.thrown, unit=config.unit)
        if config.kind == "block":
            return block_partition(draws, self.grid, config.masked, config.thrown, min_patches=config.min_patches)
        if attended is not None:
            maps, places = attended.unflatten(1, self.grid), self.whole.expand(len(draws), 4)
            flip = None
            crop: Crop = "exact"
        elif "map" in batch:
            maps, places, flip, crop = batch["map"], batch["place"], batch.get("flip"), self.attention.crop
        else:  # no maps yet
            even = torch.ones(len(draws), self.numbers, device=draws.device)
            return sample_partition(even, draws, self.grid, self.attention.warmup_masked, 0, unit=config.unit)
        return attention_partition(
            maps,
            places,
            draws,
            self.grid,
            config.masked,
            config.thrown,
            flip=flip,
            crop=crop,
            unit=config.unit,
            temperature=config.temperature,
            uniform=config.uniform,
            order=config.order,
        )
