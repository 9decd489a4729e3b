"""Compare training steps of recipes: `dtm-step-bench --recipes mae_vit_base amt_mae_vit_base`, or
`python train/step_bench.py`.

Builds every recipe on generated images, with random weights, and trains them in turns in one run: what slows the
machine for a while slows them all. Says the time of a step, its ratio to the first recipe's, and how many tokens and
operations the recipe needs. Masks that follow attention have maps to follow, random ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from dtm_triton.measure.ceilings import dtype_name
from dtm_triton.measure.machine import describe
from dtm_triton.measure.render_steps import readable_steps
from dtm_triton.measure.step_record import StepRecord, StepRow
from dtm_triton.train import recipes
from dtm_triton.train.benchmark.inputs import benchmark_trainer, describe_inputs, without_network
from dtm_triton.train.benchmark.turns import LOADED, Turns
from dtm_triton.train.build import build_objective
from dtm_triton.train.command_line import run_command
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.planning.budget import token_budget

EPOCHS = 10_000  # a run that does not come to its end
WARM_UP = 2  # steps of every recipe that are not counted


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = _parser().parse_args(argv)
    for name in options.recipes:
        if name not in recipes.PRETRAIN:
            sys.exit(f"dtm-step-bench: --recipes must be some of {', '.join(recipes.PRETRAIN)}; got {name!r}")
        if options.recipes.count(name) > 1:
            sys.exit(f"dtm-step-bench: --recipes must be different ones, got {name!r} twice")

    def work(processes: Processes) -> None:
        if processes.count > 1:
            sys.exit("dtm-step-bench: measures one process, and was started in several")
        with tempfile.TemporaryDirectory(prefix="dtm-step-bench-") as folder:
            record = measure(options, Path(folder), processes)
        sys.stdout.write(f"\n{readable_steps(record)}\n")
        if options.out:
            sys.stdout.write(f"\nwrote {record.write(options.out)}\n")

    run_command("dtm-step-bench", work, options.device)


def measure(options: argparse.Namespace, folder: Path, processes: Processes) -> StepRecord:
    """Measure as the options say; everything that is written on the way lies below `folder`."""
    batch = options.batch or (256 if processes.device.type == "cuda" else 8)
    start = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - start:6.1f} s] {text}\n")
        sys.stdout.flush()

    configs, trainers = {}, {}
    for name in options.recipes:
        config = _chosen(recipes.PRETRAIN[name](), options, batch)
        configs[name] = without_network(config, folder / name, images=LOADED * batch)
        trainers[name] = _trainer(configs[name], processes)
        say(f"{name}: {token_budget(configs[name]).describe()}")
    times = Turns(trainers).run(options.repetitions, options.steps, WARM_UP, say)
    rows = []
    for name, config in configs.items():
        found = token_budget(config)
        tokens = {"encoder_tokens": found.encoder_tokens, "decoder_tokens": found.decoder_tokens}
        rows.append(StepRow(recipe=name, step_ms=times[name], flops=found.flops, **tokens))
    first = configs[options.recipes[0]]
    half = first.run.half_precision(processes.device)
    return StepRecord(
        machine=describe(processes.device),
        batch=batch,
        steps=options.steps,
        precision=dtype_name(torch.bfloat16 if half else torch.float32),
        options=[text for text in ("compile", "checkpointing") if getattr(options, text)],
        source=describe_inputs(first, LOADED * batch),
        rows=rows,
    )


def _chosen(config: PretrainConfig, options: argparse.Namespace, batch: int) -> PretrainConfig:
    """The recipe with what the command line changes in it."""
    run = replace(
        config.run,
        epochs=EPOCHS,
        batch_size=batch,
        accumulate=1,
        compile=options.compile,
        activation_checkpointing=options.checkpointing,
    )
    return replace(config, data=replace(config.data, workers=0), run=run)


def _trainer(config: PretrainConfig, processes: Processes) -> Trainer:
    return benchmark_trainer(build_objective(config, processes), config, processes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dtm-step-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--recipes", nargs="+", required=True, metavar="NAME", help="those that dtm-pretrain knows; ratios to the first"
    )
    add("--batch", type=int, help="images a step; by default 256 on a GPU, 8 on a CPU")
    add("--steps", type=int, default=2, help="in a turn (%(default)s)")
    add("--repetitions", type=int, default=7, help="turns of every recipe (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--compile", action="store_true", help="torch.compile the blocks of student and teacher")
    add("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    add("--out", type=Path, metavar="DIR", help="write the record there; benchmarks/data is what BENCHMARKS.md shows")
    return parser


if __name__ == "__main__":
    main()
