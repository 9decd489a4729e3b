"""The data of training and loader benchmarks: JSON files that BENCHMARKS.md and docs/planning.md show."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtm_triton.measure.machine import slug

FORMAT = "dtm-train-bench 1"
LOADER_FORMAT = "dtm-loader-bench 1"

PARTS = ("loader", "teacher", "student", "objective", "optimiser", "rest")
"""What a step's time is divided into; "rest" lies between: transfer, augmentation, masks, normalisation, metrics."""

SHEET_TFLOP_S = {
    "NVIDIA H200": 989.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
}
"""Dense bfloat16 rates of the makers' data sheets, by the name the driver gives."""


@dataclass(frozen=True)
class Figure:
    """The median of repetitions and their interquartile range.

    >>> Figure.of([3.0, 1.0, 2.0])
    Figure(median=2.0, iqr=2.0)
    """

    median: float
    iqr: float

    @staticmethod
    def of(values: list[float]) -> Figure:
        """Of one value or more."""
        if len(values) == 1:
            return Figure(values[0], 0.0)
        low, middle, high = statistics.quantiles(values, n=4)
        return Figure(middle, high - low)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One kind of targets in the same student, loop and batches; a list holds one value for each repetition."""

    name: str
    """"dtm", "token-wise", or "released": DTM by the released program's operations."""
    step_ms: list[float]
    """Wall time of a step as it is trained."""
    parts_ms: dict[str, list[float]]
    """Time of every part of a step, by PARTS."""
    peak_bytes: int
    """Weights, moments and teacher, and the most that a step allocates above them."""

    @property
    def step(self) -> Figure:
        """Wall time of a step in milliseconds."""
        return Figure.of(self.step_ms)

    def part(self, name: str) -> Figure:
        """Time of a part in milliseconds."""
        return Figure.of(self.parts_ms[name])

    def share(self, *names: str, without: tuple[str, ...] = ()) -> Figure:
        """Parts' share of the sum of all parts but those in `without`, taken within each repetition.

        >>> side = Side(name="dtm", step_ms=[5.0], parts_ms={"teacher": [1.0], "student": [3.0], "objective": [1.0]},
        ...             peak_bytes=0)
        >>> side.share("objective").median, side.share("objective", without=("teacher",)).median
        (0.2, 0.25)
        """
        shares = []
        for place in range(len(self.step_ms)):
            ms = {part: values[place] for part, values in self.parts_ms.items() if part not in without}
            shares.append(sum(ms[name] for name in names) / sum(ms.values()))
        return Figure.of(shares)


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """Everything measured of one recipe on one machine in one run."""

    machine: dict[str, str]
    recipe: str
    student: str
    teacher: str
    batch: int
    """Images a step, over all processes."""
    processes: int
    steps: int
    """Steps a repetition."""
    precision: str
    workers: int
    options: list[str] = field(default_factory=list)
    """What was not left at the recipe's value, for example "compile"."""
    source: str
    """What the images and the weights were."""
    student_flops: int
    """Forward and backward, an image."""
    teacher_flops: int
    """Forward, an image."""
    matrix_tflop_s: float
    """The rate of a large matrix product in `precision`, measured in the same run."""
    sides: list[Side]

    def side(self, name: str) -> Side | None:
        """The side of that name, if it was measured."""
        return next((side for side in self.sides if side.name == name), None)

    def images_per_second(self, side: Side) -> Figure:
        """Over all processes."""
        return Figure.of([1e3 * self.batch / ms for ms in side.step_ms])

    def utilisation(self, side: Side, tflop_s: float | None = None) -> float:
        """Operations of student and teacher a second over those of a process's matrix product, or over `tflop_s`."""
        done = self.images_per_second(side).median * (self.student_flops + self.teacher_flops)
        return done / (1e12 * (tflop_s or self.matrix_tflop_s) * self.processes)

    def difference(self, side: Side, other: Side) -> Figure:
        """How many milliseconds a step of `side` takes longer than one of `other`, repetition by repetition."""
        return Figure.of([a - b for a, b in zip(side.step_ms, other.step_ms, strict=True)])

    def write(self, folder: Path) -> Path:
        """Write the file of this machine and recipe into `folder`; returns its path."""
        path = folder / f"train-{self.machine['slug']}-{slug(self.recipe)}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        return path


@dataclass(frozen=True, kw_only=True)
class LoaderRow:
    """Images a second on one core by one chain of decoding and transforms."""

    chain: str
    images_per_second_per_core: float
    iqr: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class LoaderRecord:
    """Everything a loader benchmark measured on one machine in one run."""

    machine: dict[str, str]
    source: str
    rows: list[LoaderRow]

    def rate(self, chain: str) -> float | None:
        """Images a second on one core, if that chain was measured."""
        return next((row.images_per_second_per_core for row in self.rows if row.chain == chain), None)


def read_train(folder: Path) -> list[TrainRecord]:
    """Every training record in `folder`, GPUs first.

    >>> read_train(Path("no such folder"))
    []
    """
    records = []
    for content in contents(folder, FORMAT):
        sides = [Side(**side) for side in content.pop("sides")]
        records.append(TrainRecord(**content, sides=sides))
    return records


def read_loader(folder: Path) -> list[LoaderRecord]:
    """Every loader record in `folder`, GPU machines first.

    >>> read_loader(Path("no such folder"))
    []
    """
    records = []
    for content in contents(folder, LOADER_FORMAT):
        rows = [LoaderRow(**row) for row in content.pop("rows")]
        records.append(LoaderRecord(**content, rows=rows))
    return records


def contents(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What the JSON files of one format in `folder` hold, GPU machines first."""
    every = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    chosen = [content for content in every if isinstance(content, dict) and content.pop("format", None) == kind]
    return sorted(chosen, key=lambda content: content["machine"]["kind"] != "gpu")
