"""How processes end: told to stop, killed under torchrun, on a disk that is full."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from killing import Start
from processes import run_together
from tiny import assert_same_bits, final_state

from dtm_triton.train import pretrain
from dtm_triton.train.engine.checkpoint import load_plain, saved_steps
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)], ids=str)
def test_a_signal_to_any_process_stops_all_with_a_checkpoint(ranks: tuple[int, ...], tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(batch_size=64, epochs=2, checkpoint_every=100)
    start = Start(tmp_path, changes, {})
    start.wait_for(lambda: len(read_metrics(tmp_path)) >= 3)
    for rank in ranks:
        pid = start.children[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
    start.finish(code=128 + signal.SIGTERM)
    texts = [(tmp_path / f"output-{rank}.txt").read_text() for rank in range(2)]
    told = re.search(r"stopped at step (\d+), saved", texts[0])
    assert told and not any("Traceback" in text for text in texts), texts
    assert load_plain(saved_steps(tmp_path / "checkpoints")[0])["step"] == int(told[1])
    again = Start(tmp_path, changes, {})
    assert again.step == int(told[1])
    again.kill((0, 1))


def words(folder: Path, *more: str) -> list[str]:
    run = dict(folder=folder, epochs=1, batch_size=64, checkpoint_every=3, log_every=1, threads=1)
    options = [f"--run.{name.replace('_', '-')}={value}" for name, value in run.items()]
    student = ["--teacher.kind=pixels", "--loss.max-iterations=3", "--student.model-kwargs.depth=1"]
    return ["--recipe=demo", *options, *student, *more]


def run_command_in_process(processes: Processes, folder: Path) -> None:
    """For `run_together`: the command's work in processes that have joined already."""
    from dtm_triton.train import recipes
    from dtm_triton.train.command_line import parse

    pretrain.pretrain(parse(recipes.PRETRAIN, "demo", "test", words(folder)), processes)


def workers_of(process: int) -> list[int]:
    """Children of a process, in the order of their start."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def test_torchrun_restarts_after_a_killed_worker_to_the_same_bits(tmp_path: Path) -> None:
    folder, calm = tmp_path / "killed", tmp_path / "calm"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    process = subprocess.Popen(
        [sys.executable, *launch, str(ROOT / "train" / "pretrain.py"), *words(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(folder)) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-5000:]
    begun = re.search(r"goes on from step (\d+) of 22", output)
    assert begun and int(begun[1]) >= 3, output[-5000:]
    run_together(2, run_command_in_process, calm)
    assert_same_bits(final_state(folder), final_state(calm))
    assert [row["step"] for row in read_metrics(folder) if "loss" in row] == list(range(1, 23))


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_saved(tmp_path: Path) -> None:
    """On a file system of 4 MB, room for two checkpoints: the third cannot be written, nor the next two."""
    if os.environ.get("DTM_NO_NAMESPACES") == "1":
        pytest.skip("DTM_NO_NAMESPACES=1: this machine allows no file system of one's own")
    script = 'mount -t tmpfs -o size=4m none "$0" && { "$@"; code=$?; ls "$0/run/checkpoints"; exit $code; }'
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *words(tmp_path / "run")]
    run = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path), *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 1, run.stdout + run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("dtm-pretrain: ") and "could not be written" in line and "No space left" in line, run.stderr
    assert "Traceback" not in run.stderr
    assert [name for name in run.stdout.splitlines() if re.fullmatch(r"step_\d+", name)], run.stdout
