"""Configuration: small frozen dataclasses. A recipe (recipes.py) is a function that returns one complete configuration.

`to_json` is what lies beside the results.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtm_triton.train.config.checks import check
from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.config.model import LossConfig, MaskConfig, StudentConfig, TeacherConfig
from dtm_triton.train.config.run import OptimizerConfig, RunConfig

__all__ = [
    "DataConfig",
    "FinetuneConfig",
    "LossConfig",
    "MaskConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "ProbeConfig",
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

    def __post_init__(self) -> None:
        patches = 1
        for side in self.data.image_size:
            whole = side % self.student.patch_size == 0
            check("data.image_size", self.data.image_size, whole, f"multiples of patch {self.student.patch_size}")
            patches *= side // self.student.patch_size
        check("mask.masked", self.mask.masked, self.mask.masked <= patches, f"at most {patches}, the patches")


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
