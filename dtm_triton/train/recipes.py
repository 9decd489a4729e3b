"""Recipes: functions that return a complete configuration. A variant calls its base and replaces what differs.

Numbers of the `dtm_*` recipes come from DTM (arXiv 2401.00254) and its released program; where the two differ the line
says which one it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def image_folder() -> DataConfig:
    """ImageNet-like class folders under data/train and data/val, cropped as BEiT and DTM do."""
    return DataConfig(
        source="folder",
        train_folder=Path("data/train"),
        test_folder=Path("data/val"),
        image_size=(224, 224),
        crop_scale=(0.08, 1.0),
        colour_jitter=0.4,
        workers=8,
    )


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


def dtm_vit_base_patch16_in1k() -> PretrainConfig:
    """DTM's ViT-B/16 on ImageNet-1K, 300 epochs, CLIP ViT-B/16 as the teacher."""
    batch_size = 1024  # paper
    epochs = 300  # paper
    return PretrainConfig(
        data=image_folder(),
        student=StudentConfig(
            model="beit_base_patch16_224",  # width 768, 12 blocks, 12 heads
            patch_size=16,
            drop_path=0.1,  # released program; the paper's text leaves it open (0 or 0.1)
            model_kwargs={
                "init_values": 0.1,  # LayerScale: BEiT's for S and B
                "use_abs_pos_emb": False,
                "use_rel_pos_bias": False,
                "use_shared_rel_pos_bias": True,  # BEiT pre-trains with one shared table
            },
        ),
        teacher=TeacherConfig(
            kind="timm",
            model="vit_base_patch16_clip_quickgelu_224.openai",
            project=True,  # 768 -> 512, per token
            statistics="own",  # the released program feeds CLIP with ImageNet's: "imagenet"
        ),
        mask=MaskConfig(kind="block", masked=75, min_patches=16),  # BEiT: 75 of 196
        loss=LossConfig(
            num_schedules=2, max_removed=196, max_iterations=14, kind="smooth_l1", beta=2.0
        ),  # released program
        optimizer=OptimizerConfig(
            lr=1.5e-3 * math.sqrt(batch_size / 2048),  # released program; the paper's text says 1.5e-4
            final_lr=1e-5,
            warmup_epochs=10,
            betas=(0.9, 0.98),
            eps=1e-8,
            weight_decay=0.05,
            clip_norm=3.0,
        ),
        run=RunConfig(
            folder=Path("runs/dtm_vit_base_patch16_in1k"), epochs=epochs, batch_size=batch_size, evaluate_every=10
        ),
    )


def dtm_vit_small_patch16_in1k() -> PretrainConfig:
    """The base recipe with ViT-S/16: width 384, 12 blocks, 6 heads."""
    return _sized(dtm_vit_base_patch16_in1k(), "small", {"embed_dim": 384, "num_heads": 6})


def dtm_vit_large_patch16_in1k() -> PretrainConfig:
    """The base recipe with ViT-L/16: width 1024, 24 blocks, 16 heads, LayerScale 1e-5."""
    return _sized(
        dtm_vit_base_patch16_in1k(), "large", {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5}
    )


def _sized(base: PretrainConfig, size: str, changes: dict[str, int | float]) -> PretrainConfig:
    student = replace(base.student, model_kwargs={**base.student.model_kwargs, **changes})
    return replace(base, student=student, run=replace(base.run, folder=Path(f"runs/dtm_vit_{size}_patch16_in1k")))


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


def probe_folder() -> ProbeConfig:
    """kNN and linear probe of an exported student on an image folder."""
    return ProbeConfig(weights=Path("runs/dtm_vit_base_patch16_in1k/student"), data=image_folder())


PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {
    function.__name__: function
    for function in (
        demo,
        demo_tokenwise,
        dtm_vit_small_patch16_in1k,
        dtm_vit_base_patch16_in1k,
        dtm_vit_large_patch16_in1k,
    )
}
FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {"finetune_demo": finetune_demo}
PROBE: dict[str, Callable[[], ProbeConfig]] = {"probe_demo": probe_demo, "probe_folder": probe_folder}
