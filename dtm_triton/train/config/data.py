"""Configuration of the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtm_triton.train.config.checks import check

Source = Literal["digits", "folder", "shards", "huggingface", "torchvision"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and what is done to them. ValueError for values that make no sense."""

    source: Source
    """"digits": scikit-learn's 8 x 8 digits on a larger canvas; "folder": a folder of class folders of images;
    "shards": a folder of tar files (WebDataset's, `dtm-shard`'s, or of class folders); "huggingface": what
    `save_to_disk` wrote; "torchvision": one of torchvision's sets, already downloaded."""
    train_folder: Path | None = None
    """Training images; for "huggingface" a dataset or a dictionary of splits, for "torchvision" the set's root."""
    test_folder: Path | None = None
    """Held-out images, of the same kind; without it nothing is evaluated."""
    name: str = ""
    """Class in torchvision.datasets, for source "torchvision": CIFAR10, ImageNet, Food101 and so on."""
    order: Literal["exact", "resampled"] = "exact"
    """"exact": every epoch shows every image once, in a new random order; "resampled" (shards only): a few shards at a
    time, drawn with replacement, each read from its beginning to its end: for slow or remote file systems."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of what the student sees, in pixels."""
    channels: int = 3
    """1 (grey), 3 (RGB), or what the images have: other numbers come from .npy, TIFF, PNG and WebP files."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop takes (not of digits)."""
    flip: bool = True
    """Mirror half of the images."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by a factor uniform in 1 - this .. 1 + this."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from what the student sees (images lie in 0..1)."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides what the student sees."""
    workers: int = 0
    """Processes that decode images; 0 decodes in the training process."""
    max_corrupt: float = 0.01
    """Share of the images that may be unreadable, each replaced by another and named in the log; more end the run (but
    ten always may)."""

    def __post_init__(self) -> None:
        if self.source != "digits" and self.train_folder is None:
            raise ValueError(f'data.train_folder must be given for source "{self.source}", got None')
        named = self.source != "torchvision" or bool(self.name)
        check("data.name", self.name, named, 'a class of torchvision.datasets for source "torchvision"')
        in_shards = self.order == "exact" or self.source == "shards"
        check("data.order", self.order, in_shards, f'"exact" for source "{self.source}"')
        check("data.image_size", self.image_size, min(self.image_size) >= 1, "positive")
        check("data.channels", self.channels, self.channels >= 1, "positive")
        low, high = self.crop_scale
        check("data.crop_scale", self.crop_scale, 0 < low <= high <= 1, "between 0 and 1, smaller first")
        check("data.colour_jitter", self.colour_jitter, 0 <= self.colour_jitter <= 1, "between 0 and 1")
        for name in ("mean", "std"):
            values = getattr(self, name)
            check(f"data.{name}", values, len(values) == self.channels, f"one number for each of {self.channels}")
        check("data.std", self.std, min(self.std) > 0, "positive")
        check("data.workers", self.workers, self.workers >= 0, "0 or more")
        check("data.max_corrupt", self.max_corrupt, 0 <= self.max_corrupt < 1, "in 0..1")
