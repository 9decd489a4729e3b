"""The data of a benchmark: one JSON file per machine, from which everything shown is rendered."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtm_triton.measure.cases import Case, bytes_moved, flops
from dtm_triton.measure.ceilings import Ceilings, dtype_name
from dtm_triton.measure.timing import Timing

FORMAT = "dtm-bench 1"
"""Marks the files that are benchmark data; a folder may hold others."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of one case: measured, or the reason why not."""

    case: str
    op: str
    dtype: str
    implementation: str
    bytes: int
    flops: int
    median_ms: float | None = None
    iqr_ms: float | None = None
    calls: int | None = None
    peak_bytes: int | None = None
    reason: str | None = None

    @staticmethod
    def of(case: Case, implementation: str, **figures: Any) -> Row:
        """A row with what is known of the case.

        >>> case = Case(op="merge", batch=1, tokens=8, channels=4, schedules=((3,),))
        >>> Row.of(case, "portable", reason="too slow").reason
        'too slow'
        """
        return Row(
            case=case.name,
            op=case.op,
            dtype=dtype_name(case.dtype),
            implementation=implementation,
            bytes=bytes_moved(case),
            flops=flops(case),
            **figures,
        )

    def floor_ms(self, ceilings: Ceilings) -> float:
        """What no version can be much faster than, at these ceilings."""
        return ceilings.floor_ms(self.bytes, self.flops, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything measured on one machine in one run."""

    machine: dict[str, str]
    ceilings: Ceilings
    seconds: float
    """Time that every median was taken over, about."""
    rows: list[Row]
    host: dict[str, Timing] = field(default_factory=dict)
    """Host time per call, by name."""
    replay: dict[str, Timing] = field(default_factory=dict)
    """Replay time of captured cases, by name."""

    def write(self, folder: Path) -> Path:
        """Write the machine's file into `folder`; returns its path."""
        path = folder / f"{self.machine['slug']}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        return path


def read(path: Path) -> Record | None:
    """The record in a JSON file, or None when the file holds something else."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    return Record(
        machine=content["machine"],
        ceilings=Ceilings(**content["ceilings"]),
        seconds=content["seconds"],
        rows=[Row(**row) for row in content["rows"]],
        host={name: Timing(**timing) for name, timing in content["host"].items()},
        replay={name: Timing(**timing) for name, timing in content["replay"].items()},
    )


def read_all(folder: Path) -> list[Record]:
    """Every machine's record, GPUs first, then by name.

    >>> read_all(Path("no such folder"))
    []
    """
    records = [record for path in sorted(folder.glob("*.json")) if (record := read(path))]
    return sorted(records, key=lambda record: (record.machine["kind"] != "gpu", record.machine["slug"]))
