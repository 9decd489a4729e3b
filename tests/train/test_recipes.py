"""Every recipe trains, evaluates, stops and goes on, exports."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunk import FULL_SCALE, PATCHES, SIZE, shrink, shrunk_trainer, write_images
from tiny import assert_same_bits, final_state, stop_at

from dtm_triton.train import recipes
from dtm_triton.train.build import build_student
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.stop import Stopped
from dtm_triton.train.models.export import load_exported
from dtm_triton.train.pretrain import pretrain

RESUMED = ["data2vec_vit_base", "beit_v2_vit_base", "byol_vit_base", "mae_clip_vit_base"]
RESUMED += ["amt_mae_vit_base", "amt_simmim_vit_base", "dtm_amt_vit_base"]


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
    stored = config.mask.kind == "attention" and config.attention.maps == "stored"
    assert [path.name for path in (tmp_path / "maps").glob("*.npy")] == (["step_000000002.npy"] if stored else [])


@pytest.mark.parametrize("name", RESUMED)
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


@pytest.mark.parametrize("name", ["data2vec_vit_base", "mae_clip_vit_base", "amt_mae_vit_base", "amt_simmim_vit_base"])
def test_the_whole_command_exports_plain_timm_weights(name: str, images: Path, tmp_path: Path) -> None:
    config = shrunk(name, images, tmp_path, epochs=2 if "amt" in name else 1)  # maps come after the first epoch
    pretrain(config, Processes())
    for file in ("curves.png", "masks.png", "groups.png", "finished.json"):
        assert (tmp_path / file).is_file(), file
    model = load_exported(tmp_path / "student")
    x = torch.rand(2, 3, *SIZE)
    trained = final_state(tmp_path)
    assert model.forward_features(x).shape == (2, PATCHES + 1, 24)  # type: ignore[operator]
    for key, value in model.state_dict().items():
        inner = key if config.method == "mae" else key.replace("patch_embed.", "patch_embed.embed.")
        assert torch.equal(value, trained[f"objective.network.backbone.{inner}"]), key
    student = build_student(replace(config.student, weights=tmp_path / "student"), config.data, 5)
    assert torch.equal(student.backbone.norm.weight, model.norm.weight)  # type: ignore[union-attr,arg-type]


def test_the_modern_student_has_rotary_positions_and_registers() -> None:
    config = recipes.PRETRAIN["dtm_eva_vit_base"]()
    with torch.device("meta"):
        student: Any = build_student(config.student, config.data, 512)
    backbone = student.backbone
    assert backbone.rope is not None and backbone.pos_embed is None
    assert backbone.reg_token.shape == (1, 4, 768) and backbone.num_prefix_tokens == 5
    assert len(backbone.blocks) == 12 and backbone.blocks[0].gamma_1 is not None
    assert "backbone.reg_token" in student.no_weight_decay()
