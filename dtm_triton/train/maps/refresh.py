"""Attention maps of all training images made anew, by all processes together; a kill at any moment costs little.

Images are shown whole, in chunks (see `Chunks`): every process takes the next missing one. Processes with nothing left
to do compute black images, so that networks that are sharded over the processes work. All forward calls have one shape:
an image's map does not depend on the number of processes, or on where the work was taken up again.

Every map is scaled so that its largest weight is 1: only ratios within a map matter, 8 bits then serve any statistic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dtm_triton.train.data.batches import load_rows, open_loader
from dtm_triton.train.data.images import WHOLE, Images
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.maps.chunks import Chunks

PATIENCE = 30.0  # seconds between words of progress


def refresh_maps(
    path: Path,
    attend: Callable[[Tensor], Tensor],
    *,
    images: Images,
    grid: tuple[int, int],
    dtype: str,
    workers: int,
    most_unread: int,
    processes: Processes,
    go_on: bool,
    check: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Write the maps of all images to `path`; see `MapStore`. All processes call it.

    Args:
        path: the file, which is there when it is whole.
        attend: images, floats in 0..1 [b, C, H, W] on the processes' device -> weights of their patches [b, N].
        images: an image that cannot be read gets zeros.
        grid: rows and columns of patches, N together.
        dtype: "uint8" or "float16".
        workers: processes that decode.
        most_unread: images that may be unreadable; more end the work.
        go_on: continue what an earlier call left, or take what it finished, instead of removing it.
        check: called between chunks, in all processes equally often; what it raises ends the work.
        say: told the progress, in the first process.

    Raises FolderError when files cannot be written or are not seen by all processes, and for too many unreadable
    images; ValueError for weights of another shape.
    """
    chunks = Chunks(path, len(images.labels), grid, dtype)
    missing = processes.from_first(lambda: chunks.begin(go_on), FolderError)
    if missing is None:
        return
    began = said = time.monotonic()
    mine = missing[processes.rank :: processes.count]
    batches = WholeBatches(images, [numbers for chunk in mine for numbers in chunks.batches(chunk)], chunks.batch)
    with open_loader(batches, range(len(batches)), workers if mine else 0) as incoming:
        for turn in range(-(-len(missing) // processes.count)):
            check()
            chunk = mine[turn] if turn < len(mine) else None
            maps = _attend_chunk(attend, incoming, len(chunks.batches(chunk)), chunks, images.shape, processes.device)
            if chunk is not None:
                chunks.write(chunk, maps)
            if processes.first and time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                left = sum(len(chunks.images(chunk)) for chunk in missing[(turn + 1) * processes.count :])
                say(f"attention maps: {chunks.count - left:,} of {chunks.count:,} images")
    processes.wait()
    unread = processes.from_first(lambda: chunks.join(most_unread), FolderError)
    if processes.first:
        text = f"attention maps of {chunks.count:,} images made in {time.monotonic() - began:.0f} s"
        say(text + (f"; {unread:,} cannot be read, their maps are empty" if unread else ""))


class WholeBatches(Dataset[tuple[Tensor, Tensor]]):
    """Whole images, squeezed to the size of crops: uint8 [size, C, H, W], and which rows show one, bool [size].

    batches: the images' numbers.
    """

    def __init__(self, images: Images, batches: list[range], size: int) -> None:
        self.images, self.batches, self.size = images, batches, size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return load_rows(self.images, self.batches[number], WHOLE, self.size)


def _attend_chunk(
    attend: Callable[[Tensor], Tensor],
    incoming: Iterator[tuple[Tensor, Tensor]],
    full: int,
    chunks: Chunks,
    shape: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """Weights of a chunk's patches, float32 [size, N] on the CPU: `full` batches of images, then black ones."""
    black = torch.zeros(chunks.batch, *shape, dtype=torch.uint8), torch.zeros(chunks.batch, dtype=torch.bool)
    parts, shown = [], []
    for call in range(chunks.calls):
        pixels, read = next(incoming) if call < full else black
        floats = pixels.to(device).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        with torch.no_grad():
            parts.append(attend(floats).float())
        shown.append(read)
        wanted = [chunks.batch, chunks.grid[0] * chunks.grid[1]]
        if list(parts[-1].shape) != wanted:
            raise ValueError(f"attend must give {wanted} weights, got {list(parts[-1].shape)}")
    return _scaled(torch.cat(parts).cpu()) * torch.cat(shown)[:, None]


def _scaled(maps: Tensor) -> Tensor:
    """Maps [n, N] with a largest weight of 1; what is not finite, or below zero, is zero; of zeros alone, all ones."""
    maps = maps.nan_to_num(0, 0, 0).clamp_(min=0)
    largest = maps.amax(1, keepdim=True)
    return torch.where(largest > 0, maps / largest, 1.0)
