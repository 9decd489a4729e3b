"""Configuration: small frozen dataclasses. A recipe (recipes/) is a function that returns one complete configuration.

`to_json` is what lies beside the results.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtm_triton.train.config.checks import check
from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.config.model import (
    CodebookConfig,
    DecoderConfig,
    EmaConfig,
    LossConfig,
    MaskConfig,
    ProjectorConfig,
    StudentConfig,
    TeacherConfig,
)
from dtm_triton.train.config.run import OptimizerConfig, RunConfig

__all__ = [
    "CodebookConfig",
    "DataConfig",
    "DecoderConfig",
    "EmaConfig",
    "FinetuneConfig",
    "LossConfig",
    "MaskConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "ProbeConfig",
    "ProjectorConfig",
    "RunConfig",
    "StudentConfig",
    "TeacherConfig",
    "to_json",
]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything about a pre-training run."""

    data: DataConfig
    student: StudentConfig
    teacher: TeacherConfig
    mask: MaskConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    run: RunConfig
    method: Literal["masked", "mae", "beit_v2", "byol"] = "masked"
    """"masked": the student sees mask tokens and predicts targets, as DTM; "mae": it sees visible patches only and a
    decoder predicts; "beit_v2": it predicts codes of the targets; "byol": two views, the average's projections."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)

    def __post_init__(self) -> None:
        kind, method = self.teacher.kind, self.method
        if method == "byol":
            check("teacher.kind", kind, kind == "ema", '"ema" for method "byol"')
        if method == "beit_v2":
            check("teacher.kind", kind, kind in ("timm", "conv"), '"timm" or "conv" for method "beit_v2"')
        patches = 1
        for side in self.data.image_size:
            whole = side % self.student.patch_size == 0
            check("data.image_size", self.data.image_size, whole, f"multiples of patch {self.student.patch_size}")
            patches *= side // self.student.patch_size
        masked = self.mask.masked
        check("mask.masked", masked, masked < patches, f"below {patches}, the patches")
        if self.loss.on == "masked" or method == "beit_v2":
            check("mask.masked", masked, masked >= 1, "positive when only masked tokens are compared")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything about supervised training, from pre-trained or from random weights."""

    data: DataConfig
    student: StudentConfig
    optimizer: OptimizerConfig
    run: RunConfig
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes equally."""

    def __post_init__(self) -> None:
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in 0..1")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Everything about probing frozen features."""

    weights: Path
    """What a pre-training run exported (RUN/student), or a .safetensors file of the same kind."""
    data: DataConfig
    neighbours: int = 20
    """k of the nearest-neighbour classifier."""
    batch_size: int = 256
    """Images at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU where there is one."""

    def __post_init__(self) -> None:
        check("neighbours", self.neighbours, self.neighbours >= 1, "positive")
        check("batch_size", self.batch_size, self.batch_size >= 1, "positive")


def to_json(config: Any) -> str:
    """A configuration as readable JSON, paths as text."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)
