"""One small map of every training image, in one file that stays on the disk: a batch reads its own rows.

`.npy`, [count, h, w], uint8 or float16. The file is mapped into the training process alone, and read by no worker: the
system keeps what was read, once for all processes of a host, and gives the memory back when it is needed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtm_triton.train.engine.checkpoint import FolderError

PRECISIONS = ("uint8", "float16")


class MapStore:
    """A file of maps.

    Raises FolderError for a file that is missing, cut off, or holds anything else.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "maps.npy")
    >>> np.save(path, np.arange(8, dtype=np.uint8).reshape(2, 2, 2))
    >>> MapStore(path).rows(torch.tensor([1])).tolist()
    [[[4, 5], [6, 7]]]
    """

    def __init__(self, path: Path) -> None:
        try:
            mapped = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise FolderError(f"maps {str(path)!r} cannot be read: {error}") from error
        self.path, self.maps = path, np.asarray(mapped)
        self.precision = str(mapped.dtype)
        if mapped.ndim != 3 or self.precision not in PRECISIONS:
            raise FolderError(
                f"maps {str(path)!r} must be [count, h, w] of {' or '.join(PRECISIONS)}, got {mapped!r:.80}"
            )

    def rows(self, numbers: Tensor) -> Tensor:
        """The maps of the images with these numbers, int64 [b] on the CPU: a copy, [b, h, w] of the file's dtype."""
        return torch.from_numpy(self.maps[numbers.numpy()])

    def check(self, count: int, grid: tuple[int, int], precision: str) -> None:
        """Raise FolderError, naming what differs, when these are maps of another data set or configuration."""
        images, height, width = self.maps.shape
        found = {
            "images": (images, count),
            "grid (data.image_size, student.patch_size)": ((height, width), grid),
            "attention.precision": (self.precision, precision),
        }
        wrong = [f"{name}: {before} -> {after}" for name, (before, after) in found.items() if before != after]
        if wrong:
            raise FolderError(f"maps {str(self.path)!r} were made with another configuration ({'; '.join(wrong)})")
