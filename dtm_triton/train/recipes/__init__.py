"""Recipes: functions that return a complete configuration. A variant calls its base and replaces what differs.

The tables below are what `--recipe NAME` chooses from. A run's folder is runs/NAME unless the recipe says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dtm_triton.train.config import FinetuneConfig, PretrainConfig, ProbeConfig
from dtm_triton.train.recipes.amt import (
    amt_mae_vit_base,
    amt_mae_vit_large,
    amt_mae_vit_small,
    amt_simmim_vit_base,
    dtm_amt_vit_base,
    dtm_amt_vit_small,
)
from dtm_triton.train.recipes.demonstration import (
    demo,
    demo_tokenwise,
    digits,
    digits_student,
    finetune_demo,
    linear_demo,
    own_images,
    probe_demo,
)
from dtm_triton.train.recipes.finetuning import finetune_mae_vit_base, finetune_simmim_vit_base, linear_mae_vit_base
from dtm_triton.train.recipes.frameworks import (
    beit_v2_vit_base,
    byol_vit_base,
    data2vec_vit_base,
    mae_clip_vit_base,
    mae_vit_base,
    mae_vit_large,
    mae_vit_small,
    maskfeat_vit_base,
    simmim_vit_base,
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
    "linear_demo",
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
    mae_vit_small,
    mae_vit_base,
    mae_vit_large,
    amt_mae_vit_small,
    amt_mae_vit_base,
    amt_mae_vit_large,
    simmim_vit_base,
    amt_simmim_vit_base,
    dtm_amt_vit_small,
    dtm_amt_vit_base,
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
_FINETUNE = (finetune_demo, linear_demo, finetune_mae_vit_base, finetune_simmim_vit_base, linear_mae_vit_base)
FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {recipe.__name__: recipe for recipe in _FINETUNE}
PROBE: dict[str, Callable[[], ProbeConfig]] = {"probe_demo": probe_demo, "probe_folder": probe_folder}
