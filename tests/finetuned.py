"""Supervised runs small enough for a test, and what several processes do with them."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import STUDENT, tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from dtm_triton.train.config import FinetuneConfig, OptimizerConfig
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.optimizer import build_optimizer, guarded_step
from dtm_triton.train.engine.stop import Stopped
from dtm_triton.train.finetune import finetune
from dtm_triton.train.models.classifier import Standardise
from dtm_triton.train.objectives.supervised import Supervised
from dtm_triton.train.recipes import finetune_demo


def probing_config(folder: Path, **run: Any) -> FinetuneConfig:
    """Linear probing of digits with everything that draws random numbers: 22 steps."""
    return replace(
        finetune_demo(),
        student=STUDENT,
        optimizer=OptimizerConfig(kind="lars", lr=2.0, final_lr=0.0, warmup_epochs=1, weight_decay=0.0),
        run=tiny_config(folder, **run).run,
        pool="class",
        frozen=True,
        mixup=0.8,
        cutmix=1.0,
        random_erasing=0.25,
    )


def probe_in_processes(processes: Processes, folder: Path, strategy: str) -> None:
    """A linear probe in this folder; for `run_together`."""
    finetune(probing_config(folder, strategy=strategy), processes)


def finetune_in_two_goes(config: FinetuneConfig, step: int) -> None:
    """Stopped in the middle of that step, and gone on with."""
    seed_draws, told = Supervised.seed_draws, []

    def seed_and_signal(self: Supervised, seed: int, now: int, rank: int) -> None:
        if now == step and not told:  # a second signal ends it at once
            told.append(now)
            signal.raise_signal(signal.SIGTERM)
        seed_draws(self, seed, now, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervised, "seed_draws", seed_and_signal)
        with pytest.raises(Stopped):
            finetune(config, Processes())
    finetune(config, Processes())


def standardise_in_parts(processes: Processes, folder: Path) -> None:
    """Each process standardises its rows; for `run_together`."""
    rows = torch.load(folder / "rows.pt", weights_only=True)
    module = Standardise(rows.shape[1])
    mine = module(rows[processes.rank :: processes.count])
    torch.save([mine, module.mean, module.variance], folder / f"{processes.rank}.pt")


def step_shards(processes: Processes, folder: Path) -> None:
    """Two steps of LARS on sharded weights; for `run_together`."""
    layer = torch.nn.Linear(3, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 7 + 1)
    fully_shard(layer, mesh=init_device_mesh("cpu", (processes.count,)))
    config = OptimizerConfig(kind="lars", lr=0.5, weight_decay=0.1)
    optimizer = build_optimizer(layer, config)
    for _ in range(2):
        for parameter in layer.parameters():
            gradient = torch.arange(parameter.numel()).view(parameter.shape) / 5 - 1
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        guarded_step(optimizer, 0.5, torch.zeros(()))
    state = {name: value.full_tensor() for name, value in layer.state_dict().items()}
    if processes.first:
        torch.save(state, folder / "sharded.pt")
