"""Sources of images. `load(number, seed)` of each is a pure function of both."""

from __future__ import annotations

import random
from typing import Protocol

import torch
from torch import Tensor

from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.data.decode import WHOLE, Crop, ImageError

__all__ = ["WHOLE", "Crop", "Digits", "ImageError", "Images", "open_images"]


class Images(Protocol):
    """Images and their labels."""

    labels: Tensor
    """int64 [count]."""
    num_classes: int
    shape: tuple[int, int, int]
    """Of every crop: channels, height, width."""

    @property
    def fingerprint(self) -> str:
        """Changes when the images do, as far as names and numbers show it."""

    def name(self, number: int) -> str:
        """What people find an image by."""

    def load(self, number: int, seed: int | None) -> Crop:
        """A random crop decided by `seed`; evaluation's fixed one for None; the whole image, squeezed, for WHOLE.

        Raises ImageError, or OSError, for an image that cannot be read.
        """


def open_images(config: DataConfig, part: str) -> Images | None:
    """The "train" or "test" images; None when there are no held-out ones.

    Raises FolderError for a folder that is missing, holds no images or cannot be read.
    """
    if config.source == "digits":
        return Digits(config, part)
    folder = config.train_folder if part == "train" else config.test_folder
    if folder is None:
        return None
    assert config.train_folder is not None
    # a source imports what it needs when it is used: none of it is needed for the others
    if config.source == "folder":
        from dtm_triton.train.data.folder import ImageFolder, class_names

        return ImageFolder(config, folder, None if part == "train" else class_names(config.train_folder) or None)
    if config.source == "shards":
        from dtm_triton.train.data.shards import ShardImages

        shards = ShardImages(config, folder)
        if part == "test":
            shards.use_classes(ShardImages(config, config.train_folder).classes)
        return shards
    if config.source == "huggingface":
        from dtm_triton.train.data.huggingface import HuggingFaceImages

        return HuggingFaceImages(config, folder, part)
    from dtm_triton.train.data.torchvision_sets import TorchvisionImages

    return TorchvisionImages(config, folder, part)


class Digits:
    """The 1,797 digits of scikit-learn, 8 x 8 pixels, each at a random place of a larger black canvas.

    Every fifth one is held out: 1,437 to train, 360 to test. The whole image is the canvas with the digit in its
    middle; what a random place moves into the canvas lies outside of it.

    >>> from dtm_triton.train.recipes import digits
    >>> train, test = Digits(digits(), "train"), Digits(digits(), "test")
    >>> len(train.labels), len(test.labels), test.load(0, None).image.shape
    (1437, 360, torch.Size([1, 12, 12]))
    """

    num_classes = 10

    def __init__(self, config: DataConfig, part: str) -> None:
        from sklearn.datasets import load_digits

        if min(config.image_size) < 8:
            raise ValueError(f"data.image_size must be at least 8 x 8 for digits, got {config.image_size!r}")
        everything = load_digits()
        chosen = [i for i in range(len(everything.target)) if (i % 5 == 0) == (part == "test")]
        pixels = torch.tensor(everything.images[chosen] * (255 / 16)).round().to(torch.uint8)
        self.pixels = pixels[:, None].expand(-1, config.channels, -1, -1)
        self.labels = torch.tensor(everything.target[chosen])
        self.shape = (config.channels, *config.image_size)

    @property
    def fingerprint(self) -> str:
        return f"{len(self.labels)} digits"

    def name(self, number: int) -> str:
        return f"digit {number}"

    def load(self, number: int, seed: int | None) -> Crop:
        draw = random.Random(number if seed is None else seed)
        channels, height, width = self.shape
        middle = (height - 8) // 2, (width - 8) // 2
        top, left = middle if seed == WHOLE else (draw.randrange(height - 7), draw.randrange(width - 7))
        canvas = torch.zeros(channels, height, width, dtype=torch.uint8)
        canvas[:, top : top + 8, left : left + 8] = self.pixels[number]
        down, right = middle[0] - top, middle[1] - left
        return Crop(canvas, (down / height, right / width, 1 + down / height, 1 + right / width))
