"""The loader benchmark measures what it says, in turns, on one core, and writes a record that is rendered."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtm_triton.measure.train_record import read_loader
from dtm_triton.train import loader_bench
from dtm_triton.train.config import DataConfig


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader_bench.main(["--images", "3", "--repetitions", "3", "--output", str(tmp_path)])
    (record,) = read_loader(tmp_path)
    names = ["released DTM", "folder", "shards", "folder, device's share added", "shards, device's share added"]
    assert [row.chain for row in record.rows] == names
    assert all(row.images_per_second_per_core > 0 and row.runs == 3 for row in record.rows)
    assert "3 JPEG files of 500 x 375" in record.source and record.machine["kind"] == "cpu"
    (file,) = tmp_path.glob("loader-*.json")
    assert json.loads(file.read_text())["format"] == "dtm-loader-bench 1"
    assert "x released DTM" in capsys.readouterr().out


def test_both_sides_do_all_of_the_work(tmp_path: Path) -> None:
    loader_bench.write_photos(tmp_path / "photos", 4)
    paths = sorted((tmp_path / "photos").iterdir())
    assert len({path.read_bytes() for path in paths}) == 4
    assert {Image.open(path).size for path in paths} == {(500, 375)}
    theirs = loader_bench.released_chain(paths)(0)
    for patches, tokens, mask in theirs:  # type: ignore[attr-defined]
        assert patches.shape == tokens.shape == (3, 224, 224) and patches.dtype == torch.float32
        assert float(tokens.min()) >= 0 and float(patches.min()) < 0 and 40 < mask.sum() <= 75
    data = DataConfig(source="folder", train_folder=tmp_path / "photos", colour_jitter=0.4)
    batch = loader_bench.our_chain(data, 4)(0)
    assert isinstance(batch, dict) and batch["images"].shape == (4, 3, 224, 224)
    assert set(batch) == {"images", "number", "place", "labels", "skipped", "flip", "jitter", "mask"}
    assert bool((batch["skipped"] < 0).all())
    (student, teacher), partition = loader_bench.device_share(batch)  # type: ignore[misc]
    assert student.shape == teacher.shape == (4, 3, 224, 224) and partition.mask.sum(1).tolist() == [75] * 4


def test_the_other_sides_masks_are_blocks() -> None:
    masks = np.stack([loader_bench.block_mask(random.Random(seed)) for seed in range(200)])
    assert masks.sum((1, 2)).max() == 75 and masks.sum((1, 2)).mean() > 70


def test_one_core() -> None:
    before = os.sched_getaffinity(0), torch.get_num_threads()
    with pytest.raises(KeyError), loader_bench.one_core():
        assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 1
        raise KeyError
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
