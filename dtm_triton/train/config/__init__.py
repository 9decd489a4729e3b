"""Configuration: small frozen dataclasses. A recipe (recipes/) is a function that returns one complete configuration.

`to_json` is what lies beside the results.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtm_triton.train.config.attention import AttentionConfig
from dtm_triton.train.config.checks import check
from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.config.finetune import FinetuneConfig
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
    "AttentionConfig",
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
    attention: AttentionConfig = field(default_factory=AttentionConfig)
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
        patches, mask = 1, self.mask
        for side in self.data.image_size:
            whole = side % self.student.patch_size == 0
            check("data.image_size", self.data.image_size, whole, f"multiples of patch {self.student.patch_size}")
            units = side // self.student.patch_size % mask.unit == 0
            check("mask.unit", mask.unit, units, f"a divisor of the patches a side, {side // self.student.patch_size}")
            patches *= side // self.student.patch_size
        check("mask.masked", mask.masked, mask.masked < patches, f"below {patches}, the patches")
        rest = patches - mask.masked
        check("mask.thrown", mask.thrown, mask.thrown < rest, f"below {rest}, the patches that are not masked")
        if mask.thrown:
            check("mask.thrown", mask.thrown, method != "byol", '0 for method "byol"')
        if mask.kind == "attention":
            self._check_attention(patches)
        if self.loss.on == "masked" or method == "beit_v2":
            check("mask.masked", mask.masked, mask.masked >= 1, "positive when only masked tokens are compared")

    def _check_attention(self, patches: int) -> None:
        maps, mask = self.attention, self.mask
        check("mask.kind", mask.kind, self.method != "byol", 'other than "attention" for method "byol"')
        check(
            "attention.source",
            maps.source,
            maps.source != "teacher" or self.teacher.kind == "timm",
            'other than "teacher" without a timm teacher',
        )
        epochs = self.run.epochs
        wanted = f"below run.epochs {epochs}, or no map is ever made"
        check("attention.warmup_epochs", maps.warmup_epochs, maps.warmup_epochs < epochs, wanted)
        if maps.warmup_epochs:
            warmup = maps.warmup_masked
            on_all = self.loss.on == "all" and self.method != "beit_v2"
            fine = (warmup >= 1 or on_all) and warmup < patches and warmup % mask.unit**2 == 0
            check(
                "attention.warmup_masked",
                warmup,
                fine,
                f"below {patches}, in whole units, and positive when masked tokens are compared",
            )


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
