"""Writes and checks one tar shard. The same images give the same bytes, whenever and wherever they are written."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dtm_triton.train.data.decode import NPY, ImageError, decode, shrink
from dtm_triton.train.data.folder import SUFFIXES
from dtm_triton.train.data.shard_index import images_of
from dtm_triton.train.engine.checkpoint import FolderError, write_atomically

Record = dict[str, Any]
"""What is known of a shard: name, bytes, sha256, images, skipped (of which every one has a name and a reason)."""


class EncodedImages(Protocol):
    """A source whose images are files."""

    labels: Tensor

    def name(self, number: int) -> str:
        """What people find an image by."""

    def read(self, number: int) -> bytes:
        """The bytes of an image file. Raises OSError, ImageError."""


def write_shard(
    path: Path, images: EncodedImages, places: range, numbers: Sequence[int], *, side: int, quality: int, channels: int
) -> Record:
    """Write the images `numbers` as `path`, whole or not at all; returns what is known of it.

    places: their places among all images, which name them. Larger images than `side` pixels at the shorter side are
    scaled to it, as JPEG of `quality` (.npy unless there are 1 or 3 channels); others are copied, or written in the
    same way where their format is none of `SUFFIXES`. An image that cannot be read is left out.
    """
    skipped: list[dict[str, str]] = []
    written = 0

    def write(file: Any) -> None:
        nonlocal written
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for place, number in zip(places, numbers, strict=True):
                try:
                    data, suffix = _smaller(images.read(number), side, quality, channels)
                except (ImageError, OSError) as error:
                    skipped.append({"name": images.name(number), "reason": str(error)})
                    continue
                _add(tar, f"{place:09}.cls", str(int(images.labels[number])).encode())
                _add(tar, f"{place:09}.{suffix}", data)
                written += 1

    write_atomically(path, write)
    known = {"name": path.name, "bytes": path.stat().st_size, "sha256": checksum(path)}
    return known | {"images": written, "skipped": skipped}


def check_shard(path: Path, record: Record, channels: int) -> None:
    """Raise FolderError unless the file is what its record says and every image in it can be decoded."""
    if not matches(path, record):
        raise FolderError(f"shard {str(path)!r} is not what was written: its size or checksum is another")
    count = 0
    with open(path, "rb") as file:
        for name, offset, size, _ in images_of(path):
            try:
                decode(os.pread(file.fileno(), size, offset), channels)
            except Exception as error:  # decoders raise whatever they like
                raise FolderError(f"shard {str(path)!r}: {name.decode()} cannot be decoded: {error}") from error
            count += 1
    if count != record["images"]:
        raise FolderError(f"shard {str(path)!r} holds {count} images, {record['images']} were written")


def matches(path: Path, record: Record) -> bool:
    """Whether the file has the size and checksum of its record."""
    return path.is_file() and path.stat().st_size == record["bytes"] and checksum(path) == record["sha256"]


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _smaller(data: bytes, side: int, quality: int, channels: int) -> tuple[bytes, str]:
    """The bytes to be written and their suffix."""
    from PIL import Image

    pixels = shrink(data, side, channels)
    buffer = io.BytesIO()
    if pixels is None:
        if data[: len(NPY)] == NPY:
            return data, "npy"
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "").lower()
        kind = {"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind)
        if f".{kind}" in SUFFIXES:
            return data, kind
        pixels = decode(data, channels)  # AVIF for example, whatever the file's name was: nobody would look for it
    if channels in (1, 3):
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, "JPEG", quality=quality)
        return buffer.getvalue(), "jpg"
    np.save(buffer, pixels)
    return buffer.getvalue(), "npy"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same bytes again
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
