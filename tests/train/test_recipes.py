"""Every recipe trains, evaluates, stops and goes on, exports; its numbers are the sources'."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunk import FULL_SCALE, PATCHES, SIZE, shrink, shrunk_trainer, write_images
from tiny import assert_same_bits, final_state, stop_at

from dtm_triton.train import recipes
from dtm_triton.train.build import build_student
from dtm_triton.train.config import PretrainConfig, to_json
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.run_folder import differences
from dtm_triton.train.engine.stop import Stopped
from dtm_triton.train.models.export import load_exported
from dtm_triton.train.pretrain import pretrain

IN1K = [f"dtm_vit_{size}_patch16_in1k" for size in ("small", "base", "large")]
CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def shrunk(name: str, images: Path, folder: Path, **run: Any) -> PretrainConfig:
    return shrink(recipes.PRETRAIN[name](), images, folder, **run)


@pytest.mark.parametrize("name", [*FULL_SCALE, "own_images"])
def test_recipe_trains_and_evaluates(name: str, images: Path, tmp_path: Path) -> None:
    config = shrunk(name, images, tmp_path)
    trainer = shrunk_trainer(config)
    before = {key: value.clone() for key, value in trainer.objective.network.state_dict().items()}
    metrics = trainer.fit()
    assert trainer.step == 4 and 0 <= metrics["knn"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    after = trainer.objective.network.state_dict()
    trained = {key for key, parameter in trainer.objective.network.named_parameters() if parameter.requires_grad}
    still = [key for key in trained if torch.equal(before[key], after[key])]
    assert still == ([] if config.mask.masked else ["backbone.patch_embed.mask_token"])


@pytest.mark.parametrize("name", ["data2vec_vit_base", "beit_v2_vit_base", "byol_vit_base", "mae_clip_vit_base"])
def test_a_stopped_run_ends_with_the_same_bits(name: str, images: Path, tmp_path: Path) -> None:
    shrunk_trainer(shrunk(name, images, tmp_path / "whole")).fit()
    config = shrunk(name, images, tmp_path / "stopped")
    trainer = shrunk_trainer(config)
    stop_at(trainer, 1)
    with pytest.raises(Stopped):
        trainer.fit()
    again = shrunk_trainer(config)
    assert 0 < again.step < again.total
    again.fit()
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert_same_bits(whole, resumed)
    held = {"data2vec_vit_base": ".ema.", "byol_vit_base": ".ema.", "beit_v2_vit_base": ".codebook."}.get(
        name, ".network."
    )
    assert any(held in key for key in whole)
    assert not any(".teacher." in key for key in whole)


@pytest.mark.parametrize("name", ["data2vec_vit_base", "mae_clip_vit_base"])
def test_the_whole_command_exports_plain_timm_weights(name: str, images: Path, tmp_path: Path) -> None:
    config = shrunk(name, images, tmp_path, epochs=1)
    pretrain(config, Processes())
    for file in ("curves.png", "masks.png", "groups.png", "finished.json"):
        assert (tmp_path / file).is_file(), file
    model = load_exported(tmp_path / "student")
    x = torch.rand(2, 3, *SIZE)
    trained = final_state(tmp_path)
    assert model.forward_features(x).shape == (2, PATCHES + 1, 24)  # type: ignore[operator]
    for key, value in model.state_dict().items():
        inner = key if name == "mae_clip_vit_base" else key.replace("patch_embed.", "patch_embed.embed.")
        assert torch.equal(value, trained[f"objective.network.backbone.{inner}"]), key
    student = build_student(replace(config.student, weights=tmp_path / "student"), config.data, 5)
    assert torch.equal(student.backbone.norm.weight, model.norm.weight)  # type: ignore[union-attr,arg-type]


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
        assert ("base" in name) == (config.student.model_kwargs.get("embed_dim", 768) == 768)
        assert config.run.epochs >= 300 and config.run.folder == Path("runs", name)


def test_the_modern_student_has_rotary_positions_and_registers() -> None:
    config = recipes.PRETRAIN["dtm_eva_vit_base"]()
    with torch.device("meta"):
        student: Any = build_student(config.student, config.data, 512)
    backbone = student.backbone
    assert backbone.rope is not None and backbone.pos_embed is None
    assert backbone.reg_token.shape == (1, 4, 768) and backbone.num_prefix_tokens == 5
    assert len(backbone.blocks) == 12 and backbone.blocks[0].gamma_1 is not None
    assert "backbone.reg_token" in student.no_weight_decay()
