"""Commands in several processes: finished stages, the "conv" teacher's batch, who computes a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import STUDENT, tiny_config

from dtm_triton.train import conv_teacher, probe
from dtm_triton.train.build import assemble
from dtm_triton.train.config import EmaConfig, TeacherConfig
from dtm_triton.train.conv_teacher import train_conv_teacher
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.finetune import finetune
from dtm_triton.train.models.teacher import ConvTeacher
from dtm_triton.train.pretrain import pretrain
from dtm_triton.train.recipes import finetune_demo


@dataclass(frozen=True, kw_only=True)
class Last(Processes):
    """The last of several processes, without the others; `told` is what the first one finds."""

    told: Any = None

    def from_first(self, work: Callable[[], Any], refusal: type[Exception]) -> Any:
        return self.told

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def test_the_first_process_says_whether_a_run_is_finished(tmp_path: Path) -> None:
    """On a shared disk one process may see finished.json later than another: nothing is here, and none trains."""
    last = Last(rank=1, count=2, told={"knn": 0.5})
    base = finetune_demo()
    tuned = replace(base, student=STUDENT, run=replace(base.run, folder=tmp_path))
    assert pretrain(tiny_config(tmp_path), last) == finetune(tuned, last) == {"knn": 0.5}
    assert not list(tmp_path.iterdir())


class Began(Exception):
    """Training would begin."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the "conv" teacher's trainer is given; it does not train."""
    given: dict[str, Any] = {}

    def trainer(objective: Any, **arguments: Any) -> None:
        given.update(arguments)
        raise Began

    monkeypatch.setattr(conv_teacher, "Trainer", trainer)
    return given


@pytest.mark.parametrize(("count", "batch"), [(1, 64), (2, 64), (3, 63), (5, 60), (64, 64)])
def test_the_conv_teachers_batch_is_divisible(asked: dict[str, Any], tmp_path: Path, count: int, batch: int) -> None:
    with pytest.raises(Began):
        train_conv_teacher(tiny_config(tmp_path), Last(rank=count - 1, count=count))
    assert asked["run"].batch_size == batch and f'"batch_size": {batch},' in asked["resolved"]


def test_a_finished_conv_teacher_serves_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path)
    trained = train_conv_teacher(config, Processes())
    capsys.readouterr()
    monkeypatch.setattr(Last, "from_first", lambda self, work, refusal: work())
    again: ConvTeacher = train_conv_teacher(config, Last(rank=2, count=3))
    assert "step" not in capsys.readouterr().out, "trained again"
    first, second = trained.state_dict(), again.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_first_process_alone_fits_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(*rows: torch.Tensor, **options: Any) -> float:
        raise AssertionError("fitted in another process")

    data = tiny_config(tmp_path).data
    monkeypatch.setattr(probe, "knn_accuracy", fitted)
    monkeypatch.setattr(probe, "linear_probe_accuracy", fitted)
    assert probe.probe(lambda images: images.flatten(1), data, Last(rank=1, count=2)) == {}
    with pytest.raises(AssertionError, match="fitted"):
        probe.probe(lambda images: images.flatten(1), data, Processes())


def test_an_average_over_more_blocks_than_there_are_is_refused(tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path), teacher=TeacherConfig(kind="ema"), ema=EmaConfig(blocks=3))
    with pytest.raises(FolderError, match=r"ema\.blocks must be at most the student's 2, got 3"):
        assemble(config, None)
    assemble(replace(config, ema=EmaConfig(blocks=2)), None)
