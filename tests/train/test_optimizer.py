"""Parameter groups, the schedule's values, and the step that a non-finite gradient cannot harm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import step_shards
from processes import run_together
from timm.optim.lars import Lars
from tiny import STUDENT
from torch import nn

from dtm_triton.partition import Partition
from dtm_triton.train.build import build_network, build_student
from dtm_triton.train.config import OptimizerConfig
from dtm_triton.train.engine.optimizer import (
    build_optimizer,
    clip_gradient,
    guarded_step,
    learning_rate,
    parameter_groups,
)
from dtm_triton.train.models.classifier import Classifier
from dtm_triton.train.models.student import MaskedStudent
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


@pytest.mark.parametrize("kind", ["adamw", "lars"])
def test_frozen_parameters_are_left_out(kind: Any) -> None:
    probe = build_network(Classifier, STUDENT, digits(), out_features=10, frozen=True)
    config = replace(CONFIG, kind=kind, layer_decay=0.5)
    assert [name for group in parameter_groups(probe, config) for name in group["names"]] == [
        "head.weight",
        "head.bias",
    ]
    assert {group["lr_scale"] for group in build_optimizer(probe, config).param_groups} == {1.0}
    with pytest.raises(ValueError, match="network must have trainable parameters"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), config)


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
        masked = Partition.of(torch.tensor([[True, False, False, False]]), None, 1)
        (scale * student(torch.ones(1, 1, 4, 4), masked).square().sum()).backward()
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


LARS = OptimizerConfig(kind="lars", lr=0.5, weight_decay=0.1, betas=(0.9, 0.999))


def test_lars_steps_are_those_computed_by_hand() -> None:
    """Weights of two dimensions: decay, then the trust ratio; vectors: plain momentum."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, LARS)
    weight, bias = layer.weight.detach().double().clone(), layer.bias.detach().double().clone()
    sums = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(4):
        layer.weight.grad, layer.bias.grad = torch.randn(2, 3), torch.randn(2)
        update = layer.weight.grad.double() + 0.1 * weight
        update *= 0.001 * weight.norm() / update.norm()
        sums = 0.9 * sums[0] + update, 0.9 * sums[1] + layer.bias.grad.double()
        weight, bias = weight - 0.2 * (step + 1) * sums[0], bias - 0.2 * (step + 1) * sums[1]
        guarded_step(optimizer, 0.2 * (step + 1), torch.zeros(()))
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.double(), bias, rtol=1e-5, atol=1e-6)
    assert (weight - layer.bias.detach().double()[:, None]).abs().max() > 0.1, "the case decides nothing"


def test_lars_is_timms_without_decay() -> None:
    """timm adapts the rate of all weights alike; of decay it takes the norm alone, as the paper."""
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(5, 4, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    first = build_optimizer(ours, replace(LARS, weight_decay=0.0))
    second = Lars(theirs.parameters(), lr=0.5, momentum=0.9, always_adapt=True)
    for _ in range(5):
        ours.weight.grad = torch.randn(4, 5)
        theirs.weight.grad = ours.weight.grad.clone()
        guarded_step(first, 0.5, torch.zeros(()))
        second.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_lars_moves_what_is_zero_and_leaves_what_has_no_gradient() -> None:
    weight, still = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    optimizer = build_optimizer(nn.ParameterList([weight, still]), LARS)
    assert all(not optimizer.state[each]["momentum"].any() for each in (weight, still))
    weight.grad = torch.ones(2, 2)
    guarded_step(optimizer, 0.5, torch.zeros(()))
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5)) and not still.any()
    weight.grad = torch.zeros(2, 2)
    guarded_step(build_optimizer(nn.ParameterList([weight]), replace(LARS, weight_decay=0.0)), 0.5, torch.zeros(()))
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5)), "no gradient: no ratio, and nothing to move"


def test_a_broken_step_leaves_weights_and_momenta_of_lars() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, LARS)

    def step(value: float, broken: float) -> list[torch.Tensor]:
        layer.weight.grad, layer.bias.grad = torch.full((2, 3), value), torch.full((2,), value)
        guarded_step(optimizer, 0.1, torch.tensor(broken))
        kept = [*layer.parameters(), *(moments["momentum"] for moments in optimizer.state.values())]
        return [tensor.detach().clone() for tensor in kept]

    fine = step(1.0, 0.0)
    assert all(map(torch.equal, step(math.nan, 1.0), fine))
    assert all(map(torch.equal, step(1.0, 1.0), fine)), "from the first broken step on"
    after = step(1.0, 0.0)
    assert not any(map(torch.equal, after, fine)) and all(tensor.isfinite().all() for tensor in after)


def test_lars_steps_shards_as_the_whole(tmp_path: Path) -> None:
    """The norms are those of the whole weight, also of the part that this process holds."""
    run_together(2, step_shards, tmp_path)
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 7 + 1)
    optimizer = build_optimizer(layer, LARS)
    for _ in range(2):
        for parameter in layer.parameters():
            parameter.grad = torch.arange(parameter.numel()).view_as(parameter) / 5 - 1
        guarded_step(optimizer, 0.5, torch.zeros(()))
    for name, value in torch.load(tmp_path / "sharded.pt", weights_only=True).items():
        torch.testing.assert_close(value, layer.state_dict()[name])
