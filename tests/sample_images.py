"""Small images in files, for tests of what reads them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dtm_triton.train.config import DataConfig


def smooth(seed: int, height: int = 60, width: int = 80, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C] without edges, so that two good resamplings of it agree."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = draw.uniform(1, 4, (channels, 3))
    planes = [127 + 60 * np.sin(a * 2 * x + c) + 60 * np.cos(b * 2 * y) for a, b, c in waves]
    return np.stack(planes, 2).round().astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, pixels)
    else:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_classes(folder: Path, classes: int = 2, images: int = 5, size: tuple[int, int] = (60, 80)) -> Path:
    """`images` JPEG files in each of `classes` folders c0, c1, ..."""
    for label in range(classes):
        (folder / f"c{label}").mkdir(parents=True)
        for number in range(images):
            data = encoded(smooth(100 * label + number, *size), quality=92)
            (folder / f"c{label}" / f"{number:02}.jpg").write_bytes(data)
    return folder


def data_config(folder: Path, **changes: object) -> DataConfig:
    """Crops of 16 x 24 from a folder of class folders."""
    fields = {"source": "folder", "train_folder": folder, "image_size": (16, 24), **changes}
    return DataConfig(**fields)  # type: ignore[arg-type]
