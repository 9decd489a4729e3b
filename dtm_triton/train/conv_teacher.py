"""The "conv" teacher: a small convolutional network, trained on the labels in a run of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dtm_triton.train.config import DataConfig, OptimizerConfig, PretrainConfig, RunConfig, TeacherConfig, to_json
from dtm_triton.train.data.draws import fold
from dtm_triton.train.data.images import open_images
from dtm_triton.train.engine.checkpoint import FolderError, load_newest, load_tensors
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.run_folder import read_finished, write_finished
from dtm_triton.train.models.teacher import ConvTeacher
from dtm_triton.train.objectives.supervised import Supervised

BATCH = 64  # images a step, if processes and dataset allow it


@dataclass(frozen=True, kw_only=True)
class ConvRun:
    """The resolved configuration of the "conv" teacher's own run."""

    data: DataConfig
    teacher: TeacherConfig
    patch_size: int
    optimizer: OptimizerConfig
    run: RunConfig


def train_conv_teacher(config: PretrainConfig, processes: Processes) -> ConvTeacher:
    """The convolutional teacher, trained on the labels in `config.teacher.weights`, by default RUN/teacher.

    Once finished it serves any number of processes, whatever the number that trained it.
    Raises as `Trainer` does.
    """
    folder = config.teacher.weights or config.run.folder / "teacher"
    images = open_images(config.data, "train")
    assert images is not None
    torch.manual_seed(fold(config.run.seed, "teacher weights"))
    network = ConvTeacher(
        config.data.image_size,
        config.student.patch_size,
        in_chans=config.data.channels,
        num_classes=images.num_classes,
        out_features=config.teacher.features,
    )
    batch = min(BATCH, len(images.labels))
    own = ConvRun(
        data=config.data,
        teacher=replace(config.teacher, weights=None),  # wherever it lies
        patch_size=config.student.patch_size,
        optimizer=OptimizerConfig(lr=4e-3, warmup_epochs=1, weight_decay=0.02),
        run=replace(
            config.run,
            folder=folder,
            epochs=config.teacher.epochs,
            evaluate_every=0,
            accumulate=1,
            batch_size=batch,
            strategy="ddp",  # batch statistics and no transformer blocks: nothing to shard, compile or recompute
            compile=False,
            activation_checkpointing=False,
            keep_every=0,
        ),
    )
    resolved = to_json(own)
    if processes.from_first(lambda: read_finished(folder, resolved), FolderError) is not None:
        _load_network(network, folder)
        return network
    divided = replace(own, run=replace(own.run, batch_size=batch - batch % processes.count))
    trainer = Trainer(
        Supervised(network, own.data),
        data=own.data,
        optimizer=own.optimizer,
        run=divided.run,
        processes=processes,
        resolved=to_json(divided),
        title="teacher",
    )
    results = trainer.fit()
    if processes.first:
        write_finished(folder, resolved, results)
    if processes.count > 1:  # batch statistics are each process's own: take the first one's
        processes.wait()
        _load_network(network, folder)
    return network


def _load_network(network: nn.Module, folder: Path) -> None:
    found = load_newest(folder / "checkpoints", print)
    assert found is not None
    prefix = "objective.network."
    weights = {name: tensor for name, tensor in load_tensors(found[0]).items() if name.startswith(prefix)}
    network.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
