"""Runs of the study: one arm with one seed, or the share of a process; what is finished is not repeated."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dtm_triton.train.build import build_objective
from dtm_triton.train.config import DataConfig, PretrainConfig, to_json
from dtm_triton.train.data.batches import Batch
from dtm_triton.train.engine.checkpoint import write_text
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.run_folder import refuse_changes
from dtm_triton.train.objectives.tokens import TokenObjective
from dtm_triton.train.pictures import SHOWN, draw_stage, drawable, first_images, reconstruct
from dtm_triton.train.probe import probe
from dtm_triton.train.study.design import configure
from dtm_triton.visualize import draw_reconstructions

PICTURED = 0  # the seed whose masks and reconstructions are drawn
Result = dict[str, Any]
Configure = Callable[[str, int, Path], PretrainConfig]


def run_share(
    folder: Path, arms: Sequence[str], seeds: Sequence[int], say: Callable[[str], None], make: Configure = configure
) -> None:
    """All arms with the first of the seeds, with the next one, and so on; says after every run how it came out."""
    runs = [(name, seed) for seed in seeds for name in arms]
    began, done = time.monotonic(), 0
    for place, (name, seed) in enumerate(runs, start=1):
        done += not result_path(folder, name, seed).exists()
        result = run_arm(folder, name, seed, make)
        left = (time.monotonic() - began) / max(done, 1) * (len(runs) - place) / 60
        say(
            f"{place} of {len(runs)}: {name}, seed {seed}: linear probe {100 * result['linear_probe']:.1f} %, "
            f"kNN {100 * result['knn']:.1f} %; about {left:.0f} min left"
        )


def run_arm(folder: Path, name: str, seed: int, make: Configure = configure) -> Result:
    """The result of an arm with a seed, from its file, or from a run, which goes on where it was stopped.

    {"arm", "seed", "linear_probe", "knn", "loss" of the last epoch, "seconds"}. Raises FolderError when the file's run
    had another configuration.
    """
    path, config = result_path(folder, name, seed), make(name, seed, folder)
    resolved = to_json(config)
    if path.exists():
        kept = json.loads(path.read_text())
        refuse_changes(path, json.dumps(kept.pop("config")), resolved)
        return kept
    began = time.monotonic()
    torch.set_num_threads(1)
    objective = build_objective(config, Processes())
    loss = None if "untrained" in name else _train(config, objective, name, resolved, folder / "pictures", seed)
    metrics = probe(objective.features, _held_out(config.data), Processes())
    seconds = round(time.monotonic() - began, 1)
    result: Result = {"arm": name, "seed": seed, **metrics, "loss": loss, "seconds": seconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**result, "config": json.loads(resolved)}, indent=1))
    shutil.rmtree(config.run.folder, ignore_errors=True)
    return result


def result_path(folder: Path, name: str, seed: int) -> Path:
    """Where the result of a run is kept."""
    return folder / "results" / f"{file_name(name)}-{seed}.json"


def file_name(name: str) -> str:
    """An arm's name in names of files."""
    return name.replace(" + ", "_").replace(" ", "_")


def _train(
    config: PretrainConfig, objective: TokenObjective, name: str, resolved: str, pictures: Path, seed: int
) -> float:
    """The loss of the last epoch."""
    with contextlib.redirect_stdout(io.StringIO()):  # what every single run says
        trainer = Trainer(
            objective,
            data=config.data,
            optimizer=config.optimizer,
            run=config.run,
            processes=Processes(),
            resolved=resolved,
            title=name,
        )

        def stage(step: int) -> None:
            path = pictures / f"{file_name(name)}_step_{step:09d}.png"
            draw_stage(config, objective, trainer.first_rows(SHOWN), path, Processes())

        if seed == PICTURED:
            trainer.after_maps = stage
        trainer.fit()
        if seed == PICTURED and config.teacher.kind == "pixels":
            path = pictures / f"{file_name(name)}_reconstructions.png"
            _draw_end(config, objective, trainer.first_rows(SHOWN), path)
    losses = [float(row["loss"]) for row in read_metrics(config.run.folder) if "loss" in row]
    return losses[-1]


def _draw_end(config: PretrainConfig, objective: TokenObjective, batch: Batch, path: Path) -> None:
    batch, pixels = first_images(batch, Processes())
    partition = objective.partition(batch, pixels)
    again = reconstruct(config, objective, pixels, partition)
    draw_reconstructions(
        drawable(pixels), drawable(again), partition.mask, objective.network.grid, path, partition.thrown_mask
    )


def _held_out(data: DataConfig) -> DataConfig:
    """With the held-out windows, which training does not look at; digits hold some out themselves."""
    return data if data.train_folder is None else replace(data, test_folder=data.train_folder.parent / "test")
