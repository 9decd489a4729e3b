"""What is done to a whole batch of images at once, on the device: floats, flips, colour jitter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)


def augment(batch: Mapping[str, Tensor]) -> Tensor:
    """Images of a batch as floats in 0..1 [B, C, H, W], flipped and jittered where the batch says so.

    batch: "images" uint8 [B, C, H, W]; optional "flip" bool [B] and "jitter" [B, 3], factors of brightness, contrast
    and saturation, applied in this order.

    >>> images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    >>> augment({"images": images, "flip": torch.tensor([True])}).flatten().tolist()
    [1.0, 0.0]
    """
    images = batch["images"].float() / 255
    if "flip" in batch:
        images = torch.where(batch["flip"].view(-1, 1, 1, 1), images.flip(-1), images)
    if "jitter" in batch:
        brightness, contrast, saturation = batch["jitter"].view(-1, 3, 1, 1, 1).unbind(1)
        images = (images * brightness).clamp(0, 1)
        mean = _grey(images).mean((2, 3), keepdim=True)
        images = (mean + (images - mean) * contrast).clamp(0, 1)
        grey = _grey(images)
        images = (grey + (images - grey) * saturation).clamp(0, 1)
    return images


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, channel by channel.

    >>> normalise(torch.ones(1, 1, 1, 1), (0.5,), (0.25,)).item()
    2.0
    """
    shape = (1, len(mean), 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(LUMINANCE).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
