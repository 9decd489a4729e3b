"""Images below a folder, one subfolder a class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.data.decode import Crop, load_crop
from dtm_triton.train.data.names import Names
from dtm_triton.train.engine.checkpoint import FolderError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".npy")


class ImageFolder:
    """Images below a folder, one subfolder a class; a folder of images without subfolders is one class.

    What begins with a dot is left out; links are followed. classes: names of the classes, from the training images, so
    that held-out ones get the same labels.

    Raises FolderError when there is no such folder, when it or one of its classes holds no image, images lie beside the
    class folders, or a class is not among `classes`.
    """

    def __init__(self, config: DataConfig, folder: Path, classes: Sequence[str] | None = None) -> None:
        found = class_names(folder)
        self.classes = list(found if classes is None else classes)
        if found and not set(found) <= set(self.classes):
            raise FolderError(
                f"data folder {str(folder)!r} holds the class {sorted(set(found) - set(self.classes))[0]!r}, which the "
                "training images do not have"
            )
        labels: list[int] = []
        self.folder, self.config = os.fsencode(folder), config
        self.files = Names(self._list(found, labels))
        self.labels = torch.tensor(labels)
        self.shape = (config.channels, *config.image_size)
        self.num_classes = max(len(self.classes), 1)

    def _list(self, found: list[str], labels: list[int]) -> Iterator[bytes]:
        numbers = {name: number for number, name in enumerate(self.classes)}
        loose = sorted(entry.name for entry in os.scandir(self.folder) if _is_image(entry)) if found else []
        if loose:
            raise FolderError(
                f"data folder {os.fsdecode(self.folder)!r} holds the folder {found[0]!r}, a class, and beside it "
                f"{len(loose)} images of no class, {os.fsdecode(loose[0])!r} for one; move either elsewhere"
            )
        for name in found or [""]:
            place = os.path.join(self.folder, os.fsencode(name))
            before = len(labels)
            for path in sorted(_images_below(place, set())):
                labels.append(numbers.get(name, 0))
                yield path[len(os.path.join(self.folder, b"")) :]
            if len(labels) == before:
                shown = os.fsdecode(place.rstrip(b"/"))
                raise FolderError(f"data folder {shown!r} holds no images ({', '.join(SUFFIXES)})")

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.files.joined.tobytes() + self.files.ends.tobytes(), digest_size=8)
        return f"{len(self.files)} files, {digest.hexdigest()}"

    def name(self, number: int) -> str:
        return self.files.text(number)

    def read(self, number: int) -> bytes:
        """The bytes of a file."""
        with open(os.path.join(self.folder, self.files[number]), "rb", buffering=0) as file:
            return file.read()

    def load(self, number: int, seed: int | None) -> Crop:
        return load_crop(self.read(number), self.config, seed)


def class_names(folder: Path) -> list[str]:
    """The names of the class folders, sorted. Raises FolderError when there is no such folder."""
    if not folder.is_dir():
        raise FolderError(f"data folder {str(folder)!r} does not exist")
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images_below(place: bytes, seen: set[tuple[int, int]]) -> Iterator[bytes]:
    """Paths of images, in any order; a folder reached twice, by a link, counts once."""
    state = os.stat(place)
    if (state.st_dev, state.st_ino) in seen:
        return
    seen.add((state.st_dev, state.st_ino))
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, seen)
            elif _is_image(entry):
                yield entry.path


def _is_image(entry: os.DirEntry[bytes]) -> bool:
    hidden = entry.name.startswith(b".")
    return not hidden and os.fsdecode(entry.name).lower().endswith(SUFFIXES) and not entry.is_dir()
