"""Parameter groups, the schedule's values, and the step that a non-finite gradient cannot harm."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import STUDENT
from torch import nn

from dtm_triton.train.build import build_student
from dtm_triton.train.config import OptimizerConfig
from dtm_triton.train.engine.optimizer import (
    build_optimizer,
    clip_gradient,
    guarded_step,
    learning_rate,
    parameter_groups,
)
from dtm_triton.train.models.student import MaskedStudent
from dtm_triton.train.objectives.supervised import Supervised
from dtm_triton.train.recipes import digits, digits_student

CONFIG = OptimizerConfig(lr=1e-3, weight_decay=0.05)


@pytest.mark.parametrize("config", [STUDENT, digits_student()], ids=["vit", "beit"])
def test_tokens_tables_and_vectors_do_not_decay(config: object) -> None:
    student = build_student(config, digits(), 8)  # type: ignore[arg-type]
    groups = parameter_groups(student, CONFIG)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay.keys() == dict(student.named_parameters()).keys()
    for name, parameter in student.named_parameters():
        plain = parameter.ndim == 1 or name.endswith(("_token", "pos_embed", "relative_position_bias_table"))
        assert decay[name] == (0.0 if plain else 0.05), name
    assert decay["backbone.blocks.0.attn.qkv.weight"] == 0.05
    assert decay["backbone.patch_embed.mask_token"] == 0.0
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters()))


def test_layer_decay_scales_by_depth() -> None:
    student = build_student(STUDENT, digits(), 8)  # two blocks
    groups = parameter_groups(student, replace(CONFIG, layer_decay=0.5))
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["head.weight"] == scale["backbone.norm.weight"] == 1.0
    assert scale["backbone.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["backbone.blocks.0.mlp.fc1.weight"] == 0.25
    assert scale["backbone.patch_embed.embed.proj.weight"] == scale["backbone.pos_embed"] == 0.125
    assert {group["lr_scale"] for group in parameter_groups(student, CONFIG)} == {1.0}


def test_frozen_parameters_are_left_out() -> None:
    student = build_student(STUDENT, digits(), 10)
    Supervised(student, digits())
    names = [name for group in parameter_groups(student, CONFIG) for name in group["names"]]
    assert "backbone.patch_embed.mask_token" not in names and "head.weight" in names
    with pytest.raises(ValueError, match="network must have trainable parameters"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), CONFIG)


def test_learning_rate_values() -> None:
    config = OptimizerConfig(lr=2.0, final_lr=0.5)
    rates = [learning_rate(step, 101, 10, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[-1] == 0.5
    assert rates[55] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 0, config) == 2.0


def test_guarded_step_scales_groups_and_stops_when_broken() -> None:
    student = MaskedStudent("vit_tiny_patch16_224", out_features=2, image_size=4, patch_size=2, in_chans=1,
                            model_kwargs={"embed_dim": 12, "depth": 1, "num_heads": 3})  # fmt: skip
    optimizer = build_optimizer(student, replace(CONFIG, layer_decay=0.5))
    fine, broken = torch.zeros(()), torch.ones(())

    def backward(scale: float) -> torch.Tensor:
        optimizer.zero_grad()
        images, mask = torch.ones(1, 1, 4, 4), torch.tensor([[True, False, False, False]])
        (scale * student(images, mask).square().sum()).backward()
        return clip_gradient(student.parameters(), 1.0)

    before = {name: value.clone() for name, value in student.named_parameters()}
    assert backward(1.0) > 0
    guarded_step(optimizer, 1e-2, fine)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2, 5e-3, 2.5e-3}
    moved = {name: (value - before[name]).abs().max().item() for name, value in student.named_parameters()}
    assert all(change > 0 for name, change in moved.items() if "head" in name)
    good = {name: value.clone() for name, value in student.named_parameters()}
    count = optimizer.state_dict()["state"][0]["step"].clone()
    assert not math.isfinite(backward(float("nan")))
    guarded_step(optimizer, 1e-2, broken)
    assert all(torch.equal(value, good[name]) for name, value in student.named_parameters())
    assert torch.equal(optimizer.state_dict()["state"][0]["step"], count)
    backward(1.0)
    guarded_step(optimizer, 1e-2, fine)
    assert not torch.equal(student.head.weight, good["head.weight"])
