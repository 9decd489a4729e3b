"""The pictures at the end of a pre-training run: curves, masks, and groups at several steps of a schedule."""

from __future__ import annotations

import torch

from dtm_triton import morph
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.data.batches import Batch
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.objectives.pretraining import Pretraining
from dtm_triton.visualize import draw_curves, draw_groups, draw_masks

SHOWN = 6  # images
SHARES = (0.25, 0.5, 0.75, 0.9)  # of the tokens removed


def draw_run(config: PretrainConfig, objective: Pretraining, images: Batch, device: torch.device) -> None:
    """curves.png, masks.png and groups.png in the run's folder.

    images: "images" uint8 [B, C, H, W] and "mask" bool [B, N]; the groups are those of the teacher's targets.
    """
    folder = config.run.folder
    pixels = images["images"][:SHOWN].float() / 255
    grid = objective.network.grid
    draw_curves(read_metrics(folder), folder / "curves.png")
    draw_masks(pixels, images["mask"][:SHOWN], grid, folder / "masks.png")
    with torch.no_grad():
        targets = objective.teacher(pixels.to(device))
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
