"""Saving while training goes on: the state is copied, then written by a thread, then published by the first process.

Kept are the newest two checkpoints, the best one (named in `best.json`), those of every `run.keep_every` epochs, which
carry a file `kept`, and the last ones before the latest two loss spikes, which carry a file `before_spike`. The others
are removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from dtm_triton.train.engine.checkpoint import MAPS, FolderError, saved_steps, seal, write_text
from dtm_triton.train.engine.distributed import Processes

NEWEST = 2  # the newest, and the one before it in case the newest is damaged
PATIENCE = 3  # failed checkpoints in a row after which a run stops
BEST, KEPT, SPIKE = "best.json", "kept", "before_spike"
SPIKES = 2  # so many of the latest ones


class Saver:
    """Writes a run's checkpoints; one is under way at a time.

    Args:
        folder: of the checkpoints; unfinished ones that a kill left are removed.
        processes: all of them call `save` and `finish` at the same steps.

    >>> import tempfile, torch
    >>> saver = Saver(Path(tempfile.mkdtemp()), Processes())
    >>> saver.save(7, {"w": torch.ones(2)}, {"step": 7})
    >>> saver.finish()
    >>> [path.name for path in saved_steps(saver.folder)]
    ['step_000000007']
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self.group = processes.own_group()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.under_way: Future[None] | None = None
        self.failures = 0
        if processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.unfinished"):
                shutil.rmtree(left)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        plain: Mapping[str, Any],
        *,
        best: bool = False,
        why: str = "",
        beside: Path | None = None,
    ) -> str | None:
        """Copy the state and begin to write it; waits for the checkpoint before. Returns what `finish` does.

        tensors: whole ones, equal in all processes, or shards (DTensor). plain: what JSON can hold. best: this is the
        best checkpoint so far. why: a reason never to remove it. beside: a file that
        belongs to it, which nobody changes any more; the checkpoint gets a copy, whose damage harms no other one.
        """
        trouble = self.finish()
        path = self.folder / f"step_{step:09d}"
        unfinished = path.with_name(path.name + ".unfinished")
        written: Any = dcp.async_save(
            dict(tensors),
            storage_writer=dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
            process_group=self.group,
            no_dist=self.processes.count == 1,
        )
        self.under_way = self.thread.submit(self._publish, written, unfinished, path, dict(plain), best, why, beside)
        return trouble

    def finish(self) -> str | None:
        """Wait until nothing is under way. Returns what went wrong with the last checkpoint, None when it is on disk.

        Raises FolderError when several in a row could not be written.
        """
        if self.under_way is None:
            return None
        under_way, self.under_way = self.under_way, None
        error = under_way.exception()
        if error is None:
            self.failures = 0
            return None
        self.failures += 1
        trouble = f"checkpoint in {str(self.folder)!r} could not be written: {_cause(error)}"
        if self.failures >= PATIENCE:
            raise FolderError(f"{trouble}; {self.failures} in a row") from error
        return trouble

    def settle(self) -> None:
        """Wait until nothing is under way; how it went is for `finish` to tell."""
        if self.under_way is not None:
            self.under_way.exception()

    def protect(self, before: int, why: str) -> Path | None:
        """Keep the newest checkpoint of at most `before` steps, as one before a spike; None when there is none."""
        self.settle()
        for path in saved_steps(self.folder):
            if int(path.name.removeprefix("step_")) <= before:
                write_text(path / SPIKE, why)
                return path
        return None

    def _publish(
        self,
        written: Any,
        unfinished: Path,
        path: Path,
        plain: dict[str, Any],
        best: bool,
        why: str,
        beside: Path | None,
    ) -> None:
        try:
            getattr(written, "upload_completion", written).result()  # in the first process: all have written
            if self.processes.first:
                if beside is not None:
                    shutil.copyfile(beside, unfinished / MAPS)
                self._complete(unfinished, path, plain, best, why)
        except BaseException:
            if self.processes.first:
                shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk the next try needs the place
            raise

    def _complete(self, unfinished: Path, path: Path, plain: dict[str, Any], best: bool, why: str) -> None:
        if why:
            write_text(unfinished / KEPT, why)
        if path.exists():  # this one was damaged: training went on from the one before
            _remove(path)
        seal(unfinished, path, plain)
        if best:
            note = json.dumps({"step": plain["step"], "folder": path.name})
            write_text(self.folder / BEST, note)
        saved = saved_steps(self.folder)
        spikes = [old for old in saved if (old / SPIKE).exists()][:SPIKES]
        spared = {best_step(self.folder), *saved[:NEWEST], *spikes}
        for old in saved:
            if old not in spared and not (old / KEPT).exists():
                _remove(old)


def best_step(folder: Path) -> Path | None:
    """The checkpoint of the best evaluation, None when there is none."""
    try:
        return folder / str(json.loads((folder / BEST).read_bytes())["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(path: Path) -> None:
    """Under another name first: a kill in between leaves nothing that looks complete."""
    doomed = path.with_name(path.name + ".removed.unfinished")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _cause(error: BaseException) -> str:
    """The innermost reason: torch.distributed.checkpoint wraps what the file system said."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values())) if failures else None
    inner = inner[0] if isinstance(inner, tuple) else inner
    return str(inner or error)
