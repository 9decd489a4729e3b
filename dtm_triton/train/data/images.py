"""Sources of images: scikit-learn's digits and image folders. `load(number, seed)` is a pure function of both."""

from __future__ import annotations

import hashlib
import math
import random
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dtm_triton.train.config import DataConfig
from dtm_triton.train.engine.checkpoint import FolderError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
EVALUATION_SHARE = 0.875  # side of the centre crop over the shorter side, as is usual on ImageNet


class Images(Protocol):
    """Images and their labels."""

    labels: list[int]
    num_classes: int

    @property
    def fingerprint(self) -> str:
        """Changes when the images do, as far as names and numbers show it."""

    def load(self, number: int, seed: int | None) -> Tensor:
        """Image uint8 [C, H, W]: a random crop decided by `seed`, or the fixed one of evaluation when None."""


def open_images(config: DataConfig, part: str) -> Images | None:
    """The "train" or "test" images; None when there are no held-out ones.

    Raises FolderError for a folder that is missing or holds no images.
    """
    if config.source == "digits":
        return Digits(config, part)
    folder = config.train_folder if part == "train" else config.test_folder
    return None if folder is None else ImageFolder(config, folder)


class Digits:
    """The 1,797 digits of scikit-learn, 8 x 8 pixels, each at a random place of a larger black canvas.

    Every fifth one is held out: 1,437 to train, 360 to test.

    >>> from dtm_triton.train.recipes import digits
    >>> train, test = Digits(digits(), "train"), Digits(digits(), "test")
    >>> len(train.labels), len(test.labels), test.load(0, None).shape
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
        self.labels: list[int] = everything.target[chosen].tolist()
        self.size = config.image_size

    @property
    def fingerprint(self) -> str:
        return f"{len(self.labels)} digits"

    def load(self, number: int, seed: int | None) -> Tensor:
        draw = random.Random(number if seed is None else seed)
        height, width = self.size
        top, left = draw.randrange(height - 7), draw.randrange(width - 7)
        canvas = torch.zeros(self.pixels.shape[1], height, width, dtype=torch.uint8)
        canvas[:, top : top + 8, left : left + 8] = self.pixels[number]
        return canvas


class ImageFolder:
    """Images below a folder, one subfolder a class; a folder of images without subfolders is one class.

    Raises FolderError when there is no such folder, or when it or one of its classes holds no image. An
    image that cannot be decoded raises FolderError with its path when it is loaded.
    """

    def __init__(self, config: DataConfig, folder: Path) -> None:
        if not folder.is_dir():
            raise FolderError(f"data folder {str(folder)!r} does not exist")
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        self.files: list[Path] = []
        self.labels: list[int] = []
        for label, place in enumerate(classes or [folder]):
            files = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
            if not files:
                raise FolderError(f"data folder {str(place)!r} holds no images ({', '.join(sorted(SUFFIXES))})")
            self.files += files
            self.labels += [label] * len(files)
        self.folder, self.config = folder, config
        self.num_classes = max(len(classes), 1)

    @cached_property
    def fingerprint(self) -> str:
        names = "\n".join(path.relative_to(self.folder).as_posix() for path in self.files)
        return f"{len(self.files)} files, {hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}"

    def load(self, number: int, seed: int | None) -> Tensor:
        import numpy as np
        from PIL import Image

        height, width = self.config.image_size
        try:
            with Image.open(self.files[number]) as file:
                image = file.convert("L" if self.config.channels == 1 else "RGB")
        except Exception as error:  # Pillow raises whatever its decoders raise
            raise FolderError(f"image {str(self.files[number])!r} cannot be decoded: {error}") from error
        if seed is None:
            box = _centre_box(image.size, (width, height))
        else:
            box = _random_box(image.size, (width, height), self.config.crop_scale, random.Random(seed))
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).view(height, width, -1).permute(2, 0, 1).contiguous()


Box = tuple[float, float, float, float]


def _random_box(size: tuple[int, int], target: tuple[int, int], scale: tuple[float, float], draw: random.Random) -> Box:
    """A crop of random area and of an aspect within 3/4..4/3 of the target's; after ten tries the centre."""
    wide, high = size
    aspect = target[0] / target[1]
    for _ in range(10):
        area = wide * high * draw.uniform(*scale)
        ratio = aspect * math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= wide and 0 < h <= high:
            left, top = draw.randint(0, wide - w), draw.randint(0, high - h)
            return left, top, left + w, top + h
    return _centre_box(size, target, share=1.0)


def _centre_box(size: tuple[int, int], target: tuple[int, int], share: float = EVALUATION_SHARE) -> Box:
    """The centre crop of the target's aspect whose tighter side spans `share` of the image."""
    wide, high = size
    unit = share * min(wide / target[0], high / target[1])
    w, h = unit * target[0], unit * target[1]
    left, top = (wide - w) / 2, (high - h) / 2
    return left, top, left + w, top + h
