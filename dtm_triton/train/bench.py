"""Measure training: `dtm-train-bench`, `python train/bench.py`, `torchrun train/bench.py`.

Trains a recipe for a few steps, with generated images and random weights instead of a data set and a network, through
the trainer that `dtm-pretrain` uses. Says how many images a second, how much memory, which share of a step the loader,
the teacher, the student, the objective and the optimiser take, and how much of the machine's matrix rate is used;
beside it the same with token-wise targets, and with --dtm by the released program's operations.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from dtm_triton.measure.ceilings import dtype_name, measure_ceilings
from dtm_triton.measure.machine import describe
from dtm_triton.measure.released import NotReleased, ReleasedLoss, load
from dtm_triton.measure.render_training import readable
from dtm_triton.measure.train_record import TrainRecord
from dtm_triton.train import recipes
from dtm_triton.train.benchmark.flops import count_flops
from dtm_triton.train.benchmark.inputs import benchmark_trainer, describe_inputs, without_network
from dtm_triton.train.benchmark.repetitions import Repetitions
from dtm_triton.train.build import build_objective
from dtm_triton.train.command_line import run_command
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.data.augment import augment
from dtm_triton.train.data.batches import MicroBatches, training_loader
from dtm_triton.train.data.images import open_images
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.objectives.pretraining import Pretraining

EPOCHS = 10_000  # a run that does not come to its end
CEILING_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = _parser().parse_args(argv)
    try:
        released = load("dtm", options.dtm) if options.dtm else None
    except NotReleased as error:
        sys.exit(f"dtm-train-bench: {error}")

    def work(processes: Processes) -> None:
        with tempfile.TemporaryDirectory(prefix="dtm-train-bench-") as folder:
            record = measure(options, Path(folder), processes, released)
        if processes.first:
            sys.stdout.write(f"\n{readable(record)}\n")
            if options.out:
                sys.stdout.write(f"\nwrote {record.write(options.out)}\n")

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory here, and need not report on itself
    run_command("dtm-train-bench", work, options.device)


def measure(
    options: argparse.Namespace, folder: Path, processes: Processes, released: ModuleType | None
) -> TrainRecord:
    """Measure one recipe as the options say; everything that is written on the way lies below `folder`."""
    on_gpu = processes.device.type == "cuda"
    name = options.recipe or ("dtm_vit_base_patch16_in1k" if on_gpu else "dtm_vit_small_patch16_in1k")
    if name not in recipes.PRETRAIN:
        sys.exit(f"dtm-train-bench: --recipe must be one of {', '.join(recipes.PRETRAIN)}; got {name!r}")
    batch = (options.batch or (256 if on_gpu else 8)) * processes.count
    workers = options.workers if options.workers is not None else (_spare_cores(processes) if on_gpu else 0)
    place = folder / str(processes.rank)
    config = chosen(recipes.PRETRAIN[name](), options, batch, workers)
    if config.method not in ("masked", "mae"):
        sys.exit(f"dtm-train-bench: --recipe must predict a teacher's tokens, {name!r} is for {config.method}")
    config = without_network(config, place, images=batch)
    objective = build_objective(config, processes)
    assert isinstance(objective, Pretraining)
    if released:
        try:
            ReleasedLoss(objective.loss, released)
        except ValueError as error:
            sys.exit(f"dtm-train-bench: --dtm does not fit {name!r}: {error}")
    student_flops, teacher_flops = count_operations(objective, config, processes)
    trainer = benchmark_trainer(objective, config, processes)
    dtype = torch.bfloat16 if config.run.half_precision(processes.device) else torch.float32
    rates = measure_ceilings(processes.device, CEILING_SECONDS, (dtype,)).matrix_tflop_s
    start = time.monotonic()

    def say(text: str) -> None:
        if processes.first:
            sys.stdout.write(f"[{time.monotonic() - start:6.1f} s] {text}\n")
            sys.stdout.flush()

    with training_loader(trainer.batches, 0, trainer.total, workers, pin=on_gpu) as incoming:
        repetitions = Repetitions(trainer, incoming, released)
        sides = repetitions.run(options.repetitions, options.steps, say)
        if options.trace:
            repetitions.trace(options.trace if processes.first else None)
            say(f"wrote {options.trace}; open it in https://ui.perfetto.dev")
    return TrainRecord(
        machine=describe(processes.device),
        recipe=name,
        student=config.student.model,
        teacher=config.teacher.model or config.teacher.kind,
        batch=batch,
        processes=processes.count,
        steps=options.steps,
        precision=dtype_name(dtype),
        workers=workers,
        options=[text for text in (options.strategy if processes.count > 1 else "",) if text]
        + [text for text in ("compile", "checkpointing") if getattr(options, text)],
        source=describe_inputs(config, batch),
        student_flops=student_flops,
        teacher_flops=teacher_flops,
        matrix_tflop_s=rates[dtype_name(dtype)],
        sides=sides,
    )


def chosen(config: PretrainConfig, options: argparse.Namespace, batch: int, workers: int) -> PretrainConfig:
    """The recipe with what the command line and the machine change in it."""
    run = replace(
        config.run,
        epochs=EPOCHS,
        batch_size=batch,
        accumulate=1,
        strategy=options.strategy,
        compile=options.compile,
        activation_checkpointing=options.checkpointing,
    )
    return replace(config, data=replace(config.data, workers=workers), run=run)


def count_operations(objective: Pretraining, config: PretrainConfig, processes: Processes) -> tuple[int, int]:
    """Operations of one image once masks are warm: of the student forward and backward, of the teacher forward."""
    images = open_images(config.data, "train")
    assert images is not None
    run = replace(config.run, batch_size=1)
    batch = MicroBatches(images, config.data, run, Processes(), objective.draws())[0]
    objective.epoch = config.attention.warmup_epochs
    if objective.maps is not None:
        batch["map"] = torch.ones(1, *objective.network.grid)
    both = count_flops(lambda: objective(batch)["loss"].backward())
    objective.zero_grad(set_to_none=True)
    teacher = count_flops(lambda: objective.targets(augment(batch)))
    return both - teacher, teacher


def _spare_cores(processes: Processes) -> int:
    return max(1, (os.cpu_count() or 2) // processes.count - 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dtm-train-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", help="one that dtm-pretrain knows; by default DTM's ViT-B on a GPU, its ViT-S on a CPU")
    add("--batch", type=int, help="images a step and process; by default 256 on a GPU, 8 on a CPU")
    add("--steps", type=int, default=4, help="in a repetition (%(default)s)")
    add("--repetitions", type=int, default=7, help="of each kind of targets, which take turns (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--workers", type=int, help="processes that decode; by default the spare cores on a GPU machine, else none")
    add("--strategy", choices=("ddp", "fsdp"), default="ddp", help="over the processes of torchrun (%(default)s)")
    add("--compile", action="store_true", help="torch.compile the blocks of student and teacher")
    add("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    add("--dtm", type=Path, metavar="DIR", help="a checkout of the released DTM, to compare with")
    add("--trace", type=Path, metavar="FILE", help="also write a trace of a few steps, which Perfetto opens")
    add("--out", type=Path, metavar="DIR", help="write the record there; benchmarks/data is what BENCHMARKS.md shows")
    return parser


if __name__ == "__main__":
    main()
