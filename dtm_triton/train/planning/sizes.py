"""What a recipe's student and teacher weigh and compute, counted on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch

from dtm_triton.train.benchmark.flops import count_flops
from dtm_triton.train.build import build_student
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.models.targets import HogTargets, PixelTargets
from dtm_triton.train.models.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters, and operations for one image: of the student forward and backward, of the teacher forward."""

    student_parameters: int
    teacher_parameters: int
    student_flops: int
    teacher_flops: int

    @property
    def flops(self) -> int:
        """Of both."""
        return self.student_flops + self.teacher_flops


def count(config: PretrainConfig) -> Size:
    """The size of a recipe with a timm teacher; no memory is taken, so any machine can count any model."""
    with torch.device("meta"):
        teacher = _teacher(config)
        student = build_student(config.student, config.data, teacher.out_features)
        images = torch.rand(1, config.data.channels, *config.data.image_size)
        return Size(
            student_parameters=sum(parameter.numel() for parameter in student.parameters()),
            teacher_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
            student_flops=count_flops(lambda: student(images).sum().backward()),
            teacher_flops=count_flops(lambda: teacher(images)),
        )


def target_features(config: PretrainConfig) -> int | None:
    """How wide the targets of a recipe are; None: as wide as the student."""
    teacher, data, patch = config.teacher, config.data, config.student.patch_size
    with torch.device("meta"):
        if teacher.kind == "timm":
            return _teacher(config).out_features
        if teacher.kind == "pixels":
            return PixelTargets(data.image_size, patch, data.mean, data.std).out_features
        if teacher.kind == "hog":
            return HogTargets(data.image_size, patch, data.channels).out_features
    return teacher.features if teacher.kind == "conv" else None


def _teacher(config: PretrainConfig) -> Teacher:
    """The timm teacher at the student's grid, with weights of no value."""
    kwargs: dict[str, Any] = dict(config.teacher.model_kwargs)
    network: Any = timm.create_model(config.teacher.model, **kwargs)
    patches, channels = network.patch_embed.patch_size, config.data.channels
    sides = (side // config.student.patch_size for side in config.data.image_size)
    network.set_input_size(img_size=tuple(n * patch for n, patch in zip(sides, patches, strict=True)))
    return Teacher(network, (0.0,) * channels, (1.0,) * channels, config.teacher.project)
