"""Configuration of what is trained: student, teacher, masks, loss, and what single methods add."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dtm_triton.attention_masking import ORDER, Part
from dtm_triton.losses import LossKind
from dtm_triton.matching import Split
from dtm_triton.train.config.checks import check


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The Vision Transformer that is trained."""

    model: str
    """Name of a timm model: a plain VisionTransformer, Beit or Eva."""
    patch_size: int
    """Pixels a side."""
    positions: Literal["learned", "sincos"] = "learned"
    """Of models with absolute positions: "sincos" are MAE's fixed sines and cosines, not trained."""
    drop_path: float = 0.0
    """Stochastic depth of the last block."""
    init_std: float = 0.02
    """Deviation of the truncated normal that weights start from; a narrow model needs a larger one."""
    model_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of the timm model, for example embed_dim 96 depth 4."""
    weights: Path | None = None
    """Start from these: what a pre-training run exported (RUN/student), or random weights when not given."""

    def __post_init__(self) -> None:
        check("student.patch_size", self.patch_size, self.patch_size >= 1, "positive")
        check("student.drop_path", self.drop_path, 0 <= self.drop_path < 1, "in 0..1")
        check("student.init_std", self.init_std, self.init_std > 0, "positive")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where targets come from."""

    kind: Literal["timm", "conv", "ema", "pixels", "hog"]
    """"timm": a pre-trained timm model; "conv": a small convolutional network trained on the spot, with labels;
    "ema": a moving average of the student; "pixels": of every patch, standardised; "hog": oriented gradients."""
    model: str = ""
    """Name of the timm model."""
    model_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of the timm model."""
    weights: Path | None = None
    """Its weights, a file or folder; by default timm's hub cache. For "conv" the folder of its run."""
    project: bool = False
    """Apply the model's head to every token (CLIP's projection)."""
    standardise: bool = True
    """For "pixels": every patch to mean 0 and deviation 1, as MAE; False: normalised as the student's, as SimMIM."""
    statistics: Literal["own", "imagenet"] = "own"
    """Normalise its input as the model was trained ("own"), or with ImageNet's mean and deviation."""
    features: int = 64
    """Width of the "conv" teacher's tokens."""
    epochs: int = 12
    """Training of the "conv" teacher."""

    def __post_init__(self) -> None:
        check("teacher.model", self.model, self.kind != "timm" or bool(self.model), 'given for kind "timm"')
        check("teacher.features", self.features, self.features >= 1, "positive")
        check("teacher.epochs", self.epochs, self.epochs >= 1, "positive")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches the student does not see."""

    kind: Literal["random", "block", "attention"]
    """"random" patches, BEiT's rectangles ("block"), or in proportion to attention maps (see `attention`)."""
    masked: int
    """Patches masked in every image."""
    thrown: int = 0
    """Patches that are neither seen nor predicted."""
    unit: int = 1
    """Patches a side of the squares that are masked or thrown together (SimMIM: 2); not of "block"."""
    min_patches: int = 16
    """Smallest rectangle of "block"."""
    temperature: float = 1.0
    """Weights of "attention" are raised to 1 / this: below 1 the strongest patches are chosen more surely."""
    uniform: float = 0.01
    """Share of the largest weight that is added to all weights of "attention"."""
    order: tuple[Part, Part, Part] = ORDER
    """What becomes of the patches that "attention" draws first, next and last."""

    def __post_init__(self) -> None:
        for name in ("masked", "thrown"):
            check(f"mask.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check("mask.min_patches", self.min_patches, self.min_patches >= 1, "positive")
        check("mask.unit", self.unit, self.unit >= 1, "positive")
        check("mask.unit", self.unit, self.unit == 1 or self.kind != "block", '1 for kind "block"')
        for name in ("masked", "thrown"):
            whole = getattr(self, name) % self.unit**2 == 0
            check(f"mask.{name}", getattr(self, name), whole, f"a multiple of {self.unit**2}, the patches of a unit")
        check("mask.temperature", self.temperature, 0 < self.temperature < math.inf, "positive and finite")
        check("mask.uniform", self.uniform, 0 <= self.uniform < math.inf, "0 or more")
        check("mask.order", self.order, sorted(self.order) == sorted(ORDER), "each of the three once")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Dynamic Token Morphing, or token-wise targets. Fields as in `dtm_triton.morph.DTMLoss`."""

    morph: bool = True
    """False: every token is compared with its own target, nothing is morphed."""
    num_schedules: int = 2
    """Schedules a step."""
    max_removed: int = 196
    """Most tokens that a schedule removes."""
    max_iterations: int = 14
    """Most iterations of a schedule."""
    kind: LossKind = "smooth_l1"
    """Distance between tokens."""
    on: Literal["all", "masked"] = "all"
    """Tokens that are compared: all, as DTM does, or the masked ones only. Others are not morphed either."""
    beta: float = 2.0
    """Where smooth_l1 turns from quadratic to linear."""
    normalize_target: bool = False
    """Standardise every morphed target token over its channels."""
    num_protected: int = 0
    """1: the first patch never merges, as in the released program."""
    split: Split = "alternating"
    """How matching halves the tokens. A "random" half depends on an image's place in its micro-batch."""
    shared_schedules: bool = False
    """All processes draw the same schedules. By default each draws its own, as the method does."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The moving average that serves as teacher of kind "ema"."""

    momentum: float = 0.9998
    """Share of itself that the average keeps in the first step."""
    final_momentum: float = 0.9998
    """The same in the last step; between them half a cosine."""
    blocks: int = 6
    """Last blocks whose standardised outputs are averaged to targets ("masked" and "mae")."""

    def __post_init__(self) -> None:
        for name in ("momentum", "final_momentum"):
            check(f"ema.{name}", getattr(self, name), 0 <= getattr(self, name) <= 1, "in 0..1")
        check("ema.blocks", self.blocks, self.blocks >= 1, "positive")

    def at(self, progress: float) -> float:
        """The momentum when a share `progress` of the steps is done.

        >>> EmaConfig(momentum=0.5, final_momentum=1.0).at(0.5)
        0.75
        """
        return self.final_momentum - (self.final_momentum - self.momentum) * (math.cos(math.pi * progress) + 1) / 2


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The decoder of method "mae"."""

    width: int = 512
    """Of its tokens, a multiple of 4 and of `heads`."""
    depth: int = 8
    """Blocks."""
    heads: int = 16
    """Attention heads."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            check(f"decoder.{name}", getattr(self, name), getattr(self, name) >= 1, "positive")


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """The codebook of method "beit_v2"."""

    codes: int = 8192
    """How many."""
    momentum: float = 0.99
    """Share of its statistics that a code keeps in a step."""

    def __post_init__(self) -> None:
        check("codebook.codes", self.codes, self.codes >= 2, "2 or more")
        check("codebook.momentum", self.momentum, 0 <= self.momentum < 1, "in 0..1")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Projector and predictor of method "byol"."""

    hidden: int = 4096
    """Width of the hidden layer."""
    features: int = 256
    """Width of what they give."""

    def __post_init__(self) -> None:
        for name in ("hidden", "features"):
            check(f"projector.{name}", getattr(self, name), getattr(self, name) >= 1, "positive")
