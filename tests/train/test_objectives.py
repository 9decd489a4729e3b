"""Objectives: what they compute, what they show the teacher, what they train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import STUDENT, tiny_config, tiny_trainer
from torch import Tensor
from torch.nn import functional as F

from dtm_triton.morph import MorphSchedule, dtm_loss
from dtm_triton.train.build import build_network, build_student
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.data.augment import augment
from dtm_triton.train.data.draws import fold
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.optimizer import build_optimizer
from dtm_triton.train.models.classifier import Classifier
from dtm_triton.train.models.targets import ConvTargets
from dtm_triton.train.models.teacher import ConvTeacher
from dtm_triton.train.objectives.supervised import Supervised


def config(folder: Path, **loss: Any) -> PretrainConfig:
    base = tiny_config(folder, data={"flip": True, "mean": (0.3,), "std": (0.5,)})
    return replace(base, loss=replace(base.loss, **loss))


def outputs_and_targets(trainer: Trainer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    objective: Any = trainer.objective
    images = augment(batch)
    return objective.network((images - 0.3) / 0.5, objective.masks(batch)), objective.teacher(images)


def test_pretraining_is_the_librarys_loss_on_its_own_schedules(tmp_path: Path) -> None:
    trainer = tiny_trainer(config(tmp_path, beta=0.1))
    batch = trainer.batches[4]
    trainer.objective.seed_draws(0, 4, 0)
    result = trainer.objective(batch)
    generator = torch.Generator().manual_seed(fold(0, "schedules", 4, 0))
    schedules = [MorphSchedule.sample(36, 36, 14, generator) for _ in range(2)]
    outputs, targets = outputs_and_targets(trainer, batch)
    torch.testing.assert_close(result["loss"], dtm_loss(outputs, targets, schedules, beta=0.1))
    trainer.objective.seed_draws(0, 5, 0)
    assert not torch.equal(trainer.objective(batch)["loss"], result["loss"])


def test_tokenwise_morphs_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(config(tmp_path, morph=False, beta=0.1))
    batch = trainer.batches[0]
    outputs, targets = outputs_and_targets(trainer, batch)
    torch.testing.assert_close(trainer.objective(batch)["loss"], F.smooth_l1_loss(outputs, targets, beta=0.1))


def test_teacher_sees_the_same_crop_unmasked_and_learns_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(config(tmp_path))
    objective: Any = trainer.objective
    seen: list[Tensor] = []
    objective.teacher.register_forward_pre_hook(lambda module, images: seen.append(images[0]))
    batch = trainer.batches[0]
    objective.train()
    before = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    objective(batch)["loss"].backward()
    assert torch.equal(seen[0], augment(batch)) and bool(batch["flip"].any())
    assert not objective.teacher.training and objective.network.training
    assert all(torch.equal(value, before[name]) for name, value in objective.teacher.state_dict().items())
    assert not [p for p in objective.teacher.parameters() if p.requires_grad or p.grad is not None]
    assert not [name for name, p in objective.network.named_parameters() if p.grad is None]


def test_weights_that_are_no_students_are_refused_by_name(tmp_path: Path) -> None:
    data = tiny_config(tmp_path).data
    with pytest.raises(FileNotFoundError, match=r"student\.weights '.*nowhere' does not exist"):
        build_student(replace(STUDENT, weights=tmp_path / "nowhere"), data, 8)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(FolderError, match=r"student\.weights '.*' cannot be read as tensors only"):
        build_student(replace(STUDENT, weights=path), data, 8)
    state = build_student(STUDENT, data, 8).backbone_state_dict()
    del state["blocks.1.norm2.bias"]
    save_file(state, path)
    with pytest.raises(FolderError, match=r"student\.weights '.*' do not fit: .*blocks\.1\.norm2\.bias"):
        build_student(replace(STUDENT, weights=path), data, 8)
    with pytest.raises(FolderError, match=r"student\.model must be the name of a timm model .* 'vit_nowhere'"):
        build_student(replace(STUDENT, model="vit_nowhere"), data, 8)


def test_conv_targets_are_standardised_tokens() -> None:
    teacher = ConvTargets(ConvTeacher(12, 2, out_features=16)).eval()
    tokens = teacher(torch.rand(3, 1, 12, 12))
    assert tokens.shape == (3, 36, 16)
    torch.testing.assert_close(tokens.mean(2), torch.zeros(3, 36), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["student", "conv"])
def test_supervised_learns_a_batch_by_heart(tmp_path: Path, kind: str) -> None:
    base = tiny_config(tmp_path, batch_size=32)
    batch = tiny_trainer(base).batches[0]
    network: Any = ConvTeacher(12, 2, out_features=16)
    if kind == "student":
        network = build_network(Classifier, STUDENT, base.data, out_features=10)
    objective = Supervised(network, base.data, label_smoothing=0.1)
    optimizer = build_optimizer(network, base.optimizer)
    losses = []
    for _ in range(80):
        result = objective(batch)
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result["loss"].item())
    assert 0.4 < losses[-1] < 0.5 * losses[0]  # smoothed labels cannot be met exactly
    assert result["train_accuracy"] > 0.9
    expected = F.cross_entropy(objective.logits(augment(batch)), batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(objective(batch)["loss"], expected, atol=1e-3, rtol=1e-3)
