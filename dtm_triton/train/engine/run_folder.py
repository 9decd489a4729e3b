"""A run's folder: the configuration it began with, and whether it is finished."""

from __future__ import annotations

import errno
import fcntl
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtm_triton.train.engine.checkpoint import FolderError, write_text

# what file systems answer that know no locks
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# these may change when a run goes on: they touch neither a weight nor a result
FREE_AT_RESUME = {"run.folder", "run.log_every", "run.checkpoint_every", "run.keep_every", "run.timeout_minutes"}
FREE_AT_RESUME |= {"data.workers", "data.max_corrupt"}
# these may change too, and change bits: the same arithmetic in another order (drop path draws anew with some)
SAME_BUT_FOR_BITS = {"run.strategy", "run.compile", "run.activation_checkpointing", "run.accumulate"}
SAME_BUT_FOR_BITS |= {"run.threads", "run.deterministic"}


@contextmanager
def hold_folder(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Keep other processes out of a run's folder; the hold ends with this process, however it ends.

    Raises FolderError when another process still holds it after `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FolderError(f"folder {str(folder)!r} is in use by another process") from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"folder {str(folder)!r} cannot be locked ({error}): take care that only one run uses it")
                break
        yield


def keep_apart(folder: Path, data: Iterable[Path | None]) -> None:
    """Raise FolderError for a run's folder inside one of images: its pictures would be trained on.

    >>> keep_apart(Path("a/run"), [Path("a"), None])
    Traceback (most recent call last):
    dtm_triton.train.engine.checkpoint.FolderError: run.folder must not lie inside data folder 'a', got 'a/run'
    """
    for place in data:
        if place is not None and folder.resolve().is_relative_to(place.resolve()):
            raise FolderError(f"run.folder must not lie inside data folder {str(place)!r}, got {str(folder)!r}")


def write_config(folder: Path, resolved: str) -> None:
    """Keep the resolved configuration beside the results."""
    write_text(folder / "config.json", resolved)


def write_finished(folder: Path, resolved: str, results: dict[str, float]) -> None:
    """Note that the run is complete: everything it writes is written."""
    text = json.dumps({"results": results, "config": json.loads(resolved)}, indent=2)
    write_text(folder / "finished.json", text)


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


def differences(saved: str, current: str) -> list[str]:
    """What changed between two configurations in JSON, but for what may change when a run goes on.

    >>> differences('{"run": {"seed": 0, "log_every": 5}}', '{"run": {"seed": 1, "log_every": 9}}')
    ['run.seed: 0 -> 1']
    """
    before, after = _flatten(json.loads(saved)), _flatten(json.loads(current))
    free = FREE_AT_RESUME | SAME_BUT_FOR_BITS
    names = [name for name in {**before, **after} if name not in free]
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def changes_of_bits(saved: str, current: str) -> list[str]:
    """The fields that changed between two configurations and let the run go on, though not to the same bits.

    >>> changes_of_bits('{"run": {"compile": false}}', '{"run": {"compile": true}}')
    ['run.compile: False -> True']
    """
    before, after = _flatten(json.loads(saved)), _flatten(json.loads(current))
    names = sorted(SAME_BUT_FOR_BITS)
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
