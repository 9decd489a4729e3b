"""Micro-batches as pure functions of their number: the order of the data, crops, flips and masks need no loader state.

Shapes: images uint8 [b, C, H, W] (in memory [b, H, W, C]), number int64 [b] of the image that is shown, place float64
[b, 4] (see `Crop`), labels int64 [b], flip bool [b], jitter float [b, 3], skipped int64 [b], and an entry for every
further draw. A step's global batch is the same for any number of processes and micro-batches; each takes its part of
the rows.

An image that cannot be read is replaced by another one, chosen by its place alone; "skipped" holds its number, and -1
in all other rows.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dtm_triton.train.config import DataConfig, RunConfig
from dtm_triton.train.data.draws import Draw, draw_images, fold
from dtm_triton.train.data.images import Crop, ImageError, Images
from dtm_triton.train.data.order import ExactOrder, Order, ResampledOrder
from dtm_triton.train.data.shards import ShardImages
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes

Batch = dict[str, Tensor]
Item = TypeVar("Item")
TRIES = 16  # images in place of one that cannot be read


class MicroBatches(Dataset[Batch]):
    """Training data: item number `step * accumulate + m` is this process's micro-batch m of that step.

    Args:
        images: where they come from.
        data, run: the configuration; `run.batch_size` rows make a step's global batch, in the order of
            `ExactOrder` or `ResampledOrder`.
        draws: further random numbers for every image, by their name in the batch: masks for example.

    Raises ValueError when the global batch cannot be divided, or is larger than the data.
    """

    def __init__(
        self, images: Images, data: DataConfig, run: RunConfig, processes: Processes, draws: Mapping[str, Draw]
    ) -> None:
        parts = run.accumulate * processes.count
        if run.batch_size % parts:
            raise ValueError(
                f"run.batch_size must be a multiple of run.accumulate x processes, {run.accumulate} x "
                f"{processes.count}, got {run.batch_size}"
            )
        if run.batch_size > len(images.labels):
            raise ValueError(f"run.batch_size must be at most the {len(images.labels)} images, got {run.batch_size}")
        self.images, self.run, self.processes = images, run, processes
        self.draws: dict[str, Draw] = dict(draws)
        if data.flip:
            self.draws["flip"] = _flips
        if data.colour_jitter:
            self.draws["jitter"] = _Jitter(data.colour_jitter)
        self.steps_per_epoch = len(images.labels) // run.batch_size
        self.size = run.batch_size // parts
        self.order: Order = ExactOrder(len(images.labels), run.batch_size, run.seed)
        if data.order == "resampled":
            assert isinstance(images, ShardImages)
            self.order = ResampledOrder(images.ends, run.batch_size, run.seed, images.announce)

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.run.accumulate)
        return self.rows(step, (micro * self.processes.count + self.processes.rank) * self.size, self.size)

    def rows(self, step: int, first: int, count: int) -> Batch:
        """The rows first .. first + count - 1 of a step's global batch."""
        wanted = self.order.rows(step, first, count)
        found = [self._load(number, step, first + row) for row, number in enumerate(wanted)]
        shown = torch.tensor([number for number, _ in found])
        asked = torch.tensor(wanted)
        batch = {
            "images": _stack([crop.image for _, crop in found]),
            "number": shown,
            "place": torch.tensor([crop.place for _, crop in found], dtype=torch.float64),
            "labels": self.images.labels[shown],
            "skipped": torch.where(shown == asked, -1, asked),
        }
        for name, draw in self.draws.items():
            batch[name] = draw_images(draw, self.run.seed, name, step, first, count)
        return batch

    def _load(self, number: int, step: int, row: int) -> tuple[int, Crop]:
        """A number and its crop: the one asked for, or the first readable one of those that take its place."""
        crop = fold(self.run.seed, "crop", step, row)
        tried = number
        for attempt in range(TRIES + 1):
            try:
                return tried, self.images.load(tried, crop)
            except (ImageError, OSError) as error:
                reason = f"{self.images.name(tried)!r} {error}"
            others = len(self.images.labels) - 1  # never the same again, so that it is noticed
            step_on = 1 + fold(self.run.seed, "substitute", step, row, attempt) % max(others, 1)
            tried = (number + step_on) % len(self.images.labels)
        raise FolderError(f"data: {TRIES + 1} images in a row cannot be read, the last one: {reason}")


class EvaluationBatches(Dataset[tuple[Tensor, Tensor]]):
    """This process's share of the images, cropped as for evaluation: floats in 0..1 and labels, in batches.

    All processes have as many batches, of as many rows, so that they can compute together: rows that fill up, and
    images that cannot be read, are black and have the label -1.

    limit: with more images than this, so many spread evenly over all.
    """

    def __init__(self, images: Images, batch_size: int, processes: Processes, limit: int | None = None) -> None:
        self.images, self.batch_size = images, batch_size
        count = len(images.labels)
        chosen = min(count, limit or count)
        self.mine = [i * count // chosen for i in range(processes.rank, chosen, processes.count)]
        self.rows = -(-chosen // processes.count)

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        first = number * self.batch_size
        count = min(self.batch_size, self.rows - first)
        mine = self.mine[first : first + count]
        pixels, read = load_rows(self.images, mine, None, count)
        labels = torch.full((count,), -1)
        labels[read] = self.images.labels[mine][read[: len(mine)]]
        return pixels.float() / 255, labels


def load_rows(images: Images, numbers: Sequence[int], seed: int | None, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` images, uint8 [count, C, H, W], and which rows show one, bool [count].

    Rows that fill up, and images that cannot be read, are black. seed: see `Images.load`.
    """
    pixels = [torch.zeros(images.shape, dtype=torch.uint8)] * count
    read = torch.zeros(count, dtype=torch.bool)
    for row, number in enumerate(numbers):
        with suppress(ImageError, OSError):
            pixels[row] = images.load(number, seed).image
            read[row] = True
    return _stack(pixels), read


def training_loader(
    batches: MicroBatches, start: int, end: int, workers: int, pin: bool
) -> AbstractContextManager[Iterator[Batch]]:
    """Micro-batches of the steps start .. end - 1, decoded ahead by worker processes when there are any."""
    numbers = range(start * batches.run.accumulate, end * batches.run.accumulate)
    return open_loader(batches, numbers, workers, pin)


@contextmanager
def open_loader(dataset: Dataset[Item], numbers: range, workers: int, pin: bool = False) -> Iterator[Iterator[Item]]:
    """The items of a dataset with these numbers, in order, once; the workers end with the context."""
    iterator = iter(_loader(dataset, numbers, workers, pin))
    try:
        yield iterator
    finally:
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # now, not when the last traceback that holds the iterator is gone
            for worker in iterator._workers:  # type: ignore[attr-defined]
                worker.kill()  # one that still reads, from a file system that hangs for example: nobody waits for it


def evaluation_loader(batches: EvaluationBatches, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """All batches in order."""
    return _loader(batches, range(len(batches)), workers, pin=False)


def _loader(dataset: Dataset, numbers: range, workers: int, pin: bool) -> DataLoader:  # type: ignore[type-arg]
    # one pass over all steps: the workers live as long as the run, and nothing restarts between epochs
    return DataLoader(
        dataset,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_outlive_signals,
        # forked by this process itself: a fork server, the default since Python 3.14, would die of the group's SIGTERM
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=Generator(),  # its own: the loader must not draw from the global one
    )


def _outlive_signals(_: int) -> None:
    """Ctrl-C and SIGTERM may reach every process of a group; the training process needs its workers to stop well.

    They end when it tells them to, and within five seconds of its death: the DataLoader's workers look for that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stack(images: list[Tensor]) -> Tensor:
    """Images [C, H, W] as one tensor [b, C, H, W] that lies in memory as [b, H, W, C], as decoders give them."""
    rows = [image.movedim(0, -1) for image in images]
    together = None
    if get_worker_info() is not None:  # at once into the memory that the other process reads, as default_collate does
        shared = rows[0]._typed_storage()._new_shared(len(rows) * rows[0].numel())
        together = rows[0].new(shared).resize_(len(rows), *rows[0].shape)  # type: ignore[call-arg]
    return torch.stack(rows, out=together).movedim(-1, 1)


def _flips(count: int, *, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5


class _Jitter:
    """Factors of brightness, contrast and saturation [count, 3]; a class, so that workers can be sent one."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, count: int, *, generator: Generator) -> Tensor:
        return 1 + self.strength * (2 * torch.rand(count, 3, generator=generator) - 1)
