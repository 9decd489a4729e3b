"""docs/planning.md: the plan as tables, every figure computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from dtm_triton.measure.tables import number, table
from dtm_triton.train import recipes
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.planning import arithmetic
from dtm_triton.train.planning.facts import GIGA, Fact, Facts, read_facts
from dtm_triton.train.planning.sizes import Size, count

RECIPES = {"ViT-S": "dtm_vit_small_patch16_in1k", "ViT-B": "dtm_vit_base_patch16_in1k"}
RECIPES |= {"ViT-L": "dtm_vit_large_patch16_in1k"}
BASE = "ViT-B"
GPUS = (8, 64, 512)
HOUR = 3_600
HOURS = ("hours, all traffic hidden", "hours, none hidden")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A recipe, its size and its rate on one GPU."""

    name: str
    config: PretrainConfig
    size: Size
    rate: Fact


def render(folder: Path) -> str:
    """The page, from the recipes and the records in `folder`."""
    facts = read_facts(folder, RECIPES[BASE])
    configs = {name: recipes.PRETRAIN[recipe]() for name, recipe in RECIPES.items()}
    sizes = {name: count(config) for name, config in configs.items()}
    models = [
        Model(
            name=name,
            config=config,
            size=sizes[name],
            rate=facts.rate(RECIPES[name], sizes[name].flops, RECIPES[BASE], sizes[BASE].flops),
        )
        for name, config in configs.items()
    ]
    parts = [
        "# Planning a run on many GPUs",
        "Computed by `python train/plan.py` from the recipes, from the records in `benchmarks/data` where there are "
        "any, and from the assumptions in the first table, which change as they are measured. Nothing here has run on "
        "8, 64 or 512 GPUs.",
    ]
    for section in (_facts, _models, _speed, _traffic, _memory, _checkpoints, _constant, _scaled):
        parts += section(facts, models)
    return "\n\n".join(parts) + "\n"


def _facts(facts: Facts, models: list[Model]) -> list[str]:
    named = [getattr(facts, field.name) for field in fields(facts) if field.name != "other_rates"]
    rows = [[fact.unit, _value(fact.value), fact.source] for fact in named]
    first = models[0].config
    rows += [
        ["epochs; steps between checkpoints", f"{first.run.epochs}; {first.run.checkpoint_every}", "the recipes"],
        ["parameters and operations of students and teachers", "below", "counted"],
        ["how much traffic hides behind computing", "all to none", "assumed: both ends are shown"],
        ["latency of a hop, stragglers, restarts, evaluations", "0", "assumed: left out"],
    ]
    return ["## What it stands on", table(["what", "value", "source"], rows)]


def _models(facts: Facts, models: list[Model]) -> list[str]:
    rows = []
    for m in models:
        size = m.size
        counts = [size.student_parameters / 1e6, size.teacher_parameters / 1e6]
        operations = [size.student_flops / GIGA, size.teacher_flops / GIGA]
        rows.append([m.name, *map(number, counts + operations), number(m.rate.value), m.rate.source])
    header = ["student", "its parameters, M", "the teacher's, M", "GFLOP an image", "of the teacher", "images/s a GPU"]
    return [
        "## Students",
        "Operations of the student are forward and backward, those of the teacher forward.",
        table([*header, "source"], rows),
    ]


def _speed(facts: Facts, models: list[Model]) -> list[str]:
    rows = []
    for m in models:
        for gpus in GPUS:
            speed = m.rate.value * gpus
            cores = [math.ceil(speed / fact.value) for fact in (facts.folder_rate, facts.shards_rate)]
            node = [math.ceil(core * facts.node.value / gpus) for core in cores]
            rows.append([m.name, str(gpus), _value(speed), *map(str, cores), f"{node[0]} / {node[1]}"])
    header = ["student", "GPUs", "images/s", "loader cores, JPEG files", "loader cores, shards"]
    return [
        "## Images a second, and the cores that decode them",
        "At the rate of one GPU times their number: what traffic costs is below.",
        table([*header, "of each machine: files / shards"], rows),
    ]


def _traffic(facts: Facts, models: list[Model]) -> list[str]:
    rows = []
    for m in models:
        for gpus in GPUS:
            sent = [arithmetic.traffic(m.size.student_parameters, gpus, strategy) for strategy in ("ddp", "fsdp")]
            link = facts.inside if gpus <= facts.node.value else facts.between
            times = [number(1e3 * one / link.value) for one in sent]
            step = number(1e3 * facts.batch.value / m.rate.value)
            rows.append([m.name, str(gpus), *[f"{number(one / GIGA)}" for one in sent], *times, step])
    header = ["student", "GPUs", "DDP, GB", "FSDP, GB", "DDP, ms", "FSDP, ms"]
    return [
        "## Traffic of a step",
        "What each GPU sends by rings, and how long that takes on the slowest link. DDP all-reduces float32 gradients, "
        "2 (n - 1) / n of them; FSDP gathers bfloat16 weights twice and scatters float32 gradients, which comes to the "
        f"same. Beside it the computing of a step of {facts.batch.value:.0f} images a GPU, which can hide part of it.",
        table([*header, "computing, ms"], rows),
    ]


def _memory(facts: Facts, models: list[Model]) -> list[str]:
    rows = []
    for m in models:
        for strategy, gpus in (("ddp", GPUS[0]), *(("fsdp", gpus) for gpus in GPUS)):
            sizes = m.size.student_parameters, m.size.teacher_parameters
            found = arithmetic.held(*sizes, gpus, strategy, average=True)
            average = found.pop("average")
            names = ("weights", "gradients", "moments", "teacher")
            cells = [number(found[name] / GIGA) for name in names]
            where = "DDP, any number" if strategy == "ddp" else f"FSDP, {gpus}"
            rows.append([m.name, where, *cells, number(sum(found.values()) / GIGA), number(average / GIGA)])
    header = ["student", "GPUs", "weights", "gradients", "Adam's moments", "teacher", "sum"]
    return [
        "## Memory of each GPU, GB",
        "What is held from step to step; activations come on top (`dtm-train-bench` measures a whole step), and under "
        "FSDP the gathered weights of the blocks at work. A recipe with a moving average of the student adds the last "
        "column.",
        table([*header, "moving average"], rows),
    ]


def _checkpoints(facts: Facts, models: list[Model]) -> list[str]:
    rows = []
    for m in models:
        size = arithmetic.checkpoint(m.size.student_parameters)
        batch, every = m.config.run.batch_size, m.config.run.checkpoint_every
        for gpus in GPUS:
            plan = _plan(facts, m, gpus, batch)
            copy, write = size / facts.to_host.value, size / facts.storage.value
            written = plan.steps // every
            cost = 100 * written * copy / plan.seconds(hidden=True)
            rest = every * plan.seconds(hidden=True) / plan.steps
            cells = [number(size / GIGA), number(copy), number(write), number(rest), str(written), f"{number(cost)} %"]
            rows.append([m.name, str(gpus), *cells])
    header = ["student", "GPUs", "GB", "copy to host, s", "write behind, s", "between two, s", "in a run"]
    return [
        "## Checkpoints",
        "Float32 weights and two moments. Training waits while they are copied to the host (here: all by one GPU, the "
        "most it can be), and goes on while they are written. Where writing takes longer than the time between two, "
        "raise `run.checkpoint_every`. The newest two are kept, and the best.",
        table([*header, "of the run's time"], rows),
    ]


def _constant(facts: Facts, models: list[Model]) -> list[str]:
    rows = []
    for m in models:
        batch = m.config.run.batch_size
        for gpus in GPUS:
            plan = _plan(facts, m, gpus, batch)
            rows.append([m.name, str(gpus), str(batch // gpus), f"{plan.steps}", *_hours(plan)])
    header = ["student", "GPUs", "images a GPU and step", "steps"]
    return [
        f"## {models[0].config.run.epochs} epochs at the recipe's batch of {models[0].config.run.batch_size}",
        "The same training on any number of GPUs. A GPU with few images a step does not keep the rate assumed here: "
        "with 16 it is optimistic, with 2 it is out of reach, and more GPUs only help with a larger batch.",
        table([*header, *HOURS], rows),
    ]


def _scaled(facts: Facts, models: list[Model]) -> list[str]:
    rows = []
    for m in models:
        base, lr = m.config.run.batch_size, m.config.optimizer.lr
        for gpus in GPUS:
            batch = int(facts.batch.value) * gpus
            plan = _plan(facts, m, gpus, batch)
            warm = round(m.config.optimizer.warmup_epochs * (facts.images.value // batch))
            rate = f"{arithmetic.scaled_rate(lr, base, batch):.2e}"
            rows.append([m.name, str(gpus), str(batch), rate, f"{plan.steps}", str(warm), *_hours(plan)])
    header = ["student", "GPUs", "batch", "optimizer.lr", "steps", "of warm-up"]
    return [
        f"## {models[0].config.run.epochs} epochs with {facts.batch.value:.0f} images on each GPU",
        "Another training: fewer and larger steps. The recipes' learning rate follows the square root of the batch, so "
        "`run.batch_size` and `optimizer.lr` change together, and warm-up in epochs becomes shorter in steps. Nobody "
        "has shown that batches above the recipe's reach its accuracy.",
        table([*header, *HOURS], rows),
    ]


def _plan(facts: Facts, model: Model, gpus: int, batch: int) -> arithmetic.Run:
    return arithmetic.run(
        facts,
        rate=model.rate.value,
        parameters=model.size.student_parameters,
        gpus=gpus,
        batch=batch,
        epochs=model.config.run.epochs,
    )


def _hours(plan: arithmetic.Run) -> list[str]:
    return [number(plan.seconds(hidden=hidden) / HOUR) for hidden in (True, False)]


def _value(value: float) -> str:
    """Thousands apart; large ones as a power of ten."""
    return f"{value:.3g}" if value >= 1e9 else f"{value:,.0f}"
