"""The loader's worker processes and signals: they live as long as the trainer needs them, and no longer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import CONTEXT
from tiny import tiny_config, tiny_trainer

from dtm_triton.train.command_line import run_command
from dtm_triton.train.data.batches import Batch, MicroBatches, training_loader
from dtm_triton.train.engine.checkpoint import load_plain, saved_steps
from dtm_triton.train.engine.distributed import Processes

SLOW = 1.5  # seconds that a step takes


def train(folder: Path) -> None:
    """A run in a process group of its own whose step 3 is slow."""
    os.setsid()
    with open(folder / "output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)

    def work(processes: Processes) -> None:
        trainer = tiny_trainer(tiny_config(folder / "run", data={"workers": 1}), processes)
        forward = trainer.objective.forward

        def slow(batch: Batch) -> Any:
            if trainer.step == 3:
                (folder / "slow").touch()
                time.sleep(SLOW)
            return forward(batch)

        trainer.objective.forward = slow  # type: ignore[method-assign]
        trainer.fit()

    run_command("tiny", work, "cpu")


def begin(folder: Path) -> tuple[multiprocessing.process.BaseProcess, list[int]]:
    """The run in its slow step, and its workers."""
    process = CONTEXT.Process(target=train, args=(folder,))  # no daemon, which could have no children
    process.start()
    deadline = time.monotonic() + 60
    while not (folder / "slow").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.is_alive(), (folder / "output.txt").read_text()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 1
    return process, [int(worker) for worker in workers]


def fields(process: int) -> dict[str, str]:
    """What Linux says of a process; nothing when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    found = dict(line.split(":\t", 1) for line in lines)
    return {} if found["State"].startswith("Z") else found


def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_trainer(tmp_path: Path) -> None:
    """As torchrun, scancel and terminals send it. The workers set no deadline: a step or an evaluation may be long."""
    process, workers = begin(tmp_path)
    assert process.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        ignored = int(fields(workers[0])["SigIgn"], 16)
        assert ignored >> (number - 1) & 1, f"{number!r} does something in a worker"
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 143 and "Traceback" not in output, output
    assert "stopped at step 4, saved" in output
    assert load_plain(saved_steps(tmp_path / "run" / "checkpoints")[0])["step"] == 4
    assert not any(fields(worker) for worker in workers)


def test_workers_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    process, workers = begin(tmp_path)
    process.kill()
    deadline = time.monotonic() + 20
    while any(fields(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(fields(worker) for worker in workers)


def test_nobody_waits_for_a_worker_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that does not answer."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    trainer = tiny_trainer(tiny_config(tmp_path))
    monkeypatch.setattr(MicroBatches, "__getitem__", lambda *_: time.sleep(60))
    with training_loader(trainer.batches, 0, 4, workers=1, pin=False) as loader:
        worker = loader._workers[0]  # type: ignore[attr-defined]
        while not int(fields(worker.pid)["SigIgn"], 16) >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.01)
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL
