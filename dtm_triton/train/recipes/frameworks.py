"""Other frameworks on ImageNet-1K with ViT-B/16: with DTM as their loss, and the plain ones it is added to.

`mae_clip_vit_base`, `beit_v2_vit_base` and `byol_vit_base` are the rows of DTM's compatibility table; that paper does
not give their settings, so each has its own framework's. `--loss.no-morph` makes any of them token-wise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dtm_triton.train.config import (
    DecoderConfig,
    EmaConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    PretrainConfig,
    ProjectorConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from dtm_triton.train.recipes.imagenet import CLIP, dtm_vit_base_patch16_in1k, image_folder, with_student


def mae_pixels_vit_base() -> PretrainConfig:
    """MAE (arXiv 2111.06377): a quarter of the patches seen, standardised pixels of the masked ones predicted."""
    batch_size = 4096
    return PretrainConfig(
        method="mae",
        data=replace(image_folder(), crop_scale=(0.2, 1.0), colour_jitter=0.0),  # MAE: crop and flip only
        student=StudentConfig(
            model="vit_base_patch16_224", patch_size=16
        ),  # MAE's with learned positions; no drop path, no LayerScale
        teacher=TeacherConfig(kind="pixels"),
        decoder=DecoderConfig(width=512, depth=8, heads=16),
        mask=MaskConfig(kind="random", masked=147),  # 75 % of 196
        loss=LossConfig(morph=False, on="masked", kind="l2"),
        optimizer=OptimizerConfig(
            lr=1.5e-4 * batch_size / 256, final_lr=0.0, warmup_epochs=40, betas=(0.9, 0.95), weight_decay=0.05
        ),
        run=RunConfig(folder=Path("runs/mae"), epochs=400, batch_size=batch_size, evaluate_every=20),
    )


def mae_clip_vit_base() -> PretrainConfig:
    """MAE that predicts CLIP's tokens with DTM's loss, over all tokens."""
    return replace(mae_pixels_vit_base(), teacher=CLIP, loss=dtm_vit_base_patch16_in1k().loss)


def maskfeat_vit_base() -> PretrainConfig:
    """MaskFeat (arXiv 2112.09133): oriented gradients of the masked patches; settings of OpenMMLab's 300 epochs."""
    return PretrainConfig(
        data=replace(image_folder(), crop_scale=(0.5, 1.0), colour_jitter=0.0),
        student=StudentConfig(model="vit_base_patch16_224", patch_size=16),
        teacher=TeacherConfig(kind="hog"),
        mask=MaskConfig(kind="block", masked=78, min_patches=15),  # 40 %
        loss=LossConfig(morph=False, on="masked", kind="l2"),
        optimizer=OptimizerConfig(lr=1.6e-3, final_lr=1e-6, warmup_epochs=30, weight_decay=0.05, clip_norm=0.02),
        run=RunConfig(folder=Path("runs/maskfeat"), epochs=300, batch_size=2048, evaluate_every=10),
    )


def data2vec_vit_base() -> PretrainConfig:
    """data2vec (arXiv 2202.03555) with DTM's loss: a moving average of the student is the teacher, from scratch.

    Numbers are those of its released command for ViT-B, 800 epochs. data2vec itself compares masked tokens one by one:
    `--loss.no-morph --loss.on masked`.
    """
    base = with_student(dtm_vit_base_patch16_in1k(), init_values=1e-4, attn_drop_rate=0.05)
    return replace(
        base,
        student=replace(base.student, drop_path=0.25),
        teacher=TeacherConfig(kind="ema"),
        ema=EmaConfig(momentum=0.999, final_momentum=0.9998, blocks=6),
        mask=MaskConfig(kind="block", masked=120, min_patches=16),
        optimizer=OptimizerConfig(lr=2e-3, final_lr=1e-5, warmup_epochs=10, weight_decay=0.05, clip_norm=3.0),
        run=replace(base.run, epochs=800, batch_size=2048),
    )


def beit_v2_vit_base() -> PretrainConfig:
    """BEiT v2-style (arXiv 2208.06366): codes of CLIP's morphed tokens; see `objectives/beit_v2.py` for what is ours.

    Student, masks and schedule are the base recipe's, which DTM took from BEiT v2; 8192 codes as there.
    """
    return replace(dtm_vit_base_patch16_in1k(), method="beit_v2")


def byol_vit_base() -> PretrainConfig:
    """BYOL (arXiv 2006.07733) with DTM's loss on tokens; optimiser as in MoCo v3 (2104.02057)."""
    batch_size = 4096
    return PretrainConfig(
        method="byol",
        data=image_folder(),
        student=StudentConfig(model="vit_base_patch16_224", patch_size=16),
        teacher=TeacherConfig(kind="ema"),
        ema=EmaConfig(momentum=0.996, final_momentum=1.0),  # BYOL
        projector=ProjectorConfig(hidden=4096, features=256),  # BYOL
        mask=MaskConfig(kind="random", masked=0),  # BYOL hides nothing
        loss=LossConfig(kind="cosine"),
        optimizer=OptimizerConfig(
            lr=1.5e-4 * batch_size / 256, final_lr=0.0, warmup_epochs=40, weight_decay=0.1
        ),  # MoCo v3
        run=RunConfig(folder=Path("runs/byol"), epochs=300, batch_size=batch_size, evaluate_every=10),  # MoCo v3
    )
