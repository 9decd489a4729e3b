"""The attention maps that a run has: made when they are due, kept in RUN/maps/ and with every checkpoint."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dtm_triton.train.config.attention import AttentionConfig
from dtm_triton.train.data.batches import Batch
from dtm_triton.train.data.images import Images
from dtm_triton.train.engine.checkpoint import MAPS, FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.maps.chunks import checksum_path
from dtm_triton.train.maps.refresh import refresh_maps
from dtm_triton.train.maps.store import MapStore


class RunMaps:
    """Maps of a run's training images: RUN/maps/step_000000123.npy, one file at a time; none before the first are due.

    Args:
        config: when they are made, and how they are kept.
        images: the training images.
        grid: rows and columns of patches.
        folder: the run's.
        processes: all of them call `refresh` and `restore`.
        workers: processes that decode.
        most_unread: images that may be unreadable.
    """

    def __init__(
        self,
        config: AttentionConfig,
        images: Images,
        grid: tuple[int, int],
        folder: Path,
        processes: Processes,
        workers: int,
        most_unread: int,
    ) -> None:
        self.config, self.images, self.grid, self.workers = config, images, grid, workers
        self.most_unread = most_unread
        self.folder, self.processes = folder / "maps", processes
        self.store: MapStore | None = None

    @property
    def path(self) -> Path | None:
        """The file of the maps in use, which nobody changes; None when there are none yet."""
        return None if self.store is None else self.store.path

    def due(self, epoch: int) -> bool:
        """Whether maps are to be made when `epoch` epochs are done."""
        return self.config.due(epoch)

    def refresh(
        self,
        step: int,
        attend: Callable[[Tensor], Tensor],
        check: Callable[[], None],
        say: Callable[[str], None],
        go_on: bool,
    ) -> None:
        """Make the maps of this step and use them from now on; the ones before are removed. See `refresh_maps`.

        Checkpoints that hold the maps before must be complete.
        """
        path = self.folder / f"step_{step:09d}.npy"
        refresh_maps(
            path,
            attend,
            images=self.images,
            grid=self.grid,
            dtype=self.config.precision,
            workers=self.workers,
            most_unread=self.most_unread,
            processes=self.processes,
            go_on=go_on,
            check=check,
            say=say,
        )
        self.store = self._open(path)
        self.processes.wait()  # all have opened the new ones
        if self.processes.first:
            for other in self.folder.iterdir():
                if other not in (path, checksum_path(path)):
                    shutil.rmtree(other) if other.is_dir() else other.unlink()

    def restore(self, checkpoint: Path) -> None:
        """Use the maps that a checkpoint was made with.

        Raises FolderError for maps that cannot be read, or belong to another configuration.
        """
        path = self.processes.from_first(lambda: self._take(checkpoint), FolderError)
        self.store = None if path is None else self._open(path)

    def add_to(self, batch: Batch) -> None:
        """Put the "map" [b, h, w] of every image beside its "number", on the CPU, when there are maps."""
        if self.store is not None:
            rows = self.store.rows(batch["number"])
            batch["map"] = rows.pin_memory() if batch["number"].is_pinned() else rows

    def _take(self, checkpoint: Path) -> Path | None:
        """A checkpoint's maps among the run's: they outlive the checkpoint there. None when it has none."""
        kept = checkpoint / MAPS
        if not kept.exists():
            return None
        self._open(kept)
        try:
            for path in self.folder.glob("*.npy"):
                if filecmp.cmp(path, kept, shallow=False):
                    return path
            self.folder.mkdir(parents=True, exist_ok=True)
            # not step_...: the name of a step tells that its maps were made, these are of an earlier one
            path = self.folder / f"of_{checkpoint.name}.npy"
            path.unlink(missing_ok=True)
            shutil.copyfile(kept, path)
        except OSError as error:
            raise FolderError(f"maps {str(kept)!r} cannot be taken into {str(self.folder)!r}: {error}") from error
        return path

    def _open(self, path: Path) -> MapStore:
        store = MapStore(path)
        store.check(len(self.images.labels), self.grid, self.config.precision)
        return store
