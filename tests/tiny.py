"""A pre-training run small enough for a test: 11 steps an epoch, a student of one block, an untrained teacher."""

from __future__ import annotations

import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from dtm_triton.train import recipes
from dtm_triton.train.build import assemble
from dtm_triton.train.config import OptimizerConfig, PretrainConfig, StudentConfig, TeacherConfig, to_json
from dtm_triton.train.data.batches import training_loader
from dtm_triton.train.engine.checkpoint import load_newest, load_tensors, saved_steps
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.saver import Saver
from dtm_triton.train.engine.stop import Stopped
from dtm_triton.train.finetune import finetune
from dtm_triton.train.models.targets import ConvTargets
from dtm_triton.train.models.teacher import ConvTeacher
from dtm_triton.train.recipes import finetune_demo

STUDENT = StudentConfig(
    model="vit_tiny_patch16_224",
    patch_size=2,
    init_std=0.1,
    model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3},
)


def tiny_config(folder: Path, *, data: dict[str, Any] | None = None, **run: Any) -> PretrainConfig:
    base = recipes.demo()
    return replace(
        base,
        data=replace(base.data, **(data or {})),
        student=STUDENT,
        teacher=TeacherConfig(kind="conv", features=8, epochs=1),
        optimizer=OptimizerConfig(lr=1e-2, warmup_epochs=1, clip_norm=1.0),
        run=replace(
            base.run,
            **{
                "folder": folder,
                "epochs": 2,
                "batch_size": 128,
                "threads": 1,
                "checkpoint_every": 4,
                "evaluate_every": 0,
                "log_every": 1,
                **run,
            },
        ),
    )


def tiny_trainer(config: PretrainConfig, processes: Processes | None = None) -> Trainer:
    torch.manual_seed(5)
    teacher = ConvTeacher(config.data.image_size, 2, in_chans=config.data.channels, out_features=8)
    return Trainer(
        assemble(config, ConvTargets(teacher)),
        data=config.data,
        optimizer=config.optimizer,
        run=config.run,
        processes=processes or Processes(),
        resolved=to_json(config),
        title="tiny",
    )


def train_tiny(processes: Processes, folder: Path, stop: int | None, changes: dict[str, Any]) -> None:
    """A tiny run, or a part of one that is told to stop in the middle of a step; for `run_together`.

    Schedules are shared: they would differ with the number of processes otherwise.
    """
    base = tiny_config(folder, **changes)
    trainer = tiny_trainer(replace(base, loss=replace(base.loss, shared_schedules=True)), processes)
    if stop is None:
        trainer.fit()
    else:
        stop_at(trainer, stop)
        with pytest.raises(Stopped):
            trainer.fit()
    state = trainer.whole_network().state_dict()
    if processes.first:
        torch.save(state, folder / "whole.pt")


def finetune_tiny(processes: Processes, folder: Path, strategy: str) -> None:
    """A classifier of digits, trained for an epoch."""
    run = replace(tiny_config(folder, epochs=1).run, strategy=strategy)
    finetune(replace(finetune_demo(), student=STUDENT, run=run), processes)


def count_exchanges(processes: Processes, folder: Path, strategy: str) -> None:
    """Gradients are exchanged as often in a step of four micro-batches as in a step of one."""
    counts = []
    for accumulate in (1, 4):
        config = tiny_config(folder / str(accumulate), accumulate=accumulate, strategy=strategy)
        trainer = tiny_trainer(config, processes)
        with training_loader(trainer.batches, 0, 2, workers=0, pin=False) as loader:
            trainer._train_step(loader)  # the first one settles DDP's buckets
            with CommDebugMode() as debug:
                trainer._train_step(loader)
        kinds = {str(kind): count for kind, count in debug.get_comm_counts().items()}
        reductions = [count for kind, count in kinds.items() if "reduce" in kind]
        assert reductions, kinds
        counts.append(sum(reductions))
    assert counts[0] == counts[1], counts


def diverge_in_one(processes: Processes, folder: Path, strategy: str) -> None:
    """The second process's loss is not a number in step 6: both stop, and what lies on the disk is from before."""
    trainer = tiny_trainer(tiny_config(folder, log_every=5, checkpoint_every=3, strategy=strategy), processes)
    forward = trainer.objective.forward

    def spoil(batch: Any) -> dict[str, Tensor]:
        results = forward(batch)
        return {"loss": results["loss"] * (float("nan") if trainer.step == 6 and not processes.first else 1)}

    trainer.objective.forward = spoil  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        trainer.fit()
    assert trainer.step == 9
    newest = saved_steps(folder / "checkpoints")[0]
    assert newest.name == "step_000000006"


def stop_at(trainer: Trainer, step: int, number: int = signal.SIGTERM) -> None:
    """Receive a signal in the middle of that step."""
    draws = trainer.objective.seed_draws

    def seed_draws(seed: int, now: int, rank: int) -> None:
        if now == step:
            signal.raise_signal(number)
        draws(seed, now, rank)

    trainer.objective.seed_draws = seed_draws  # type: ignore[method-assign]


def final_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, moments of the optimiser included, by a flat name."""
    found = load_newest(folder / "checkpoints", print)
    assert found is not None
    path, plain = found
    return {"step": torch.tensor(plain["step"]), **load_tensors(path)}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def save_where_one_fails(processes: Processes, folder: Path) -> None:
    """Two processes save; the second one cannot write the first checkpoint, both learn of it, the next one succeeds."""
    saver = Saver(folder, processes)
    whole = {f"w{number}": torch.ones(1000) for number in range(4)}
    if not processes.first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    saver.save(1, whole, {"step": 1})
    trouble = saver.finish()
    assert trouble is not None and "File too large" in trouble, trouble
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    processes.wait()
    saver.save(2, whole, {"step": 2})
    assert saver.finish() is None
    processes.wait()
