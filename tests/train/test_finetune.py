"""Fine-tuning and linear probing: recipes run, stop and go on, in any number of processes; what is frozen stays."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from finetuned import finetune_in_two_goes, probe_in_processes, probing_config, standardise_in_parts
from processes import run_together
from shrunk import PATCHES, SIZE, shrink, shrink_finetuning, shrunk_trainer, write_images
from tiny import STUDENT, assert_same_bits, final_state
from torch import nn

from dtm_triton.train import recipes
from dtm_triton.train.build import build_network
from dtm_triton.train.config import to_json
from dtm_triton.train.data.batches import MicroBatches
from dtm_triton.train.data.images import open_images
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.optimizer import build_optimizer, guarded_step
from dtm_triton.train.finetune import finetune
from dtm_triton.train.models.classifier import Classifier, Standardise
from dtm_triton.train.models.export import export_student
from dtm_triton.train.objectives.supervised import Supervised

KWARGS: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3}
PROBES = ("linear_demo", "linear_mae_vit_base")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def classifier(model: str = "vit_tiny_patch16_224", **changes: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(model, out_features=5, image_size=SIZE, patch_size=8, model_kwargs=KWARGS, **changes)


@pytest.mark.parametrize("name", [name for name in recipes.FINETUNE if not name.endswith("demo")])
def test_recipe_trains_and_evaluates(name: str, images: Path, tmp_path: Path) -> None:
    config = shrink_finetuning(recipes.FINETUNE[name](), images, tmp_path)
    metrics = finetune(config, Processes())
    assert 0 <= metrics["accuracy"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    torch.manual_seed(0)
    before = build_network(Classifier, config.student, config.data, out_features=2, pool=config.pool).state_dict()
    after = final_state(tmp_path)
    moments = {"momentum"} if config.optimizer.kind == "lars" else {"step", "exp_avg", "exp_avg_sq"}
    trained = {key.split(".", 1)[1].rpartition(".")[0] for key in after if key.startswith("optimizer.")}
    assert {key.rpartition(".")[2] for key in after if key.startswith("optimizer.")} == moments
    assert trained == ({"head.weight", "head.bias"} if name in PROBES else before.keys())


@pytest.mark.parametrize("step", [0, 15])
def test_a_stopped_probe_ends_with_the_same_bits(step: int, tmp_path: Path) -> None:
    """With mixing, erasing, running statistics and LARS' momenta; two micro-batches a step."""
    finetune(probing_config(tmp_path / "whole", accumulate=2), Processes())
    finetune_in_two_goes(probing_config(tmp_path / "parts", accumulate=2), step)
    whole = final_state(tmp_path / "whole")
    assert_same_bits(whole, final_state(tmp_path / "parts"))
    assert whole["step"] == 22 and whole["optimizer.head.weight.momentum"].any()
    assert whole["objective.network.standardise.mean"].any()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_probe_as_one_does(strategy: str, tmp_path: Path) -> None:
    run_together(2, probe_in_processes, tmp_path / "two", strategy)
    probe_in_processes(Processes(), tmp_path / "one", strategy)
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name} {text}")
    assert one["optimizer.head.weight.momentum"].any() and one["objective.network.standardise.mean"].any()


def test_a_frozen_backbone_stays_and_is_not_trained(tmp_path: Path) -> None:
    network = build_network(Classifier, STUDENT, recipes.digits(), out_features=10)
    export_student(network, tmp_path / "student", {}, mean=(0.2,), std=(0.35,))
    config = probing_config(tmp_path / "run")
    config = replace(config, student=replace(STUDENT, weights=tmp_path / "student", drop_path=0.5))
    finetune(config, Processes())
    after = final_state(tmp_path / "run")
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(after[f"objective.network.backbone.{name}"], value), name


def test_a_frozen_backbone_sees_no_random_depth_and_keeps_no_activations() -> None:
    network = classifier(frozen=True, drop_path=0.9).train()
    assert network.training and network.head.training and network.standardise.training
    assert not any(module.training for module in network.backbone.modules())
    x = torch.rand(4, 3, *SIZE)
    features = network.features(x)
    assert torch.equal(features, network.features(x)) and not features.requires_grad
    network(x).sum().backward()
    assert network.head.weight.grad is not None and network.head.weight.grad.any()
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())
    assert not any(module.training for module in network.eval().modules())
    assert all(parameter.requires_grad for parameter in classifier().parameters())


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_base_patch16_dinov3"])
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_pools_are_timms(model: str, pool: Any) -> None:
    """The same weights in timm's own model, pooled over normed tokens."""
    network = classifier(model, pool=pool).eval()
    theirs: Any = timm.create_model(model, **network.create_kwargs)
    theirs.load_state_dict(network.backbone_state_dict())
    x = torch.rand(2, 3, *SIZE)
    tokens = theirs.eval().forward_features(x)
    prefix = theirs.num_prefix_tokens
    assert tokens.shape[1] == PATCHES + prefix and prefix == (5 if "dinov3" in model else 1)
    pooled = tokens[:, 0] if pool == "class" else tokens[:, prefix:].mean(1)
    torch.testing.assert_close(network.features(x), pooled)
    torch.testing.assert_close(network(x), network.head(pooled))


def test_a_class_token_that_is_not_there_is_refused(tmp_path: Path) -> None:
    student = replace(STUDENT, model_kwargs={**STUDENT.model_kwargs, "class_token": False})
    with pytest.raises(FolderError, match="student.model must have a class token for pool 'class', got 'vit_tiny"):
        finetune(replace(probing_config(tmp_path), student=student), Processes())
    build_network(Classifier, student, recipes.digits(), out_features=2, pool="mean")


def test_standardising_is_batch_norm_without_weights() -> None:
    ours, theirs = Standardise(6), nn.BatchNorm1d(6, affine=False, eps=1e-6)
    for seed in range(5):
        x = 3 + 2 * torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.variance, theirs.running_var)
    kept = ours.mean.clone()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours.mean, kept)
    far = 1e4 + torch.randn(64, 6, generator=torch.Generator().manual_seed(9))  # a sum of squares must keep its digits
    torch.testing.assert_close(ours.train()(far).var(0, correction=0), torch.ones(6), rtol=1e-2, atol=1e-2)
    assert ours(torch.ones(4, 6)).abs().max() == 0 and ours(torch.ones(1, 6)).isfinite().all()
    assert ours(x.bfloat16()).dtype == torch.float32


def test_standardising_is_over_all_processes(tmp_path: Path) -> None:
    rows = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    torch.save(rows, tmp_path / "rows.pt")
    run_together(2, standardise_in_parts, tmp_path)
    whole = Standardise(3)
    expected = whole(rows)
    for rank in range(2):
        mine, mean, variance = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(mine, expected[rank::2])
        torch.testing.assert_close(mean, whole.mean)
        torch.testing.assert_close(variance, whole.variance)


def test_what_mae_exports_is_fine_tuned(images: Path, tmp_path: Path) -> None:
    """Its fixed positions too, which are trained from then on."""
    config = shrink(recipes.PRETRAIN["amt_mae_vit_base"](), images, tmp_path / "mae")
    trained = shrunk_trainer(config).objective.network
    export_student(trained, tmp_path / "student", {}, mean=config.data.mean, std=config.data.std)
    tuned = shrink_finetuning(recipes.FINETUNE["finetune_mae_vit_base"](), images, tmp_path / "run")
    student = replace(tuned.student, weights=tmp_path / "student")
    network: Any = build_network(Classifier, student, tuned.data, out_features=2)
    assert torch.equal(network.backbone.pos_embed, trained.backbone.pos_embed)
    assert network.backbone.pos_embed.requires_grad and not trained.backbone.pos_embed.requires_grad
    finetune(replace(tuned, student=student), Processes())
    assert not torch.equal(
        final_state(tmp_path / "run")["objective.network.backbone.pos_embed"], network.backbone.pos_embed
    )


def test_a_step_never_makes_the_host_wait(tmp_path: Path) -> None:
    """On the device "meta", where .item(), bool() and shapes that hang on values raise; LARS decides there too."""
    config = probing_config(tmp_path)
    network = build_network(Classifier, config.student, config.data, out_features=10, pool="class", frozen=True)
    objective = Supervised(network, config.data, mixup=0.8, cutmix=1.0, random_erasing=0.25).to("meta").train()
    images = open_images(config.data, "train")
    assert images is not None
    rows = MicroBatches(images, config.data, config.run, Processes(), objective.draws())[0]
    batch = {name: value.to("meta") for name, value in rows.items()}
    assert {"mix", "erase"} <= batch.keys()
    optimizer = build_optimizer(objective.network, config.optimizer)
    loss = objective(batch)["loss"]
    loss.backward()
    guarded_step(optimizer, 0.1, torch.zeros((), device="meta"))
    assert loss.is_meta and objective.network.head.weight.grad is not None


def numbers(name: str) -> dict[str, Any]:
    config = json.loads(to_json(recipes.FINETUNE[name]()))
    parts = {
        f"{part}.{key}": value
        for part in ("data", "student", "optimizer", "run")
        for key, value in config[part].items()
    }
    return {**config, **parts}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "finetune_mae_vit_base",
            {
                "optimizer.kind": "adamw",
                "optimizer.lr": pytest.approx(4e-3),  # 1e-3 per 256 images
                "optimizer.layer_decay": 0.75,
                "optimizer.warmup_epochs": 5,
                "optimizer.weight_decay": 0.05,
                "optimizer.clip_norm": None,
                "run.epochs": 100,
                "run.batch_size": 1024,
                "student.drop_path": 0.1,
                "student.positions": "learned",
                "student.weights": "runs/mae_vit_base/student",
                "mixup": 0.8,
                "cutmix": 1.0,
                "random_erasing": 0.25,
                "label_smoothing": 0.1,
                "pool": "mean",
                "frozen": False,
            },
        ),
        (
            "finetune_simmim_vit_base",
            {
                "optimizer.lr": pytest.approx(5e-3),  # 1.25e-3 per 512 images
                "optimizer.final_lr": pytest.approx(1e-6),
                "optimizer.layer_decay": 0.65,
                "optimizer.warmup_epochs": 20,
                "optimizer.clip_norm": 5.0,
                "run.epochs": 100,
                "run.batch_size": 2048,
                "student.drop_path": 0.1,
                "student.model": "beit_base_patch16_224",
                "mixup": 0.8,
                "cutmix": 1.0,
                "random_erasing": 0.25,
                "pool": "mean",
                "frozen": False,
            },
        ),
        (
            "linear_mae_vit_base",
            {
                "optimizer.kind": "lars",
                "optimizer.lr": pytest.approx(6.4),  # 0.1 per 256 images
                "optimizer.weight_decay": 0.0,
                "optimizer.warmup_epochs": 10,
                "optimizer.betas": [0.9, 0.999],
                "run.epochs": 90,
                "run.batch_size": 16384,
                "data.crop_scale": [0.08, 1.0],
                "data.colour_jitter": 0.0,
                "data.flip": True,
                "mixup": 0.0,
                "cutmix": 0.0,
                "random_erasing": 0.0,
                "label_smoothing": 0.0,
                "pool": "class",
                "frozen": True,
            },
        ),
    ],
)
def test_the_sources_numbers(name: str, expected: dict[str, Any]) -> None:
    found = numbers(name)
    assert {field: found[field] for field in expected} == expected
