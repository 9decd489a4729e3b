"""Checkpoints that a kill at any moment cannot spoil: written beside, flushed to disk, then renamed.

A run keeps its two newest `step_*.pt`; `best.pt` is the one of the best evaluation. A file is one dictionary of tensors
and plain values, read with weights_only=True after its checksums were verified.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

KEPT = 2  # the newest, and the one before it in case the newest is damaged


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
    folder = os.open(path.parent, os.O_RDONLY)  # the new name must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, best: bool = False) -> Path:
    """Write `step_<step>.pt`, make it `best.pt` too when told, and remove all but the newest two.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for step in (1, 2, 3):
    ...     path = save_checkpoint(folder, step, {"step": step}, best=step == 1)
    >>> sorted(file.name for file in folder.iterdir())
    ['best.pt', 'step_000000002.pt', 'step_000000003.pt']
    """
    path, content = folder / f"step_{step:09d}.pt", dict(state)
    if best:  # before the step's own name: a kill in between repeats both, and never leaves an old best behind
        write_atomically(folder / "best.pt", lambda file: torch.save(content, file))
    if not (best and _link(folder / "best.pt", path)):
        write_atomically(path, lambda file: torch.save(content, file))
    for old in saved_steps(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def _link(source: Path, path: Path) -> bool:
    """Give a file a second name, atomically; False on file systems without links."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.unlink(missing_ok=True)
        os.link(source, unfinished)
        os.replace(unfinished, path)
    except OSError:
        return False
    return True


def load_newest(folder: Path, report: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None when the folder holds none.

    A damaged one is reported and the one before it taken: training goes on from there, to the same end.
    Raises CheckpointError when there are some and none can be read: starting from zero would hide the loss.
    """
    paths = saved_steps(folder)
    for path in paths:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            report(f"{error}; trying the checkpoint before it")
    if paths:
        names = [path.name for path in paths]
        raise CheckpointError(f"none of {names} in {str(folder)!r} can be read; remove them to start over")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """One checkpoint, on the CPU. Raises CheckpointError when it is damaged or of another kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # PyTorch itself does not compare the checksums
        if damaged is not None:
            raise CheckpointError(f"checkpoint {str(path)!r} is damaged in {damaged!r}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # what PyTorch, zipfile and pickle raise for damaged or foreign files has no narrower class
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"checkpoint {str(path)!r} is not one of a training run")
    return state


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step_\d+\.pt", path.name)), reverse=True)
