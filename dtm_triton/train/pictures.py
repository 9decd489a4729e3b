"""The pictures of a pre-training run: of its masks whenever attention maps were made anew, and what it came to.

All processes call these functions, for networks may be spread over them; the first one draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dtm_triton import morph
from dtm_triton.attention_masking import crop_weights
from dtm_triton.partition import Partition
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.data.augment import Normalise, augment
from dtm_triton.train.data.batches import Batch
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.evaluate import evaluating
from dtm_triton.train.models.keeping import take
from dtm_triton.train.models.targets import PixelTargets
from dtm_triton.train.objectives.tokens import TokenObjective
from dtm_triton.visualize import draw_curves, draw_groups, draw_maps, draw_masks, draw_reconstructions

SHOWN = 6  # images
SHARES = (0.25, 0.5, 0.75, 0.9)  # of the tokens removed


def draw_run(config: PretrainConfig, objective: TokenObjective, batch: Batch, processes: Processes) -> None:
    """curves.png, masks.png, groups.png (those of targets), maps.png and reconstructions.png in the run's folder.

    maps.png: what masks of kind "attention" went by, as far as the batch has maps. reconstructions.png: of students
    that predict pixels.
    """
    folder, grid = config.run.folder, objective.network.grid
    shown, pixels = first_images(batch, processes)
    targets = objective.targets(pixels)
    partition = objective.partition(shown, pixels)
    weights = _weights(config, objective, shown, pixels)
    again = reconstruct(config, objective, pixels, partition) if config.teacher.kind == "pixels" else None
    if not processes.first:
        return
    images, masks, thrown = drawable(pixels), partition.mask, partition.thrown_mask
    draw_curves(read_metrics(folder), folder / "curves.png")
    draw_masks(images, masks, grid, folder / "masks.png", thrown)
    if weights is not None:
        draw_maps(images, weights, grid, folder / "maps.png", masks, thrown)
    if again is not None:
        draw_reconstructions(images, drawable(again), masks, grid, folder / "reconstructions.png", thrown)
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
    draw_groups(images, groups, grid, folder / "groups.png")


def draw_stage(
    config: PretrainConfig, objective: TokenObjective, batch: Batch, path: Path, processes: Processes
) -> None:
    """Images of a batch, the attention maps that they come with, and what is masked and thrown by them; into `path`."""
    shown, pixels = first_images(batch, processes)
    partition = objective.partition(shown, pixels)
    weights = _weights(config, objective, shown, pixels)
    if not processes.first or weights is None:
        return
    grid = objective.network.grid
    draw_maps(drawable(pixels), weights, grid, path, partition.mask, partition.thrown_mask)


def reconstruct(config: PretrainConfig, objective: TokenObjective, pixels: Tensor, partition: Partition) -> Tensor:
    """Images [B, C, H, W] with what the network predicts in the masked patches' place; it predicts `PixelTargets`.

    A standardised patch gets the mean and the deviation that it has in the image: they are not predicted.

    pixels: [B, C, H, W] in 0..1.
    """
    data, patch = config.data, config.student.patch_size
    with torch.no_grad(), evaluating(objective.network):
        outputs = objective.network(objective.normalise(pixels), partition)
    predicted = take(outputs, partition.masked_among_kept).float()
    plain = PixelTargets(data.image_size, patch, data.mean, data.std, standardise=False).to(pixels.device)
    values = plain(pixels)
    if config.teacher.standardise:
        variance, mean = torch.var_mean(take(values, partition.masked), dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    values = values.scatter(1, partition.masked[..., None].expand_as(predicted), predicted)
    columns = values.unflatten(2, (-1, data.channels)).permute(0, 3, 2, 1).flatten(1, 2)  # [B, C p p, N]
    images = F.fold(columns, data.image_size, patch, stride=patch)
    normalise = Normalise(data.mean, data.std).to(pixels.device)
    return images * normalise.std + normalise.mean


def drawable(images: Tensor) -> Tensor:
    """On the CPU; images of other than 1 or 3 channels become grey."""
    return (images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)).cpu()


def first_images(batch: Batch, processes: Processes) -> tuple[Batch, Tensor]:
    """A batch of the first images on the device, and their pixels as they are trained on, in 0..1."""
    shown = {name: value[:SHOWN].to(processes.device) for name, value in batch.items()}
    return shown, augment(shown)


def _weights(
    config: PretrainConfig, objective: TokenObjective, batch: Mapping[str, Tensor], pixels: Tensor
) -> Tensor | None:
    """What every patch of the crops weighs in the choice of masks, [B, N]; None where no maps decide."""
    attention = config.attention
    weights = None
    if objective.live and objective.epoch >= attention.warmup_epochs:
        weights = objective.attend(pixels)
    elif "map" in batch:
        grid = objective.network.grid
        weights = crop_weights(batch["map"], batch["place"], grid, flip=batch.get("flip"), crop=attention.crop)
    return None if weights is None else weights.float().nan_to_num(posinf=0.0).clamp(min=0)
