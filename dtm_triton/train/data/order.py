"""Which images a step shows: pure functions of (seed, step), the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from dtm_triton.train.data.draws import fold

LANE = 64  # rows of the global batch that read the same shards
POOL = 4  # shards a lane reads at a time


class Order(Protocol):
    """The images of every row of every step."""

    def rows(self, step: int, first: int, count: int) -> list[int]:
        """Numbers of the images in the rows first .. first + count - 1 of a step's global batch."""


class ExactOrder:
    """Every epoch is a new permutation of the images; what does not fill a batch at its end is left out.

    >>> order = ExactOrder(count=10, batch_size=5, seed=0)
    >>> sorted(order.rows(0, 0, 5) + order.rows(1, 0, 5)), order.rows(1, 2, 3) == order.rows(1, 0, 5)[2:]
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], True)
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def rows(self, step: int, first: int, count: int) -> list[int]:
        epoch, place = divmod(step, self.count // self.batch_size)
        order = _permutation(self.count, fold(self.seed, "order", epoch))
        start = place * self.batch_size + first
        return order[start : start + count].tolist()


class ResampledOrder:
    """For slow or remote file systems: a few shards are read at a time, whole, instead of single images of all.

    Every 64 rows of the global batch are a lane, an endless row of pools. A pool is 4 shards drawn with replacement, a
    shard as likely as it is large; of each as many images as a shard holds on average (a smaller one starts over, a
    larger one gives a random part), shuffled together: every image is equally likely. So step s's rows of a lane have a
    known place in a known pool: no state, any number of processes and workers. An epoch is as many steps as in the
    exact order, but shows an image 0, 1, 2... times. Shards of images in random order, as `dtm-shard` writes them,
    lose little by it; shards of one class each do.

    ends: where every shard's images end, in ascending order; the last one is the number of images.
    announce: is told the numbers of the shards that will be read next.

    >>> order = ResampledOrder([50, 100, 200], batch_size=96, seed=0)
    >>> order.rows(7, 0, 96)[60:70] == order.rows(7, 60, 10)
    True
    """

    def __init__(
        self,
        ends: Sequence[int],
        batch_size: int,
        seed: int,
        announce: Callable[[list[int]], None] = lambda shards: None,
    ) -> None:
        self.ends, self.batch_size, self.seed, self.announce = np.asarray(ends), batch_size, seed, announce
        self.each = max(round(int(self.ends[-1]) / np.count_nonzero(np.diff(self.ends, prepend=0))), 1)
        self.shown = POOL * self.each
        self.open: dict[int, tuple[int, Tensor]] = {}  # the pool every lane was last seen in

    def rows(self, step: int, first: int, count: int) -> list[int]:
        numbers: list[int] = []
        row, last = first, first + count
        while row < last:
            lane, place = divmod(row, LANE)
            width = min(LANE, self.batch_size - lane * LANE)
            pool, start = divmod(step * width + place, self.shown)
            taken = min(width - place, self.shown - start, last - row)
            numbers += self._pool(lane, pool)[start : start + taken].tolist()
            row += taken
        return numbers

    def _pool(self, lane: int, pool: int) -> Tensor:
        """The images of a lane's pool in the order they are shown, [shown]."""
        known, images = self.open.get(lane, (-1, torch.empty(0)))
        if known != pool:
            generator = Generator().manual_seed(fold(self.seed, "pool", lane, pool))
            drawn = torch.randint(int(self.ends[-1]), (POOL,), generator=generator).numpy()
            shards = np.searchsorted(self.ends, drawn, side="right")
            self.announce(shards.tolist())
            parts = []
            for shard in shards:
                start = int(self.ends[shard - 1]) if shard else 0
                images = start + torch.randperm(int(self.ends[shard]) - start, generator=generator)
                parts.append(images.repeat(-(-self.each // len(images)))[: self.each])
            images = torch.cat(parts)[torch.randperm(self.shown, generator=generator)]
            self.open[lane] = pool, images
        return images


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=Generator().manual_seed(seed))
