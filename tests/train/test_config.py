"""Recipes are valid and complete, fields are checked, the command line chooses and overrides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Generator

from dtm_triton.train import recipes
from dtm_triton.train.build import build_student
from dtm_triton.train.command_line import parse
from dtm_triton.train.config import (
    DataConfig,
    FinetuneConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    to_json,
)
from dtm_triton.train.data.masks import Masks
from dtm_triton.train.engine.run_folder import differences, refuse_changes

EVERY = {**recipes.PRETRAIN, **recipes.FINETUNE, **recipes.PROBE}


@pytest.mark.parametrize("name", EVERY)
def test_recipe_is_complete(name: str) -> None:
    config = EVERY[name]()
    assert differences(to_json(config), to_json(EVERY[name]())) == []
    assert json.loads(to_json(config))["data"]["source"] in ("digits", "folder")
    if name in recipes.PRETRAIN and not name.startswith("demo"):
        assert config.run.folder == Path("runs", name)


@pytest.mark.parametrize(("size", "width", "heads", "depth"), [("small", 384, 6, 12), ("base", 768, 12, 12)])
def test_in1k_recipes_build_the_papers_student(size: str, width: int, heads: int, depth: int) -> None:
    config = recipes.PRETRAIN[f"dtm_vit_{size}_patch16_in1k"]()
    student = build_student(config.student, config.data, 512)
    assert student.grid == (14, 14)
    assert student.backbone.embed_dim == width
    assert student.num_blocks == depth
    assert student.backbone.blocks[0].attn.num_heads == heads
    assert student.backbone.pos_embed is None
    masks = Masks(config.mask, student.grid)
    assert masks(masks.draw(3, generator=Generator().manual_seed(0))).sum(1).tolist() == [75, 75, 75]


def test_in1k_recipe_holds_the_methods_numbers() -> None:
    config = recipes.dtm_vit_base_patch16_in1k()
    optimizer, run, loss = config.optimizer, config.run, config.loss
    assert (run.epochs, run.batch_size) == (300, 1024)
    assert optimizer.lr == pytest.approx(1.5e-3 * (1024 / 2048) ** 0.5)
    assert (optimizer.final_lr, optimizer.warmup_epochs, optimizer.clip_norm) == (1e-5, 10, 3.0)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.98), 1e-8, 0.05)
    assert (loss.num_schedules, loss.max_removed, loss.max_iterations, loss.beta) == (2, 196, 14, 2.0)
    assert recipes.dtm_vit_large_patch16_in1k().student.model_kwargs["depth"] == 24


def test_tokenwise_twin_differs_by_morphing_alone() -> None:
    changed = differences(to_json(recipes.demo()), to_json(recipes.demo_tokenwise()))
    assert changed == ["loss.morph: True -> False"]


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (recipes.digits(), "channels", 0, "data.channels must be positive, got 0"),
        (recipes.digits(), "mean", (0.1, 0.2), "data.mean must be one number for each of 1"),
        (recipes.digits(), "std", (0.0,), "data.std must be positive"),
        (recipes.digits(), "crop_scale", (0.5, 0.2), "data.crop_scale must be between 0 and 1, smaller first"),
        (recipes.digits(), "source", "folder", "data.train_folder must be given"),
        (recipes.digits(), "workers", -1, "data.workers must be 0 or more, got -1"),
        (recipes.digits_student(), "drop_path", 1.0, r"student.drop_path must be in 0\.\.1, got 1.0"),
        (recipes.demo().teacher, "kind", "timm", "teacher.model must be given"),
        (recipes.demo().mask, "masked", -1, "mask.masked must be 0 or more, got -1"),
        (recipes.demo().optimizer, "lr", 0.0, "optimizer.lr must be positive, got 0.0"),
        (recipes.demo().optimizer, "final_lr", 1.0, "optimizer.final_lr must be between 0 and lr"),
        (recipes.demo().optimizer, "clip_norm", 0.0, "optimizer.clip_norm must be positive or None, got 0.0"),
        (recipes.demo().optimizer, "layer_decay", 1.5, "optimizer.layer_decay must be above 0, 1 at most, got 1.5"),
        (recipes.demo().run, "epochs", 0, "run.epochs must be positive, got 0"),
        (recipes.demo().run, "accumulate", 3, "run.batch_size must be a multiple of run.accumulate 3"),
        (recipes.demo().run, "threads", 0, "run.threads must be positive or None, got 0"),
        (recipes.demo(), "mask", MaskConfig(kind="random", masked=37), "mask.masked must be at most 36"),
        (
            recipes.demo(),
            "student",
            StudentConfig(model="x", patch_size=5),
            "data.image_size must be multiples of patch 5",
        ),
        (recipes.finetune_demo(), "label_smoothing", 1.0, "label_smoothing must be"),
        (recipes.probe_demo(), "neighbours", 0, "neighbours must be positive, got 0"),
    ],
)
def test_bad_values_are_named(config: Any, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **{field: value})


def test_every_field_has_a_docstring() -> None:
    import inspect

    for kind in (DataConfig, StudentConfig, TeacherConfig, MaskConfig, LossConfig, OptimizerConfig, RunConfig):
        lines = [line.strip() for line in inspect.getsource(kind).splitlines()]
        for name in kind.__dataclass_fields__:
            place = next(number for number, line in enumerate(lines) if line.startswith(f"{name}:"))
            assert lines[place + 1].startswith('"""'), f"{kind.__name__}.{name}"


def test_command_line_chooses_and_overrides() -> None:
    words = ["--run.epochs", "3", "--recipe", "demo_tokenwise", "--student.model-kwargs.embed-dim", "48"]
    config = parse(recipes.PRETRAIN, "demo", "dtm-pretrain", words)
    assert (config.loss.morph, config.run.epochs, config.student.model_kwargs["embed_dim"]) == (False, 3, 48)
    assert parse(recipes.PRETRAIN, "demo", "dtm-pretrain", ["--recipe=demo_tokenwise"]) == recipes.demo_tokenwise()
    assert parse(recipes.PRETRAIN, "demo", "dtm-pretrain", []) == recipes.demo()
    tuned = parse(recipes.FINETUNE, "finetune_demo", "dtm-finetune", ["--student.weights", "None"])
    assert isinstance(tuned, FinetuneConfig) and tuned.student.weights is None


def test_command_line_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(recipes.PRETRAIN, "demo", "dtm-pretrain", ["--recipe", "dtm_vit_base_patch16_in1k", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for wanted in (*recipes.PRETRAIN, "--run.epochs", "Passes over the training images", "(default: 300)"):
        assert wanted in text


@pytest.mark.parametrize("words", [["--recipe", "nope"], ["--run.epochs", "0"], ["--nothing", "1"], ["--recipe"]])
def test_command_line_refuses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(recipes.PRETRAIN, "demo", "dtm-pretrain", words)
    assert stop.value.code not in (0, None)
    text = f"{stop.value.code} {''.join(capsys.readouterr())}"
    assert any(hint in text for hint in ("dtm_vit_base_patch16_in1k", "run.epochs must be positive", "--nothing"))


def test_changed_configuration_names_the_fields(tmp_path: Any) -> None:
    base = recipes.demo()
    other = replace(
        base, run=replace(base.run, seed=7, log_every=99, folder=tmp_path), optimizer=replace(base.optimizer, lr=1)
    )
    with pytest.raises(ValueError, match=r"run.seed: 0 -> 7") as error:
        refuse_changes(tmp_path, to_json(base), to_json(other))
    assert "optimizer.lr" in str(error.value) and "log_every" not in str(error.value)
