"""Recipes to begin with: the demo on scikit-learn's digits, and a first run on images of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dtm_triton.train.config import (
    DataConfig,
    EmaConfig,
    FinetuneConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)


def digits() -> DataConfig:
    """scikit-learn's 8 x 8 digits at a random place of a 12 x 12 canvas."""
    return DataConfig(
        source="digits", image_size=(12, 12), channels=1, flip=False, mean=(0.2,), std=(0.35,)
    )  # a mirrored digit is another sign


def digits_student() -> StudentConfig:
    """A small ViT: width 96, 3 blocks, 36 patches of 2 x 2 pixels."""
    return StudentConfig(
        model="vit_tiny_patch16_224",
        patch_size=2,
        init_std=0.08,  # BEiT's 0.02 is for widths of hundreds
        model_kwargs={"embed_dim": 96, "depth": 3, "num_heads": 3},
    )


def demo() -> PretrainConfig:
    """DTM on digits in about two minutes on one CPU core, with a convolutional teacher trained on the spot.

    Its folder is that of `make demo`, which trains the same student: what one has done the other does not repeat.
    """
    return PretrainConfig(
        data=digits(),
        student=digits_student(),
        teacher=TeacherConfig(kind="conv", features=64, epochs=8),
        mask=MaskConfig(kind="random", masked=6),
        loss=LossConfig(max_removed=36),
        optimizer=OptimizerConfig(lr=1e-3, warmup_epochs=2, betas=(0.9, 0.98), clip_norm=3.0),
        run=RunConfig(
            folder=Path("runs/demo/dtm"),
            epochs=44,
            batch_size=16,
            threads=1,  # a fixed number: the same bits on every run
            deterministic=True,
            checkpoint_every=50,
            evaluate_every=10,
        ),
    )


def demo_tokenwise() -> PretrainConfig:
    """`demo` without morphing: every token is compared with its own target. All else is equal."""
    base = demo()
    return replace(
        base, loss=replace(base.loss, morph=False), run=replace(base.run, folder=Path("runs/demo/tokenwise"))
    )


def own_images() -> PretrainConfig:
    """A first run on a folder of your own photos, a few hundred or more: no labels, no teacher to download.

    The teacher is a moving average of the student, as in data2vec; DTM's loss; a small ViT at 128 pixels. It learns
    visibly within a minute on two CPU cores and is as slow as its images are many.
    """
    return PretrainConfig(
        data=DataConfig(
            source="folder",
            train_folder=Path("data/train"),
            image_size=(128, 128),
            crop_scale=(0.2, 1.0),
            colour_jitter=0.4,
            workers=2,
        ),
        student=StudentConfig(
            model="vit_tiny_patch16_224",  # width 192, 3 heads
            patch_size=16,
            init_std=0.04,
            model_kwargs={"depth": 6},
        ),
        teacher=TeacherConfig(kind="ema"),
        ema=EmaConfig(momentum=0.99, final_momentum=0.9995, blocks=3),  # for runs of some thousand steps
        mask=MaskConfig(kind="block", masked=38, min_patches=6),  # 60 % of 64
        loss=LossConfig(max_removed=64),
        optimizer=OptimizerConfig(lr=5e-4, warmup_epochs=5, betas=(0.9, 0.98), clip_norm=3.0),
        run=RunConfig(folder=Path("runs/own_images"), epochs=100, batch_size=64, log_every=5, checkpoint_every=50),
    )


def finetune_demo() -> FinetuneConfig:
    """Supervised training of the demo's student on digits."""
    return FinetuneConfig(
        data=digits(),
        student=replace(digits_student(), weights=Path("runs/demo/dtm/student")),
        optimizer=OptimizerConfig(lr=1e-3, warmup_epochs=1, layer_decay=0.75, clip_norm=3.0),
        run=RunConfig(
            folder=Path("runs/finetune_demo"),
            epochs=10,
            batch_size=64,
            threads=1,
            deterministic=True,
            evaluate_every=2,
        ),
        label_smoothing=0.1,
    )


def linear_demo() -> FinetuneConfig:
    """Linear probing of the demo's student on digits, by training: the backbone stays as it is."""
    base = finetune_demo()
    return replace(
        base,
        optimizer=OptimizerConfig(kind="lars", lr=1.0, final_lr=0.0, warmup_epochs=1, weight_decay=0.0),
        run=replace(base.run, folder=Path("runs/linear_demo")),
        label_smoothing=0.0,
        frozen=True,
    )


def probe_demo() -> ProbeConfig:
    """kNN and linear probe of the demo's student on digits."""
    return ProbeConfig(weights=Path("runs/demo/dtm/student"), data=digits())
