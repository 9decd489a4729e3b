"""Recipes' numbers are their sources', variants differ from what they build on in the fields that they name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunk import FULL_SCALE

from dtm_triton.train import recipes
from dtm_triton.train.build import build_student
from dtm_triton.train.config import to_json
from dtm_triton.train.engine.run_folder import differences

IN1K = [f"dtm_vit_{size}_patch16_in1k" for size in ("small", "base", "large")]
CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def numbers(name: str) -> dict[str, Any]:
    return dict(flat(json.loads(to_json(recipes.PRETRAIN[name]()))))


@pytest.mark.parametrize("name", IN1K)
def test_the_papers_numbers(name: str) -> None:
    found = numbers(name)
    expected = {
        "method": "masked",
        "data.image_size": [224, 224],
        "data.crop_scale": [0.08, 1.0],
        "data.flip": True,
        "data.colour_jitter": 0.4,
        "student.patch_size": 16,
        "student.drop_path": 0.1,
        "student.init_std": 0.02,
        "student.model_kwargs.use_abs_pos_emb": False,
        "student.model_kwargs.use_shared_rel_pos_bias": True,
        "teacher.model": CLIP,
        "teacher.project": True,
        "teacher.statistics": "own",
        "mask.kind": "block",
        "mask.masked": 75,
        "mask.min_patches": 16,
        "loss.morph": True,
        "loss.on": "all",
        "loss.num_schedules": 2,
        "loss.max_removed": 196,
        "loss.max_iterations": 14,
        "loss.kind": "smooth_l1",
        "loss.beta": 2.0,
        "loss.normalize_target": False,
        "loss.num_protected": 0,
        "loss.split": "alternating",
        "loss.shared_schedules": False,
        "optimizer.lr": pytest.approx(1.5e-3 * math.sqrt(1024 / 2048)),
        "optimizer.final_lr": 1e-5,
        "optimizer.warmup_epochs": 10,
        "optimizer.betas": [0.9, 0.98],
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.05,
        "optimizer.clip_norm": 3.0,
        "optimizer.layer_decay": 1.0,
        "run.epochs": 300,
        "run.batch_size": 1024,
    }
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads", "scale"),
    [("small", 384, 12, 6, 0.1), ("base", 768, 12, 12, 0.1), ("large", 1024, 24, 16, 1e-5)],
)
def test_the_papers_students(size: str, width: int, depth: int, heads: int, scale: float) -> None:
    config = recipes.PRETRAIN[f"dtm_vit_{size}_patch16_in1k"]()
    with torch.device("meta"):
        student: Any = build_student(config.student, config.data, 512)
    blocks = student.backbone.blocks
    assert (student.backbone.embed_dim, len(blocks), blocks[0].attn.num_heads) == (width, depth, heads)
    assert student.grid == (14, 14) and student.head.out_features == 512
    assert student.backbone.pos_embed is None and student.backbone.rel_pos_bias is not None
    assert blocks[0].attn.relative_position_bias_table is None and blocks[0].gamma_1 is not None
    assert config.student.model_kwargs["init_values"] == scale


SIMMIM: dict[str, Any] = {
    "method": "masked",
    "data.crop_scale": [0.67, 1.0],
    "data.colour_jitter": 0.0,
    "student.model": "beit_base_patch16_224",
    "student.drop_path": 0.1,
    "student.positions": "learned",
    "student.model_kwargs.init_values": 0.1,
    "student.model_kwargs.use_abs_pos_emb": False,
    "student.model_kwargs.use_rel_pos_bias": False,
    "student.model_kwargs.use_shared_rel_pos_bias": True,
    "teacher.kind": "pixels",
    "teacher.standardise": False,
    "mask.kind": "random",
    "mask.masked": 30 * 4,
    "mask.thrown": 0,
    "mask.unit": 2,
    "loss.morph": False,
    "loss.on": "masked",
    "loss.kind": "l1",
    "optimizer.lr": pytest.approx(4e-4),  # 1e-4 per 512 images
    "optimizer.warmup_epochs": 10,
    "optimizer.weight_decay": 0.05,
    "optimizer.clip_norm": 5.0,
    "run.epochs": 200,
    "run.batch_size": 2048,
}
MAE: dict[str, Any] = {
    "method": "mae",
    "data.crop_scale": [0.2, 1.0],
    "data.colour_jitter": 0.0,
    "data.flip": True,
    "student.drop_path": 0.0,
    "student.positions": "sincos",
    "student.model_kwargs": {},
    "teacher.kind": "pixels",
    "teacher.standardise": True,
    "decoder.width": 512,
    "decoder.depth": 8,
    "decoder.heads": 16,
    "mask.kind": "random",
    "mask.masked": 147,
    "mask.thrown": 0,
    "loss.morph": False,
    "loss.on": "masked",
    "loss.kind": "l2",
    "optimizer.lr": pytest.approx(2.4e-3),  # 1.5e-4 per 256 images
    "optimizer.final_lr": 0.0,
    "optimizer.warmup_epochs": 40,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.weight_decay": 0.05,
    "optimizer.clip_norm": None,
    "run.epochs": 400,
    "run.batch_size": 4096,
}
AMT: dict[str, Any] = {
    "mask.kind": "attention",
    "mask.masked": 88,
    "mask.thrown": 78,
    "mask.unit": 1,
    "mask.temperature": 1.0,
    "mask.order": ["masked", "thrown", "visible"],
    "attention.source": "student",
    "attention.statistic": "class_row",
    "attention.maps": "stored",
    "attention.warmup_epochs": 40,
    "attention.warmup_masked": 147,
    "attention.refresh_epochs": 40,
    "attention.crop": "exact",
}
AMT_SIMMIM = {**AMT, "mask.masked": 22 * 4, "mask.thrown": 13 * 4, "mask.unit": 2, "attention.warmup_masked": 120}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((f"mae_vit_{size}", MAE) for size in ("small", "base", "large")),
        *((f"amt_mae_vit_{size}", {**MAE, **AMT}) for size in ("small", "base", "large")),
        ("simmim_vit_base", SIMMIM),
        ("amt_simmim_vit_base", {**SIMMIM, **AMT_SIMMIM}),
    ],
)
def test_the_sources_numbers(name: str, expected: dict[str, Any]) -> None:
    found = {**numbers(name), "student.model_kwargs": recipes.PRETRAIN[name]().student.model_kwargs}
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads"), [("small", 384, 12, 6), ("base", 768, 12, 12), ("large", 1024, 24, 16)]
)
def test_maes_students(size: str, width: int, depth: int, heads: int) -> None:
    config = recipes.PRETRAIN[f"amt_mae_vit_{size}"]()
    with torch.device("meta"):
        backbone: Any = build_student(config.student, config.data, 768).backbone
    assert (backbone.embed_dim, len(backbone.blocks), backbone.blocks[0].attn.num_heads) == (width, depth, heads)
    assert not backbone.pos_embed.requires_grad and isinstance(backbone.blocks[0].ls1, torch.nn.Identity)


def test_maps_of_amt_are_made_after_40_80_to_360_epochs() -> None:
    config = recipes.PRETRAIN["amt_mae_vit_base"]()
    due = [epoch for epoch in range(config.run.epochs) if config.attention.due(epoch)]
    assert due == list(range(40, 400, 40))


RELEASED = {
    "student.init_std: 0.02 -> 0.010792",
    "student.model_kwargs.use_rel_pos_bias: False -> True",
    "teacher.statistics: 'own' -> 'imagenet'",
    "loss.num_protected: 0 -> 1",
}
PAPER = {"loss.split: 'alternating' -> 'random'", "optimizer.lr: 0.0010606601717798214 -> 0.00015"}
MODEL = f"teacher.model: '{CLIP}' -> "


@pytest.mark.parametrize(
    ("name", "base", "changes"),
    [
        *((f"{base}_released", base, RELEASED) for base in IN1K),
        *((f"{base}_paper", base, PAPER) for base in IN1K),
        (
            "dtm_vit_small_patch16_in1k",
            "dtm_vit_base_patch16_in1k",
            {"student.model_kwargs.embed_dim: None -> 384", "student.model_kwargs.num_heads: None -> 6"},
        ),
        (
            "dtm_vit_base_dinov2",
            "dtm_vit_base_patch16_in1k",
            {MODEL + "'vit_base_patch14_dinov2.lvd142m'", "teacher.project: True -> False"},
        ),
        (
            "dtm_vit_base_eva_clip",
            "dtm_vit_base_patch16_in1k",
            {MODEL + "'eva02_base_patch16_clip_224.merged2b'"},
        ),
        ("beit_v2_vit_base", "dtm_vit_base_patch16_in1k", {"method: 'masked' -> 'beit_v2'"}),
        ("mae_vit_large", "mae_vit_base", {"student.model: 'vit_base_patch16_224' -> 'vit_large_patch16_224'"}),
        (
            "amt_mae_vit_base",
            "mae_vit_base",
            {"mask.kind: 'random' -> 'attention'", "mask.masked: 147 -> 88", "mask.thrown: 0 -> 78"},
        ),
        (
            "dtm_amt_vit_base",
            "dtm_vit_base_patch16_in1k",
            {
                "mask.kind: 'block' -> 'attention'",
                "mask.thrown: 0 -> 50",
                "loss.max_removed: 196 -> 146",
                "attention.source: 'student' -> 'teacher'",
                "attention.maps: 'stored' -> 'live'",
                "attention.warmup_epochs: 40 -> 0",
            },
        ),
    ],
)
def test_a_variant_differs_in_the_listed_fields_alone(name: str, base: str, changes: set[str]) -> None:
    first, second = numbers(base), numbers(name)
    found = {
        f"{field}: {first.get(field)!r} -> {second.get(field)!r}"
        for field in {**first, **second}
        if first.get(field) != second.get(field) and field != "run.folder"
    }
    assert found == changes
    assert len(differences(to_json(recipes.PRETRAIN[base]()), to_json(recipes.PRETRAIN[name]()))) == len(changes)


def test_every_full_scale_recipe_is_for_vit_b_or_says_its_size() -> None:
    for name in FULL_SCALE:
        config = recipes.PRETRAIN[name]()
        assert config.data.image_size == (224, 224) and config.student.patch_size == 16
        base = "base" in config.student.model and config.student.model_kwargs.get("embed_dim", 768) == 768
        assert ("base" in name) == base
        assert config.run.epochs >= (200 if "simmim" in name else 300) and config.run.folder == Path("runs", name)
