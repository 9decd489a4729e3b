"""What the study compares, fixed before it was run: the arms, their numbers, and which differences are looked at.

Every arm trains the same student from the same weights with the same optimiser, crops and order of images; only what
this file says of an arm differs. Seeds are paired: seed s of one arm belongs to seed s of every other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dtm_triton.train.config import (
    AttentionConfig,
    DataConfig,
    DecoderConfig,
    EmaConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from dtm_triton.train.recipes import digits

SEEDS = 10
EPOCHS = {"photographs": 10, "dtm": 5, "digits": 3}
"""Over 400 windows or 1,437 digits; DTM's steps cost twice as much. Chosen by time alone: 15 minutes in all."""
SHOWN_STEPS = (50, 250, 450)
"""Refreshes of maps whose pictures the page shows: the first, the middle and the last one."""
METRICS = ("linear_probe", "knn")
BATCH = {"photographs": 8, "digits": 16}
STEPS = {"photographs": 50, "digits": 89}  # an epoch
EVEN = 1e6
"""A temperature at which all patches weigh the same: the maps do not matter, everything else is as with them."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to pre-train."""

    images: str
    """"photographs" or "digits"."""
    base: str | None
    """The arm it is compared with."""
    what: str
    """For the table."""


ARMS = {
    "untrained": Arm(images="photographs", base=None, what="the student's random weights"),
    "mae": Arm(images="photographs", base=None, what="MAE: masked at random"),
    "uniform": Arm(images="photographs", base="mae", what="as AMT, but masked and thrown at random"),
    "amt": Arm(images="photographs", base="mae", what="AMT: attended first masked, then thrown, rest visible"),
    "thrown first": Arm(images="photographs", base="mae", what="attended first thrown, then masked, rest visible"),
    "reversed": Arm(images="photographs", base="mae", what="attended first visible, then thrown, rest masked"),
    "dtm": Arm(images="photographs", base=None, what="DTM, moving average as teacher: masked at random"),
    "dtm + amt": Arm(images="photographs", base="dtm", what="DTM, masked and thrown by its teacher's attention"),
    "digits untrained": Arm(images="digits", base=None, what="the student's random weights"),
    "digits mae": Arm(images="digits", base=None, what="MAE: masked at random"),
    "digits amt": Arm(images="digits", base="digits mae", what="AMT: attended first masked, then thrown, rest visible"),
}
COMPARISONS = tuple((name, arm.base, metric) for name, arm in ARMS.items() if arm.base for metric in METRICS)
"""(arm, base, metric) of every difference that is tested: one family for Holm's correction."""


def configure(name: str, seed: int, folder: Path) -> PretrainConfig:
    """The configuration of a run of an arm; `folder` is the study's. That of "untrained" is its untrained network's."""
    arm = ARMS[name]
    kind = name.removeprefix("digits ").replace("untrained", "mae")
    epochs = EPOCHS["dtm" if kind.startswith("dtm") else arm.images]
    tenth = max(epochs // 10, 1)
    shares = _photograph_masks() if arm.images == "photographs" else _digit_masks()
    mask = shares[kind]
    config = PretrainConfig(
        method="mae",
        data=_photographs(folder) if arm.images == "photographs" else digits(),
        student=StudentConfig(
            model="vit_tiny_patch16_224",
            patch_size=8 if arm.images == "photographs" else 2,
            positions="sincos",
            init_std=0.08,  # the width is small
            model_kwargs={"embed_dim": 96, "depth": 4, "num_heads": 3},
        ),
        teacher=TeacherConfig(kind="pixels", standardise=False),  # standardised ones take more steps than there are
        decoder=DecoderConfig(width=64, depth=1, heads=4),
        mask=mask,
        attention=AttentionConfig(warmup_epochs=tenth, warmup_masked=shares["mae"].masked, refresh_epochs=tenth),
        loss=LossConfig(morph=False, on="masked", kind="l2"),
        optimizer=OptimizerConfig(
            lr=1e-3, final_lr=0.0, warmup_epochs=tenth, betas=(0.9, 0.95), weight_decay=0.05, clip_norm=3.0
        ),
        run=RunConfig(
            folder=folder / "runs" / f"{name.replace(' ', '_')}-{seed}",
            epochs=epochs,
            batch_size=BATCH[arm.images],
            seed=seed,
            threads=1,  # a fixed number: the same bits
            deterministic=True,
            device="cpu",
            log_every=STEPS[arm.images],
            checkpoint_every=1_000_000,
        ),
    )
    return _with_average(config) if kind.startswith("dtm") else config


def _with_average(config: PretrainConfig) -> PretrainConfig:
    """DTM on the tokens of a moving average of the student, which also attends."""
    return replace(
        config,
        method="masked",
        teacher=TeacherConfig(kind="ema"),
        ema=EmaConfig(momentum=0.99, final_momentum=0.999, blocks=2),
        attention=replace(config.attention, source="ema", warmup_masked=_photograph_masks()["dtm"].masked),
        loss=LossConfig(max_removed=64),
    )


def _photographs(folder: Path) -> DataConfig:
    """64 patches of 8 x 8 pixels; nothing held out while training."""
    return DataConfig(
        source="folder",
        train_folder=folder / "data" / "train",
        image_size=(64, 64),
        channels=1,
        crop_scale=(0.4, 1.0),
        mean=(0.45,),
        std=(0.25,),
    )


def _photograph_masks() -> dict[str, MaskConfig]:
    """Of 64 patches; MAE's and AMT's shares, and for DTM 20 visible patches either way."""
    amt = MaskConfig(kind="attention", masked=28, thrown=25)  # 45 %, 40 %: 11 are visible
    return {
        "mae": MaskConfig(kind="random", masked=48),  # 75 %: 16 are visible
        "uniform": replace(amt, temperature=EVEN),
        "amt": amt,
        "thrown first": replace(amt, order=("thrown", "masked", "visible")),
        "reversed": replace(amt, order=("visible", "thrown", "masked")),
        "dtm": MaskConfig(kind="random", masked=44),
        "dtm + amt": MaskConfig(kind="attention", masked=28, thrown=16),  # 44 %, 26 %: AMT's on SimMIM
    }


def _digit_masks() -> dict[str, MaskConfig]:
    """Of 36 patches, the same shares."""
    amt = MaskConfig(kind="attention", masked=16, thrown=14)  # 6 are visible
    return {"mae": MaskConfig(kind="random", masked=27), "amt": amt}


def masks_of(name: str) -> str:
    """Masked / thrown / visible patches of an arm, for the table; nothing for an untrained one.

    >>> masks_of("amt"), masks_of("digits mae"), masks_of("untrained")
    ('28 / 25 / 11', '27 / 0 / 9', '')
    """
    if "untrained" in name:
        return ""
    photographs = ARMS[name].images == "photographs"
    shares, patches = (_photograph_masks(), 64) if photographs else (_digit_masks(), 36)
    mask = shares[name.removeprefix("digits ")]
    return f"{mask.masked} / {mask.thrown} / {patches - mask.masked - mask.thrown}"
