"""Tar shards: WebDataset's and plain ones, their index, what is wrong with them."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sample_images import data_config, encoded, smooth

from dtm_triton.train.config import RunConfig
from dtm_triton.train.data import shard_index
from dtm_triton.train.data.batches import MicroBatches, training_loader
from dtm_triton.train.data.decode import load_crop
from dtm_triton.train.data.images import open_images
from dtm_triton.train.data.shards import ShardImages
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def open_shards(folder: Path, part: str = "train", **changes: object) -> ShardImages:
    images = open_images(data_config(folder, source="shards", **changes), part)
    assert isinstance(images, ShardImages)
    return images


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 4, 1 and 3 images with .cls labels 0, 1, 2, ..."""
    number = 0
    for shard, count in enumerate((4, 1, 3)):
        files = {}
        for _ in range(count):
            files[f"{number:06}.cls"] = str(number).encode()
            files[f"{number:06}.jpg"] = encoded(smooth(number))
            number += 1
        write_tar(tmp_path / "shards" / f"a-{shard}.tar", files)
    return tmp_path / "shards"


def test_images_labels_and_names(shards: Path) -> None:
    for images in (open_shards(shards), open_shards(shards)):  # without an index and with one
        assert images.labels.tolist() == list(range(8)) and images.num_classes == 8
        assert images.ends.tolist() == [4, 5, 8]
        assert [images.name(n) for n in (0, 4, 7)] == ["a-0.tar/000000.jpg", "a-1.tar/000004.jpg", "a-2.tar/000007.jpg"]
        for number in range(8):
            assert images.read(number) == encoded(smooth(number))
        assert torch.equal(images.load(6, 3).image, load_crop(encoded(smooth(6)), images.config, 3).image)
    assert (shards / shard_index.INDEX).is_file()


def test_index_is_kept_and_follows_the_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = shard_index.images_of
    monkeypatch.setattr(shard_index, "images_of", lambda path: read.append(path.name) or real(path))
    first = open_shards(shards).fingerprint
    assert open_shards(shards).fingerprint == first and len(read) == 3
    write_tar(shards / "a-1.tar", {"x.cls": b"0", "x.jpg": encoded(smooth(50))})  # one image, as before
    assert open_shards(shards).fingerprint != first and len(read) == 6
    (shards / shard_index.INDEX).write_bytes(b"not an index")
    assert len(open_shards(shards).labels) == 8 and len(read) == 9
    (shards / shard_index.INDEX).write_bytes((shards / shard_index.INDEX).read_bytes()[:700])
    assert len(open_shards(shards).labels) == 8 and len(read) == 12
    (shards / "a-2.tar").unlink()
    assert len(open_shards(shards).labels) == 5


def test_a_folder_that_cannot_be_written(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(shard_index, "write_atomically", refuse)
    assert len(open_shards(shards).labels) == 8 and not (shards / shard_index.INDEX).exists()


@pytest.mark.parametrize("order", ["exact", "resampled"])
def test_workers_read_what_the_process_reads(shards: Path, order: str) -> None:
    images = open_shards(shards, order=order)
    images.read(0)  # an open file, which workers inherit
    run = RunConfig(folder=Path("unused"), epochs=1, batch_size=4)
    batches = MicroBatches(images, images.config, run, Processes(), {})
    expected = [batches[step] for step in range(6)]
    with training_loader(batches, 0, 6, 2, pin=False) as loader:
        for batch, wanted in zip(loader, expected, strict=True):
            assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    if order == "exact":
        assert sorted(torch.cat([batch["labels"] for batch in expected[:2]]).tolist()) == list(range(8))


def test_many_shards_keep_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:02}.tar", {f"{number}.png": encoded(smooth(number), "PNG")})
    monkeypatch.setattr("dtm_triton.train.data.shards.OPEN_FILES", 3)
    images = open_shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in (*range(12), 0, 5):
        assert images.read(number) == encoded(smooth(number), "PNG")
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert pickle.loads(pickle.dumps(images)).read(3) == images.read(3)


def test_json_labels_and_class_folders(tmp_path: Path) -> None:
    picture = encoded(smooth(0))
    write_tar(
        tmp_path / "json" / "0.tar",
        {"a.jpg": picture, "a.json": b'{"label": 3}', "b.JPEG": picture, "b.json": b'{"cls": 1, "url": "x"}'},
    )
    assert open_shards(tmp_path / "json").labels.tolist() == [3, 1]
    first = {"train/dog/1.jpg": picture, "train/cat/1.jpg": picture, "train/.x.jpg": b""}
    write_tar(tmp_path / "plain" / "0.tar", first)
    write_tar(tmp_path / "plain" / "1.tar", {"train/emu/1.jpg": picture, "train/notes.txt": b""})
    plain = open_shards(tmp_path / "plain")
    assert (plain.classes, plain.labels.tolist()) == (["cat", "dog", "emu"], [1, 0, 2])
    write_tar(tmp_path / "held" / "0.tar", {"val/emu/9.jpg": picture})
    held = replace(plain.config, test_folder=tmp_path / "held")
    test = open_images(held, "test")
    assert test is not None and test.labels.tolist() == [2] and test.num_classes == 3
    write_tar(tmp_path / "held" / "0.tar", {"val/fox/9.jpg": picture})
    with pytest.raises(FolderError, match="class 'fox', the training images do not"):
        open_images(held, "test")
    write_tar(tmp_path / "none" / "0.tar", {"1.jpg": picture, "2.jpg": picture})
    assert (open_shards(tmp_path / "none").labels.tolist(), open_shards(tmp_path / "none").num_classes) == ([0, 0], 1)


def test_names_of_any_bytes_and_length(tmp_path: Path) -> None:
    names = ["ü/" + "long" * 60 + ".jpg", "\udcff\udcfe/x y\n.png", "日本/*.webp"]
    kinds = ["JPEG", "PNG", "WEBP"]
    write_tar(tmp_path / "0.tar", {n: encoded(smooth(i), k) for i, (n, k) in enumerate(zip(names, kinds, strict=True))})
    images = open_shards(tmp_path)
    assert [images.load(number, None).image.shape for number in range(3)] == [(3, 16, 24)] * 3
    assert "\\xff\\xfe" in images.name(1) and images.name(2).encode()


PICTURE = encoded(smooth(0))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": PICTURE, "a.cls": b"cat"}, r"label in 'a.cls' must be a number.*cat"),
        ({"a.jpg": PICTURE, "a.cls": b"-2"}, "label in 'a.cls'"),
        ({"a.jpg": PICTURE, "a.json": b"{"}, "cannot be read"),
        ({"a.jpg": PICTURE, "a.cls": b"1", "b.jpg": PICTURE}, "'b.jpg' has no label"),
        ({"a.1.jpg": PICTURE, "a.2.jpg": PICTURE}, "two images share the name 'a'"),
        ({"a.txt": b""}, "without images"),
    ],
)
def test_tars_that_cannot_be_used(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "0.tar", files)
    with pytest.raises(FolderError, match=message):
        open_shards(tmp_path)


def test_broken_and_missing_shards(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "a-0.tar").read_bytes()
    for broken in (whole[:3000], b"", os.urandom(2000)):
        (shards / "a-0.tar").write_bytes(broken)
        with pytest.raises(FolderError, match=r"a-0.tar' cannot be read"):
            open_shards(shards)
    for folder, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds no .tar files")):
        with pytest.raises(FolderError, match=message):
            open_shards(folder)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(FolderError, match="compressed ones must be unpacked"):
        open_shards(tmp_path)


def test_a_shard_cut_off_under_a_run_is_skipped_images(shards: Path) -> None:
    images = open_shards(shards)
    os.truncate(shards / "a-2.tar", 2000)
    with pytest.raises(OSError, match="bytes too early"):
        images.load(7, None)


def test_the_manifest_is_believed(shards: Path) -> None:
    told = [{"name": path.name, "bytes": path.stat().st_size} for path in sorted(shards.glob("*.tar"))]
    manifest = {"shards": told, "images": 8, "classes": list("abcdefghij")}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    assert open_shards(shards).num_classes == 10
    (shards / "manifest.json").write_text(json.dumps(manifest | {"images": 9}))
    with pytest.raises(FolderError, match="manifest.json says: 8 images"):
        open_shards(shards)
    (shards / "manifest.json").write_text(json.dumps(manifest))
    (shards / "a-1.tar").unlink()
    with pytest.raises(FolderError, match="manifest.json says: a-1.tar"):
        open_shards(shards)


def test_webdataset_and_this_read_each_other(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for number in range(5):
            pixels = smooth(number)
            writer.write({"__key__": f"sample{number}", "png": pixels, "cls": number % 3, "json": {"n": number}})
    images = open_shards(tmp_path)
    assert images.labels.tolist() == [0, 1, 2, 0, 1]
    expected = load_crop(encoded(smooth(2), "PNG"), images.config, 5).image
    assert torch.equal(images.load(2, 5).image, expected)
