"""Micro-batches as pure functions of their number: the order of the data, crops, flips and masks need no loader state.

Shapes: images uint8 [b, C, H, W], labels int64 [b], flip bool [b], jitter float [b, 3], mask bool [b, N]. A step's
global batch is the same for any number of processes and micro-batches; each takes its part of the rows.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from dtm_triton.train.config import DataConfig, RunConfig
from dtm_triton.train.data.draws import Draw, draw_images, fold
from dtm_triton.train.data.images import Images
from dtm_triton.train.engine.distributed import Processes

Batch = dict[str, Tensor]
GRACE = 10  # seconds that a worker lives on after SIGTERM


class MicroBatches(Dataset[Batch]):
    """Training data: item number `step * accumulate + m` is this process's micro-batch m of that step.

    Args:
        images: where they come from.
        data, run: the configuration; `run.batch_size` rows make a step's global batch, over epochs that are each a new
            permutation of the images. What does not fill a batch at an epoch's end is left out.
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

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.run.accumulate)
        first = (micro * self.processes.count + self.processes.rank) * self.size
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(len(self.images.labels), fold(self.run.seed, "order", epoch))
        start = place * self.run.batch_size + first
        chosen = order[start : start + self.size].tolist()
        crops = [fold(self.run.seed, "crop", step, first + row) for row in range(self.size)]
        batch = {
            "images": torch.stack([self.images.load(i, crop) for i, crop in zip(chosen, crops, strict=True)]),
            "labels": torch.tensor([self.images.labels[i] for i in chosen]),
        }
        for name, draw in self.draws.items():
            batch[name] = draw_images(draw, self.run.seed, name, step, first, self.size)
        return batch


class EvaluationBatches(Dataset[tuple[Tensor, Tensor]]):
    """This process's share of the images, cropped as for evaluation: floats in 0..1 and labels, in batches.

    limit: with more images than this, so many spread evenly over all.
    """

    def __init__(self, images: Images, batch_size: int, processes: Processes, limit: int | None = None) -> None:
        self.images, self.batch_size = images, batch_size
        count = len(images.labels)
        chosen = min(count, limit or count)
        self.mine = [i * count // chosen for i in range(processes.rank, chosen, processes.count)]

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        chosen = self.mine[number * self.batch_size : (number + 1) * self.batch_size]
        pixels = torch.stack([self.images.load(i, None) for i in chosen])
        return pixels.float() / 255, torch.tensor([self.images.labels[i] for i in chosen])


@contextmanager
def training_loader(batches: MicroBatches, start: int, end: int, workers: int, pin: bool) -> Iterator[Iterator[Batch]]:
    """Micro-batches of the steps start .. end - 1, decoded ahead by worker processes when there are any."""
    numbers = range(start * batches.run.accumulate, end * batches.run.accumulate)
    iterator = iter(_loader(batches, numbers, workers, pin))
    try:
        yield iterator
    finally:
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # now, not when the last traceback that holds the iterator is gone


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
        generator=Generator(),  # its own: the loader must not draw from the global one
    )


def _outlive_signals(_: int) -> None:
    """Ctrl-C and SIGTERM may reach every process of a group; the training process needs its workers to stop well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=Generator().manual_seed(seed))


def _flips(count: int, *, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5


class _Jitter:
    """Factors of brightness, contrast and saturation [count, 3]; a class, so that workers can be sent one."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, count: int, *, generator: Generator) -> Tensor:
        return 1 + self.strength * (2 * torch.rand(count, 3, generator=generator) - 1)
