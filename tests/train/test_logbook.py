"""What people see of a run: plain lines, a bar on a terminal, metrics that a resumed run does not repeat."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dtm_triton.train.engine.logbook import Logbook, read_metrics
from dtm_triton.train.side_by_side import PROGRESS

METRICS = {"loss": 0.25, "images_per_second": 1234.4}


def write_run(folder: Path, start: int, steps: range, speaks: bool = True) -> Logbook:
    book = Logbook(folder, "student", start, 40, speaks)
    with book:
        for step in steps:
            book.write(step, METRICS)
            if step == 20:
                book.write(step, {"knn": 0.875})
    return book


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, 0, range(10, 41, 10))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # the first, the evaluation, the last: not one each step
    assert lines[0].startswith("student  step 10/40  loss 0.2500  1,234 images/s  ") and lines[0].endswith("s left")
    assert lines[1] == "student  step 20/40  knn 0.875"
    progress = PROGRESS.fullmatch(lines[2])
    assert progress is not None and progress.groups() == ("student", "40", "40", "loss 0.2500  1,234 images/s")


def test_a_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    book = write_run(tmp_path, 0, range(10, 41, 10))
    assert book.bar is not None and book.bar.tasks[0].completed == 40
    text = capsys.readouterr().out
    for wanted in ("student", "40/40", "loss 0.2500", "1,234 images/s", "knn 0.875"):
        assert wanted in text


def test_rows_behind_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    write_run(tmp_path, 0, range(10, 31, 10))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "los')  # a kill cut it short
    write_run(tmp_path, 20, range(30, 41, 10))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 20, 30, 40]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 40, **METRICS}


def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = write_run(tmp_path, 0, range(10, 41, 10), speaks=False)
    book.say("nothing")
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_rows_but_spoils_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that do not fit are told and left out; the next ones that fit follow the last whole one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Logbook(tmp_path, "run", 0, 9, speaks=True) as book:
        book.board = SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)  # its files are its own matter
        book.write(1, {"knn": 0.5})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
            book.write(2, {"knn": 0.25})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        book.write(3, {"knn": 0.75})
    assert read_metrics(tmp_path) == [{"step": 1, "knn": 0.5}, {"step": 3, "knn": 0.75}]
    assert "metrics of step 2 could not be written" in capsys.readouterr().out
