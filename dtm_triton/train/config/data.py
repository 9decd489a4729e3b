"""Configuration of the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtm_triton.train.config.checks import check


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and what is done to them. ValueError for values that make no sense."""

    source: Literal["digits", "folder"]
    """"digits": scikit-learn's 8 x 8 digits on a larger canvas; "folder": a folder of class folders of images."""
    train_folder: Path | None = None
    """Training images, for source "folder"."""
    test_folder: Path | None = None
    """Held-out images, for source "folder"; without it nothing is evaluated."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of what the student sees, in pixels."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop takes ("folder" only)."""
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

    def __post_init__(self) -> None:
        if self.source == "folder" and self.train_folder is None:
            raise ValueError('data.train_folder must be given for source "folder", got None')
        check("data.image_size", self.image_size, min(self.image_size) >= 1, "positive")
        check("data.channels", self.channels, self.channels in (1, 3), "1 or 3")
        low, high = self.crop_scale
        check("data.crop_scale", self.crop_scale, 0 < low <= high <= 1, "between 0 and 1, smaller first")
        check("data.colour_jitter", self.colour_jitter, 0 <= self.colour_jitter <= 1, "between 0 and 1")
        for name in ("mean", "std"):
            values = getattr(self, name)
            check(f"data.{name}", values, len(values) == self.channels, f"one number for each of {self.channels}")
        check("data.std", self.std, min(self.std) > 0, "positive")
        check("data.workers", self.workers, self.workers >= 0, "0 or more")
