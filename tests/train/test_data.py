"""Batches are pure functions of seed and step, whatever the number of processes, micro-batches and workers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtm_triton.masking import random_masks
from dtm_triton.train.config import DataConfig, RunConfig
from dtm_triton.train.data.augment import augment
from dtm_triton.train.data.batches import EvaluationBatches, MicroBatches, evaluation_loader, training_loader
from dtm_triton.train.data.draws import draw_images, fold
from dtm_triton.train.data.folder import ImageFolder
from dtm_triton.train.data.images import Crop, Digits, open_images
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.recipes import digits

DATA = replace(digits(), flip=True, colour_jitter=0.4)
DIGITS = Digits(DATA, "train")
DRAWS = {"mask": partial(random_masks, grid=(6, 6), num_masked=9)}


def batches(accumulate: int = 1, rank: int = 0, count: int = 1, seed: int = 0, batch_size: int = 96) -> MicroBatches:
    run = RunConfig(folder=Path("unused"), epochs=1, batch_size=batch_size, accumulate=accumulate, seed=seed)
    return MicroBatches(DIGITS, DATA, run, Processes(rank=rank, count=count), DRAWS)


@pytest.mark.parametrize("number", [0, 3, 14, 40])
@pytest.mark.parametrize(("accumulate", "count"), [(2, 1), (1, 2), (3, 2), (4, 8)])
def test_parts_make_the_whole_batch(number: int, accumulate: int, count: int) -> None:
    whole = batches()[number]
    parts = [
        batches(accumulate, rank, count)[number * accumulate + micro]
        for micro in range(accumulate)
        for rank in range(count)
    ]
    assert set(whole) == {"images", "number", "place", "labels", "skipped", "mask", "flip", "jitter"}
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=0, atol=0)


def test_seed_and_step_decide_everything() -> None:
    first = batches()
    for name, value in first[5].items():
        assert torch.equal(batches()[5][name], value), name  # no state: another object, nothing drawn before
        if name != "skipped":
            assert not torch.equal(batches(seed=1)[5][name], value), name
            assert not torch.equal(first[6][name], value), name


def test_an_epoch_shows_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = batches(batch_size=479)
    monkeypatch.setattr(source.images, "load", lambda number, seed: Crop(torch.tensor([number]), (0.0, 0.0, 1.0, 1.0)))
    epochs = [torch.cat([source[3 * epoch + step]["images"] for step in range(3)]).flatten() for epoch in range(2)]
    assert source.steps_per_epoch == 3
    for shown in epochs:
        assert shown.sort().values.tolist() == list(range(1437))
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_begins_anywhere(workers: int) -> None:
    source = batches(accumulate=2)
    with training_loader(source, 3, 6, workers, pin=False) as loader:
        loaded = list(loader)
    assert len(loaded) == 6
    for number, batch in enumerate(loaded, start=6):
        for name, value in batch.items():
            assert torch.equal(value, source[number][name])


def test_batch_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"run.batch_size must be a multiple .* 2 x 5, got 96"):
        batches(accumulate=2, count=5)
    with pytest.raises(ValueError, match=r"run.batch_size must be at most the 1437 images, got 1500"):
        batches(batch_size=1500)


def test_digits_split_and_placement() -> None:
    train, test = Digits(DATA, "train"), Digits(DATA, "test")
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert min(np.bincount(test.labels)) >= 25
    spots = {tuple(train.load(0, seed).image[0].any(0).nonzero()[0].tolist()) for seed in range(40)}
    assert len(spots) > 2
    assert torch.equal(train.load(3, None).image, train.load(3, None).image)
    assert int(train.load(0, 1).image.max()) == 255
    assert int(train.load(0, 1).image.sum()) == int(train.load(0, 2).image.sum()) > 255 * 8  # never cut off
    with pytest.raises(ValueError, match="data.image_size must be at least 8 x 8"):
        Digits(replace(DATA, image_size=(6, 12)), "train")


def test_evaluation_shares_and_limit() -> None:
    images = Digits(DATA, "test")
    whole = list(evaluation_loader(EvaluationBatches(images, 100, Processes()), 0))
    assert [len(labels) for _, labels in whole] == [100, 100, 100, 60]
    assert torch.cat([labels for _, labels in whole]).tolist() == images.labels.tolist()
    assert whole[0][0].dtype == torch.float32 and float(whole[0][0].max()) <= 1
    shares = [EvaluationBatches(images, 100, Processes(rank=rank, count=7)).mine for rank in range(7)]
    assert sorted(number for share in shares for number in share) == list(range(360))
    assert EvaluationBatches(images, 100, Processes(), limit=10).mine == list(range(0, 360, 36))


def test_rows_of_all_processes_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        parts[:] = [mine, mine[:1] + 10]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    rows = torch.tensor([[1.0], [2.0]])
    assert Processes(count=2).gather_rows(rows).flatten().tolist() == [1, 2, 11]
    assert torch.equal(Processes().gather_rows(rows), rows)


def test_fold_separates_purposes() -> None:
    seeds = {fold(seed, name, step) for seed in range(3) for name in ("order", "crop") for step in range(50)}
    assert len(seeds) == 300
    assert fold(1, 12) != fold(11, 2)


def test_draws_of_different_steps_and_blocks_differ() -> None:
    first = draw_images(torch.rand, 0, "x", 0, 0, 128)
    assert len(first.unique()) == 128
    assert not torch.equal(first, draw_images(torch.rand, 0, "x", 1, 0, 128))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, tone in (("bright", 220), ("dark", 30)):
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = np.full((20 + number, 30, 3), tone, dtype=np.uint8)
            pixels[:, :15] = 255 - tone
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def folder_config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(source="folder", train_folder=folder, image_size=(16, 24), **changes)  # type: ignore[arg-type]


def test_image_folder(folder: Path) -> None:
    images = open_images(folder_config(folder), "train")
    assert isinstance(images, ImageFolder)
    assert (images.labels.tolist(), images.num_classes) == ([0] * 4 + [1] * 4, 2)
    assert open_images(folder_config(folder), "test") is None
    crop = images.load(5, 11).image
    assert crop.shape == (3, 16, 24) and crop.dtype == torch.uint8
    assert torch.equal(crop, images.load(5, 11).image)
    assert any(not torch.equal(crop, images.load(5, seed).image) for seed in range(12, 20))
    centre = images.load(0, None).image.float()  # the edge between the halves stays in the middle
    assert float(centre[..., :10].mean()) < 60 and float(centre[..., -10:].mean()) > 190
    grey = ImageFolder(folder_config(folder, channels=1, mean=(0.5,), std=(0.5,)), folder)
    assert grey.load(0, 3).image.shape == (1, 16, 24)


def test_folder_without_classes_is_one_class(folder: Path) -> None:
    images = ImageFolder(folder_config(folder), folder / "dark")
    assert (images.labels.tolist(), images.num_classes) == ([0] * 4, 1)


def test_folders_that_cannot_be_used(folder: Path) -> None:
    with pytest.raises(FolderError, match="does not exist"):
        open_images(folder_config(folder / "nowhere"), "train")
    (folder / "empty").mkdir()
    with pytest.raises(FolderError, match=r"empty' holds no images"):
        open_images(folder_config(folder), "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named(folder: Path, workers: int) -> None:
    (folder / "dark" / "2.png").write_bytes((folder / "dark" / "2.png").read_bytes()[:60])
    config = folder_config(folder)
    run = RunConfig(folder=Path("unused"), epochs=1, batch_size=8)
    source = MicroBatches(ImageFolder(config, folder), config, run, Processes(), {})
    with training_loader(source, 0, 1, workers, pin=False) as loader:
        (batch,) = loader
    skipped = batch["skipped"]
    assert sorted(skipped.tolist()) == [-1] * 7 + [6] and source.images.name(6) == "dark/2.png"
    row = int(skipped.argmax())
    assert torch.equal(batch["images"][row], source[0]["images"][row]) and int(batch["images"][row].max()) > 0


def test_fingerprint_sees_a_shrunk_folder(folder: Path) -> None:
    before = ImageFolder(folder_config(folder), folder).fingerprint
    (folder / "dark" / "3.png").unlink()
    assert ImageFolder(folder_config(folder), folder).fingerprint != before


def test_augment_flips_and_jitters() -> None:
    images = torch.randint(0, 256, (3, 3, 4, 6), dtype=torch.uint8)
    plain = augment({"images": images})
    assert torch.equal(plain, images.float() / 255)
    flipped = augment({"images": images, "flip": torch.tensor([True, False, True])})
    assert torch.equal(flipped[0], plain[0].flip(-1)) and torch.equal(flipped[1], plain[1])
    ones = torch.ones(3, 3)
    torch.testing.assert_close(augment({"images": images, "jitter": ones}), plain)
    dark = ones.clone()
    dark[:, 0] = 0.5
    torch.testing.assert_close(augment({"images": images, "jitter": dark}), plain / 2)
    flat = ones.clone()
    flat[:, 1] = 0.0
    assert float(augment({"images": images, "jitter": flat}).var((1, 2, 3)).max()) < 1e-10
    grey = ones.clone()
    grey[:, 2] = 0.0
    coloured = augment({"images": images, "jitter": grey})
    torch.testing.assert_close(coloured[:, 0], coloured[:, 2])
    assert float(augment({"images": images, "jitter": 1.4 * ones}).max()) <= 1
