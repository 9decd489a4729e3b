"""Attention maps of digits, of a network that attends to what is bright; for tests in one process and in several."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dtm_triton.train.config import AttentionConfig
from dtm_triton.train.data.images import WHOLE, Digits, Images
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.maps import chunks, refresh
from dtm_triton.train.maps.refresh import refresh_maps
from dtm_triton.train.maps.run_maps import RunMaps
from dtm_triton.train.recipes import digits

GRID = (4, 6)


def some_digits(count: int = 75, size: tuple[int, int] = (12, 18)) -> Digits:
    """The first ones."""
    images = Digits(replace(digits(), image_size=size), "train")
    images.labels = images.labels[:count]
    return images


def brightness(images: Tensor) -> Tensor:
    """[b, C, H, W] -> [b, N]."""
    high, wide = images.shape[2] // GRID[0], images.shape[3] // GRID[1]
    return F.avg_pool2d(images.mean(1, keepdim=True), (high, wide)).flatten(1)


def expected(images: Images, skipped: tuple[int, ...] = ()) -> Tensor:
    """The maps as bytes, [count, h, w], one image at a time; those of `skipped` are zero."""
    rows = []
    for number in range(len(images.labels)):
        whole = torch.zeros(images.shape) if number in skipped else images.load(number, WHOLE).image / 255
        row = brightness(whole[None])[0]
        rows.append((255 * row / row.max().clamp(min=1e-9)).round())
    return torch.stack(rows).to(torch.uint8).view(-1, *GRID)


def make_maps(path: Path, images: Images, processes: Processes | None = None, **changes: Any) -> list[str]:
    """Maps of batches of 4 images and chunks of 8; returns what was said."""
    said: list[str] = []
    settings: dict[str, Any] = dict(
        grid=GRID, dtype="uint8", workers=0, go_on=False, check=lambda: None, say=said.append, attend=brightness
    )
    settings |= {"most_unread": len(images.labels), **changes}
    before = chunks.BATCH, chunks.CHUNKS, chunks.LARGEST
    chunks.BATCH, chunks.CHUNKS, chunks.LARGEST = 4, 3, 2
    try:
        refresh_maps(path, settings.pop("attend"), images=images, processes=processes or Processes(), **settings)
    finally:
        chunks.BATCH, chunks.CHUNKS, chunks.LARGEST = before
    return said


def attend_together(calls: list[tuple[int, ...]]) -> Callable[[Tensor], Tensor]:
    """As a network that is sharded over the processes: a call in one process waits for one in every other."""

    def attend(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        if dist.is_initialized():
            present = torch.ones(())
            dist.all_reduce(present)
            assert int(present) == dist.get_world_size()
        return brightness(images)

    return attend


def maps_of_several(processes: Processes, folder: Path) -> None:
    """Interrupted in all processes, then finished, by processes of which not all have something to do at the end."""
    images, calls, checks = some_digits(), [], []  # type: ignore[var-annotated]
    path = folder / f"{processes.count}.npy"

    def stop() -> None:
        checks.append(1)
        if len(checks) > 2:
            raise InterruptedError

    with suppress(InterruptedError):
        make_maps(path, images, processes, attend=attend_together(calls), check=stop)
    assert len(calls) == 2 * 2 and not path.exists()
    processes.wait()  # all have written their chunks
    refresh.PATIENCE = -1.0  # progress after every chunk
    said = make_maps(path, images, processes, attend=attend_together(calls), go_on=True, check=lambda: checks.append(1))
    chunk = 8
    assert set(calls) == {(4, 1, 12, 18)}
    found = processes.gather((len(calls), len(checks), len(said)))
    left = -(-75 // chunk) - 2 * processes.count
    turns = -(-left // processes.count)
    wanted = [(4 + 2 * turns, 3 + turns, (turns + 1) * (rank == 0)) for rank in range(processes.count)]
    assert found == wanted, found


def run_maps_of_several(processes: Processes, folder: Path) -> None:
    """A run's maps made twice, the first ones removed when all have the second; then taken from a checkpoint."""
    images = some_digits()

    def opened() -> RunMaps:
        return RunMaps(AttentionConfig(), images, GRID, folder, processes, workers=0, most_unread=10)

    maps, quiet = opened(), lambda *_: None
    maps.refresh(7, brightness, quiet, quiet, go_on=False)
    if processes.first:
        (folder / "checkpoints" / "step_000000009").mkdir(parents=True)
        os.link(folder / "maps" / "step_000000007.npy", folder / "checkpoints" / "step_000000009" / "maps.npy")
    maps.refresh(14, lambda rows: 1 - brightness(rows), quiet, quiet, go_on=False)
    processes.wait()
    assert [path.name for path in folder.glob("maps/*.npy")] == ["step_000000014.npy"]
    batch = {"number": torch.tensor([3, 70])}
    maps.add_to(batch)
    assert not torch.equal(batch["map"], expected(images)[[3, 70]])
    processes.wait()
    if processes.first:
        shutil.rmtree(folder / "maps")
    again = opened()
    again.restore(folder / "checkpoints" / "step_000000009")
    again.add_to(batch)
    assert torch.equal(batch["map"], expected(images)[[3, 70]])


def make_maps_and_die(path: Path, place: str, number: int) -> None:
    """Maps of a process that is killed in the `number`-th call of a function."""
    calls = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    owners: dict[str, Any] = {"fsync": os, "replace": os, "rmtree": shutil}
    check = deadly(lambda: None) if place == "check" else lambda: None
    if place in owners:
        setattr(owners[place], place, deadly(getattr(owners[place], place)))
    make_maps(path, some_digits(), check=check)
