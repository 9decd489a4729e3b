"""Probe frozen features of an exported student: `dtm-probe --weights RUN/student`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from torch import Tensor

from dtm_triton.train import recipes
from dtm_triton.train.command_line import parse, run_command
from dtm_triton.train.config import DataConfig, ProbeConfig
from dtm_triton.train.data.augment import Normalise
from dtm_triton.train.data.batches import EvaluationBatches, evaluation_loader
from dtm_triton.train.data.images import open_images
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.evaluate import knn_accuracy, linear_probe_accuracy
from dtm_triton.train.models.export import exported_input, load_exported
from dtm_triton.train.objectives.objective import gather_features

Metrics = dict[str, float]


def probe(
    features: Callable[[Tensor], Tensor],
    data: DataConfig,
    processes: Processes,
    neighbours: int = 20,
    batch_size: int = 256,
) -> Metrics:
    """{"knn", "linear_probe"} of features [B, D] of images [B, C, H, W] in 0..1, fractions of the held-out images.

    The first process alone computes them; the others help with the features, return {} and need not wait.
    Raises FolderError when nothing is held out.
    """
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for part in ("train", "test"):
        images = open_images(data, part)
        if images is None:
            raise FolderError("data.test_folder must be given to probe, got None")
        loader = evaluation_loader(EvaluationBatches(images, batch_size, processes), data.workers)
        rows[part] = gather_features(features, loader, processes)
    if not processes.first:
        return {}
    knn = knn_accuracy(*rows["train"], *rows["test"], k=neighbours)
    return {"knn": knn, "linear_probe": linear_probe_accuracy(*rows["train"], *rows["test"])}


def exported_features(weights: Path, data: DataConfig, processes: Processes) -> Callable[[Tensor], Tensor]:
    """Features of an exported student: the mean of its normed patch tokens.

    Raises FolderError when `data` prepares images otherwise than the student was trained on them.
    """
    model: Any = load_exported(weights).to(processes.device)
    given = {"input_size": [data.channels, *data.image_size], "mean": list(data.mean), "std": list(data.std)}
    for name, wanted in exported_input(weights).items():
        if given[name] != wanted:
            field = "data.channels and data.image_size" if name == "input_size" else f"data.{name}"
            raise FolderError(f"{field} must be {wanted}, as {str(weights)!r} was trained, got {given[name]}")
    normalise = Normalise(data.mean, data.std).to(processes.device)

    def features(images: Tensor) -> Tensor:
        tokens = model.forward_features(normalise(images))
        return tokens[:, model.num_prefix_tokens :].mean(1)

    return features


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    config = parse(recipes.PROBE, "probe_demo", "dtm-probe", argv)
    run_command("dtm-probe", partial(_report, config), config.device)


def _report(config: ProbeConfig, processes: Processes) -> None:
    features = exported_features(config.weights, config.data, processes)
    metrics = probe(features, config.data, processes, config.neighbours, config.batch_size)
    if processes.first:
        print(f"{config.weights}: kNN {100 * metrics['knn']:.2f} %, linear probe {100 * metrics['linear_probe']:.2f} %")


if __name__ == "__main__":
    main()
