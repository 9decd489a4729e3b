"""Photographs that come with scikit-image and scikit-learn, as class folders of windows: nothing is downloaded.

A class is a photograph. Training windows lie in its left part, held-out ones in its right part: no pixel is in both.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from dtm_triton.train.data.draws import fold

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "china",
    "coffee",
    "coins",
    "flower",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
SHORT_SIDE = 384  # of a photograph
LEFT = 0.6  # of its width to train
SIDES = (112, 152)  # of windows: below the narrowest part, 40 % of 384
WRITTEN = 80  # pixels a side of a file
WINDOWS = {"train": 25, "test": 20}  # of every photograph

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def photograph(name: str) -> Pixels:
    """A photograph in grey, uint8 [H, W], its shorter side `SHORT_SIDE`.

    Raises ModuleNotFoundError without scikit-image.
    """
    from PIL import Image

    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        import skimage.data

        pixels = getattr(skimage.data, name)()
    if isinstance(pixels, tuple):  # a stereo pair and its disparity
        pixels = pixels[0]
    image = Image.fromarray(np.asarray(pixels)).convert("L")
    scale = SHORT_SIDE / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def windows(name: str, part: str, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(top, left, side) of the windows of a "train" or "test" part of a photograph of a size (height, width)."""
    draw = np.random.default_rng(fold(0, "windows", name, part))
    height, width = size
    border = int(LEFT * width)
    first, last = (0, border) if part == "train" else (border, width)
    chosen = []
    for _ in range(WINDOWS[part]):
        side = int(draw.integers(SIDES[0], SIDES[1] + 1))
        top = int(draw.integers(0, height - side + 1))
        chosen.append((top, int(draw.integers(first, last - side + 1)), side))
    return chosen


def write_windows(folder: Path) -> None:
    """`folder`/train and `folder`/test, a folder of PNGs for every photograph; nothing is done where they are."""
    from PIL import Image

    if folder.is_dir():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in PHOTOGRAPHS:
        pixels = photograph(name)
        for part in WINDOWS:
            place = unfinished / part / name
            place.mkdir(parents=True)
            height, width = pixels.shape
            for number, (top, left, side) in enumerate(windows(name, part, (height, width))):
                window = Image.fromarray(pixels[top : top + side, left : left + side])
                window.resize((WRITTEN, WRITTEN), Image.Resampling.LANCZOS).save(
                    place / f"{number:02}.png", compress_level=0
                )
    unfinished.rename(folder)
