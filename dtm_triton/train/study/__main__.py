"""The command: all runs of the study in two processes of one thread each, then tables and a picture.

`python -m dtm_triton.train.study`; finished runs are not repeated, a run that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dtm_triton.measure.machine import describe
from dtm_triton.measure.tables import aligned
from dtm_triton.train.command_line import run_command
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.side_by_side import die_with_parent, run_side_by_side
from dtm_triton.train.study.data import write_windows
from dtm_triton.train.study.design import ARMS, SEEDS
from dtm_triton.train.study.page import CHOSEN, write_page, write_record
from dtm_triton.train.study.report import render
from dtm_triton.train.study.run import result_path, run_share


@dataclass(frozen=True, kw_only=True)
class Study:
    """The study of attention-driven masking, about a quarter of an hour on two CPU cores; needs scikit-image."""

    folder: Path = Path("runs/study")
    """Everything is written here; runs found here are not repeated."""
    seeds: int = SEEDS
    """Seeds 0, 1, ... of every arm."""
    arms: tuple[str, ...] = field(default_factory=lambda: tuple(ARMS))
    """Arms to run, by their names in design.py."""
    processes: int = 2
    """Side by side, of one thread each."""
    page: bool = False
    """Write the record, the pictures and the tables into docs/, of a checkout."""
    only: int | None = None
    """Do this process's share and stop: what the study starts side by side."""


def run_study(study: Study) -> str:
    """Do what is left to do; returns the tables for a terminal."""
    write_windows(study.folder / "data")
    words = [sys.executable, "-m", "dtm_triton.train.study", f"--folder={study.folder}", f"--seeds={study.seeds}"]
    words += [f"--processes={study.processes}", "--arms", *study.arms]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes: PyTorch's threads and those of BLAS
    run_side_by_side({f"process {share}": [*words, f"--only={share}"] for share in range(study.processes)})
    runs = []
    for name in study.arms:
        for seed in range(study.seeds):
            run = json.loads(result_path(study.folder, name, seed).read_text())
            runs.append({key: value for key, value in run.items() if key != "config"})
    record = {"machine": describe(torch.device("cpu")), "runs": runs}
    write_record(record, study.folder)
    if study.page:
        write_page(record, study.folder / "pictures", CHOSEN)
    parts = render(runs).split("\n\n")
    return "\n\n".join(aligned(part) if part.startswith("|") else part for part in parts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    import tyro

    study = tyro.cli(Study, prog="python -m dtm_triton.train.study", description=__doc__, args=argv)
    unknown = [name for name in study.arms if name not in ARMS]
    if unknown:
        sys.exit(f"study: --arms must be of {', '.join(ARMS)}, got {unknown[0]!r}")
    run_command("study", partial(_report, study), "cpu")


def _report(study: Study, processes: Processes) -> None:
    if study.only is None:
        print(run_study(study))
        return
    die_with_parent()
    seeds = range(study.only, study.seeds, study.processes)
    run_share(study.folder, study.arms, seeds, partial(_say, f"process {study.only}, "))


def _say(prefix: str, text: str) -> None:
    print(prefix + text, flush=True)


if __name__ == "__main__":
    main()
