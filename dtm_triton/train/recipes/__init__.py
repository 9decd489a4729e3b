"""Recipes: functions that return a complete configuration. A variant calls its base and replaces what differs.

The tables below are what `--recipe NAME` chooses from. A run's folder is runs/NAME unless the recipe says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dtm_triton.train.config import FinetuneConfig, PretrainConfig, ProbeConfig
from dtm_triton.train.recipes.demonstration import (
    demo,
    demo_tokenwise,
    digits,
    digits_student,
    finetune_demo,
    own_images,
    probe_demo,
)
from dtm_triton.train.recipes.frameworks import (
    beit_v2_vit_base,
    byol_vit_base,
    data2vec_vit_base,
    mae_clip_vit_base,
    mae_pixels_vit_base,
    maskfeat_vit_base,
)
from dtm_triton.train.recipes.imagenet import (
    dtm_vit_base_patch16_in1k,
    dtm_vit_large_patch16_in1k,
    dtm_vit_small_patch16_in1k,
    image_folder,
    imagenet_recipes,
    probe_folder,
)

__all__ = [
    "FINETUNE",
    "PRETRAIN",
    "PROBE",
    "demo",
    "demo_tokenwise",
    "digits",
    "digits_student",
    "dtm_vit_base_patch16_in1k",
    "dtm_vit_large_patch16_in1k",
    "dtm_vit_small_patch16_in1k",
    "finetune_demo",
    "image_folder",
    "own_images",
    "probe_demo",
    "probe_folder",
]


def _placed(name: str, recipe: Callable[[], PretrainConfig]) -> Callable[[], PretrainConfig]:
    def placed() -> PretrainConfig:
        config = recipe()
        return replace(config, run=replace(config.run, folder=Path("runs", name)))

    return placed


_FRAMEWORKS = (
    mae_pixels_vit_base,
    mae_clip_vit_base,
    maskfeat_vit_base,
    data2vec_vit_base,
    beit_v2_vit_base,
    byol_vit_base,
)
_FULL_SCALE = {**imagenet_recipes(), **{recipe.__name__: recipe for recipe in _FRAMEWORKS}}
PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {
    "demo": demo,
    "demo_tokenwise": demo_tokenwise,
    "own_images": own_images,
    **{name: _placed(name, recipe) for name, recipe in _FULL_SCALE.items()},
}
FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {"finetune_demo": finetune_demo}
PROBE: dict[str, Callable[[], ProbeConfig]] = {"probe_demo": probe_demo, "probe_folder": probe_folder}
