"""What BENCHMARKS.md says of training and of loaders, from their records."""

from __future__ import annotations

from pathlib import Path

from dtm_triton.measure.machine import shown_commit
from dtm_triton.measure.tables import aligned, number, table
from dtm_triton.measure.train_record import (
    PARTS,
    SHEET_TFLOP_S,
    Figure,
    LoaderRecord,
    TrainRecord,
    read_loader,
    read_train,
)

TITLES = {"dtm": "DTM", "token-wise": "token-wise", "released": "DTM, released operations"}
RELEASED_CHAIN = "released DTM"
"""The loader benchmark's name for the released program's transforms."""

GOAL_DEVICE = "NVIDIA H200"
GOAL_RECIPE = "dtm_vit_base_patch16_in1k"
GOAL_RATE, GOAL_UTILISATION, GOAL_SHARE = 2800, 40, 0.5
GOAL_CPU_RECIPE, GOAL_CPU_BATCH, GOAL_CPU_SHARE = "dtm_vit_small_patch16_in1k", 8, 3


def training_parts(folder: Path) -> list[str]:
    """The sections on training and on loaders, from the records in `folder`."""
    trained, loaded = read_train(folder), read_loader(folder)
    parts = []
    for record in trained:
        parts += _trained(record)
    if not any(record.machine["kind"] == "gpu" for record in trained):
        parts += ["## Training on GPUs: not measured", f"No GPU has trained yet. {_gpu_goal()}"]
    for loader in loaded:
        parts += _loaded(loader)
    return parts


def readable(record: TrainRecord) -> str:
    """A record for a terminal."""
    return "\n\n".join(aligned(part) if part.startswith("|") else part for part in _trained(record)[1:])


def _trained(record: TrainRecord) -> list[str]:
    facts = record.machine
    setting = f"{record.processes} processes, " if record.processes > 1 else ""
    setting += f"{record.batch} images a step, {record.precision}, {record.workers} loader processes"
    setting += "".join(f", {option}" for option in record.options)
    versions = f"{facts['cpu'].rpartition(', ')[2]}, torch {facts['torch']}"
    return [
        f"## Training {record.recipe} on {facts['device']}",
        f"Student {record.student}, teacher {record.teacher}; {setting}; {record.source}. {versions}. {facts['date']}, "
        f"commit {shown_commit(facts)}. Medians (IQR) over {len(record.sides[0].step_ms)} repetitions of "
        f"{record.steps} steps, taken in turns.",
        _speeds(record),
        _shares(record),
        _summary(record),
    ]


def _speeds(record: TrainRecord) -> str:
    plain = record.side("token-wise")
    rows = []
    for side in record.sides:
        longer = "" if plain is None or side is plain else _figure(record.difference(side, plain))
        speed, used = record.images_per_second(side), 100 * record.utilisation(side)
        cells = [TITLES[side.name], _figure(speed), _figure(side.step), longer, number(side.peak_bytes / 1e6)]
        rows.append([*cells, f"{number(used)} %"])
    header = ["targets", "images/s", "step, ms", "over token-wise, ms", "peak, MB", "of the matrix rate"]
    return table(header, rows)


def _shares(record: TrainRecord) -> str:
    rows = []
    for side in record.sides:
        for unit in ("ms", "%"):
            figures = [side.part(part) if unit == "ms" else _percent(side.share(part)) for part in PARTS]
            rows.append([f"{TITLES[side.name]}, {unit}", *map(_figure, figures)])
    return table(["part of a step", *PARTS], rows)


def _summary(record: TrainRecord) -> str:
    side, facts = record.sides[0], record.machine
    student, teacher = record.student_flops / 1e9, record.teacher_flops / 1e9
    reached = record.images_per_second(side).median * (student + teacher) / 1e3
    text = (
        f"An image takes {number(student)} GFLOP in the student, forward and backward, and {number(teacher)} in the "
        f"teacher: {number(reached)} TFLOP/s in all, where a large matrix product reaches "
        f"{number(record.matrix_tflop_s)} on each device"
    )
    if sheet := SHEET_TFLOP_S.get(facts["device"]):
        text += f"; of the {number(sheet)} on its data sheet {number(100 * record.utilisation(side, sheet))} %"
    share, without = (_percent(side.share("objective", without=skipped)) for skipped in ((), ("teacher",)))
    text += (
        f". The DTM objective (matching, loss, and its backward) is {_figure(share)} % of a step, "
        f"{_figure(without)} % of one without its teacher."
    )
    if facts["device"] == GOAL_DEVICE and record.recipe == GOAL_RECIPE:
        text += f" {_gpu_goal()}"
    if facts["kind"] == "cpu" and (record.recipe, record.batch) == (GOAL_CPU_RECIPE, GOAL_CPU_BATCH):
        text += f" Goal: at most {GOAL_CPU_SHARE} % of a step."
    return text


def _gpu_goal() -> str:
    return (
        f"Goals for {GOAL_RECIPE} on an {GOAL_DEVICE}: {GOAL_RATE} images/s, {GOAL_UTILISATION} % of the matrix rate, "
        f"the objective below {GOAL_SHARE} % of a step."
    )


def _loaded(record: LoaderRecord) -> list[str]:
    facts, theirs = record.machine, record.rate(RELEASED_CHAIN)
    rows = []
    for row in record.rows:
        speed = Figure(row.images_per_second_per_core, row.iqr)
        times = f"{number(speed.median / theirs)} x" if theirs else ""
        rows.append([row.chain, _figure(speed), str(row.runs), times])
    header = ["chain", "images/s on a core (IQR)", "runs", f"against {RELEASED_CHAIN}"]
    return [
        f"## Loading images on {facts['device']}",
        f"{record.source}. torch {facts['torch']}, {facts['date']}, commit {shown_commit(facts)}.",
        table(header, rows),
    ]


def _figure(figure: Figure) -> str:
    return f"{number(figure.median)} ({number(figure.iqr)})"


def _percent(figure: Figure) -> Figure:
    return Figure(100 * figure.median, 100 * figure.iqr)
