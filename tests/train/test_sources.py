"""Image folders, Hugging Face datasets and torchvision's sets."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import data_config, encoded, smooth, write_classes

from dtm_triton.train.config import DataConfig
from dtm_triton.train.data.decode import load_crop
from dtm_triton.train.data.folder import ImageFolder
from dtm_triton.train.data.images import Images, open_images
from dtm_triton.train.engine.checkpoint import FolderError


def opened(config: DataConfig, part: str = "train") -> Images:
    images = open_images(config, part)
    assert images is not None and images.shape == (config.channels, *config.image_size)
    assert len(images.labels) > int(images.labels.min()) >= 0 and images.labels.dtype == torch.int64
    assert pickle.loads(pickle.dumps(images)).fingerprint == images.fingerprint
    return images


def test_folder_of_odd_names(tmp_path: Path) -> None:
    write_classes(tmp_path / "in")
    place = os.fsencode(tmp_path / "in" / "c0")
    for name in (b"\xff\xfe.jpg", "日 本.JPG".encode(), b"a\nb.jpeg", b"long" * 50 + b".jpg"):
        with open(os.path.join(place, name), "wb") as file:
            file.write(encoded(smooth(1)))
    (tmp_path / "in" / "c1" / "deep" / "er").mkdir(parents=True)
    shutil.copy(tmp_path / "in" / "c1" / "00.jpg", tmp_path / "in" / "c1" / "deep" / "er" / "x.jpg")
    for hidden in (".git", "c0/.thumbs"):
        (tmp_path / "in" / hidden).mkdir()
        (tmp_path / "in" / hidden / "x.jpg").write_bytes(b"")
    (tmp_path / "in" / "c0" / "._00.jpg").write_bytes(b"")
    (tmp_path / "in" / "c1" / "again").symlink_to(tmp_path / "in" / "c1")  # a circle
    images = opened(data_config(tmp_path / "in"))
    assert images.labels.tolist() == [0] * 9 + [1] * 6
    assert all(images.load(number, 0).image.shape == (3, 16, 24) for number in range(15))
    names = {images.name(number) for number in range(15)}
    assert len(names) == 15 and "c1/deep/er/x.jpg" in names and "c0/\\xff\\xfe.jpg" in names
    assert all(name.encode() for name in names), "every name can be written to a log"


def test_images_beside_class_folders_are_not_dropped_in_silence(tmp_path: Path) -> None:
    write_classes(tmp_path, classes=1, images=2)
    for name in ("._x.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c1.jpg").mkdir()
    (tmp_path / "c1.jpg" / "x.png").write_bytes(encoded(smooth(1), "PNG"))
    assert len(opened(data_config(tmp_path)).labels) == 3, (
        "hidden files, others and folders with such a name are no images"
    )
    for name in ("b.JPG", "a.npy"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FolderError, match="folder 'c0', a class, and beside it 2 images of no class, 'a.npy' for one"):
        open_images(data_config(tmp_path), "train")


def test_linked_class_folders_are_classes(tmp_path: Path) -> None:
    write_classes(tmp_path / "real")
    (tmp_path / "in").mkdir()
    for name in ("c0", "c1"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "real" / name)
    assert opened(data_config(tmp_path / "in")).labels.tolist() == [0] * 5 + [1] * 5


def test_thousands_of_classes(tmp_path: Path) -> None:
    data = encoded(smooth(0, 8, 8), "PNG")
    for label in range(1200):
        (tmp_path / f"{label:04}").mkdir()
        (tmp_path / f"{label:04}" / "0.png").write_bytes(data)
    images = opened(data_config(tmp_path))
    assert images.labels.tolist() == list(range(1200)) and images.num_classes == 1200


def test_held_out_images_have_the_training_images_labels(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", classes=3, images=1)
    write_classes(tmp_path / "test", classes=3, images=2)
    shutil.rmtree(tmp_path / "test" / "c1")
    config = data_config(tmp_path / "train", test_folder=tmp_path / "test")
    held = opened(config, "test")
    assert (held.labels.tolist(), held.num_classes) == ([0, 0, 2, 2], 3)
    (tmp_path / "test" / "c2").rename(tmp_path / "test" / "other")
    with pytest.raises(FolderError, match="class 'other', which the training images do not have"):
        open_images(config, "test")
    assert isinstance(open_images(data_config(tmp_path / "test" / "c0"), "train"), ImageFolder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    files = [encoded(smooth(number)) for number in range(6)]
    columns = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y", "z"]), "id": datasets.Value("int64")}
    )
    rows = {"picture": [{"bytes": file, "path": None} for file in files], "kind": [0, 1, 2, 0, 1, 1], "id": range(6)}
    train = datasets.Dataset.from_dict({name: list(values) for name, values in rows.items()}, features=columns)
    both = datasets.DatasetDict({"train": train, "validation": train.select([4, 2])})
    both.save_to_disk(str(tmp_path / "both"))
    train.filter(lambda row: row["id"] != 1).save_to_disk(str(tmp_path / "one"))
    train.remove_columns("picture").save_to_disk(str(tmp_path / "blind"))
    train.remove_columns(["kind", "id"]).save_to_disk(str(tmp_path / "bare"))
    return tmp_path


def test_hugging_face(saved: Path) -> None:
    config = data_config(saved / "both", source="huggingface", test_folder=saved / "both")
    train, test = opened(config), opened(config, "test")
    assert (train.labels.tolist(), train.num_classes) == ([0, 1, 2, 0, 1, 1], 3)
    assert test.labels.tolist() == [1, 2]
    assert torch.equal(train.load(4, 9).image, load_crop(encoded(smooth(4)), config, 9).image)
    assert torch.equal(test.load(1, None).image, load_crop(encoded(smooth(2)), config, None).image)
    one = opened(replace(config, train_folder=saved / "one"))
    assert one.labels.tolist() == [0, 2, 0, 1, 1] and one.name(1) == "row 1"
    assert torch.equal(one.load(1, 0).image, load_crop(encoded(smooth(2)), config, 0).image)
    assert one.fingerprint != train.fingerprint
    bare = opened(replace(config, train_folder=saved / "bare"))
    assert (bare.labels.tolist(), bare.num_classes) == ([0] * 6, 1)
    for folder, message in (("blind", "no image column, only kind, id"), ("none", "nothing that save_to_disk wrote")):
        with pytest.raises(FolderError, match=message):
            opened(replace(config, train_folder=saved / folder))
    shutil.rmtree(saved / "both" / "validation")
    (saved / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(FolderError, match="no split 'test', only train"):
        opened(config, "test")


def cifar(folder: Path) -> DataConfig:
    """CIFAR10 as torchvision unpacks it, of ten images a file."""
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = np.stack([smooth(10 * number + i, 32, 32).transpose(2, 0, 1).reshape(-1) for i in range(10)])
        (place / name).write_bytes(pickle.dumps({"data": rows, "labels": [(i + number) % 10 for i in range(10)]}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"k{n}" for n in range(10)]}))
    return data_config(folder, source="torchvision", name="CIFAR10", test_folder=folder)


def test_torchvision_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    config = cifar(tmp_path / "cifar")
    with pytest.raises(FolderError, match="CIFAR10 is not in"):
        open_images(config, "train")  # files that are not the published ones
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, test = opened(config), opened(config, "test")
    assert (len(train.labels), len(test.labels), train.num_classes) == (50, 10, 10)
    assert test.labels.tolist() == [(i + 5) % 10 for i in range(10)]
    expected = load_crop(encoded(smooth(23, 32, 32), "PNG"), config, 4).image
    assert torch.equal(train.load(23, 4).image, expected)
    grey = replace(config, channels=1, mean=(0.5,), std=(0.5,))
    assert opened(grey).load(0, 0).image.shape == (1, 16, 24)


def test_torchvision_sets_of_files_decode_as_all_do(tmp_path: Path) -> None:
    pytest.importorskip("torchvision.datasets")
    write_classes(tmp_path / "in", classes=3, images=2)
    config = data_config(tmp_path / "in", source="torchvision", name="ImageFolder")
    images = opened(config)
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2] and images.num_classes == 3
    data = (tmp_path / "in" / "c1" / "01.jpg").read_bytes()
    assert torch.equal(images.load(3, 1).image, load_crop(data, config, 1).image)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("MNIST", FolderError, "MNIST is not in"),
        ("NoSuchSet", ValueError, "data.name must be a set of torchvision.datasets, got 'NoSuchSet'"),
        ("utils", ValueError, "data.name must be a set"),
        ("FakeData", FolderError, "FakeData has no list of integer labels"),
    ],
)
def test_torchvision_sets_that_cannot_be_used(tmp_path: Path, name: str, error: type, message: str) -> None:
    pytest.importorskip("torchvision.datasets")
    config = data_config(tmp_path, source="torchvision", name=name)
    with pytest.raises(error, match=message):
        open_images(config, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "shards", "train_folder": None}, 'data.train_folder must be given for source "shards", got None'),
        ({"source": "torchvision"}, "data.name must be a class of torchvision.datasets"),
        ({"order": "resampled"}, 'data.order must be "exact" for source "folder", got \'resampled\''),
        ({"max_corrupt": 1.0}, "data.max_corrupt must be in 0..1, got 1.0"),
        ({"channels": 0, "mean": (), "std": ()}, "data.channels must be positive, got 0"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(data_config(Path("somewhere")), **changes)  # type: ignore[arg-type]


def test_a_picture_of_sixteen_bits_is_not_cut_at_255(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    Image.fromarray(smooth(3, channels=1)[..., 0].astype(np.uint16) * 256).save(tmp_path / "c" / "0.png")
    crop = opened(data_config(tmp_path)).load(0, None).image.float()
    assert abs(float(crop.mean()) - float(smooth(3, channels=1)[4:56].mean())) < 12
