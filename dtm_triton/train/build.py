"""From configurations to modules: the student, the teacher, the masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from dtm_triton.masking import block_masks, random_masks
from dtm_triton.train.config import (
    DataConfig,
    MaskConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    to_json,
)
from dtm_triton.train.data.draws import Draw, fold
from dtm_triton.train.data.images import open_images
from dtm_triton.train.engine.checkpoint import load_newest
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.run_folder import read_finished, write_finished
from dtm_triton.train.models.student import MaskedStudent
from dtm_triton.train.models.teacher import ConvTeacher, build_teacher
from dtm_triton.train.objectives.supervised import Supervised

STUDENT_STD = 0.02  # what MaskedStudent starts from
CONV_BATCH = 64  # images a step of the "conv" teacher


def build_student(config: StudentConfig, data: DataConfig, out_features: int) -> MaskedStudent:
    """The student with random weights, or with those of `config.weights`.

    Raises FileNotFoundError for missing weights, RuntimeError for ones that do not fit.
    """
    student = MaskedStudent(
        config.model,
        out_features=out_features,
        image_size=data.image_size,
        patch_size=config.patch_size,
        in_chans=data.channels,
        drop_path=config.drop_path,
        model_kwargs=config.model_kwargs,
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.ndim > 1 or name.endswith("_token"):  # what starts truncated-normal; tables of zeros stay
                parameter.mul_(config.init_std / STUDENT_STD)
    if config.weights is not None:
        path = config.weights / "model.safetensors" if config.weights.is_dir() else config.weights
        if not path.is_file():
            raise FileNotFoundError(f"student.weights {str(path)!r} does not exist; pre-train first, or give None")
        student.load_backbone_state_dict(load_state_dict(str(path), device="cpu", weights_only=True))
    return student


def build_draws(config: MaskConfig, grid: tuple[int, int]) -> dict[str, Draw]:
    """What every image of a pre-training batch comes with: its mask."""
    if config.kind == "random":
        return {"mask": partial(random_masks, grid=grid, num_masked=config.masked)}
    return {"mask": partial(block_masks, grid=grid, num_masked=config.masked, min_patches=config.min_patches)}


def build_targets(config: PretrainConfig, processes: Processes) -> Any:
    """The frozen teacher: images in 0..1 -> [B, N, out_features]. Trains the "conv" one, or goes on training it."""
    teacher, patch = config.teacher, config.student.patch_size
    if teacher.kind == "conv":
        return ConvTargets(train_conv_teacher(config, processes))
    height, width = config.data.image_size
    return build_teacher(
        teacher.model,
        weights=teacher.weights,
        project=teacher.project,
        statistics=teacher.statistics,
        grid=(height // patch, width // patch),
    )


class ConvTargets(nn.Module):
    """The tokens of a trained ConvTeacher, each standardised over its channels as a ViT's final norm does."""

    def __init__(self, network: ConvTeacher) -> None:
        super().__init__()
        self.network, self.out_features, self.grid = network, network.out_features, network.grid

    def forward(self, images: Tensor) -> Tensor:
        """Targets [B, N, C] for images [B, C, H, W] in 0..1."""
        return F.layer_norm(self.network.tokens(images), (self.out_features,))


@dataclass(frozen=True, kw_only=True)
class ConvRun:
    """The resolved configuration of the "conv" teacher's own run."""

    data: DataConfig
    teacher: TeacherConfig
    patch_size: int
    optimizer: OptimizerConfig
    run: RunConfig


def train_conv_teacher(config: PretrainConfig, processes: Processes) -> ConvTeacher:
    """The convolutional teacher, trained on the labels in `config.teacher.weights`, by default RUN/teacher.

    Raises as `Trainer` does.
    """
    folder = config.teacher.weights or config.run.folder / "teacher"
    images = open_images(config.data, "train")
    assert images is not None
    torch.manual_seed(fold(config.run.seed, "teacher weights"))
    network = ConvTeacher(
        config.data.image_size,
        config.student.patch_size,
        in_chans=config.data.channels,
        num_classes=images.num_classes,
        out_features=config.teacher.features,
    )
    batch_size = min(CONV_BATCH, len(images.labels))
    own = ConvRun(
        data=config.data,
        teacher=replace(config.teacher, weights=None),  # wherever it lies
        patch_size=config.student.patch_size,
        optimizer=OptimizerConfig(lr=4e-3, warmup_epochs=1, weight_decay=0.02),
        run=replace(
            config.run,
            folder=folder,
            epochs=config.teacher.epochs,
            evaluate_every=0,
            accumulate=1,
            batch_size=batch_size,
        ),
    )
    resolved = to_json(own)
    if read_finished(folder, resolved) is not None:
        _load_network(network, folder)
        return network
    trainer = Trainer(
        Supervised(network, own.data),
        data=own.data,
        optimizer=own.optimizer,
        run=own.run,
        processes=processes,
        draws={},
        resolved=resolved,
        title="teacher",
    )
    results = trainer.fit()
    if processes.first:
        write_finished(folder, resolved, results)
    if processes.count > 1:  # batch statistics are each process's own: take the first one's
        processes.wait()
        _load_network(network, folder)
    return network


def _load_network(network: nn.Module, folder: Path) -> None:
    state = load_newest(folder / "checkpoints", print)
    assert state is not None
    weights: Mapping[str, Tensor] = state["objective"]
    network.load_state_dict({name.removeprefix("network."): weights[name] for name in weights})
