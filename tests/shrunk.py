"""Recipes shrunk to seconds: a few small generated images, models of two narrow blocks, teachers of random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

from dtm_triton.train import recipes
from dtm_triton.train.build import build_objective
from dtm_triton.train.config import (
    CodebookConfig,
    DecoderConfig,
    FinetuneConfig,
    OptimizerConfig,
    PretrainConfig,
    ProjectorConfig,
    RunConfig,
    TeacherConfig,
    to_json,
)
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer

SIZE = (32, 48)  # of images; the grid of 8-pixel patches is (4, 6)
PATCHES = 24
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3}
FULL_SCALE = [name for name in recipes.PRETRAIN if not name.startswith(("demo", "own"))]
METHODS = {  # one recipe for every way through the objectives
    "masked": "dtm_vit_base_patch16_in1k",
    "hog": "maskfeat_vit_base",
    "ema": "data2vec_vit_base",
    "mae": "mae_clip_vit_base",
    "beit_v2": "beit_v2_vit_base",
    "byol": "byol_vit_base",
}


def write_images(folder: Path) -> Path:
    """16 images to train and 6 held out, of two classes, larger than needed and of several sizes."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for label in ("left", "right"):
            place = folder / part / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 120, (40 + number, 60, 3), dtype=np.uint8)
                pixels[:, slice(0, 30) if label == "left" else slice(30, 60), number % 3] += 120
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def write_teacher(folder: Path, config: TeacherConfig) -> TeacherConfig:
    """The teacher's architecture with two narrow blocks and random weights, in a file."""
    torch.manual_seed(0)
    path = folder / f"{config.model}.safetensors"
    if not path.exists():
        model = timm.create_model(config.model, **SMALL)
        safetensors.torch.save_file(model.state_dict(), path)
    return replace(config, weights=path, model_kwargs=dict(SMALL))


def shrink(config: PretrainConfig, images: Path, folder: Path, **run: Any) -> PretrainConfig:
    """The recipe on the images of `write_images`, in `folder`: 2 steps an epoch, 2 epochs."""
    data = replace(config.data, train_folder=images / "train", test_folder=images / "val", image_size=SIZE, workers=0)
    teacher = write_teacher(images, config.teacher) if config.teacher.kind == "timm" else config.teacher
    kwargs, maps, square = {**config.student.model_kwargs, **SMALL}, config.attention, config.mask.unit**2
    masked, thrown, first = (
        count * PATCHES // 196 // square * square
        for count in (config.mask.masked, config.mask.thrown, maps.warmup_masked)
    )
    return replace(
        config,
        data=data,
        student=replace(config.student, model_kwargs=kwargs, patch_size=8, init_std=0.08),
        teacher=teacher,
        mask=replace(config.mask, masked=masked, thrown=thrown, min_patches=2),
        attention=replace(
            maps,
            warmup_masked=first,
            warmup_epochs=min(maps.warmup_epochs, 1),  # of the two: maps are made after the first
            refresh_epochs=min(maps.refresh_epochs, 1),
        ),
        loss=replace(config.loss, max_removed=PATCHES - thrown, max_iterations=4),
        optimizer=replace(config.optimizer, lr=1e-3, warmup_epochs=1, final_lr=min(1e-5, config.optimizer.final_lr)),
        ema=replace(config.ema, blocks=2),
        decoder=DecoderConfig(width=16, depth=1, heads=2),
        codebook=CodebookConfig(codes=16, momentum=0.9),
        projector=ProjectorConfig(hidden=32, features=16),
        run=RunConfig(
            **{"folder": folder, "epochs": 2, "batch_size": 8, "threads": 1, "log_every": 1, "device": "cpu", **run}
        ),
    )


def shrink_finetuning(config: FinetuneConfig, images: Path, folder: Path, **run: Any) -> FinetuneConfig:
    """The recipe on the images of `write_images`, in `folder`, from random weights: 2 steps an epoch, 2 epochs."""
    data = replace(config.data, train_folder=images / "train", test_folder=images / "val", image_size=SIZE, workers=0)
    kwargs = {**config.student.model_kwargs, **SMALL}
    return replace(
        config,
        data=data,
        student=replace(config.student, model_kwargs=kwargs, patch_size=8, init_std=0.08, weights=None),
        optimizer=replace(config.optimizer, warmup_epochs=1),
        run=RunConfig(
            **{"folder": folder, "epochs": 2, "batch_size": 8, "threads": 1, "log_every": 1, "device": "cpu", **run}
        ),
    )


def shrunk_trainer(config: PretrainConfig, processes: Processes | None = None) -> Trainer:
    processes = processes or Processes()
    return Trainer(
        build_objective(config, processes),
        data=config.data,
        optimizer=config.optimizer,
        run=config.run,
        processes=processes,
        resolved=to_json(config),
        title="shrunk",
    )


def steady(config: PretrainConfig, **optimizer: Any) -> PretrainConfig:
    """Without random depth: the same batch gives the same loss."""
    student = replace(config.student, drop_path=0.0)
    student = replace(student, model_kwargs={k: v for k, v in student.model_kwargs.items() if k != "attn_drop_rate"})
    return replace(config, student=student, optimizer=OptimizerConfig(lr=3e-3, **optimizer))
