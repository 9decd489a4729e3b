"""Configuration: small frozen dataclasses. A recipe (recipes.py) is a function that returns one complete configuration.

`to_json` is what lies beside the results.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtm_triton.losses import LossKind
from dtm_triton.matching import Split


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and what is done to them. ValueError for values that make no sense."""

    source: Literal["digits", "folder"]
    """"digits": scikit-learn's 8 x 8 digits on a larger canvas; "folder": a folder of class folders of images."""
    train_folder: Path | None = None
    """Training images, for source "folder"."""
    test_folder: Path | None = None
    """Held-out images, for source "folder"; without it nothing is evaluated."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of what the student sees, in pixels."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop takes ("folder" only)."""
    flip: bool = True
    """Mirror half of the images."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by a factor uniform in 1 - this .. 1 + this."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from what the student sees (images lie in 0..1)."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides what the student sees."""
    workers: int = 0
    """Processes that decode images; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        if self.source == "folder" and self.train_folder is None:
            raise ValueError('data.train_folder must be given for source "folder", got None')
        _check("data.image_size", self.image_size, min(self.image_size) >= 1, "positive")
        _check("data.channels", self.channels, self.channels in (1, 3), "1 or 3")
        low, high = self.crop_scale
        _check("data.crop_scale", self.crop_scale, 0 < low <= high <= 1, "between 0 and 1, smaller first")
        _check("data.colour_jitter", self.colour_jitter, 0 <= self.colour_jitter <= 1, "between 0 and 1")
        for name in ("mean", "std"):
            values = getattr(self, name)
            _check(f"data.{name}", values, len(values) == self.channels, f"one number for each of {self.channels}")
        _check("data.std", self.std, min(self.std) > 0, "positive")
        _check("data.workers", self.workers, self.workers >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The Vision Transformer that is trained."""

    model: str
    """Name of a timm model: a plain VisionTransformer, Beit or Eva."""
    patch_size: int
    """Pixels a side."""
    drop_path: float = 0.0
    """Stochastic depth of the last block."""
    init_std: float = 0.02
    """Deviation of the truncated normal that weights start from; a narrow model needs a larger one."""
    model_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of the timm model, for example embed_dim 96 depth 4."""
    weights: Path | None = None
    """Start from these: what a pre-training run exported (RUN/student), or random weights when not given."""

    def __post_init__(self) -> None:
        _check("student.patch_size", self.patch_size, self.patch_size >= 1, "positive")
        _check("student.drop_path", self.drop_path, 0 <= self.drop_path < 1, "in 0..1")
        _check("student.init_std", self.init_std, self.init_std > 0, "positive")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen network whose tokens are the targets."""

    kind: Literal["timm", "conv"]
    """"timm": a pre-trained timm model; "conv": a small convolutional network trained on the spot, with labels."""
    model: str = ""
    """Name of the timm model."""
    weights: Path | None = None
    """Its weights, a file or folder; by default timm's hub cache. For "conv" the folder of its run."""
    project: bool = False
    """Apply the model's head to every token (CLIP's projection)."""
    statistics: Literal["own", "imagenet"] = "own"
    """Normalise its input as the model was trained ("own"), or with ImageNet's mean and deviation."""
    features: int = 64
    """Width of the "conv" teacher's tokens."""
    epochs: int = 12
    """Training of the "conv" teacher."""

    def __post_init__(self) -> None:
        _check("teacher.model", self.model, self.kind == "conv" or bool(self.model), 'given for kind "timm"')
        _check("teacher.features", self.features, self.features >= 1, "positive")
        _check("teacher.epochs", self.epochs, self.epochs >= 1, "positive")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches the student does not see."""

    kind: Literal["random", "block"]
    """"random" patches, or BEiT's rectangles ("block")."""
    masked: int
    """Patches masked in every image."""
    min_patches: int = 16
    """Smallest rectangle of "block"."""

    def __post_init__(self) -> None:
        _check("mask.masked", self.masked, self.masked >= 0, "0 or more")
        _check("mask.min_patches", self.min_patches, self.min_patches >= 1, "positive")


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
class OptimizerConfig:
    """AdamW, a cosine schedule with linear warm-up, clipping."""

    lr: float
    """Highest learning rate."""
    final_lr: float = 1e-5
    """Learning rate of the last step."""
    warmup_epochs: float = 0.0
    """Linear from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.05
    """On weights of two dimensions or more, tokens and position tables excepted."""
    clip_norm: float | None = None
    """Largest norm of the gradient."""
    layer_decay: float = 1.0
    """The learning rate of every block is that of the next one times this."""

    def __post_init__(self) -> None:
        _check("optimizer.lr", self.lr, self.lr > 0, "positive")
        _check("optimizer.final_lr", self.final_lr, 0 <= self.final_lr <= self.lr, f"between 0 and lr {self.lr}")
        _check("optimizer.warmup_epochs", self.warmup_epochs, self.warmup_epochs >= 0, "0 or more")
        _check("optimizer.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "in 0..1")
        _check("optimizer.eps", self.eps, self.eps > 0, "positive")
        _check("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        _check("optimizer.clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "positive or None")
        _check("optimizer.layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "above 0, 1 at most")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how much at once, where."""

    folder: Path
    """Everything is written here. A folder that holds a run is continued."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a step, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step: the same step with less memory."""
    seed: int = 0
    """Decides weights, data order, crops, masks and schedules."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations. "auto": bfloat16 on GPUs, float32 on CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU where there is one."""
    threads: int | None = None
    """CPU threads of PyTorch. The same number gives the same bits; by default what PyTorch chooses."""
    deterministic: bool = False
    """Only deterministic GPU operations: the same bits in every run, slower."""
    log_every: int = 10
    """Steps between log lines; a non-finite loss is noticed there."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    evaluate_every: int = 0
    """Epochs between evaluations; 0 evaluates at the end only."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "checkpoint_every"):
            _check(f"run.{name}", getattr(self, name), getattr(self, name) >= 1, "positive")
        _check("run.threads", self.threads, self.threads is None or self.threads >= 1, "positive or None")
        _check("run.evaluate_every", self.evaluate_every, self.evaluate_every >= 0, "0 or more")
        whole = self.batch_size % self.accumulate == 0
        _check("run.batch_size", self.batch_size, whole, f"a multiple of run.accumulate {self.accumulate}")


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
            _check("data.image_size", self.data.image_size, whole, f"multiples of patch {self.student.patch_size}")
            patches *= side // self.student.patch_size
        _check("mask.masked", self.mask.masked, self.mask.masked <= patches, f"at most {patches}, the patches")


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
        _check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in 0..1")


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
        _check("neighbours", self.neighbours, self.neighbours >= 1, "positive")
        _check("batch_size", self.batch_size, self.batch_size >= 1, "positive")


def to_json(config: Any) -> str:
    """A configuration as readable JSON, paths as text."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def _check(name: str, value: object, fine: bool, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
