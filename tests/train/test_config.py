"""Recipes are valid and complete, fields are checked, the command line chooses and overrides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtm_triton.train import recipes
from dtm_triton.train.command_line import parse
from dtm_triton.train.config import (
    AttentionConfig,
    CodebookConfig,
    DataConfig,
    DecoderConfig,
    EmaConfig,
    FinetuneConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    ProjectorConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    to_json,
)
from dtm_triton.train.engine.run_folder import differences, refuse_changes

MAE, BYOL = recipes.PRETRAIN["mae_clip_vit_base"](), recipes.PRETRAIN["byol_vit_base"]()
MIXED = replace(recipes.finetune_demo(), mixup=0.8)
EVERY = {**recipes.PRETRAIN, **recipes.FINETUNE, **recipes.PROBE}


@pytest.mark.parametrize("name", EVERY)
def test_recipe_is_complete(name: str) -> None:
    config = EVERY[name]()
    assert differences(to_json(config), to_json(EVERY[name]())) == []
    assert json.loads(to_json(config))["data"]["source"] in ("digits", "folder")
    if name not in ("demo", "demo_tokenwise", *recipes.PROBE):
        assert config.run.folder == Path("runs", name)


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
        (recipes.demo(), "mask", MaskConfig(kind="random", masked=37), "mask.masked must be below 36"),
        (
            recipes.demo(),
            "student",
            StudentConfig(model="x", patch_size=5),
            "data.image_size must be multiples of patch 5",
        ),
        (EmaConfig(), "momentum", 1.5, r"ema.momentum must be in 0\.\.1, got 1.5"),
        (EmaConfig(), "blocks", 0, "ema.blocks must be positive, got 0"),
        (DecoderConfig(), "depth", 0, "decoder.depth must be positive, got 0"),
        (CodebookConfig(), "codes", 1, "codebook.codes must be 2 or more, got 1"),
        (CodebookConfig(), "momentum", 1.0, r"codebook.momentum must be in 0\.\.1, got 1.0"),
        (ProjectorConfig(), "features", 0, "projector.features must be positive, got 0"),
        (recipes.demo(), "method", "byol", 'teacher.kind must be "ema" for method "byol", got \'conv\''),
        (BYOL, "method", "beit_v2", 'teacher.kind must be "timm" or "conv" for method "beit_v2", got \'ema\''),
        (BYOL, "loss", LossConfig(on="masked"), "mask.masked must be positive when only masked tokens are compared"),
        (MAE, "mask", MaskConfig(kind="random", masked=196), "mask.masked must be below 196"),
        (recipes.finetune_demo(), "label_smoothing", 1.0, "label_smoothing must be"),
        (recipes.finetune_demo(), "mixup", -0.1, "mixup must be 0 or more, got -0.1"),
        (recipes.finetune_demo(), "cutmix", -1.0, "cutmix must be 0 or more, got -1.0"),
        (recipes.finetune_demo(), "random_erasing", 1.5, r"random_erasing must be in 0\.\.1, got 1.5"),
        (
            MIXED,
            "run",
            replace(MIXED.run, batch_size=6, accumulate=2),
            "run.batch_size must be even for mixup and cutmix",
        ),
        (recipes.probe_demo(), "neighbours", 0, "neighbours must be positive, got 0"),
    ],
)
def test_bad_values_are_named(config: Any, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **{field: value})


def test_every_field_has_a_docstring() -> None:
    import inspect

    nested = (AttentionConfig, EmaConfig, DecoderConfig, CodebookConfig, ProjectorConfig)
    for kind in (
        DataConfig, StudentConfig, TeacherConfig, MaskConfig, LossConfig, OptimizerConfig, RunConfig, *nested
    ):  # fmt: skip
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
