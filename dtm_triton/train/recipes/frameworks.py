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


def mae_vit_base() -> PretrainConfig:
    """MAE (arXiv 2111.06377): a quarter of the patches seen, standardised pixels of the masked ones predicted.

    Numbers are those of its released program for ViT-B.
    """
    batch_size = 4096
    return PretrainConfig(
        method="mae",
        data=replace(image_folder(), crop_scale=(0.2, 1.0), colour_jitter=0.0),  # MAE: crop and flip only
        student=StudentConfig(
            model="vit_base_patch16_224",
            patch_size=16,
            positions="sincos",  # MAE: fixed sines and cosines
        ),  # MAE: no drop path, no LayerScale
        teacher=TeacherConfig(kind="pixels", standardise=True),  # MAE: every patch's own mean and deviation
        decoder=DecoderConfig(width=512, depth=8, heads=16),  # MAE, for all sizes
        mask=MaskConfig(kind="random", masked=147),  # MAE: 75 % of 196
        loss=LossConfig(morph=False, on="masked", kind="l2"),  # MAE
        optimizer=OptimizerConfig(
            lr=1.5e-4 * batch_size / 256,  # MAE: base rate per 256 images
            final_lr=0.0,  # MAE
            warmup_epochs=40,  # MAE
            betas=(0.9, 0.95),  # MAE
            weight_decay=0.05,  # MAE
        ),
        run=RunConfig(
            folder=Path("runs/mae"),
            epochs=400,  # MAE and AMT: 400 and 800 are both reported
            batch_size=batch_size,  # MAE
            evaluate_every=20,  # ours
        ),
    )


def mae_vit_small() -> PretrainConfig:
    """`mae_vit_base` with ViT-S: width 384, 6 heads; the same decoder. MAE has no such size, AMT neither."""
    return _with_model(mae_vit_base(), "vit_small_patch16_224")


def mae_vit_large() -> PretrainConfig:
    """`mae_vit_base` with ViT-L: width 1024, 24 blocks, 16 heads; the same decoder."""
    return _with_model(mae_vit_base(), "vit_large_patch16_224")


def _with_model(base: PretrainConfig, model: str) -> PretrainConfig:
    return replace(base, student=replace(base.student, model=model))


def mae_clip_vit_base() -> PretrainConfig:
    """MAE that predicts CLIP's tokens with DTM's loss, over all tokens."""
    return replace(mae_vit_base(), teacher=CLIP, loss=dtm_vit_base_patch16_in1k().loss)


def simmim_vit_base() -> PretrainConfig:
    """SimMIM (arXiv 2111.09886): pixels of random squares of 32 pixels from mask tokens, by one linear layer.

    Numbers are those of its released configuration for ViT-B, but for the 200 epochs that AMT trains it.
    """
    batch_size = 2048
    return PretrainConfig(
        data=replace(image_folder(), crop_scale=(0.67, 1.0), colour_jitter=0.0),  # SimMIM
        student=StudentConfig(
            model="beit_base_patch16_224",  # SimMIM: BEiT's ViT-B
            patch_size=16,  # SimMIM
            drop_path=0.1,  # SimMIM
            model_kwargs={
                "init_values": 0.1,  # SimMIM: LayerScale
                "use_abs_pos_emb": False,  # SimMIM
                "use_rel_pos_bias": False,  # SimMIM
                "use_shared_rel_pos_bias": True,  # SimMIM: one table for all blocks
            },
        ),
        teacher=TeacherConfig(kind="pixels", standardise=False),  # SimMIM: pixels as the student sees them
        mask=MaskConfig(kind="random", masked=120, unit=2),  # SimMIM: 30 of 49 squares, 60 % rounded up
        loss=LossConfig(morph=False, on="masked", kind="l1"),  # SimMIM
        optimizer=OptimizerConfig(
            lr=1e-4 * batch_size / 512,  # SimMIM: base rate per 512 images
            final_lr=5e-6 * batch_size / 512,  # SimMIM's for a cosine; its own 800 epochs divide by 10 after 700
            warmup_epochs=10,  # SimMIM
            betas=(0.9, 0.999),  # SimMIM
            weight_decay=0.05,  # SimMIM
            clip_norm=5.0,  # SimMIM
        ),
        run=RunConfig(
            folder=Path("runs/simmim"),
            epochs=200,  # AMT; SimMIM 800
            batch_size=batch_size,  # SimMIM: 16 GPUs of 128
            evaluate_every=10,  # ours
        ),
    )


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
