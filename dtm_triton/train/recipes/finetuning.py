"""Fine-tuning and linear probing on ImageNet-1K of what MAE, SimMIM, and AMT on either have trained.

`--student.weights RUN/student` says whose; the networks are the recipes' own. None of these has RandAugment, which MAE
and SimMIM use (magnitude 9, deviation 0.5): colour jitter stands in its place. MAE and SimMIM give a whole batch one
share and one rectangle of Mixup and CutMix, here every image has its own; they norm the mean token, here tokens are
normed first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dtm_triton.train.config import FinetuneConfig, OptimizerConfig, RunConfig
from dtm_triton.train.recipes.frameworks import mae_vit_base, simmim_vit_base
from dtm_triton.train.recipes.imagenet import image_folder


def finetune_mae_vit_base() -> FinetuneConfig:
    """MAE's fine-tuning of ViT-B, and AMT's: 100 epochs. Numbers are MAE's (arXiv 2111.06377, appendix A.1)."""
    batch_size = 1024
    return FinetuneConfig(
        data=replace(image_folder(), colour_jitter=0.4),  # ours, for RandAugment; crops are MAE's
        student=replace(
            mae_vit_base().student,
            positions="learned",  # MAE: trained from here on
            drop_path=0.1,  # MAE, AMT
            weights=Path("runs/mae_vit_base/student"),
        ),
        optimizer=OptimizerConfig(
            lr=1e-3 * batch_size / 256,  # MAE's paper, AMT; its released command says 5e-4, layer decay 0.65
            final_lr=1e-6,  # MAE's released program
            warmup_epochs=5,  # MAE
            betas=(0.9, 0.999),  # MAE
            weight_decay=0.05,  # MAE
            layer_decay=0.75,  # MAE's paper, AMT
        ),
        run=RunConfig(
            folder=Path("runs/finetune_mae_vit_base"),
            epochs=100,  # MAE, AMT
            batch_size=batch_size,  # MAE, AMT
            evaluate_every=5,  # ours
        ),
        pool="mean",  # MAE's released program
        label_smoothing=0.1,  # MAE
        mixup=0.8,  # MAE, AMT
        cutmix=1.0,  # MAE, AMT
        random_erasing=0.25,  # MAE's released program, AMT
    )


def finetune_simmim_vit_base() -> FinetuneConfig:
    """SimMIM's fine-tuning of ViT-B, and AMT's: 100 epochs. Numbers are those of SimMIM's released configuration.

    SimMIM gives every block a position table of its own here; ours keeps the one they share.
    """
    batch_size = 2048
    return FinetuneConfig(
        data=replace(image_folder(), colour_jitter=0.4),  # SimMIM's number, which its RandAugment overrules
        student=replace(
            simmim_vit_base().student,  # with its drop path 0.1: SimMIM
            weights=Path("runs/simmim_vit_base/student"),
        ),
        optimizer=OptimizerConfig(
            lr=1.25e-3 * batch_size / 512,  # SimMIM, AMT: base rate per 512 images
            final_lr=2.5e-7 * batch_size / 512,  # SimMIM
            warmup_epochs=20,  # SimMIM, AMT
            betas=(0.9, 0.999),  # SimMIM
            weight_decay=0.05,  # SimMIM
            clip_norm=5.0,  # SimMIM
            layer_decay=0.65,  # SimMIM, AMT
        ),
        run=RunConfig(
            folder=Path("runs/finetune_simmim_vit_base"),
            epochs=100,  # SimMIM, AMT
            batch_size=batch_size,  # SimMIM: 16 GPUs of 128
            evaluate_every=5,  # ours
        ),
        pool="mean",  # SimMIM
        label_smoothing=0.1,  # SimMIM
        mixup=0.8,  # SimMIM
        cutmix=1.0,  # SimMIM
        random_erasing=0.25,  # SimMIM
    )


def linear_mae_vit_base() -> FinetuneConfig:
    """MAE's linear probing of ViT-B, and AMT's: a head on frozen features. Numbers are MAE's (appendix A.1)."""
    batch_size = 16384
    return FinetuneConfig(
        data=replace(image_folder(), crop_scale=(0.08, 1.0), colour_jitter=0.0),  # MAE: crop and flip only
        student=replace(mae_vit_base().student, positions="learned", weights=Path("runs/mae_vit_base/student")),
        optimizer=OptimizerConfig(
            kind="lars",  # MAE
            lr=0.1 * batch_size / 256,  # MAE: base rate per 256 images
            final_lr=0.0,  # MAE
            warmup_epochs=10,  # MAE
            betas=(0.9, 0.999),  # MAE: momentum 0.9; LARS has no second moment
            weight_decay=0.0,  # MAE
        ),
        run=RunConfig(
            folder=Path("runs/linear_mae_vit_base"),
            epochs=90,  # MAE
            batch_size=batch_size,  # MAE
            evaluate_every=5,  # ours
        ),
        pool="class",  # MAE
        frozen=True,  # MAE: BatchNorm without weights before the head
    )
