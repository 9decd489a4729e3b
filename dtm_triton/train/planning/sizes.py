"""What a recipe's student and teacher weigh and compute, counted on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch

from dtm_triton.train.benchmark.flops import count_flops
from dtm_triton.train.build import build_student
from dtm_triton.train.config import PretrainConfig
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
    kwargs: dict[str, Any] = dict(config.teacher.model_kwargs)
    with torch.device("meta"):
        network: Any = timm.create_model(config.teacher.model, **kwargs)
        channels, patches = config.data.channels, network.patch_embed.patch_size
        sides = (side // config.student.patch_size for side in config.data.image_size)
        network.set_input_size(img_size=tuple(n * patch for n, patch in zip(sides, patches, strict=True)))
        teacher = Teacher(network, (0.0,) * channels, (1.0,) * channels, config.teacher.project)
        student = build_student(config.student, config.data, teacher.out_features)
        images = torch.rand(1, channels, *config.data.image_size)
        mask = torch.zeros(1, student.grid[0] * student.grid[1], dtype=torch.bool)
        return Size(
            student_parameters=sum(parameter.numel() for parameter in student.parameters()),
            teacher_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
            student_flops=count_flops(lambda: student(images, mask).sum().backward()),
            teacher_flops=count_flops(lambda: teacher(images)),
        )
