"""DTM on ImageNet-1K: the paper's three students, the two texts' variants, other teachers, a modern student.

Numbers come from DTM (arXiv 2401.00254) and its released program, which builds on BEiT v2 (2208.06366). A line's
comment says whose number it is and where the two differ. What neither says and we chose is marked "ours".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from dtm_triton.train.config import (
    DataConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)

CLIP = TeacherConfig(
    kind="timm",
    model="vit_base_patch16_clip_quickgelu_224.openai",  # paper: CLIP ViT-B/16
    project=True,  # released program: 768 -> 512, per token; off: its mode that keeps 768
    statistics="own",  # CLIP's; the released program feeds it with ImageNet's
)
TEACHERS = {  # of ViT-B students: any other by --teacher.model, with its weights by --teacher.weights
    "dinov2": TeacherConfig(kind="timm", model="vit_base_patch14_dinov2.lvd142m"),
    "dinov3": TeacherConfig(kind="timm", model="vit_base_patch16_dinov3.lvd1689m"),
    "siglip": TeacherConfig(kind="timm", model="vit_base_patch16_siglip_224.v2_webli"),
    "eva_clip": TeacherConfig(kind="timm", model="eva02_base_patch16_clip_224.merged2b", project=True),
}
TRUNCATED = 0.5396  # deviation of a normal number cut off at one deviation


def image_folder() -> DataConfig:
    """ImageNet-like class folders under data/train and data/val, cropped as BEiT and DTM do."""
    return DataConfig(
        source="folder",
        train_folder=Path("data/train"),
        test_folder=Path("data/val"),
        image_size=(224, 224),  # both
        crop_scale=(0.08, 1.0),  # released program's default
        flip=True,  # both
        colour_jitter=0.4,  # both
        workers=8,
    )


def dtm_vit_base_patch16_in1k() -> PretrainConfig:
    """DTM's ViT-B/16 on ImageNet-1K, 300 epochs, CLIP ViT-B/16 as the teacher."""
    batch_size = 1024  # paper
    return PretrainConfig(
        data=image_folder(),
        student=StudentConfig(
            model="beit_base_patch16_224",  # both: width 768, 12 blocks, 12 heads
            patch_size=16,  # both
            drop_path=0.1,  # released program's default; the paper leaves it open (0 or 0.1)
            init_std=0.02,  # both; the released program cuts off at one deviation
            model_kwargs={
                "init_values": 0.1,  # both: LayerScale of S and B
                "use_abs_pos_emb": False,  # both
                "use_rel_pos_bias": False,  # released program: True, a table in every block besides
                "use_shared_rel_pos_bias": True,  # both: one table for all blocks
            },
        ),
        teacher=CLIP,
        mask=MaskConfig(kind="block", masked=75, min_patches=16),  # both: BEiT's, 75 of 196
        loss=LossConfig(
            num_schedules=2,  # both: L
            max_removed=196,  # both: m ~ U{0..196}
            max_iterations=14,  # both: k ~ U{1..14}
            kind="smooth_l1",  # both
            beta=2.0,  # released program
            normalize_target=False,  # released program's default
            num_protected=0,  # released program: 1, though the first token is a patch
            split="alternating",  # released program; the paper's Algorithm 1 says "random"
        ),
        optimizer=OptimizerConfig(
            lr=1.5e-3 * math.sqrt(batch_size / 2048),  # released program's rule; the paper's text says 1.5e-4
            final_lr=1e-5,  # both
            warmup_epochs=10,  # both
            betas=(0.9, 0.98),  # both
            eps=1e-8,  # released program
            weight_decay=0.05,  # both
            clip_norm=3.0,  # both
        ),
        run=RunConfig(
            folder=Path("runs/dtm_vit_base_patch16_in1k"),
            epochs=300,  # paper
            batch_size=batch_size,
            evaluate_every=10,  # ours
        ),
    )


def dtm_vit_small_patch16_in1k() -> PretrainConfig:
    """The base recipe with ViT-S/16: width 384, 12 blocks, 6 heads."""
    return with_student(dtm_vit_base_patch16_in1k(), embed_dim=384, num_heads=6)


def dtm_vit_large_patch16_in1k() -> PretrainConfig:
    """The base recipe with ViT-L/16: width 1024, 24 blocks, 16 heads, LayerScale 1e-5."""
    return with_student(dtm_vit_base_patch16_in1k(), embed_dim=1024, depth=24, num_heads=16, init_values=1e-5)


def released(base: PretrainConfig) -> PretrainConfig:
    """What the released program does otherwise: ImageNet's statistics for CLIP, a protected patch, position tables in
    every block beside the shared one, narrower initial weights.

    Its learning rate is the base's already. Not reproduced: fp16, decay of the mask token and of the position tables.
    """
    base = with_student(base, use_rel_pos_bias=True)
    return replace(
        base,
        student=replace(base.student, init_std=base.student.init_std * TRUNCATED),
        teacher=replace(base.teacher, statistics="imagenet"),
        loss=replace(base.loss, num_protected=1),
    )


def paper(base: PretrainConfig) -> PretrainConfig:
    """What the paper's text says otherwise: tokens split at random, learning rate 1.5e-4."""
    return replace(base, loss=replace(base.loss, split="random"), optimizer=replace(base.optimizer, lr=1.5e-4))


def dtm_vit_base_teacher(teacher: TeacherConfig) -> PretrainConfig:
    """The base recipe with another teacher; the student's grid decides at which size the teacher sees the image."""
    return replace(dtm_vit_base_patch16_in1k(), teacher=teacher)


def dtm_eva_vit_base() -> PretrainConfig:
    """The base recipe with a modern student: timm's Eva with rotary positions and 4 registers, as DINOv3's ViT-B/16.

    Rotary positions leave flash attention on, which a position bias does not.
    """
    base = dtm_vit_base_patch16_in1k()
    kwargs: dict[str, bool | int | float | str] = {"init_values": 0.1}  # LayerScale as BEiT's
    student = replace(base.student, model="vit_base_patch16_dinov3", model_kwargs=kwargs)
    return replace(base, student=student)


def with_student(base: PretrainConfig, **changes: bool | int | float | str) -> PretrainConfig:
    """The recipe with further or other arguments of the timm model.

    >>> with_student(dtm_vit_base_patch16_in1k(), depth=3).student.model_kwargs["depth"]
    3
    """
    student = replace(base.student, model_kwargs={**base.student.model_kwargs, **changes})
    return replace(base, student=student)


def probe_folder() -> ProbeConfig:
    """kNN and linear probe of an exported student on an image folder."""
    return ProbeConfig(weights=Path("runs/dtm_vit_base_patch16_in1k/student"), data=image_folder())


def imagenet_recipes() -> dict[str, Callable[[], PretrainConfig]]:
    """All of this file by name: students, each with its two variants; teachers; the modern student."""
    table: dict[str, Callable[[], PretrainConfig]] = {}
    for recipe in (dtm_vit_small_patch16_in1k, dtm_vit_base_patch16_in1k, dtm_vit_large_patch16_in1k):
        table[recipe.__name__] = recipe
        for variant in (released, paper):
            table[f"{recipe.__name__}_{variant.__name__}"] = partial(_varied, variant, recipe)
    for name, teacher in TEACHERS.items():
        table[f"dtm_vit_base_{name}"] = partial(dtm_vit_base_teacher, teacher)
    return {**table, dtm_eva_vit_base.__name__: dtm_eva_vit_base}


def _varied(
    variant: Callable[[PretrainConfig], PretrainConfig], recipe: Callable[[], PretrainConfig]
) -> PretrainConfig:
    return variant(recipe())
