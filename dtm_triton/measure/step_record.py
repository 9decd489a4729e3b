"""The data of `dtm-step-bench`: training steps of several recipes, which took turns in one run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dtm_triton.measure.machine import slug
from dtm_triton.measure.train_record import Figure, contents

FORMAT = "dtm-step-bench 1"


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One recipe; the list holds one value for each turn."""

    recipe: str
    step_ms: list[float]
    """Wall time of a step."""
    encoder_tokens: int
    decoder_tokens: int
    """0 without a decoder."""
    flops: int
    """Of the trained network's forward pass, an image."""

    @property
    def step(self) -> Figure:
        """Wall time of a step in milliseconds."""
        return Figure.of(self.step_ms)

    def times(self, first: StepRow) -> Figure:
        """Its time over another's, turn by turn.

        >>> fast, slow = (StepRow(recipe="", step_ms=ms, encoder_tokens=1, decoder_tokens=0, flops=1)
        ...               for ms in ([2.0], [4.0]))
        >>> fast.times(slow).median
        0.5
        """
        return Figure.of([own / other for own, other in zip(self.step_ms, first.step_ms, strict=True)])


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Everything measured on one machine in one run; the first recipe is what the others are compared with."""

    machine: dict[str, str]
    batch: int
    """Images a step."""
    steps: int
    """Steps in a turn."""
    precision: str
    options: list[str]
    """What was not left at the recipes' values, for example "compile"."""
    source: str
    """What the images and the weights were."""
    rows: list[StepRow]

    def write(self, folder: Path) -> Path:
        """Write the file of this machine and first recipe into `folder`; returns its path."""
        path = folder / f"steps-{self.machine['slug']}-{slug(self.rows[0].recipe)}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        return path


def read_steps(folder: Path) -> list[StepRecord]:
    """Every such record in `folder`, GPUs first.

    >>> read_steps(Path("no such folder"))
    []
    """
    return [StepRecord(rows=[StepRow(**row) for row in each.pop("rows")], **each) for each in contents(folder, FORMAT)]
