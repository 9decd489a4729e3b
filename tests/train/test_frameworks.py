"""Every way through the objectives: learns, reaches every parameter, adds up over micro-batches, stands bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_together
from shrunk import METHODS, shrink, shrunk_trainer, steady, write_images
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from dtm_triton.groups import morph_tokens
from dtm_triton.losses import dtm_loss
from dtm_triton.partition import Partition
from dtm_triton.schedule import MorphSchedule
from dtm_triton.train import recipes
from dtm_triton.train.config import CodebookConfig, PretrainConfig
from dtm_triton.train.data.augment import augment
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.models.average import follow
from dtm_triton.train.objectives.beit_v2 import Codebook

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def config_of(method: str, images: Path, folder: Path, **run: Any) -> PretrainConfig:
    return steady(shrink(recipes.PRETRAIN[METHODS[method]](), images, folder, **run))


def ready(config: PretrainConfig) -> tuple[Trainer, Any, dict[str, Tensor]]:
    trainer = shrunk_trainer(config)
    batch = trainer.batches[0]
    batch.pop("skipped", None)
    trainer.objective.seed_draws(0, 0, 0)
    return trainer, trainer.objective, batch


def gradients(objective: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    objective.network.zero_grad()
    objective.seed_draws(0, 0, 0)
    objective(batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in objective.network.named_parameters() if p.grad is not None}


@every_method
def test_loss_falls_on_a_fixed_batch(method: str, images: Path, tmp_path: Path) -> None:
    trainer, objective, batch = ready(config_of(method, images, tmp_path))
    losses = []
    for _ in range(20):
        objective.seed_draws(0, 0, 0)
        result = objective(batch)
        result["loss"].backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        objective.after_step(0.1)
        losses.append(float(result["loss"].detach()))
    assert losses[-1] < 0.9 * losses[1], losses  # the first step moves beit_v2's codes from where they were drawn


@every_method
def test_gradients_reach_every_trainable_parameter_and_no_other(method: str, images: Path, tmp_path: Path) -> None:
    _, objective, batch = ready(config_of(method, images, tmp_path))
    found = gradients(objective, batch)
    assert found.keys() == {name for name, p in objective.network.named_parameters() if p.requires_grad}
    zero = [name for name, gradient in found.items() if not gradient.any()]
    assert zero == (["backbone.patch_embed.mask_token"] if method == "byol" else [])
    for frozen in (objective.teacher, objective.ema):
        for parameter in frozen.parameters() if frozen is not None else ():
            assert not parameter.requires_grad and parameter.grad is None
    objective.train()
    assert objective.network.training
    assert not any(
        part.training for frozen in (objective.teacher, objective.ema) if frozen for part in frozen.modules()
    )


@every_method
def test_two_halves_of_a_batch_add_up_to_it(method: str, images: Path, tmp_path: Path) -> None:
    """Also of beit_v2: codes are constant within a step, and statistics are sums."""
    _, objective, batch = ready(config_of(method, images, tmp_path))
    whole = gradients(objective, batch)
    sums = objective.codebook.new_sums.clone() if method == "beit_v2" else None
    if sums is not None:
        objective.codebook.new_sums.zero_()
    halves = [
        gradients(objective, {name: value[part] for name, value in batch.items()}) for part in (slice(4), slice(4, 8))
    ]
    for name, gradient in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, gradient, rtol=1e-3, atol=1e-5)
    if sums is not None:
        torch.testing.assert_close(objective.codebook.new_sums, sums)


@every_method
def test_bfloat16_gives_a_finite_float32_loss_near_the_exact_one(method: str, images: Path, tmp_path: Path) -> None:
    _, objective, batch = ready(config_of(method, images, tmp_path))
    exact = float(objective(batch)["loss"].detach())
    objective.seed_draws(0, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(exact, rel=0.1)
    assert all(p.grad.isfinite().all() for p in objective.network.parameters() if p.requires_grad)


@every_method
def test_recomputed_activations_change_nothing(method: str, images: Path, tmp_path: Path) -> None:
    _, objective, batch = ready(config_of(method, images, tmp_path))
    plain = gradients(objective, batch)
    objective.network.set_grad_checkpointing(True)
    again = gradients(objective, batch)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_masked_tokens_alone_are_compared(images: Path, tmp_path: Path) -> None:
    _, objective, batch = ready(config_of("hog", images, tmp_path))
    pixels, partition = augment(batch), objective.masks(batch)
    outputs, targets = objective.network(objective.normalise(pixels), partition), objective.teacher(pixels)
    mask = partition.mask
    torch.testing.assert_close(objective(batch)["loss"], F.mse_loss(outputs[mask], targets[mask]))


def test_the_encoder_of_mae_never_sees_masked_patches(images: Path, tmp_path: Path) -> None:
    _, objective, batch = ready(config_of("mae", images, tmp_path))
    network, partition = objective.network.eval(), objective.masks(batch)
    x = torch.rand(8, 3, 32, 48)
    hidden = partition.mask.view(8, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(network(torch.where(hidden, torch.rand_like(x), x), partition), network(x, partition))
    seen: list[Tensor] = []
    network.backbone.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    visible = network.tokens(x, partition)
    assert seen[0].shape == (8, 1 + 6, 24) and visible.shape == (8, 6, 24)  # 18 of 24 masked
    nothing = network.tokens(x)
    assert nothing.shape == (8, 24, 24) and seen[1].shape == (8, 1 + 24, 24)
    mask = partition.mask
    mask[0] = mask[0].roll(1)  # another mask of one image moves nothing in the others
    first, second = network(x, partition), network(x, Partition.of(mask, None, 18))
    assert torch.allclose(first[1:], second[1:], atol=1e-6) and not torch.allclose(first[0], second[0], atol=1e-4)


def test_byol_predicts_what_the_average_sees_in_the_other_view(images: Path, tmp_path: Path) -> None:
    """Image by image, view by view, token by token of the unflipped crop."""
    base = config_of("byol", images, tmp_path)
    loss = replace(base.loss, morph=False, on="masked")
    config = replace(base, loss=loss, mask=replace(base.mask, masked=6))
    _, objective, batch = ready(config)
    batch["view"][:, 0] = torch.tensor([0.0, 0.9]).repeat(4)  # flipped, not flipped
    centre = objective.centre.normal_(generator=torch.Generator().manual_seed(0)).clone()
    found = objective(batch)
    assert batch["flip"].any() and not batch["flip"].all()
    masks = objective.masks(batch).mask.view(8, 4, 6)
    image_loss, token_loss, sums = [], [], torch.zeros(2, 16)
    for number in range(8):
        whole = batch["images"][number : number + 1]
        first = {
            "images": whole,
            "flip": batch["flip"][number : number + 1],
            "jitter": batch["jitter"][number : number + 1],
        }
        view = batch["view"][number : number + 1]
        second = {"images": whole, "flip": view[:, 0] < 0.5, "jitter": 1 + 0.4 * (2 * view[:, 1:] - 1)}
        for own, other in ((first, second), (second, first)):
            mask = masks[number].flip(-1) if own["flip"] else masks[number]
            vector, tokens = objective.network(
                objective.normalise(augment(own)), Partition.of(mask.reshape(1, 24), None, 6)
            )
            wanted, targets = objective.ema(objective.normalise(augment(other)))
            sums += torch.stack([wanted[0], targets[0].mean(0)]).detach()
            grid, target_grid = tokens.view(4, 6, 16), (targets - centre[1]).view(4, 6, 16)
            image_loss.append(2 - 2 * F.cosine_similarity(vector, wanted - centre[0]).squeeze())
            for row, column in masks[number].nonzero().tolist():
                ours = grid[row, 5 - column if own["flip"] else column]
                theirs = target_grid[row, 5 - column if other["flip"] else column]
                token_loss.append(1 - F.cosine_similarity(ours, theirs, dim=0))
    assert len(token_loss) == 16 * 6
    torch.testing.assert_close(found["image_loss"], torch.stack(image_loss).mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["token_loss"], torch.stack(token_loss).mean(), atol=1e-5, rtol=1e-4)
    assert torch.equal(found["loss"], found["image_loss"] + found["token_loss"])
    objective.after_step(0.5)
    torch.testing.assert_close(objective.centre, 0.9 * centre + 0.1 * sums / 16, atol=1e-5, rtol=1e-4)
    assert objective.seen == []


def test_beit_v2_is_cross_entropy_on_morphed_tokens(images: Path, tmp_path: Path) -> None:
    _, objective, batch = ready(config_of("beit_v2", images, tmp_path))
    loss = objective(batch)["loss"]
    objective.seed_draws(0, 0, 0)
    pixels, partition = augment(batch), objective.masks(batch)
    targets, mask = objective.teacher(pixels), partition.mask
    tokens = objective.network.tokens(objective.normalise(pixels), partition)
    expected = []
    for groups in objective._groups(targets):
        codes = F.normalize(morph_tokens(targets, groups), dim=-1) @ objective.codebook.codes.T
        logits = objective.network.head(morph_tokens(tokens, groups))
        expected.append(F.cross_entropy(logits[mask], codes.argmax(-1)[mask]))
    assert len(expected) == 2
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_an_average_is_the_teacher_and_follows(images: Path, tmp_path: Path) -> None:
    _, objective, batch = ready(config_of("ema", images, tmp_path))
    pixels = augment(batch)
    layers = objective.ema.backbone.forward_intermediates(objective.normalise(pixels), output_fmt="NLC")[1]
    mean = torch.stack([F.layer_norm(layer, (24,)) for layer in layers]).mean(0)
    assert len(layers) == 2
    targets = F.layer_norm(mean, (24,))
    torch.testing.assert_close(objective.targets(pixels), targets)
    outputs = objective.network(objective.normalise(pixels), objective.masks(batch))
    generator = torch.Generator()
    generator.set_state(objective.loss.draw_state)
    schedules = [MorphSchedule.sample(24, 24, 4, generator) for _ in range(2)]
    torch.testing.assert_close(objective(batch)["loss"], dtm_loss(outputs, targets, schedules))
    names = dict(objective.network.named_parameters())
    old = {name: p.clone() for name, p in objective.ema.named_parameters()}
    assert old.keys() == {name for name in names if not name.startswith("head.")}
    with torch.no_grad():
        for parameter in names.values():
            parameter.add_(1.0)
    objective.after_step(0.5)
    momentum = (0.999 + 0.9998) / 2
    for name, parameter in objective.ema.named_parameters():
        torch.testing.assert_close(parameter, momentum * old[name] + (1 - momentum) * names[name])


def update_codebook(processes: Processes, path: Path) -> None:
    """Two processes, each with half of the tokens; for `run_together`."""
    torch.manual_seed(0)
    book = Codebook(CodebookConfig(codes=6, momentum=0.5), 4)
    tokens = torch.randn(3, 40, 4)
    for step in range(3):
        book.observe(tokens[step, processes.rank :: processes.count])
        book.update()
    torch.save(book.codes, path / f"{processes.count}-{processes.rank}.pt")


def test_processes_keep_one_codebook(tmp_path: Path) -> None:
    run_together(2, update_codebook, tmp_path)
    update_codebook(Processes(), tmp_path)
    first, second, alone = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("2-0", "2-1", "1-0"))
    assert torch.equal(first, second)
    assert first.norm(dim=1).allclose(torch.ones(6)) and not torch.equal(first, torch.zeros_like(first))
    assert (first @ alone.T).amax(1).mean() > 0.9  # codes without tokens start anew from other tokens: not equal


def test_rare_codes_start_anew() -> None:
    torch.manual_seed(0)
    book = Codebook(CodebookConfig(codes=8, momentum=0.0), 3)
    tokens = torch.randn(64, 3).abs()
    book.codes.copy_(-F.normalize(tokens[:8], dim=1))
    book.codes[0] *= -1  # the only one that any token is near
    assert book(tokens).unique().tolist() == [0]
    for _ in range(10):
        book.observe(tokens)
        book.update()
    assert book(tokens).unique().numel() == 8
    assert not book.new_sums.any() and not book.new_counts.any()
    saved = book.state_dict()
    assert saved.keys() == {"codes", "sums", "counts"}


def test_an_average_follows_when_both_are_sharded(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network, average, plain = (torch.nn.Linear(2, 2) for _ in range(3))
        expected = 0.75 * average.weight.detach() + 0.25 * network.weight.detach()
        for module in (network, average):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        average(network(torch.rand(1, 2)))
        follow(average, network, 0.75)
        torch.testing.assert_close(average.weight.full_tensor(), expected)  # type: ignore[operator]
        with pytest.raises(AssertionError):
            follow(plain, network, 0.75)
    finally:
        torch.distributed.destroy_process_group()
