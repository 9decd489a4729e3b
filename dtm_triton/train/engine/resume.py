"""How a run goes on: the newest checkpoint of its folder, when it belongs to this configuration, data and teacher."""

from __future__ import annotations

import math
from typing import Any

import torch

from dtm_triton.train.engine.checkpoint import CheckpointError, FolderError, load_into, load_newest
from dtm_triton.train.engine.run_folder import changes_of_bits, refuse_changes
from dtm_triton.train.engine.state import training_tensors


def resume(trainer: Any) -> None:
    """Fill a `Trainer` with what its folder holds; a folder without checkpoints leaves it as it is.

    Raises FolderError for checkpoints that cannot be read, a configuration, data or a teacher other than what the
    folder's run began with.
    """
    run, processes = trainer.run, trainer.processes
    folder = run.folder / "checkpoints"
    found = processes.from_first(lambda: load_newest(folder, print), FolderError)
    if found is None:
        return
    path, state = found
    unseen = torch.tensor(0.0 if path.is_dir() else 1.0, device=trainer.device)
    if processes.mean(unseen).item() > 0:
        raise CheckpointError(f"not all processes see {str(path)!r}: run.folder must be shared by all hosts")
    refuse_changes(run.folder, state["config"], trainer.resolved)
    for kind, name in (("images", "data"), ("teacher", "teacher.weights")):
        if state[kind] != trainer.origin[kind]:
            raise FolderError(f"{name} must be the {state[kind]} that the run began with, got {trainer.origin[kind]}")
    load_into(path, training_tensors(trainer.objective, trainer.optimizer))
    if trainer.maps is not None:
        trainer.maps.restore(path)
    trainer.step = trainer.on_disk = trainer.resumed = state["step"]
    trainer.best = -math.inf if state["best"] is None else state["best"]
    trainer.objective.epoch = trainer.step // trainer.batches.steps_per_epoch
    trainer.averages.restore(state)
    trainer.watch.usual.copy_(torch.tensor(state["usual_loss"]))
    trainer.skipped.known.update(state["skipped"])
    if processes.first:
        _tell(trainer, state)


def _tell(trainer: Any, state: dict[str, Any]) -> None:
    changed = changes_of_bits(state["config"], trainer.resolved)
    if state["processes"] != trainer.processes.count:
        changed.append(f"processes: {state['processes']} -> {trainer.processes.count}")
    note = f", not to the same bits ({'; '.join(changed)})" if changed else ""
    print(f"{trainer.title.strip()}: goes on from step {trainer.step} of {trainer.total}{note}")
