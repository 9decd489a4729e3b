"""Saving beside the training: what is kept, what is copied, what happens when the disk does not take it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_together

from dtm_triton.train.engine import saver as saver_module
from dtm_triton.train.engine.checkpoint import FolderError, load_tensors, saved_steps
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.saver import Saver, best_step


def save(saver: Saver, step: int, **options: Any) -> str | None:
    return saver.save(step, {"w": torch.full((10,), float(step))}, {"step": step}, **options)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in saved_steps(folder)]


def test_newest_best_and_kept_ones_stay(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Processes())
    for step in range(1, 9):
        save(saver, step, best=step == 2, why="end of epoch 4" if step == 4 else "")
    saver.finish()
    assert steps(tmp_path) == [8, 7, 4, 2]
    assert best_step(tmp_path) == tmp_path / "step_000000002"
    assert (tmp_path / "step_000000004" / "kept").read_text() == "end of epoch 4\n"
    save(saver, 9, best=True)
    saver.finish()
    assert steps(tmp_path) == [9, 8, 4]


def test_protects_the_last_one_before_a_step(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Processes())
    assert saver.protect(5, "nothing yet") is None
    for step in (2, 4):
        save(saver, step)
    assert saver.protect(3, "a spike") == tmp_path / "step_000000002"
    for step in (6, 8, 10):
        save(saver, step)
    saver.finish()
    assert steps(tmp_path) == [10, 8, 2]
    for step in (12, 14, 16, 18, 20):  # of many spikes the latest two count
        assert saver.protect(step, "another spike") == tmp_path / f"step_{step - 2:09d}"
        save(saver, step)
    saver.finish()
    assert steps(tmp_path) == [20, 18, 16]


def test_the_state_is_copied_before_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets control back while the checkpoint is written, and what it does then is not in it."""
    gate, seal = threading.Event(), saver_module.seal

    def slow(*arguments: Any) -> None:
        assert gate.wait(30)
        seal(*arguments)

    monkeypatch.setattr(saver_module, "seal", slow)
    saver, weights = Saver(tmp_path, Processes()), torch.ones(100_000)
    saver.save(1, {"w": weights}, {"step": 1})
    weights.zero_()
    assert steps(tmp_path) == []
    gate.set()
    saver.finish()
    assert load_tensors(tmp_path / "step_000000001")["w"].min() == 1


def test_a_failed_checkpoint_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, Processes())
    save(saver, 1)
    assert saver.finish() is None

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "seal", full)
        assert save(saver, 2) is None
        trouble = save(saver, 3)
        assert trouble is not None and "could not be written" in trouble and "No space left" in trouble
        assert "No space left" in (saver.finish() or "")
        assert steps(tmp_path) == [1] and not list(tmp_path.glob("*.unfinished"))
        save(saver, 4)
        with pytest.raises(FolderError, match="3 in a row"):
            saver.finish()
    save(saver, 5)
    assert saver.finish() is None and steps(tmp_path) == [5, 1]


def test_a_missing_note_of_the_best_is_none(tmp_path: Path) -> None:
    assert best_step(tmp_path) is None
    (tmp_path / "best.json").write_text(json.dumps({"folder": 3}))
    assert best_step(tmp_path) == tmp_path / "3"
    (tmp_path / "best.json").write_text("{")
    assert best_step(tmp_path) is None


def test_both_processes_hear_of_a_disk_that_one_cannot_write(tmp_path: Path) -> None:
    from tiny import save_where_one_fails

    run_together(2, save_where_one_fails, tmp_path)
    assert steps(tmp_path) == [2]
