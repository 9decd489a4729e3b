"""Pre-train a Vision Transformer: `dtm-pretrain --recipe NAME`, `torchrun train/pretrain.py --recipe NAME`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dtm_triton.train import recipes
from dtm_triton.train.build import build_objective
from dtm_triton.train.command_line import parse, run_command
from dtm_triton.train.config import PretrainConfig, to_json
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import Metrics
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.run_folder import read_finished, write_finished
from dtm_triton.train.models.export import export_student
from dtm_triton.train.pictures import SHOWN, draw_run, draw_stage
from dtm_triton.train.planning.budget import describe_budget


def resolve(config: PretrainConfig) -> str:
    """The configuration as JSON, without the place of a "conv" teacher: its own run answers for its weights."""
    anywhere = replace(config, teacher=replace(config.teacher, weights=None))
    return to_json(anywhere if config.teacher.kind == "conv" else config)


def pretrain(config: PretrainConfig, processes: Processes, title: str = "pre-training") -> Metrics:
    """Pre-train as configured, or go on where the folder's run stopped; returns the metrics of the last evaluation.

    Writes into `config.run.folder`: config.json, checkpoints/, metrics.jsonl, tensorboard/, and at the end student/
    (plain timm weights), pictures (curves, masks, groups; attention maps and reconstructions where there are any) and
    finished.json. A finished run returns at once.
    Raises as `build_objective` and `Trainer` do.
    """
    folder, resolved = config.run.folder, resolve(config)
    # asked once: a shared disk may show the file to one process before another
    done = processes.from_first(lambda: read_finished(folder, resolved), FolderError)
    if done is not None:
        return done
    objective = build_objective(config, processes)
    if processes.first:
        print(describe_budget(config, objective.network))
    trainer = Trainer(
        objective,
        data=config.data,
        optimizer=config.optimizer,
        run=config.run,
        processes=processes,
        resolved=resolved,
        title=title,
    )

    def draw_masks(step: int) -> None:
        path = folder / f"masks_step_{step:09d}.png"
        try:
            if processes.first:
                draw_stage(config, objective, trainer.first_rows(SHOWN), path, processes)
        except OSError as error:  # a picture is no reason to end a run
            print(f"picture {str(path)!r} cannot be drawn: {error}")

    trainer.after_maps = draw_masks
    metrics = trainer.fit()
    network: Any = trainer.whole_network()
    if processes.first:
        notes = {"recipe": config.run.folder.name, **metrics}
        export_student(network, folder / "student", notes, mean=config.data.mean, std=config.data.std)
    draw_run(config, objective, trainer.first_rows(SHOWN), processes)
    if processes.first:
        write_finished(folder, resolved, metrics)
    processes.wait()
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    config = parse(recipes.PRETRAIN, "demo", "dtm-pretrain", argv)
    run_command("dtm-pretrain", partial(_report, config), config.run.device, config.run.timeout_minutes)


def _report(config: PretrainConfig, processes: Processes) -> None:
    metrics = pretrain(config, processes)
    if processes.first:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(
            f"finished: {shown or 'nothing held out to evaluate'}\nin {config.run.folder}: student/ (timm weights), "
            "pictures (*.png), metrics.jsonl, tensorboard/, checkpoints/, config.json"
        )


if __name__ == "__main__":
    main()
