"""A run's folder belongs to one run at a time."""

from __future__ import annotations

import errno
import fcntl
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import stop_at, tiny_config, tiny_trainer

from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.run_folder import hold_folder
from dtm_triton.train.engine.stop import Stopped


def test_a_second_run_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path))
    stop_at(trainer, 5)
    with pytest.raises(Stopped):
        trainer.fit()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "loss": 1.0}) + "\n")  # a running run is ahead of its checkpoint
    second = tiny_trainer(tiny_config(tmp_path, log_every=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("dtm_triton.train.engine.loop.hold_folder", partial(hold_folder, patience=0.1))
    with hold_folder(tmp_path), pytest.raises(FolderError, match="is in use by another process"):
        second.fit()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert read_metrics(tmp_path)[-1]["step"] == 9


def test_file_systems_without_locks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_folder(tmp_path):
        pass
    assert "cannot be locked" in capsys.readouterr().out
