"""The weight of a map lands on the patches that show what was attended to, to a fraction of a pixel.

Every image has one bright rectangle, and its map is the rectangle. Of every source, in random and flipped crops at any
size of decoding, a patch's share of the bright pixels must be its share of the map's weight.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import data_config, encoded
from torch import Tensor

from dtm_triton.attention_masking import crop_weights
from dtm_triton.train.config import DataConfig, RunConfig
from dtm_triton.train.data import decode as module
from dtm_triton.train.data.augment import augment
from dtm_triton.train.data.batches import MicroBatches
from dtm_triton.train.data.decode import WHOLE, load_crop
from dtm_triton.train.data.images import Digits, Images, open_images
from dtm_triton.train.data.torchvision_sets import TorchvisionImages
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.recipes import digits

TARGET, GRID = (32, 48), (4, 6)
DARK, BRIGHT = 60, 190  # no resampling overshoots these beyond 0..255
COUNT = 12


def marked(number: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3], dark but for a rectangle; every number has its own."""
    draw = np.random.default_rng(number)
    pixels = np.full((*size, 3), DARK, dtype=np.uint8)
    tall, wide = (draw.integers(side // 5, side // 2) for side in size)
    top, left = draw.integers(size[0] - tall), draw.integers(size[1] - wide)
    pixels[top : top + tall, left : left + wide] = BRIGHT
    return pixels


def shares(images: Tensor) -> Tensor:
    """How much of every patch is bright, [B, N], of images [B, C, H, W] in 0..1."""
    bright = (255 * images.double().mean(1) - DARK) / (BRIGHT - DARK)
    high, wide = TARGET[0] // GRID[0], TARGET[1] // GRID[1]
    return bright.unfold(1, high, high).unfold(2, wide, wide).mean((3, 4)).flatten(1)


def expected(maps: Tensor, places: Tensor, flip: Tensor | None = None) -> Tensor:
    """The same by the maps [B, H, W] of the rectangles, pixel by pixel."""
    tall, wide = (places[:, 2] - places[:, 0]) * maps.shape[1], (places[:, 3] - places[:, 1]) * maps.shape[2]
    return crop_weights(maps, places, GRID, flip=flip) / (tall * wide / (GRID[0] * GRID[1]))[:, None]


def rectangle(number: int, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy((marked(number, size)[..., 0] == BRIGHT).astype(np.uint8))


def write_tars(folder: Path, files: list[bytes]) -> None:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * 6, shard * 6 + 6):
                for name, data in ((f"{number:02}.cls", b"0"), (f"{number:02}.jpg", files[number])):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_folder(folder: Path, files: list[bytes], suffix: str) -> None:
    (folder / "c").mkdir(parents=True)
    for number, data in enumerate(files):
        (folder / "c" / f"{number:02}.{suffix}").write_bytes(data)


def jpegs(size: tuple[int, int]) -> list[bytes]:
    return [encoded(marked(number, size), quality=97) for number in range(COUNT)]


def folder_of_jpegs(folder: Path, size: tuple[int, int]) -> DataConfig:
    write_folder(folder / "in", jpegs(size), "jpg")
    return data_config(folder / "in")


def folder_of_pngs(folder: Path, size: tuple[int, int]) -> DataConfig:
    write_folder(folder / "in", [encoded(marked(number, size), "PNG") for number in range(COUNT)], "png")
    return data_config(folder / "in")


def folder_of_arrays(folder: Path, size: tuple[int, int]) -> DataConfig:
    write_folder(folder / "in", [encoded(marked(number, size), "npy") for number in range(COUNT)], "npy")
    return data_config(folder / "in")


def shards(folder: Path, size: tuple[int, int]) -> DataConfig:
    write_tars(folder / "in", jpegs(size))
    return data_config(folder / "in", source="shards", order="resampled")


def hugging_face(folder: Path, size: tuple[int, int]) -> DataConfig:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": file, "path": None} for file in jpegs(size)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "in"))
    return data_config(folder / "in", source="huggingface")


def torchvision_files(folder: Path, size: tuple[int, int]) -> DataConfig:
    pytest.importorskip("torchvision.datasets")
    write_folder(folder / "in", jpegs(size), "jpg")
    return data_config(folder / "in", source="torchvision", name="ImageFolder")


SOURCES = (folder_of_jpegs, folder_of_pngs, folder_of_arrays, shards, hugging_face, torchvision_files)


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("size", [(205, 301), (383, 501)])
def test_weights_lie_where_the_pixels_are(
    write: Callable[[Path, tuple[int, int]], DataConfig], size: tuple[int, int], tmp_path: Path
) -> None:
    config = replace(write(tmp_path, size), image_size=TARGET, flip=True, crop_scale=(0.2, 1.0))
    images = open_images(config, "train")
    assert images is not None
    compare(images, config, size, steps=4)


def compare(images: Images, config: DataConfig, size: tuple[int, int], steps: int) -> None:
    batches = MicroBatches(
        images, config, RunConfig(folder=Path("unused"), epochs=1, batch_size=COUNT), Processes(), {}
    )
    for step in range(steps):
        batch = batches[step]
        assert batch["number"].dtype == torch.int64 and batch["place"].dtype == torch.float64
        maps = torch.stack([rectangle(int(number) % COUNT, size) for number in batch["number"]])
        weights = expected(maps, batch["place"], batch["flip"])
        assert batch["flip"].any() and not batch["flip"].all() and float(weights.max()) > 0.99
        assert (shares(augment(batch)) - weights).abs().max() < 0.025


def test_an_image_in_place_of_an_unreadable_one_comes_with_its_own_number(tmp_path: Path) -> None:
    config = folder_of_jpegs(tmp_path, (383, 501))
    for number in (2, 3, 7):
        (tmp_path / "in" / "c" / f"{number:02}.jpg").write_bytes(b"")
    config = replace(config, image_size=TARGET, flip=True)
    images = open_images(config, "train")
    assert images is not None
    compare(images, config, (383, 501), steps=3)


def test_torchvision_sets_that_decode_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        rows = [marked(number, (32, 32)).transpose(2, 0, 1).reshape(-1) for number in range(COUNT)]
        (place / name).write_bytes(pickle.dumps({"data": np.stack(rows), "labels": [0] * COUNT}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    config = data_config(tmp_path, source="torchvision", name="CIFAR10", image_size=TARGET, flip=True)
    images = open_images(config, "train")
    assert isinstance(images, TorchvisionImages) and not isinstance(images._image(0), bytes)
    # pictures as large as files: enlarged ones have edges of several pixels, which say little
    images.rows = [(Image.fromarray(marked(number, (383, 501))), 0) for number in range(COUNT)] * 5
    compare(images, config, (383, 501), steps=4)


@pytest.mark.parametrize("size", [(383, 501), (752, 1003), (752, 1008), (751, 1009)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_whole_images_show_everything(size: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squeezed, not cropped; also where a JPEG decoded at a fraction would have its last pixels beyond the edge."""
    decoded: list[int] = []
    real = module._decode_jpeg

    def noted(data: bytes, whole: tuple[int, int], channels: int, eighths: int) -> module.Pixels | None:
        decoded.append(eighths)
        return real(data, whole, channels, eighths)

    monkeypatch.setattr(module, "_decode_jpeg", noted)
    crop = load_crop(encoded(marked(5, size), kind), data_config(Path("unused"), image_size=TARGET), WHOLE)
    assert crop.place == (0, 0, 1, 1)
    places = torch.tensor([crop.place], dtype=torch.float64)
    assert (shares(crop.image[None] / 255) - expected(rectangle(5, size)[None], places)).abs().max() < 0.025
    assert kind == "PNG" or decoded == [{1008: 1}.get(size[1], 8)]


@pytest.mark.parametrize("seed", [0, 1, 2, None])
def test_the_place_of_a_scaled_jpeg_is_that_of_its_pixels(seed: int | None) -> None:
    """Where its pixels begin and end, not where the crop that was asked for does."""
    size, config = (503, 671), data_config(Path("unused"), image_size=TARGET)
    crop = load_crop(encoded(marked(seed or 0, size)), config, seed)
    box = module.choose_box(size[::-1], config, seed)
    eighths = module._eighths(box, TARGET)
    assert eighths < 8
    asked = module._place(box, size[::-1])
    unit = [8 / eighths / side for side in (*size, *size)]
    steps = [share / each for share, each in zip(crop.place, unit, strict=True)]
    assert all(abs(step - round(step)) < 1e-6 for step in steps), "whole pixels of the scaled image"
    assert all(abs(a - b) <= each for a, b, each in zip(asked, crop.place, unit, strict=True))


def test_digits_move_with_their_maps() -> None:
    """The map of the digit in the middle, moved as the digit is: the digit itself, to the last bit."""
    for shape in ((12, 12), (13, 18)):
        images = Digits(replace(digits(), image_size=shape), "train")
        outside = 0
        for number in range(20):
            whole = images.load(number, WHOLE)
            top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
            assert torch.equal(whole.image[:, top : top + 8, left : left + 8], images.pixels[number])
            assert whole.place == (0, 0, 1, 1)
            for seed in (number, None):
                crop = images.load(number, seed)
                outside += min(crop.place) < 0 or max(crop.place) > 1
                places = torch.tensor([crop.place], dtype=torch.float64)
                weights = crop_weights(whole.image[:1].double(), places, shape)
                torch.testing.assert_close(weights.view(shape), crop.image[0].double(), rtol=0, atol=1e-9)
        assert outside > 10
