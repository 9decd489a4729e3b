"""What is done to a whole batch of images at once, on the device: floats, flips, colour jitter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def augment(batch: Mapping[str, Tensor]) -> Tensor:
    """Images of a batch as floats in 0..1 [B, C, H, W], flipped and jittered where the batch says so.

    batch: "images" uint8 [B, C, H, W]; optional "flip" bool [B] and "jitter" [B, 3], factors of brightness, contrast
    and saturation, applied in this order.

    >>> images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    >>> augment({"images": images, "flip": torch.tensor([True])}).flatten().tolist()
    [1.0, 0.0]
    """
    images = batch["images"]
    if "flip" in batch:  # while they are bytes
        images = torch.where(batch["flip"].view(-1, 1, 1, 1), images.flip(-1), images)
    images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)  # as weights and gradients lie
    if "jitter" in batch:
        brightness, contrast, saturation = batch["jitter"].view(-1, 3, 1, 1, 1).unbind(1)
        images.mul_(brightness).clamp_(0, 1)
        mean = _grey(images).mean((2, 3), keepdim=True)
        images.lerp_(mean, 1 - contrast).clamp_(0, 1)
        images.lerp_(_grey(images), 1 - saturation).clamp_(0, 1)
    return images


class Normalise(nn.Module):
    """(images - mean) / std, channel by channel; the numbers lie on the device, so no step waits for a copy.

    >>> Normalise((0.5,), (0.25,))(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in 0..1 -> the same shape."""
        return (images - self.mean) / self.std


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
