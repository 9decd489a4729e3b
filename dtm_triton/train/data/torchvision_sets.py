"""torchvision's sets by name, from where they were downloaded to."""

from __future__ import annotations

import hashlib
import inspect
import io
from pathlib import Path
from typing import Any

import torch

from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.data.decode import Crop, ImageError, crop_pixels, load_crop, with_channels
from dtm_triton.train.engine.checkpoint import FolderError

SPLITS = {"train": ("train", "trainval", "train_noval"), "test": ("test", "val", "valid", "validation")}
LABELS = ("targets", "labels", "_labels", "y")


class TorchvisionImages:
    """A set of torchvision.datasets with one integer label an image.

    "train" and "test" become the set's `train=` or `split=` argument; a set without either has no held-out part.
    Nothing is downloaded.

    Raises FolderError when the set is not there, has no such split or no labels of this kind, or torchvision is not
    installed; ValueError when torchvision has no such set.
    """

    def __init__(self, config: DataConfig, folder: Path, part: str) -> None:
        self.config, self.shape = config, (config.channels, *config.image_size)
        self.rows = _open(config.name, folder, part)
        labels = next((getattr(self.rows, name) for name in LABELS if hasattr(self.rows, name)), None)
        try:
            self.labels = torch.as_tensor(labels).long()
        except (TypeError, ValueError, RuntimeError) as error:
            raise FolderError(f"torchvision's {config.name} has no list of integer labels") from error
        if self.labels.shape != (len(self.rows),) or not len(self.rows) or int(self.labels.min()) < 0:
            raise FolderError(f"torchvision's {config.name} in {str(folder)!r} must have one label for each image")
        classes = [str(name) for name in getattr(self.rows, "classes", [])]
        self.num_classes = max(len(classes), int(self.labels.max()) + 1)
        self.classes = classes
        if hasattr(self.rows, "loader"):  # sets of files: hand over the file, to be decoded as everywhere else
            self.rows.loader = _read_file

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=8).hexdigest()
        return f"{len(self.labels)} images of {self.config.name}, {digest}"

    def name(self, number: int) -> str:
        return f"{self.config.name} {number}"

    def read(self, number: int) -> bytes:
        """The bytes of an image file; what the set decodes itself comes as PNG."""
        image = self._image(number)
        if isinstance(image, bytes):
            return image
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def load(self, number: int, seed: int | None) -> Crop:
        import numpy as np

        image = self._image(number)
        if isinstance(image, bytes):
            return load_crop(image, self.config, seed)
        pixels = np.array(with_channels(image, self.config.channels))
        return crop_pixels(pixels if pixels.ndim == 3 else pixels[..., None], self.config, seed)

    def _image(self, number: int) -> Any:
        """A file's bytes, or a picture of Pillow's."""
        try:
            return self.rows[number][0]
        except OSError:
            raise
        except Exception as error:  # sets raise whatever their decoders raise
            raise ImageError(f"cannot be decoded: {error}") from error


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def _open(name: str, folder: Path, part: str) -> Any:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise FolderError('data.source "torchvision" needs the package torchvision') from error
    kind: Any = getattr(torchvision.datasets, name, None)
    known_set = inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)
    if not known_set:
        raise ValueError(f"data.name must be a set of torchvision.datasets, got {name!r}")
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"download": False} if "download" in known else {}
    if "train" in known:
        options["train"] = part == "train"
    if part == "test" and not {"train", "split"} & set(known):
        raise FolderError(f"data.test_folder must be None: torchvision's {name} has no held-out part")
    splits = SPLITS[part] if "split" in known else ("",)
    for split in splits:
        try:
            return kind(str(folder), **options, **({"split": split} if split else {}))
        except ValueError:  # a split that the set does not know
            continue
        except (RuntimeError, OSError) as error:
            raise FolderError(f"torchvision's {name} is not in {str(folder)!r}: {error}") from error
    raise FolderError(f"torchvision's {name} has none of the splits {', '.join(splits)}")
