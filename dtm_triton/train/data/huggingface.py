"""Images of a Hugging Face dataset that `save_to_disk` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.data.decode import Crop, ImageError, load_crop
from dtm_triton.train.engine.checkpoint import FolderError

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}


class HuggingFaceImages:
    """The first image column of a dataset and its labels: the first ClassLabel, or a column "label" of integers.

    A dictionary of splits gives "train", or the first of "test", "validation", "valid" and "val" it has. Without labels
    there is one class.

    Raises FolderError when there is no such folder or split, no images or no image column, and without `datasets`.
    """

    def __init__(self, config: DataConfig, folder: Path, part: str) -> None:
        self.config, self.shape = config, (config.channels, *config.image_size)
        rows = _open(folder, part)
        from datasets import ClassLabel, Image

        columns = rows.features
        column = next((name for name, kind in columns.items() if isinstance(kind, Image)), None)
        if column is None:
            raise FolderError(f"data folder {str(folder)!r} has no image column, only {', '.join(columns)}")
        if not len(rows):
            raise FolderError(f"data folder {str(folder)!r} holds no images")
        label = next((name for name, kind in columns.items() if isinstance(kind, ClassLabel)), None)
        label = label or ("label" if "label" in columns else None)
        values = rows.with_format("numpy")[label][:] if label else [0] * len(rows)
        self.labels = torch.as_tensor(values)
        if self.labels.is_floating_point() or self.labels.ndim != 1 or int(self.labels.min()) < 0:
            raise FolderError(f"data folder {str(folder)!r}: column {label!r} must hold numbers, 0 or more")
        self.labels = self.labels.long()
        names = columns[label].names if label and isinstance(columns[label], ClassLabel) else []
        self.classes: list[str] = names
        self.num_classes = max(len(names), int(self.labels.max()) + 1)
        self.column, self.made = column, rows._fingerprint
        self.rows = rows.select_columns([column]).cast_column(column, Image(decode=False)).with_format("arrow")

    @property
    def fingerprint(self) -> str:
        return f"{len(self.labels)} rows, {self.made}"

    def name(self, number: int) -> str:
        path = self._cell(number).get("path")
        return f"row {number}" + (f" ({path})" if path else "")

    def read(self, number: int) -> bytes:
        """The bytes of an image file. Raises OSError, ImageError."""
        cell = self._cell(number)
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if cell.get("path"):
            return Path(cell["path"]).read_bytes()
        raise ImageError("is empty")

    def load(self, number: int, seed: int | None) -> Crop:
        return load_crop(self.read(number), self.config, seed)

    def _cell(self, number: int) -> dict[str, Any]:
        return self.rows[number][self.column][0].as_py() or {}


def _open(folder: Path, part: str) -> Any:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise FolderError('data.source "huggingface" needs the package datasets: pip install datasets') from error
    try:
        found = load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise FolderError(f"data folder {str(folder)!r} holds nothing that save_to_disk wrote") from error
    if not isinstance(found, DatasetDict):
        return found
    split = next((name for name in SPLITS[part] if name in found), None)
    if split is None:
        raise FolderError(f"data folder {str(folder)!r} has no split {SPLITS[part][0]!r}, only {', '.join(found)}")
    return found[split]
