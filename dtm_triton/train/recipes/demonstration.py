"""Recipes of the demo: scikit-learn's digits, a model that trains in minutes on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dtm_triton.train.config import (
    DataConfig,
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
    """DTM on digits in about two minutes on one CPU core, with a convolutional teacher trained on the spot."""
    return PretrainConfig(
        data=digits(),
        student=digits_student(),
        teacher=TeacherConfig(kind="conv", features=64, epochs=8),
        mask=MaskConfig(kind="random", masked=6),
        loss=LossConfig(max_removed=36),
        optimizer=OptimizerConfig(lr=1e-3, warmup_epochs=2, betas=(0.9, 0.98), clip_norm=3.0),
        run=RunConfig(
            folder=Path("runs/demo_dtm"),
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
        base, loss=replace(base.loss, morph=False), run=replace(base.run, folder=Path("runs/demo_tokenwise"))
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


def probe_demo() -> ProbeConfig:
    """kNN and linear probe of the demo's student on digits."""
    return ProbeConfig(weights=Path("runs/demo/dtm/student"), data=digits())
