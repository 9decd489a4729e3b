"""Attention-driven masking and throwing in the objectives: who sees what, what is compared, where maps come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from attending import MASK, STAGES, attending, warm
from safetensors.torch import save_file
from shrunk import shrunk_trainer
from torch import Tensor
from torch.nn import functional as F

from dtm_triton.losses import dtm_loss
from dtm_triton.schedule import MorphSchedule
from dtm_triton.train import recipes
from dtm_triton.train.build import assemble, build_network
from dtm_triton.train.data.augment import augment
from dtm_triton.train.data.masks import Masks
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.models.average import frozen_copy
from dtm_triton.train.models.keeping import take
from dtm_triton.train.models.student import MaskedStudent
from dtm_triton.train.models.targets import ConvTargets
from dtm_triton.train.models.teacher import ConvTeacher

every_stage = pytest.mark.parametrize("stage", STAGES)


def pixels_of(patches: Tensor, grid: tuple[int, int] = (6, 6), size: int = 2) -> Tensor:
    """bool [B, 1, H, W] of the pixels of patches [B, P]."""
    flat = torch.zeros(len(patches), grid[0] * grid[1], dtype=torch.bool).scatter(1, patches, True)
    return flat.view(-1, 1, *grid).repeat_interleave(size, 2).repeat_interleave(size, 3)


@every_stage
def test_before_maps_and_after_them_so_many_patches_are_masked_and_thrown(stage: str, tmp_path: Path) -> None:
    objective: Any = (trainer := shrunk_trainer(attending(tmp_path, stage))).objective
    batch = trainer.batches[0]
    before = objective.partition(batch, augment(batch))
    warmup = 27 if stage != "simmim" else 28
    assert [part.shape for part in before] == [(128, warmup), (128, 0), (128, 36 - warmup)]
    after = objective.partition(warm(trainer), augment(batch))
    assert [part.shape for part in after] == [(128, 16), (128, 12), (128, 8)]
    for parts in (before, after):
        assert torch.equal(torch.cat(parts, 1).sort(1).values, torch.arange(36).expand(128, -1))


@every_stage
def test_nobody_sees_thrown_patches_and_the_student_no_masked_ones(stage: str, tmp_path: Path) -> None:
    objective: Any = (trainer := shrunk_trainer(attending(tmp_path, stage))).objective
    batch = warm(trainer)
    images = augment(batch)
    partition = objective.partition(batch, images)
    network, normalised = objective.network.eval(), objective.normalise(images)
    outputs = network(normalised, partition)
    assert outputs.shape[:2] == (128, 24)
    for part, hidden in (("thrown", True), ("masked", True), ("visible", False)):
        changed = torch.where(pixels_of(getattr(partition, part)), torch.rand_like(normalised), normalised)
        assert torch.equal(network(changed, partition), outputs) == hidden, part


@pytest.mark.parametrize("stage", ["mae", "simmim", "beit", "eva"])  # their targets and maps look at no other patch
def test_a_thrown_patch_is_worth_nothing(stage: str, tmp_path: Path) -> None:
    """With targets of their own patch alone, what lies in thrown patches changes neither loss nor gradient."""
    objective: Any = (trainer := shrunk_trainer(attending(tmp_path, stage))).objective
    batch = warm(trainer)
    loss = objective(batch)["loss"]
    thrown = pixels_of(objective.partition(batch, augment(batch)).thrown)
    noise = torch.randint_like(batch["images"], 256)
    other = {**batch, "images": torch.where(thrown, noise, batch["images"])}
    assert not torch.equal(other["images"], batch["images"]) and torch.equal(objective(other)["loss"], loss)


def test_mae_predicts_the_masked_patches_from_visible_and_masked_ones(tmp_path: Path) -> None:
    """By hand: the encoder's visible tokens, the decoder's tokens of kept patches, the error of the masked ones."""
    objective: Any = (trainer := shrunk_trainer(attending(tmp_path))).objective
    batch = warm(trainer)
    images = augment(batch)
    partition = objective.partition(batch, images)
    seen: dict[str, Tensor] = {}
    network = objective.network
    network.backbone.blocks[0].register_forward_pre_hook(lambda _, x: seen.update(encoder=x[0]))
    network.decoder.blocks[0].register_forward_pre_hook(lambda _, x: seen.update(decoder=x[0]))
    loss = objective(batch)["loss"]
    assert seen["encoder"].shape == (128, 1 + 8, 24) and seen["decoder"].shape == (128, 1 + 24, 16)
    outputs, targets = network(objective.normalise(images), partition), objective.teacher(images)
    errors = []
    for image in range(128):
        kept = sorted([*partition.masked[image].tolist(), *partition.visible[image].tolist()])
        errors += [outputs[image, kept.index(p)] - targets[image, p] for p in partition.masked[image].tolist()]
    torch.testing.assert_close(loss, torch.stack(errors).square().mean())


def test_simmim_is_the_absolute_error_of_normalised_pixels(tmp_path: Path) -> None:
    objective: Any = (trainer := shrunk_trainer(attending(tmp_path, "simmim"))).objective
    batch = warm(trainer)
    images = augment(batch)
    partition = objective.partition(batch, images)
    blocks = partition.masked.view(128, 4, 4).sort(2).values  # units of 2 x 2: rows of two neighbours, in pairs
    assert torch.equal(partition.masked % 6 // 2 % 3, partition.masked % 6 // 2) and blocks.shape == (128, 4, 4)
    units = torch.zeros(128, 36).scatter(1, partition.masked, 1.0).view(128, 1, 6, 6)
    assert torch.isin(F.avg_pool2d(units, 2), torch.tensor([0.0, 1.0])).all()
    outputs = objective.network(objective.normalise(images), partition)
    pixels = (images - 0.2) / 0.35
    patches = F.unfold(pixels, 2, stride=2).mT
    found = take(outputs, partition.masked_among_kept)
    torch.testing.assert_close(objective(batch)["loss"], (found - take(patches, partition.masked)).abs().mean())


def test_dtm_morphs_what_is_kept(tmp_path: Path) -> None:
    """Thrown tokens leave the student, the matching and the groups' means of both."""
    objective: Any = (trainer := shrunk_trainer(attending(tmp_path, "dtm"))).objective
    batch = warm(trainer)
    images = augment(batch)
    partition = objective.partition(batch, images)
    objective.seed_draws(0, 0, 0)
    generator = torch.Generator()
    generator.set_state(objective.loss.draw_state)
    schedules = [MorphSchedule.sample(24, 24, 4, generator) for _ in range(2)]
    outputs = objective.network(objective.normalise(images), partition)
    targets = take(objective.targets(images), partition.kept)
    torch.testing.assert_close(objective(batch)["loss"], dtm_loss(outputs, targets, schedules))


@pytest.mark.parametrize("source", ["student", "ema"])
def test_maps_come_from_the_network_or_its_average_in_eval_mode(source: str, tmp_path: Path) -> None:
    base = attending(tmp_path, "dtm")
    config = replace(
        base,
        student=replace(base.student, drop_path=0.5),
        teacher=attending(tmp_path).teacher,
        attention=replace(base.attention, source=source),
    )
    objective: Any = shrunk_trainer(config).objective
    assert (objective.ema is not None) == (source == "ema")
    images = torch.rand(4, 1, 12, 12)
    objective.train()
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.mul_(1.2)
    maps = objective.attend(images)
    assert objective.network.training and torch.equal(objective.attend(images), maps), "no drop path"
    chosen = objective.network if source == "student" else objective.ema
    with torch.no_grad():
        torch.testing.assert_close(maps, chosen.eval().attention(objective.normalise(images), "class_row"))
    assert maps.shape == (4, 36) and not maps.requires_grad
    if source == "ema":
        before = objective.ema.backbone.cls_token.clone()
        objective.after_step(0.5)
        assert not torch.equal(objective.ema.backbone.cls_token, before), "it follows"


def test_the_teachers_attention_masks_the_crop_as_the_student_sees_it(tmp_path: Path) -> None:
    """Live maps need no place and no second flip: the teacher looks at the flipped crop."""
    torch.manual_seed(1)
    model = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 8}
    state = timm.create_model("vit_base_patch16_clip_quickgelu_224", img_size=96, **model).state_dict()
    save_file(state, tmp_path / "teacher.safetensors")
    base = attending(tmp_path / "run", "dtm")
    config = replace(
        base,
        data=replace(base.data, flip=True),
        teacher=replace(
            recipes.dtm_vit_base_patch16_in1k().teacher, weights=tmp_path / "teacher.safetensors", model_kwargs=model
        ),
        attention=replace(base.attention, source="teacher", maps="live", warmup_epochs=0),
    )
    trainer = shrunk_trainer(config)
    objective: Any = trainer.objective
    assert objective.maps is None and trainer.maps is None and objective.ema is None
    batch = trainer.batches[0]
    assert batch["flip"].any() and not batch["flip"].all()
    images = augment(batch)
    partition = objective.partition(batch, images)
    maps = objective.teacher.attention(images, "class_row")
    expected = Masks(MASK, (6, 6))({"mask": batch["mask"]}, maps)
    assert all(torch.equal(*pair) for pair in zip(partition, expected, strict=True))
    targets, again = objective.look(batch, images)
    torch.testing.assert_close(targets, objective.teacher(images))
    assert all(torch.equal(*pair) for pair in zip(partition, again, strict=True))
    strong = torch.stack([take(maps[..., None], part).mean() for part in partition])
    assert strong[0] > strong[1] > strong[2], "masked are attended to most, visible least"


def test_an_even_map_masks_anything(tmp_path: Path) -> None:
    objective: Any = (trainer := shrunk_trainer(attending(tmp_path))).objective
    batch = warm(trainer)
    batch["map"] = torch.zeros_like(batch["map"])
    parts = [objective.partition({**batch, "mask": batch["mask"] + shift}, augment(batch)) for shift in range(30)]
    chosen = torch.stack([torch.zeros(128, 36).scatter(1, part.masked, 1.0) for part in parts])
    share = chosen.mean((0, 1))  # of 3,840 draws each; deviation 0.008
    assert (share - 16 / 36).abs().max() < 0.04


def test_beit_v2_throws_too(tmp_path: Path) -> None:
    base = attending(tmp_path, "dtm")
    maps = attending(tmp_path).attention
    config = replace(base, method="beit_v2", teacher=replace(base.teacher, kind="conv"), attention=maps)
    objective: Any = assemble(config, ConvTargets(ConvTeacher((12, 12), 2, in_chans=1, out_features=8)))
    batch = warm(shrunk_trainer(attending(tmp_path)))
    objective.epoch = 1
    objective.ema = frozen_copy(objective.network)
    before = objective.ema.backbone.cls_token.clone()
    found = objective(batch)
    found["loss"].backward()
    with torch.no_grad():
        objective.network.backbone.cls_token.add_(1)
    assert found["loss"].isfinite() and objective.codebook.new_counts.sum() == 2 * 128 * 16
    objective.after_step(0.5)
    assert not torch.equal(objective.ema.backbone.cls_token, before), "an average that attends follows here too"


@pytest.mark.parametrize("source", ["student", "ema"])
def test_networks_that_cannot_attend_are_refused_before_anything_is_trained(source: str, tmp_path: Path) -> None:
    base = attending(tmp_path)
    student = replace(base.student, model_kwargs={**base.student.model_kwargs, "depth": 1})
    config = replace(base, student=student, attention=replace(base.attention, source=source))
    with pytest.raises(FolderError, match=f"attention.source '{source}' gives no maps: .* two blocks or more"):
        shrunk_trainer(config)


def test_maps_that_never_come_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attention\.warmup_epochs must be below run\.epochs 1, .* got 1"):
        attending(tmp_path, epochs=1)


def test_students_that_cannot_leave_patches_are_refused(tmp_path: Path) -> None:
    base = attending(tmp_path)
    config = replace(
        base,
        method="masked",
        student=replace(
            base.student,
            model="vit_relpos_small_patch16_224",
            model_kwargs={**base.student.model_kwargs, "fc_norm": False},
        ),
        mask=replace(MASK, kind="random"),
    )
    with pytest.raises(FolderError, match=r"mask\.thrown must be 0 for student\.model 'vit_relpos_small.*got 12"):
        shrunk_trainer(config)


def test_fixed_positions_take_no_others(tmp_path: Path) -> None:
    base = attending(tmp_path)
    fixed = build_network(MaskedStudent, replace(base.student, positions="sincos"), base.data, out_features=4)
    learned = build_network(MaskedStudent, base.student, base.data, out_features=4)
    fixed.load_backbone_state_dict(fixed.backbone_state_dict())
    with pytest.raises(ValueError, match="other positions than the student's fixed ones"):
        fixed.load_backbone_state_dict(learned.backbone_state_dict())


def test_live_maps_know_their_epoch_after_a_finished_run(tmp_path: Path) -> None:
    """Pictures are drawn once more when a run ends between its last checkpoint and its last word."""
    config = attending(tmp_path, "live", epochs=2)
    shrunk_trainer(config).fit()
    again = shrunk_trainer(config)
    again.fit()
    objective: Any = again.objective
    batch = again.batches[0]
    assert again.step == 22 and objective.epoch == 2
    assert objective.partition(batch, augment(batch)).thrown.shape == (128, 12)
