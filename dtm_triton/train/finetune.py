"""Train a classifier from pre-trained weights: `dtm-finetune --student.weights RUN/student`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from dtm_triton.train import recipes
from dtm_triton.train.build import build_network
from dtm_triton.train.command_line import parse, run_command
from dtm_triton.train.config import FinetuneConfig, to_json
from dtm_triton.train.data.draws import fold
from dtm_triton.train.data.images import open_images
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import Metrics, read_metrics
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.run_folder import read_finished, write_finished
from dtm_triton.train.models.classifier import Classifier
from dtm_triton.train.objectives.supervised import Supervised
from dtm_triton.visualize import draw_curves


def finetune(config: FinetuneConfig, processes: Processes, title: str = "fine-tuning") -> Metrics:
    """Fine-tune as configured, or go on where the folder's run stopped; returns the last evaluation's metrics.

    Writes into `config.run.folder` what pre-training does, but for the export and the pictures of tokens.
    Raises as `Trainer` does, and as `build_network` for weights.
    """
    folder, resolved = config.run.folder, to_json(config)
    # asked once: a shared disk may show the file to one process before another
    done = processes.from_first(lambda: read_finished(folder, resolved), FolderError)
    if done is not None:
        return done
    images = open_images(config.data, "train")
    assert images is not None
    torch.manual_seed(fold(config.run.seed, "weights"))
    network = build_network(
        Classifier,
        config.student,
        config.data,
        out_features=images.num_classes,
        pool=config.pool,
        frozen=config.frozen,
    )
    trainer = Trainer(
        Supervised(
            network,
            config.data,
            label_smoothing=config.label_smoothing,
            mixup=config.mixup,
            cutmix=config.cutmix,
            random_erasing=config.random_erasing,
        ),
        data=config.data,
        optimizer=config.optimizer,
        run=config.run,
        processes=processes,
        resolved=resolved,
        title=title,
    )
    metrics = trainer.fit()
    if processes.first:
        draw_curves(read_metrics(folder), folder / "curves.png")
        write_finished(folder, resolved, metrics)
    processes.wait()
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    config = parse(recipes.FINETUNE, "finetune_demo", "dtm-finetune", argv)
    run_command("dtm-finetune", partial(_report, config), config.run.device, config.run.timeout_minutes)


def _report(config: FinetuneConfig, processes: Processes) -> None:
    metrics = finetune(config, processes)
    if processes.first:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"finished: {shown or 'nothing held out to evaluate'}\nin {config.run.folder}")


if __name__ == "__main__":
    main()
