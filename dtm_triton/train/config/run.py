"""Configuration of how it is trained: optimiser, length, devices, folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dtm_triton.train.config.checks import check


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser, a cosine schedule with linear warm-up, clipping."""

    kind: Literal["adamw", "lars"] = "adamw"
    """"lars": for linear probes with large batches, momentum `betas[0]`."""
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
        check("optimizer.lr", self.lr, self.lr > 0, "positive")
        check("optimizer.final_lr", self.final_lr, 0 <= self.final_lr <= self.lr, f"between 0 and lr {self.lr}")
        check("optimizer.warmup_epochs", self.warmup_epochs, self.warmup_epochs >= 0, "0 or more")
        check("optimizer.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "in 0..1")
        check("optimizer.eps", self.eps, self.eps > 0, "positive")
        check("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        check("optimizer.clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "positive or None")
        check("optimizer.layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "above 0, 1 at most")


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
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Over several processes: whole weights in each ("ddp"), or weights, gradients and moments divided ("fsdp")."""
    compile: bool = False
    """torch.compile the blocks of student and teacher."""
    activation_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass: less memory, about a third more time."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others before it gives up: a host that vanished is noticed after this."""
    deterministic: bool = False
    """Only deterministic GPU operations: the same bits in every run, slower."""
    log_every: int = 10
    """Steps between log lines; losses that are not finite or jump, and unreadable images, are told there."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the newest two are kept, and the best."""
    keep_every: int = 0
    """Epochs between checkpoints that are never removed; 0 keeps none for good."""
    evaluate_every: int = 0
    """Epochs between evaluations; 0 evaluates at the end only."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "checkpoint_every"):
            check(f"run.{name}", getattr(self, name), getattr(self, name) >= 1, "positive")
        check("run.threads", self.threads, self.threads is None or self.threads >= 1, "positive or None")
        for name in ("evaluate_every", "keep_every"):
            check(f"run.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check("run.timeout_minutes", self.timeout_minutes, self.timeout_minutes > 0, "positive")
        whole = self.batch_size % self.accumulate == 0
        check("run.batch_size", self.batch_size, whole, f"a multiple of run.accumulate {self.accumulate}")

    def half_precision(self, device: torch.device) -> bool:
        """Whether activations on `device` are bfloat16."""
        return self.precision == "bfloat16" or (self.precision == "auto" and device.type == "cuda")
