"""Images in tar files: WebDataset's shards, those of `dtm-shard`, and tars of class folders; read at any place.

A sample is what shares a name up to its first dot: an image and, if there is one, its label in a `.cls` file (a number)
or a `.json` file (its "label" or "cls"). Without labels the folder inside the tar is the class; without folders there
is one class. A shard's headers are read once for the places of its images; these are kept in `.dtm-index.npz` beside
the shards, or in memory where that cannot be written, and are read again when a shard's size or time changes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.data.decode import Crop, load_crop
from dtm_triton.train.data.folder import SUFFIXES
from dtm_triton.train.data.names import Names
from dtm_triton.train.data.shard_index import open_index
from dtm_triton.train.engine.checkpoint import FolderError

MANIFEST = "manifest.json"
OPEN_FILES = 64


class ShardImages:
    """Images in all the tar files of a folder, in the order of the files' names and of the images in them.

    ends: int64 [shards], where every shard's images end.

    Raises FolderError when there are no tar files, one is compressed or cut off or is not what the manifest beside it
    says, when there are no images, or only some have a label.
    """

    def __init__(self, config: DataConfig, folder: Path) -> None:
        if not folder.is_dir():
            raise FolderError(f"data folder {str(folder)!r} does not exist")
        self.paths = sorted(folder.glob("*.tar"))
        if not self.paths:
            compressed = ", compressed ones must be unpacked" if any(folder.glob("*.tar.*")) else ""
            raise FolderError(f"data folder {str(folder)!r} holds no .tar files{compressed}")
        self.config, self.shape = config, (config.channels, *config.image_size)
        index = open_index(folder, self.paths)
        self.ends, self.offsets, self.sizes = index["ends"], index["offsets"], index["sizes"]
        self.names = Names.of(index["names"], index["name_ends"])
        if not len(self.names):
            raise FolderError(f"data folder {str(folder)!r} holds shards without images ({', '.join(SUFFIXES)})")
        self.labels = torch.from_numpy(index["labels"])
        told = _read_manifest(folder, self.paths, len(self.names))
        self.classes: list[str] = json.loads(str(index["classes"])) or told
        self.folder, self.num_classes = folder, max(len(self.classes), int(self.labels.max()) + 1)
        self.files: OrderedDict[int, io.FileIO] = OrderedDict()  # open ones

    def use_classes(self, classes: Sequence[str]) -> None:
        """Number the classes as the training images do. Raises FolderError for a class that is not among `classes`."""
        if not (classes and self.classes):
            return  # numbers alone: they are taken as they are
        for name in self.classes:
            if name not in classes:
                raise FolderError(
                    f"data folder {str(self.folder)!r} holds the class {name!r}, the training images do not"
                )
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = torch.tensor([numbers[name] for name in self.classes])[self.labels]
        self.classes, self.num_classes = list(classes), len(classes)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.names.joined, self.names.ends, self.sizes, self.labels.numpy()):
            digest.update(part.tobytes())
        return f"{len(self.names)} images in shards, {digest.hexdigest()}"

    def name(self, number: int) -> str:
        return f"{self.paths[self._shard(number)].name}/{self.names.text(number)}"

    def read(self, number: int) -> bytes:
        """The bytes of an image file. Raises OSError."""
        file = self._open(self._shard(number)).fileno()
        size, offset = int(self.sizes[number]), int(self.offsets[number])
        data = os.pread(file, size, offset)
        while len(data) < size:  # one read gives 2 GB at most, and network file systems may give less
            more = os.pread(file, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"ends {size - len(data)} bytes too early")
            data += more
        return data

    def load(self, number: int, seed: int | None) -> Crop:
        return load_crop(self.read(number), self.config, seed)

    def announce(self, shards: list[int]) -> None:
        """Have the system read whole shards ahead, from their beginning to their end."""
        if hasattr(os, "posix_fadvise"):
            for shard in shards:
                os.posix_fadvise(self._open(shard).fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _shard(self, number: int) -> int:
        return int(np.searchsorted(self.ends, number, side="right"))

    def _open(self, shard: int) -> io.FileIO:
        """A shard, open; pread moves no position, so processes that share it do not disturb each other."""
        file = self.files.pop(shard, None) or io.FileIO(self.paths[shard])
        self.files[shard] = file  # now the latest
        if len(self.files) > OPEN_FILES:
            self.files.popitem(last=False)[1].close()
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": OrderedDict()}


def _read_manifest(folder: Path, paths: list[Path], images: int) -> list[str]:
    """The classes that the manifest of `dtm-shard` names, none without one. Raises FolderError for other shards."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        told = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
        total, classes = manifest["images"], manifest["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # none, or another program's
    found = {path.name: path.stat().st_size for path in paths}
    wrong = sorted(name for name in {**told, **found} if told.get(name) != found.get(name))
    if wrong or total != images:
        what = ", ".join(wrong[:3]) or f"{images} images"
        raise FolderError(f"data folder {str(folder)!r} does not hold what its {MANIFEST} says: {what}")
    return classes
