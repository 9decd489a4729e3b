"""The maps of a run: made when due, added to batches, kept with checkpoints, taken back from them; nothing is left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from attended import GRID, brightness, expected, run_maps_of_several, some_digits
from processes import run_together

from dtm_triton.train.config import AttentionConfig, RunConfig
from dtm_triton.train.data.batches import MicroBatches
from dtm_triton.train.data.decode import Crop
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.maps.run_maps import RunMaps
from dtm_triton.train.recipes import digits

IMAGES = some_digits()


def run_maps(folder: Path, grid: tuple[int, int] = GRID, images: int = 75, **changes: object) -> RunMaps:
    config = AttentionConfig(**changes)  # type: ignore[arg-type]
    return RunMaps(config, some_digits(images), grid, folder, Processes(), workers=0, most_unread=10)


def make(maps: RunMaps, step: int, go_on: bool = False, bright: bool = True) -> int:
    """Returns how often the network was asked."""
    calls: list[int] = []

    def attend(rows: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return brightness(rows) if bright else 1 - brightness(rows)

    maps.refresh(step, attend, lambda: None, lambda text: None, go_on=go_on)
    return len(calls)


def save(maps: RunMaps, step: int) -> Path:
    """A checkpoint with the maps of now."""
    path = maps.folder.parent / "checkpoints" / f"step_{step:09d}"
    path.mkdir(parents=True)
    if maps.path is not None:
        shutil.copyfile(maps.path, path / "maps.npy")
    return path


def shown(maps: RunMaps) -> torch.Tensor:
    batch = {"number": torch.arange(75)}
    maps.add_to(batch)
    return batch["map"]


def test_a_batch_gets_the_maps_of_its_images(tmp_path: Path) -> None:
    maps = run_maps(tmp_path)
    run = RunConfig(folder=tmp_path, epochs=1, batch_size=25)
    batch = MicroBatches(IMAGES, digits(), run, Processes(), {})[0]
    maps.add_to(batch)
    assert "map" not in batch and maps.path is None and not (tmp_path / "maps").exists()
    make(maps, 40)
    maps.add_to(batch)
    assert torch.equal(batch["map"], expected(IMAGES)[batch["number"]]) and batch["map"].dtype == torch.uint8
    assert maps.path == tmp_path / "maps" / "step_000000040.npy"
    assert [epoch for epoch in range(121) if run_maps(tmp_path, refresh_epochs=30).due(epoch)] == [40, 70, 100]


def test_new_maps_take_the_place_of_the_old(tmp_path: Path) -> None:
    maps = run_maps(tmp_path, precision="float16")
    make(maps, 40)
    first = shown(maps)
    held = maps.store
    (tmp_path / "maps" / "step_000000080.npy.unfinished").mkdir()
    (tmp_path / "maps" / "step_000000010.npy.unfinished").mkdir()
    (tmp_path / "maps" / "step_000000010.npy.tmp").write_bytes(b"x")
    make(maps, 80, bright=False)
    assert sorted(os.listdir(tmp_path / "maps")) == ["step_000000080.crc", "step_000000080.npy"]
    assert not torch.equal(shown(maps), first) and held is not None and torch.equal(held.rows(torch.arange(75)), first)
    assert make(run_maps(tmp_path, precision="float16"), 80, go_on=True) == 0


def test_a_run_goes_on_with_the_maps_of_its_checkpoint(tmp_path: Path) -> None:
    maps = run_maps(tmp_path)
    before = save(maps, 39)
    make(maps, 40)
    saved, first = save(maps, 50), shown(maps)
    again = run_maps(tmp_path)
    again.restore(saved)
    assert again.path == maps.path and torch.equal(shown(again), first)
    assert not list(tmp_path.glob("maps/of_*")), "the file is known, not taken twice"
    make(maps, 80, bright=False)  # the newer maps are there, but the newest whole checkpoint is before them
    again = run_maps(tmp_path)
    again.restore(saved)
    assert torch.equal(shown(again), first) and again.path == tmp_path / "maps" / "of_step_000000050.npy"
    again.restore(saved)
    assert len(list(tmp_path.glob("maps/*.npy"))) == 2
    assert make(again, 80, go_on=True) == 0 and not torch.equal(shown(again), first)
    assert [path.name for path in tmp_path.glob("maps/*.npy")] == ["step_000000080.npy"]
    assert (saved / "maps.npy").is_file()
    again.restore(before)
    assert again.path is None


def test_maps_of_a_checkpoint_are_not_taken_for_those_of_its_step(tmp_path: Path) -> None:
    """A checkpoint at the step where new maps are due holds the ones before."""
    maps = run_maps(tmp_path)
    make(maps, 40)
    saved = save(maps, 80)
    for path in (tmp_path / "maps").iterdir():
        path.unlink()
    again = run_maps(tmp_path)
    again.restore(saved)
    assert torch.equal(shown(again), expected(IMAGES))
    assert make(again, 80, go_on=True, bright=False) > 0 and not torch.equal(shown(again), expected(IMAGES))
    assert [path.name for path in tmp_path.glob("maps/*.npy")] == ["step_000000080.npy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (2, 6)}, r"grid \(data.image_size, student.patch_size\): \(4, 6\) -> \(2, 6\)"),
        ({"precision": "float16"}, "attention.precision: uint8 -> float16"),
        ({"images": 70}, "images: 75 -> 70"),
    ],
)
def test_maps_of_another_configuration_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    maps = run_maps(tmp_path)
    make(maps, 40)
    saved = save(maps, 50)
    with pytest.raises(FolderError, match=message):
        run_maps(tmp_path, **changes).restore(saved)  # type: ignore[arg-type]
    (saved / "maps.npy").unlink()
    (saved / "maps.npy").write_bytes(b"damaged")
    with pytest.raises(FolderError, match=r"maps '.*step_000000050/maps.npy' cannot be read"):
        run_maps(tmp_path).restore(saved)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    maps = run_maps(tmp_path / "one")
    make(maps, 40)
    saved = save(maps, 50)
    (tmp_path / "two").write_bytes(b"")
    with pytest.raises(FolderError, match=r"cannot be taken into '.*two/maps'"):
        run_maps(tmp_path / "two").restore(saved)


def test_several_processes_share_one_file(tmp_path: Path) -> None:
    run_together(2, run_maps_of_several, tmp_path)
    assert os.listdir(tmp_path / "maps") == ["of_step_000000009.npy"]


def test_a_finished_file_that_has_changed_is_made_again(tmp_path: Path) -> None:
    """Its shape is right, its bytes are not those that were written; or nobody knows what was."""
    maps = run_maps(tmp_path)
    make(maps, 40)
    first, path = shown(maps), tmp_path / "maps" / "step_000000040.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.unlink()
    path.write_bytes(data)
    assert make(again := run_maps(tmp_path), 40, go_on=True) > 0 and torch.equal(shown(again), first)
    path.with_suffix(".crc").unlink()
    assert make(again := run_maps(tmp_path), 40, go_on=True) > 0 and torch.equal(shown(again), first)
    assert make(run_maps(tmp_path), 40, go_on=True) == 0


def test_too_many_unreadable_images_end_the_run_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int, seed: int | None) -> Crop:
        raise OSError("stale file handle")

    maps = run_maps(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(maps.images, "load", refuse)
        with pytest.raises(
            FolderError, match="75 of 75 images cannot be read for attention maps, more than the 10 that"
        ):
            make(maps, 40)
    assert os.listdir(tmp_path / "maps") == [] and maps.path is None
    assert make(maps, 40, go_on=True) > 0 and torch.equal(shown(maps), expected(IMAGES))


def test_even_attention_is_no_unreadable_image(tmp_path: Path) -> None:
    """Blank images, of which a network without positions says nothing: every patch weighs the same."""
    maps = run_maps(tmp_path)
    maps.refresh(40, lambda rows: 0 * brightness(rows), lambda: None, lambda text: None, go_on=False)
    assert (shown(maps) == 255).all()
