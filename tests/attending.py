"""Tiny runs whose masks follow attention, and functions for `run_together`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunk import shrunk_trainer
from tiny import stop_at, tiny_config

from dtm_triton.train.config import (
    AttentionConfig,
    DecoderConfig,
    EmaConfig,
    LossConfig,
    MaskConfig,
    PretrainConfig,
    TeacherConfig,
)
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.stop import Stopped

PIXELS = LossConfig(morph=False, on="masked", kind="l2")
MASK = MaskConfig(kind="attention", masked=16, thrown=12)  # of 36: 8 are seen
MAPS = AttentionConfig(warmup_epochs=1, warmup_masked=27, refresh_epochs=1)
STAGES = {  # one for every kind of network and source
    "mae": {},
    "simmim": {
        "method": "masked",
        "mask": replace(MASK, unit=2),
        "loss": replace(PIXELS, kind="l1"),
        "attention": replace(MAPS, warmup_masked=28),
    },
    "beit": {"method": "masked", "mask": MASK},
    "eva": {"method": "masked"},
    "dtm": {
        "method": "masked",
        "teacher": TeacherConfig(kind="ema"),
        "loss": LossConfig(max_removed=24, max_iterations=4),
        "attention": replace(MAPS, source="ema"),
    },
    "live": {"attention": replace(MAPS, maps="live")},
    "average": {"attention": replace(MAPS, source="ema", precision="float16", statistic="row_column")},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}),
    "eva": ("vit_base_patch16_dinov3", {}),
    "simmim": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
}


def attending(folder: Path, stage: str = "mae", **run: Any) -> PretrainConfig:
    """Digits, 3 epochs of 11 steps, maps anew after the first and the second one."""
    base = tiny_config(folder, data={"mean": (0.2,), "std": (0.35,)}, **{"epochs": 3, **run})
    model, kwargs = MODELS.get(stage, (base.student.model, {}))
    fields: dict[str, Any] = {
        "method": "mae",
        "student": replace(base.student, model=model, model_kwargs={**base.student.model_kwargs, **kwargs}),
        "teacher": TeacherConfig(kind="pixels", standardise=stage != "simmim"),
        "mask": MASK,
        "attention": MAPS,
        "loss": PIXELS,
        "decoder": DecoderConfig(width=16, depth=1, heads=2),
        "ema": EmaConfig(momentum=0.9, final_momentum=0.99, blocks=1),
        **STAGES[stage],
    }
    return replace(base, **fields)


def train_attending(
    processes: Processes, folder: Path, stage: str, stop: int | None = None, changes: dict[str, Any] | None = None
) -> None:
    """A whole run, or one that is told to stop in the middle of a step."""
    config = attending(folder, stage, **(changes or {}))
    config = replace(config, loss=replace(config.loss, shared_schedules=True))
    trainer = shrunk_trainer(config, processes)
    if stop is None:
        trainer.fit()
        return
    stop_at(trainer, stop)
    with pytest.raises(Stopped):
        trainer.fit()


def warm(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A batch of the first step after the warm-up, with random maps where they are stored."""
    trainer.objective.epoch = 1
    batch = trainer.batches[0]
    batch.pop("skipped")
    if trainer.maps is not None:
        generator = torch.Generator().manual_seed(3)
        batch["map"] = torch.randint(256, (len(batch["mask"]), 6, 6), generator=generator, dtype=torch.uint8)
    return batch
