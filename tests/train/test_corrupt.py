"""Images that cannot be read are replaced, counted and named; nothing depends on processes, workers or a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sample_images import data_config, write_classes

from dtm_triton.train.config import RunConfig
from dtm_triton.train.data.batches import EvaluationBatches, MicroBatches, evaluation_loader, training_loader
from dtm_triton.train.data.decode import Crop, ImageError
from dtm_triton.train.data.folder import ImageFolder
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.evaluate import extract_features

CORRUPT = {3: b"", 8: b"no image", 11: None, 17: b"cut"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """24 images of which four cannot be read: empty, text, cut off, and gone after they were listed."""
    folder = write_classes(tmp_path_factory.mktemp("corrupt") / "in", classes=2, images=12)
    images = ImageFolder(data_config(folder), folder)
    for number, content in CORRUPT.items():
        path = folder / images.name(number)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:900] if content == b"cut" else content)
    return images


def batches(images: ImageFolder, rank: int = 0, count: int = 1, accumulate: int = 1) -> MicroBatches:
    run = RunConfig(folder=Path("unused"), epochs=1, batch_size=12, accumulate=accumulate)
    return MicroBatches(images, images.config, run, Processes(rank=rank, count=count), {})


def test_each_is_replaced_and_named_once_an_epoch(images: ImageFolder) -> None:
    source = batches(images)
    for epoch in range(3):
        both = [source[2 * epoch + step] for step in range(2)]
        skipped = torch.cat([batch["skipped"] for batch in both])
        assert sorted(skipped[skipped >= 0].tolist()) == sorted(CORRUPT)
        assert all(int(image.max()) > 0 for batch in both for image in batch["images"])
        # labels are those of the images that are shown: class 0 is images 0..11
        wanted = torch.tensor([row for step in range(2) for row in source.order.rows(2 * epoch + step, 0, 12)])
        labels = torch.cat([batch["labels"] for batch in both])
        assert torch.equal(labels[skipped < 0], (wanted[skipped < 0] >= 12).long())


def test_labels_are_those_of_what_is_shown(images: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(number: int, seed: int | None) -> Crop:
        if number % 3 == 0:
            raise ImageError("is one of eight")
        return Crop(torch.full((3, 1, 1), number, dtype=torch.uint8), (0.0, 0.0, 1.0, 1.0))

    monkeypatch.setattr(images, "load", load)
    substituted = 0
    for step in range(8):
        batch = batches(images)[step]
        shown = batch["images"][:, 0, 0, 0].long()
        assert torch.equal(batch["labels"], (shown >= 12).long()) and torch.equal(batch["number"], shown)
        substituted += int((batch["labels"] != (batch["skipped"] >= 12))[batch["skipped"] >= 0].sum())
    assert substituted > 3, "substitutes of the other class"


def test_substitutes_depend_on_their_place_alone(images: ImageFolder) -> None:
    whole = [batches(images)[step] for step in range(4)]
    for count, accumulate in ((2, 1), (1, 3), (2, 2)):
        sources = [batches(images, rank, count, accumulate) for rank in range(count)]
        for step in (3, 0, 1):  # in any order
            parts = [source[step * accumulate + micro] for micro in range(accumulate) for source in sources]
            for name, value in whole[step].items():
                assert torch.equal(torch.cat([part[name] for part in parts]), value), name
    with training_loader(batches(images), 2, 4, 2, pin=False) as loader:
        for batch, wanted in zip(loader, whole[2:], strict=True):
            assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_ends_in_words(tmp_path: Path, workers: int) -> None:
    folder = write_classes(tmp_path / "in", classes=1, images=20)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:500])
    images = ImageFolder(data_config(folder), folder)
    with (
        pytest.raises(
            FolderError, match=r"17 images in a row cannot be read, the last one: 'c0/\d\d.jpg' cannot be decoded"
        ),
        training_loader(batches(images), 0, 1, workers, pin=False) as loader,
    ):
        next(loader)


def test_wrong_channels_are_named(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "in", classes=1, images=20)
    config = replace(data_config(folder), channels=4, mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(FolderError, match=r"has the channels R, G, B, data.channels is 4"):
        batches(ImageFolder(config, folder))[0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 24, 30])
@pytest.mark.parametrize("limit", [None, 7])
def test_evaluation_is_as_long_on_every_process(images: ImageFolder, count: int, limit: int | None) -> None:
    shares = [EvaluationBatches(images, 4, Processes(rank=rank, count=count), limit) for rank in range(count)]
    sizes = {tuple(tuple(pixels.shape) for pixels, _ in map(share.__getitem__, range(len(share)))) for share in shares}
    assert len(sizes) == 1
    loaded = [batch for share in shares for batch in evaluation_loader(share, 0)]
    pixels, labels = (torch.cat(parts) for parts in zip(*loaded, strict=True))
    assert pixels.dtype == torch.float32 and bool((pixels[labels < 0] == 0).all())
    chosen = {i * 24 // (limit or 24) for i in range(limit or 24)}
    readable = sorted(int(number >= 12) for number in chosen - set(CORRUPT))
    assert sorted(labels[labels >= 0].tolist()) == readable
    features, kept = extract_features(lambda batch: batch.mean((2, 3)), loaded)
    assert len(features) == len(kept) == len(readable) and bool((features > 0).all())
