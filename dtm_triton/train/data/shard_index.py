"""Where the images of a shard lie: read once from its tar headers, kept beside the shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dtm_triton.train.data.folder import SUFFIXES
from dtm_triton.train.data.names import Names
from dtm_triton.train.engine.checkpoint import FolderError, write_atomically

INDEX = ".dtm-index.npz"
NO_LABEL = -1
Index = dict[str, Any]
"""ends [shards]; offsets, sizes, labels [images]; names and name_ends as in Names; classes, JSON; state, JSON."""


def open_index(folder: Path, paths: list[Path]) -> Index:
    """The index of the shards as they are: the kept one, or a new one, which is kept where the folder can be written.

    Raises FolderError for a shard that cannot be read, or images of which only some have a label.
    """
    state = json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
    with suppress(Exception):  # whatever numpy raises for bytes that are no index
        with np.load(folder / INDEX, allow_pickle=False) as file:
            index = dict(file)
        if str(index["state"]) == state:
            return index
    index = _make_index(paths) | {"state": np.array(state)}
    buffer = io.BytesIO()
    np.savez(buffer, **index)
    with suppress(OSError):  # a folder that cannot be written
        write_atomically(folder / INDEX, lambda file: file.write(buffer.getbuffer()))
    return index


def _make_index(paths: list[Path]) -> Index:
    offsets, sizes, labels, ends = array("q"), array("q"), array("q"), array("q")

    def found() -> Iterator[bytes]:
        for path in paths:
            for name, offset, size, label in images_of(path):
                offsets.append(offset)
                sizes.append(size)
                labels.append(label)
                yield name
            ends.append(len(offsets))

    names = Names(found())
    numbers = np.array(labels, dtype=np.int64)
    classes: list[str] = []
    if (numbers == NO_LABEL).all():
        folders = [os.path.basename(os.path.dirname(names[number])) for number in range(len(names))]
        unique, numbers = np.unique(np.array(folders, dtype=object), return_inverse=True)
        classes = [name.decode("utf-8", "backslashreplace") for name in unique]
    elif (numbers == NO_LABEL).any():
        bare = int(np.flatnonzero(numbers == NO_LABEL)[0])
        path = paths[int(np.searchsorted(np.array(ends), bare, side="right"))]
        raise FolderError(f"shard {str(path)!r}: {names.text(bare)!r} has no label, other images have one")
    return {
        "ends": np.array(ends, dtype=np.int64),
        "offsets": np.array(offsets, dtype=np.int64),
        "sizes": np.array(sizes, dtype=np.int64),
        "labels": numbers.astype(np.int64),
        "names": names.joined,
        "name_ends": names.ends,
        "classes": np.array(json.dumps(classes)),
    }


def images_of(path: Path) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, place, size and label (or NO_LABEL) of every image of a tar file. Raises FolderError."""
    sample, image, label = None, None, NO_LABEL
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                place, name = os.path.split(member.name)
                if not member.isreg() or name.startswith("."):
                    continue
                key = os.path.join(place, name.partition(".")[0])
                if key != sample:
                    if image:
                        yield (*image, label)
                    sample, image, label = key, None, NO_LABEL
                if name.lower().endswith(SUFFIXES):
                    if image:
                        raise FolderError(f"shard {str(path)!r}: two images share the name {key!r}")
                    image = member.name.encode("utf-8", "surrogateescape"), member.offset_data, member.size
                elif name.lower().endswith((".cls", ".json")):
                    content = tar.extractfile(member)
                    assert content is not None
                    label = _label(content.read(), name, label)
            if image:
                yield (*image, label)
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, FolderError):
            raise
        raise FolderError(f"shard {str(path)!r} cannot be read: {error}") from error


def _label(content: bytes, name: str, known: int) -> int:
    """The label that a file of a sample gives, `known` when a .json file gives none. Raises ValueError."""
    value: Any = content
    if name.lower().endswith(".json"):
        values = json.loads(content)
        value = values.get("label", values.get("cls", known)) if isinstance(values, dict) else known
        if value == known:
            return known
    try:
        label = int(value)
    except (TypeError, ValueError):
        label = NO_LABEL
    if label < 0:
        raise ValueError(f"the label in {name!r} must be a number, 0 or more, got {value!r}")
    return label
