"""A run's folder: the configuration it began with, and whether it is finished."""

from __future__ import annotations

import json
from pathlib import Path

from dtm_triton.train.checkpoint import FolderError, write_atomically
from dtm_triton.train.config import differences


def write_config(folder: Path, resolved: str) -> None:
    """Keep the resolved configuration beside the results."""
    write_atomically(folder / "config.json", lambda file: file.write(resolved.encode() + b"\n"))


def write_finished(folder: Path, resolved: str, results: dict[str, float]) -> None:
    """Note that the run is complete: everything it writes is written."""
    text = json.dumps({"results": results, "config": json.loads(resolved)}, indent=2)
    write_atomically(folder / "finished.json", lambda file: file.write(text.encode() + b"\n"))


def read_finished(folder: Path, resolved: str) -> dict[str, float] | None:
    """The results of a finished run, None when the folder holds none. Raises as `refuse_changes` does.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_finished(folder, '{"seed": 1}', {"knn": 0.5})
    >>> read_finished(folder, '{"seed": 1}')
    {'knn': 0.5}
    """
    path = folder / "finished.json"
    if not path.is_file():
        return None
    finished = json.loads(path.read_text())
    refuse_changes(folder, json.dumps(finished["config"]), resolved)
    return finished["results"]


def refuse_changes(folder: Path, saved: str, resolved: str) -> None:
    """Raise FolderError, naming every field, when a run would go on with another configuration."""
    changed = differences(saved, resolved)
    if changed:
        raise FolderError(
            f"run.folder {str(folder)!r} holds a run with another configuration ({'; '.join(changed)}); "
            "give another folder, or remove it to start over"
        )
