"""A recipe made to run anywhere: generated images and attention maps, random weights for its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator

from dtm_triton.train.config import DataConfig, PretrainConfig, TeacherConfig, to_json
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.maps.store import MapStore
from dtm_triton.train.objectives.tokens import TokenObjective

WIDTH, HEIGHT = 500, 375  # what most images of ImageNet-1K have
BLOBS = 24  # pixels: noise of this grain, under finer noise, compresses about as photographs do
GRAIN = 9.0  # deviation of the finer noise, in levels of 255
QUALITY = 92


def without_network(config: PretrainConfig, folder: Path, *, images: int) -> PretrainConfig:
    """`config` on `images` JPEG files and teacher weights that are written below `folder`; digits stay digits.

    Weights and pictures do not change what a step costs; what a file costs to decode depends on its size.
    """
    return replace(
        config,
        data=generated_images(config.data, folder / "images", images),
        teacher=random_weights(config.teacher, folder / "teacher.safetensors"),
        run=replace(config.run, folder=folder / "run"),
    )


def generated_images(data: DataConfig, folder: Path, count: int) -> DataConfig:
    """`data` on a folder of `count` generated JPEG files, one class; digits need none."""
    if data.source == "digits":
        return data
    from PIL import Image

    folder.mkdir(parents=True)
    generator = Generator().manual_seed(0)
    for number in range(count):
        coarse = torch.rand(1, data.channels, HEIGHT // BLOBS, WIDTH // BLOBS, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0]
        noise = GRAIN * torch.randn(smooth.shape, generator=generator)
        pixels = (255 * smooth + noise).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        image = Image.fromarray(pixels.squeeze(-1).numpy())
        image.save(folder / f"{number:06}.jpg", quality=QUALITY)
    return replace(data, source="folder", train_folder=folder, test_folder=None)


def random_weights(teacher: TeacherConfig, path: Path) -> TeacherConfig:
    """`teacher` with weights of its own architecture written to `path`; only timm's models need any."""
    if teacher.kind != "timm":
        return teacher
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    kwargs: dict[str, Any] = dict(teacher.model_kwargs)
    state = timm.create_model(teacher.model, **kwargs).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return replace(teacher, weights=path)


def benchmark_trainer(objective: TokenObjective, config: PretrainConfig, processes: Processes) -> Trainer:
    """A trainer whose steps are those behind the warm-up of attention maps."""
    trainer = Trainer(
        objective,
        data=config.data,
        optimizer=config.optimizer,
        run=config.run,
        processes=processes,
        resolved=to_json(config),
        title="benchmark",
    )
    past_warm_up(trainer)
    return trainer


def past_warm_up(trainer: Trainer) -> None:
    """Put a fresh trainer behind the warm-up of its masks; where its recipe stores attention maps, it has random ones.

    What maps hold does not change what a step costs.
    """
    trainer.objective.epoch = 1 << 30
    if trainer.maps is None:
        return
    trainer.maps.folder.mkdir(parents=True)
    path = trainer.maps.folder / "random.npy"
    shape = (len(trainer.batches.images.labels), *trainer.maps.grid)
    np.save(path, np.random.default_rng(0).integers(1, 256, shape).astype(trainer.maps.config.precision))
    trainer.maps.store = MapStore(path)


def describe_inputs(config: PretrainConfig, images: int) -> str:
    """One line on what the images and the weights are."""
    what = "scikit-learn's digits"
    if config.data.source == "folder":
        what = f"{images} generated JPEG files of {WIDTH} x {HEIGHT} pixels, read from the file system's cache"
    return f"{what}; random weights for student and teacher"
