"""The pictures at the end of a pre-training run: curves, masks, and groups at several steps of a schedule."""

from __future__ import annotations

import torch

from dtm_triton import morph
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.data.batches import Batch
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.objectives.tokens import TokenObjective
from dtm_triton.visualize import draw_curves, draw_groups, draw_masks

SHOWN = 6  # images
SHARES = (0.25, 0.5, 0.75, 0.9)  # of the tokens removed


def draw_run(config: PretrainConfig, objective: TokenObjective, batch: Batch, processes: Processes) -> None:
    """curves.png, masks.png and groups.png in the run's folder, of images of a batch; the groups are those of targets.

    All processes must call it, for the moving average may be spread over them; the first one draws.
    """
    folder = config.run.folder
    shown = {name: value[:SHOWN].to(processes.device) for name, value in batch.items()}
    pixels = shown["images"].float() / 255
    targets = objective.targets(pixels)
    if not processes.first:
        return
    grid, pixels, masks = objective.network.grid, pixels.cpu(), objective.masks(shown["mask"]).cpu()
    draw_curves(read_metrics(folder), folder / "curves.png")
    draw_masks(pixels, masks, grid, folder / "masks.png")
    tokens, iterations = targets.shape[1], config.loss.max_iterations
    schedules = [morph.MorphSchedule.uniform(round(share * tokens), iterations) for share in SHARES]
    generator = torch.Generator().manual_seed(config.run.seed)
    groups = [
        morph.match_tokens(
            targets,
            schedule,
            num_protected=config.loss.num_protected,
            split=config.loss.split,
            generator=generator,
        )
        for schedule in schedules
    ]
    draw_groups(pixels, groups, grid, folder / "groups.png")
