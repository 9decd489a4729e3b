"""Checkpoints that a kill at any moment cannot spoil: folders written beside, verified, then renamed.

`step_000000123/` holds the tensors in safetensors files, as many as processes wrote (torch.distributed.checkpoint: they
can be read by any number of processes), `maps.npy` in runs that have attention maps, and `state.json`: plain values,
and size and checksum of every file. Under this name a folder is complete. Nothing in it is code, and nothing is
unpickled.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process alone is nothing to warn of

STATE = "state.json"
MAPS = "maps.npy"  # attention maps, of runs that have them
CHUNK = 1 << 24  # bytes of a file read at once


class FolderError(ValueError):
    """A run cannot begin or go on with what a folder holds."""


class CheckpointError(FolderError):
    """No checkpoint of a folder can be used."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Give `path` new content, whole or not at all, whatever happens meanwhile.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "note.txt")
    >>> write_atomically(path, lambda file: file.write(b"done"))
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('done', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for a text, which gets a newline at its end."""
    write_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def seal(unfinished: Path, path: Path, plain: Mapping[str, Any]) -> None:
    """Complete a folder of safetensors files: `state.json`, everything on the disk, its final name.

    plain: what JSON can hold, kept beside the tensors.
    """
    files = {}
    for file in sorted([*unfinished.glob("*.safetensors"), *unfinished.glob(MAPS)]):
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
        files[file.name] = [file.stat().st_size, checksum_of(file)]
    text = json.dumps({"files": files, **plain}, indent=1)
    write_text(unfinished / STATE, text)
    os.replace(unfinished, path)
    flush_folder(path.parent)


def load_newest(folder: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Path and plain values of the newest checkpoint that is whole; None when the folder holds none.

    A damaged one is reported and the one before it taken: training goes on from there, to the same end.
    Raises CheckpointError when there are some and none can be used: starting from zero would hide the loss.
    """
    paths = saved_steps(folder)
    for path in paths:
        try:
            return path, load_plain(path)
        except CheckpointError as error:
            report(f"{error}; trying the checkpoint before it")
    old = sorted(folder.glob("step_*.pt")) if folder.is_dir() else []
    if paths or old:
        names = [path.name for path in [*paths, *old]]
        raise CheckpointError(f"none of {names} in {str(folder)!r} can be read; remove them to start over")
    return None


def load_plain(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint. Raises CheckpointError when it is damaged or of another kind."""
    try:
        state = json.loads((path / STATE).read_bytes())
        files = [(path / name, int(size), int(value)) for name, (size, value) in state["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    for file, size, value in files:
        try:
            fine = file.stat().st_size == size and checksum_of(file) == value
        except OSError as error:
            raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
        if not fine:
            raise CheckpointError(f"checkpoint {str(path)!r} is damaged in {file.name!r}")
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"checkpoint {str(path)!r} is not one of a training run")
    return state


def load_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole ones or this process's shards, from a checkpoint; all processes that hold shards call it.

    Raises CheckpointError when names or shapes differ from the checkpoint's.
    """
    saved = {name: tuple(entry.size) for name, entry in _metadata(path).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name))
    if wrong:
        shown = ", ".join(f"{name} {saved.get(name)} -> {wanted.get(name)}" for name in wrong[:5])
        raise CheckpointError(f"checkpoint {str(path)!r} does not fit in {len(wrong)} tensors: {shown}")
    dcp.load(tensors, storage_reader=_reader(path), no_dist=not torch.distributed.is_initialized())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, on the CPU; in this process alone."""
    metadata = _metadata(path)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    dcp.load(tensors, storage_reader=_reader(path), no_dist=True)
    return tensors


def saved_steps(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step_\d+", path.name)), reverse=True)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reader(path: Path) -> Any:
    return dcp.HuggingFaceStorageReader(str(path))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return _reader(path).read_metadata().state_dict_metadata
    except Exception as error:  # safetensors' own class, and what its header's JSON gives rise to
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {error}") from error


def checksum_of(path: Path) -> int:
    """Of a file's bytes."""
    value = 0
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            value = zlib.crc32(data, value)
    return value
