"""A pre-training run small enough for a test: 11 steps an epoch, a student of one block, an untrained teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtm_triton.train import recipes
from dtm_triton.train.build import ConvTargets, build_draws, build_student
from dtm_triton.train.config import OptimizerConfig, PretrainConfig, StudentConfig, TeacherConfig, to_json
from dtm_triton.train.engine.checkpoint import load_newest
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.models.teacher import ConvTeacher
from dtm_triton.train.objectives.pretraining import Pretraining

STUDENT = StudentConfig(
    model="vit_tiny_patch16_224",
    patch_size=2,
    init_std=0.1,
    model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3},
)


def tiny_config(folder: Path, *, data: dict[str, Any] | None = None, **run: Any) -> PretrainConfig:
    base = recipes.demo()
    return replace(
        base,
        data=replace(base.data, **(data or {})),
        student=STUDENT,
        teacher=TeacherConfig(kind="conv", features=8, epochs=1),
        optimizer=OptimizerConfig(lr=1e-2, warmup_epochs=1, clip_norm=1.0),
        run=replace(
            base.run,
            **{
                "folder": folder,
                "epochs": 2,
                "batch_size": 128,
                "threads": 1,
                "checkpoint_every": 4,
                "evaluate_every": 0,
                "log_every": 1,
                **run,
            },
        ),
    )


def tiny_trainer(config: PretrainConfig, processes: Processes | None = None) -> Trainer:
    torch.manual_seed(5)
    teacher = ConvTeacher(config.data.image_size, 2, in_chans=config.data.channels, out_features=8)
    student = build_student(config.student, config.data, 8)
    return Trainer(
        Pretraining(student, ConvTargets(teacher), config.data, config.loss),
        data=config.data,
        optimizer=config.optimizer,
        run=config.run,
        processes=processes or Processes(),
        draws=build_draws(config.mask, student.grid),
        resolved=to_json(config),
        title="tiny",
    )


def final_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, moments of the optimiser included, by a flat name."""
    state = load_newest(folder / "checkpoints", print)
    assert state is not None
    flat = {f"objective.{name}": value for name, value in state["objective"].items()}
    for number, moments in state["optimizer"]["state"].items():
        flat.update({f"optimizer.{number}.{name}": value for name, value in moments.items()})
    return {"step": torch.tensor(state["step"]), **flat}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different
