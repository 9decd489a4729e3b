"""Random numbers as pure functions of what they are for: a resumed run draws what the undisturbed one would have.

Nothing here has a state. Every draw starts from a seed folded from the run's seed, its purpose and its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Draw = Callable[..., Tensor]
"""draw(count, generator=...) -> [count, ...]: random numbers for `count` images."""

BLOCK = 64  # images that share a generator


def fold(seed: int, *purpose: str | int) -> int:
    """A seed in 0..2^63-1 that depends on all arguments.

    >>> fold(0, "masks", 1) == fold(0, "masks", 1), fold(0, "masks", 1) == fold(0, "masks", 2)
    (True, False)
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_images(draw: Draw, seed: int, purpose: str, step: int, first: int, count: int) -> Tensor:
    """What `draw` gives the images first .. first + count - 1 of a step's global batch: [count, ...].

    An image gets the same whatever the number of processes and micro-batches: the global batch is drawn in blocks of 64
    images, each from a generator of its own, and only the blocks asked for are drawn.

    >>> whole = draw_images(torch.rand, 0, "flip", 3, 0, 200)
    >>> bool((draw_images(torch.rand, 0, "flip", 3, 50, 100) == whole[50:150]).all())
    True
    """
    blocks = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
    drawn = [draw(BLOCK, generator=Generator().manual_seed(fold(seed, purpose, step, block))) for block in blocks]
    start = first - blocks.start * BLOCK
    return torch.cat(drawn)[start : start + count]
