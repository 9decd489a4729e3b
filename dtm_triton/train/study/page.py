"""docs/amt.md and what it shows: the study's part of the page is rendered from the runs beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtm_triton.measure.machine import ROOT
from dtm_triton.train.engine.checkpoint import write_text
from dtm_triton.train.study.design import SHOWN_STEPS
from dtm_triton.train.study.report import draw, render

PAGE = ROOT / "docs" / "amt.md"
FOLDER = ROOT / "docs" / "study"
BEGIN, END = "<!-- rendered by python -m dtm_triton.train.study -->", "<!-- end of what is rendered -->"
RECORD = "runs.json"
CHOSEN = (
    *(f"amt_step_{step:09d}.png" for step in SHOWN_STEPS),
    "mae_reconstructions.png",
    "amt_reconstructions.png",
)
"""Pictures that the page shows."""


def read_record(folder: Path = FOLDER) -> dict[str, Any]:
    """{"machine": facts, "runs": [...]} of a study."""
    return json.loads((folder / RECORD).read_text())


def write_record(record: dict[str, Any], folder: Path) -> None:
    """runs.json and differences.png."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(run) for run in record["runs"])
    head = json.dumps(record["machine"], indent=1)
    write_text(folder / RECORD, f'{{"machine": {head},\n "runs": [\n  {lines}\n ]}}\n')
    draw(record["runs"], folder / "differences.png")


def rendered(page: str, record: dict[str, Any]) -> str:
    """The page with what lies between its marks made anew.

    >>> record = {"machine": {"device": "CPU", "torch": "2", "date": "today"}, "runs": []}
    >>> rendered(f"before\\n{BEGIN}\\nold\\n{END}\\nafter", record).splitlines()[::8]
    ['before', 'after']
    """
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render(record['runs'])}\n\n{_facts(record)}\n\n{END}{after}"


def write_page(record: dict[str, Any], pictures: Path, chosen: Sequence[str]) -> None:
    """The record, its picture, the `chosen` ones of `pictures`, and the page."""
    write_record(record, FOLDER)
    for name in chosen:
        _copy(pictures / name, FOLDER / name)
    write_text(PAGE, rendered(PAGE.read_text(), record).removesuffix("\n"))


def _copy(picture: Path, place: Path) -> None:
    """With 128 colours: a third of the bytes."""
    from PIL import Image

    with Image.open(picture) as image:
        image.convert("RGB").quantize(128).save(place, optimize=True)


def _facts(record: dict[str, Any]) -> str:
    facts, runs = record["machine"], record["runs"]
    minutes = sum(run["seconds"] for run in runs) / 60
    return f"{len(runs)} runs, {minutes:.0f} core-minutes; {facts['device']}, torch {facts['torch']}, {facts['date']}."
