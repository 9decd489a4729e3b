"""Maps on their way into one file: in parts that are complete or not there, so that a kill at any moment costs little.

Chunk 3 of `maps.npy` is `maps.npy.unfinished/000003.npy`. How many images a chunk has depends on the number of all
images alone: any number of processes writes the same chunks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from dtm_triton.train.engine.checkpoint import FolderError, checksum_of, write_atomically, write_text
from dtm_triton.train.maps.store import MapStore

BATCH = 128  # images that a network sees at once
CHUNKS = 64  # at least, where there are as many batches
LARGEST = 8  # batches of a chunk: when a run is stopped, what was computed of a chunk is lost


class Chunks:
    """The parts of one file of maps, and where they are kept until all are there."""

    def __init__(self, path: Path, count: int, grid: tuple[int, int], dtype: str) -> None:
        self.path, self.count, self.grid, self.dtype = path, count, grid, np.dtype(dtype)
        self.folder = path.with_name(path.name + ".unfinished")
        self.batch = min(BATCH, count)
        self.calls = min(max(-(-count // self.batch) // CHUNKS, 1), LARGEST)
        """Forward calls for a chunk, the last one too."""
        self.size = self.batch * self.calls
        self.numbers = range(-(-count // self.size))

    def images(self, chunk: int) -> range:
        """The numbers of a chunk's images."""
        return range(chunk * self.size, min((chunk + 1) * self.size, self.count))

    def batches(self, chunk: int | None) -> list[range]:
        """Those of every batch with images in it; nobody's chunk (None) has none."""
        if chunk is None:
            return []
        images = self.images(chunk)
        return [images[first : first + self.batch] for first in range(0, len(images), self.batch)]

    def begin(self, go_on: bool) -> list[int] | None:
        """The numbers of the chunks that are missing; None when the whole file is there. Raises FolderError."""
        done = go_on and _holds(self.path, (self.count, *self.grid), self.dtype) and _is_what_it_was(self.path)
        try:
            if (done or not go_on) and self.folder.exists():
                shutil.rmtree(self.folder)
            if done:
                return None
            for path in (self.path, checksum_path(self.path)):
                path.unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            # asked for by name, a network file system might remember for a while that a chunk is not there
            names = set(os.listdir(self.folder))
        except OSError as error:
            raise FolderError(f"attention maps cannot be written: {error}") from error
        return [chunk for chunk in self.numbers if self._file(chunk).name not in names or not self._there(chunk)]

    def write(self, chunk: int, maps: Tensor) -> None:
        """Keep the first rows of weights [n, N]; the others fill up."""
        rows = maps[: len(self.images(chunk))].unflatten(1, self.grid)
        scaled = rows.mul(255).round() if self.dtype == np.uint8 else rows
        write_atomically(self._file(chunk), lambda file: np.save(file, scaled.numpy().astype(self.dtype)))

    def join(self, most_unread: int) -> int:
        """Make the file of all chunks; returns the number of maps that are zero: those of unreadable images.

        Raises FolderError when not all chunks are there, and when more than `most_unread` maps are zero: then the
        chunks are removed, and the next start begins anew.
        """
        if not all(map(self._there, self.numbers)):
            raise FolderError(
                f"not all processes write to {str(self.folder)!r}: run.folder must be shared by all hosts"
            )
        unread = sum(int((np.load(self._file(chunk)).max((1, 2)) == 0).sum()) for chunk in self.numbers)
        if unread > most_unread:
            shutil.rmtree(self.folder)
            raise FolderError(
                f"{unread} of {self.count} images cannot be read for attention maps, more than the {most_unread} that "
                "data.max_corrupt allows"
            )
        shape = {"shape": (self.count, *self.grid), "fortran_order": False}

        def write(file: BinaryIO) -> None:
            np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(self.dtype), **shape})
            for chunk in self.numbers:
                file.write(np.load(self._file(chunk)).tobytes())

        try:
            write_atomically(self.path, write)
            write_text(checksum_path(self.path), str(checksum_of(self.path)))
            shutil.rmtree(self.folder)
        except OSError as error:
            raise FolderError(f"attention maps cannot be written: {error}") from error
        return unread

    def _file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.npy"

    def _there(self, chunk: int) -> bool:
        return _holds(self._file(chunk), (len(self.images(chunk)), *self.grid), self.dtype)


def checksum_path(path: Path) -> Path:
    """Where the checksum of a finished file lies: without it, or with another one, the file is made again."""
    return path.with_suffix(".crc")


def _is_what_it_was(path: Path) -> bool:
    try:
        return checksum_path(path).read_text().strip() == str(checksum_of(path))
    except OSError:
        return False


def _holds(path: Path, shape: tuple[int, int, int], dtype: np.dtype) -> bool:
    """Whether a file holds maps of this shape and type."""
    try:
        maps = MapStore(path).maps
    except FolderError:
        return False
    return maps.shape == shape and maps.dtype == dtype
