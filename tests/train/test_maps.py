"""Attention maps of all images: their store, how they are made by one process and several, killed and continued."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attended import GRID, brightness, expected, make_maps, make_maps_and_die, maps_of_several, some_digits
from processes import CONTEXT, run_together
from sample_images import data_config, write_classes

from dtm_triton.train.data.folder import ImageFolder
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.maps import refresh
from dtm_triton.train.maps.chunks import Chunks
from dtm_triton.train.maps.store import MapStore


def test_rows_are_copies_of_the_file(tmp_path: Path) -> None:
    for dtype in (np.uint8, np.float16):
        values = np.random.default_rng(0).integers(0, 255, (9, 3, 4)).astype(dtype)
        np.save(tmp_path / "maps.npy", values)
        store = MapStore(tmp_path / "maps.npy")
        rows = store.rows(torch.tensor([8, 0, 8]))
        assert rows.dtype == torch.from_numpy(values).dtype and np.array_equal(rows.numpy(), values[[8, 0, 8]])
        rows.zero_()
        assert np.array_equal(np.load(tmp_path / "maps.npy"), values) and store.precision == np.dtype(dtype).name
        assert store.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 4)


def broken_files() -> dict[str, Any]:
    """What is no file of maps."""
    return {
        "nothing": b"",
        "text": b"no maps at all",
        "cut": None,
        "of one image": np.zeros((3, 4), dtype=np.uint8),
        "of numbers": np.zeros((2, 3, 4), dtype=np.int64),
        "of objects": np.array([[[None]]], dtype=object),
    }


@pytest.mark.parametrize("name", broken_files())
def test_files_that_are_no_maps_are_told(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / "maps.npy", broken_files()[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, np.zeros((20, 3, 4), dtype=np.uint8) if content is None else content)
    if content is None:
        os.truncate(path, 300)
    with pytest.raises(FolderError, match=r"maps '.*maps.npy' (cannot be read|must be \[count, h, w\])"):
        MapStore(path)
    with pytest.raises(FolderError, match="cannot be read"):
        MapStore(tmp_path / "nowhere.npy")


def resident() -> int:
    """Bytes of this process in memory that it does not share with a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def test_maps_of_imagenet_open_at_once_and_stay_on_the_disk(tmp_path: Path) -> None:
    path, count = tmp_path / "maps.npy", 1_281_167
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, 14, 14)})
        begin = file.tell()
        file.truncate(begin + count * 196)
        file.seek(begin + (count - 1) * 196)
        file.write(bytes(range(196)))
    assert path.stat().st_size > 251e6 and path.stat().st_blocks * 512 < 1e6, "a sparse file"
    before, start = resident(), time.process_time()
    store = MapStore(path)
    batches = [store.rows(torch.randint(count, (256,))) for _ in range(50)]
    assert time.process_time() - start < 2, "seconds of this process"
    assert resident() - before < 20e6
    assert all(batch.shape == (256, 14, 14) for batch in batches)
    assert store.rows(torch.tensor([count - 1, 5])).flatten(1).tolist() == [list(range(196)), [0] * 196]


def test_chunks_hold_every_image_once() -> None:
    for count in (1, 7, 127, 128, 129, 5000, 50_000, 1_281_167):
        chunks = Chunks(Path("maps.npy"), count, GRID, "uint8")
        parts = [numbers for chunk in chunks.numbers for numbers in chunks.batches(chunk)]
        assert sum(map(len, parts)) == count and min(map(len, parts)) >= 1 and max(map(len, parts)) <= 128
        assert all(first.stop == second.start for first, second in pairwise(parts))
        assert all(len(chunks.batches(chunk)) <= chunks.calls <= 8 for chunk in chunks.numbers)
        assert len(chunks.numbers) >= min(64, -(-count // 128)) and len(chunks.numbers) < 1300
        assert chunks.batches(None) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_every_map_is_its_images(workers: int, tmp_path: Path) -> None:
    images = some_digits()
    shapes: set[tuple[torch.Size, torch.dtype, bool]] = set()

    def attend(rows: torch.Tensor) -> torch.Tensor:
        shapes.add((rows.shape, rows.dtype, rows.is_contiguous()))
        assert not torch.is_grad_enabled() and float(rows.min()) >= 0 and float(rows.max()) <= 1
        return brightness(rows)

    said = make_maps(tmp_path / "maps.npy", images, attend=attend, workers=workers)
    maps = MapStore(tmp_path / "maps.npy").rows(torch.arange(75))
    assert torch.equal(maps, expected(images)) and len(maps.flatten(1).unique(dim=0)) == 75
    assert shapes == {(torch.Size([4, 1, 12, 18]), torch.float32, True)}
    assert re.fullmatch(r"attention maps of 75 images made in \d+ s", said[0]) and len(said) == 1
    assert sorted(os.listdir(tmp_path)) == ["maps.crc", "maps.npy"]


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    for count in (1, 2, 3):
        run_together(count, maps_of_several, tmp_path)
    first, second, third = ((tmp_path / f"{count}.npy").read_bytes() for count in (1, 2, 3))
    assert first == second == third
    assert torch.equal(MapStore(tmp_path / "3.npy").rows(torch.arange(75)), expected(some_digits()))
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["1.npy", "2.npy", "3.npy"]


@pytest.mark.parametrize(
    ("place", "number", "kept"),
    [
        ("check", 1, 0),
        ("check", 5, 4),
        ("fsync", 3, 1),  # a chunk half written: every file is flushed, then its folder
        ("replace", 7, 6),
        ("fsync", 21, 10),  # all of them half joined
        ("replace", 11, 10),
        ("rmtree", 1, None),  # joined
    ],
)
def test_killed_at_any_moment(place: str, number: int, kept: int | None, tmp_path: Path) -> None:
    path = tmp_path / "maps.npy"
    process = CONTEXT.Process(target=make_maps_and_die, args=(path, place, number))
    process.start()
    process.join(60)
    assert process.exitcode == -9 and path.exists() == (kept is None)
    whole = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "maps.npy.unfinished").glob("??????.npy")}
    assert len(whole) == (10 if kept is None else kept)
    calls: list[int] = []

    def attend(rows: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return brightness(rows)

    make_maps(path, some_digits(), go_on=True, attend=attend)
    assert len(calls) == (0 if kept is None else 2 * (10 - kept)), "what was there is not made again"
    assert torch.equal(MapStore(path).rows(torch.arange(75)), expected(some_digits()))
    assert sorted(os.listdir(tmp_path)) == ["maps.crc", "maps.npy"]


def test_what_is_there_is_taken_or_removed_as_asked(tmp_path: Path) -> None:
    path, images = tmp_path / "maps.npy", some_digits()
    make_maps(path, images, attend=lambda rows: 1 - brightness(rows))
    other = path.read_bytes()
    assert make_maps(path, images, go_on=True) == [] and path.read_bytes() == other
    make_maps(path, images, go_on=False)
    first = path.read_bytes()
    assert first != other
    halted: list[int] = []

    def halt() -> None:
        halted.append(1)
        if len(halted) == 4:
            raise InterruptedError

    for go_on in (True, False):
        halted.clear()
        with pytest.raises(InterruptedError):
            make_maps(path, images, check=halt, attend=lambda rows: 1 - brightness(rows))
        assert not path.exists() and len(os.listdir(tmp_path / "maps.npy.unfinished")) == 3
        make_maps(path, images, go_on=go_on)
        mixed = MapStore(path).rows(torch.arange(75))
        assert torch.equal(mixed[24:], expected(images)[24:])
        assert torch.equal(mixed[:24], expected(images)[:24]) != go_on
    make_maps(path, images, go_on=True, dtype="float16")  # finished, but of another kind
    assert MapStore(path).precision == "float16"
    (tmp_path / "maps.npy.unfinished").mkdir()
    for name, content in (("000001.npy", first[:50]), ("000002.npy", first), ("000003.npy.tmp", b"")):
        (tmp_path / "maps.npy.unfinished" / name).write_bytes(content)
    make_maps(path, images, go_on=True)
    assert path.read_bytes() == first and sorted(os.listdir(tmp_path)) == ["maps.crc", "maps.npy"]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_have_empty_maps(workers: int, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "in", classes=2, images=9)
    images = ImageFolder(data_config(folder), folder)
    for number in (0, 5, 17):
        (folder / images.name(number)).write_bytes(b"no image")
    (folder / images.name(7)).unlink()

    def attend(rows: torch.Tensor) -> torch.Tensor:
        return brightness(rows) + (rows.amax((1, 2, 3)) == 0)[:, None]  # to something in black images too

    said = make_maps(tmp_path / "maps.npy", images, workers=workers, attend=attend)
    maps = MapStore(tmp_path / "maps.npy").rows(torch.arange(18))
    assert torch.equal(maps, expected(images, skipped=(0, 5, 7, 17)))
    assert (maps.flatten(1).max(1).values == 0).nonzero().flatten().tolist() == [0, 5, 7, 17]
    assert said[-1].endswith("; 4 cannot be read, their maps are empty")


def test_weights_of_any_size_keep_their_ratios(tmp_path: Path) -> None:
    images, rows = some_digits(8), torch.rand(8, 24, generator=torch.Generator().manual_seed(0))
    rows[1], rows[2, 3], rows[2, 4], rows[2, 5], rows[3, 0] = 0, torch.nan, torch.inf, -1, -torch.inf
    clean = rows.clone()
    clean[2, 3:6], clean[3, 0] = 0, 0
    clean /= clean.amax(1, keepdim=True).clamp(min=1e-9)
    clean[1] = 1  # nothing is attended to more than anything else
    for scale in (1e-30, 1e-6, 1.0, 1e9):
        given = iter((scale * rows).split(4))
        make_maps(tmp_path / "a.npy", images, attend=lambda _: next(given).bfloat16())  # noqa: B023
        maps = MapStore(tmp_path / "a.npy").rows(torch.arange(8)).flatten(1)
        assert (maps.float() / 255 - clean).abs().max() < 0.01 and maps.amax(1).tolist() == [255] * 8
        given = iter((scale * rows).split(4))
        make_maps(tmp_path / "b.npy", images, attend=lambda _: next(given), dtype="float16")  # noqa: B023
        maps = MapStore(tmp_path / "b.npy").rows(torch.arange(8)).flatten(1)
        assert maps.dtype == torch.float16 and (maps.float() - clean).abs().max() < 5e-4


def test_progress_is_told_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "PATIENCE", -1.0)
    said = make_maps(tmp_path / "maps.npy", some_digits())
    numbers = [8, 16, 24, 32, 40, 48, 56, 64, 72, 75]
    assert said[:-1] == [f"attention maps: {number} of 75 images" for number in numbers]


def test_workers_end_with_what_interrupts_them(tmp_path: Path) -> None:
    def stop() -> None:
        found.extend(multiprocessing.active_children())
        raise InterruptedError

    found: list[Any] = []
    with pytest.raises(InterruptedError) as held:  # the traceback holds the loader
        make_maps(tmp_path / "maps.npy", some_digits(), workers=2, check=stop)
    for worker in found:
        worker.join(5)
    assert held and len(found) == 2 and all(worker.exitcode is not None for worker in found)


def test_files_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FolderError, match="attention maps cannot be written: "):
        make_maps(tmp_path / "file" / "maps.npy", some_digits())
    with pytest.raises(ValueError, match=r"attend must give \[4, 24\] weights, got \[4, 23\]"):
        make_maps(tmp_path / "maps.npy", some_digits(), attend=lambda rows: brightness(rows)[:, 1:])


def test_whole_images_of_a_folder(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "in", classes=2, images=9, size=(97, 133))
    images = ImageFolder(replace(data_config(folder), image_size=(16, 24)), folder)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        assert rows.is_contiguous(), "as networks take them, not as decoders give them"
        return brightness(rows)

    make_maps(tmp_path / "maps.npy", images, workers=1, attend=attend)
    assert torch.equal(MapStore(tmp_path / "maps.npy").rows(torch.arange(18)), expected(images))
