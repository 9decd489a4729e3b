"""How a command ends: a person's mistake in one line, a programmer's with its traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtm_triton.train import pretrain
from dtm_triton.train.command_line import run_command
from dtm_triton.train.engine.distributed import Processes


def end_of(words: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(["--recipe", "demo", "--run.device", "cpu", *words])
    assert isinstance(stopped.value.code, str)
    return stopped.value.code


def test_values_that_cannot_be_used_end_in_one_line(tmp_path: Path) -> None:
    small = ["--run.folder", str(tmp_path), "--teacher.kind", "pixels"]
    assert end_of([*small, "--run.batch-size", "2000"]) == (
        "dtm-pretrain: run.batch_size must be at most the 1437 images, got 2000"
    )
    assert end_of([*small, "--loss.num-schedules", "0"]).startswith("dtm-pretrain: num_schedules must be ")
    assert "device must be one that PyTorch finds here" in end_of([*small, "--run.device", "cuda"])


def test_mistakes_of_programs_keep_their_traceback() -> None:
    def work(processes: Processes) -> None:
        raise ValueError("not about anything a person typed")

    with pytest.raises(ValueError, match="not about"):
        run_command("dtm-test", work, "cpu")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FloatingPointError("not finite")])
def test_failures_of_machines_end_in_one_line(error: Exception) -> None:
    def work(processes: Processes) -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command("dtm-test", work, "cpu")
    assert stopped.value.code == f"dtm-test: {error}"


def test_lost_processes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(processes: Processes) -> None:
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:5] Connection closed by peer")

    with pytest.raises(SystemExit) as stopped:
        run_command("dtm-test", work, "cpu")
    assert str(stopped.value.code).startswith("dtm-test: another process has ended, or was not heard of in time")
