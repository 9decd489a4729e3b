"""The demo, scaled down: killed at random moments it ends with the same bits; finished it only prints its table."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dtm_triton.train import demo as demo_command
from dtm_triton.train.build import build_targets
from dtm_triton.train.demo import Demo, describe, run_demo
from dtm_triton.train.engine.checkpoint import FolderError, saved_steps
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.run_folder import hold_folder
from dtm_triton.train.pretrain import pretrain
from dtm_triton.train.probe import probe
from dtm_triton.train.side_by_side import run_side_by_side

ROOT = Path(__file__).parents[2]
STAGES = ("teacher", "tokenwise", "dtm")


def demo_words(folder: Path) -> list[str]:
    return [sys.executable, str(ROOT / "train" / "demo.py"), f"--folder={folder}", "--epochs=1", "--teacher-epochs=1"]


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        demo_words(folder),
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rows(folder: Path) -> int:
    return sum(len(read_metrics(folder / stage)) for stage in STAGES)


def killed_twice(folder: Path) -> None:
    """A demo killed while the teacher trains and while the students do, at random moments, then left alone."""
    draw = random.Random(1)
    for least in (1, 14):
        process = start(folder)
        deadline = time.monotonic() + 90
        while rows(folder) < least and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.wait()
        for stage in STAGES:  # the children are gone too
            with hold_folder(folder / stage, patience=3):
                pass
    output, _ = start(folder).communicate(timeout=120)
    assert "Where everything lies" in output, output
    assert "goes on from step" in output


def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One test, so that one worker makes the demo once: killed it equals one left alone, finished it says so."""
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    killed_twice(killed)
    for config in Demo(folder=calm, epochs=1, teacher_epochs=1).students().values():
        pretrain(config, Processes())
    for student in ("tokenwise", "dtm"):
        weights = [folder / student / "student" / "model.safetensors" for folder in (killed, calm)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), student
        losses = [[row.get("loss") for row in read_metrics(folder / student)] for folder in (killed, calm)]
        assert losses[0] == losses[1]
    students = [(calm / name / "student" / "model.safetensors").read_bytes() for name in ("tokenwise", "dtm")]
    assert students[0] != students[1]
    capsys.readouterr()
    finished_demo_says_so(killed, capsys)
    results = json.loads((killed / "results.json").read_text())["results"]
    baselines_of_the_table(results)
    config = Demo(folder=killed, epochs=1, teacher_epochs=1).students()["dtm"]
    teacher = build_targets(config, Processes()).eval()  # with the statistics of all images, not of a batch
    assert results["teacher (saw all labels)"] == probe(
        lambda images: teacher(images).mean(1), config.data, Processes()
    )


def finished_demo_says_so(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*") if path.is_file()}
    demo_command.main([f"--folder={killed}", "--epochs=1", "--teacher-epochs=1"])
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("*") if path.is_file()} == before
    text = capsys.readouterr().out
    assert "is finished; remove the folder" in text and "What it does not show" in text
    results = json.loads((killed / "results.json").read_text())["results"]
    assert len(results) == 5
    for name, metrics in results.items():
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{100 * metrics['knn']:.1f} %" in line and f"{100 * metrics['linear_probe']:.1f} %" in line
    with pytest.raises(FolderError, match=r"run.epochs: 1 -> 2"):
        run_demo(Demo(folder=killed, epochs=2, teacher_epochs=1), Processes())


def baselines_of_the_table(results: dict[str, dict[str, float]]) -> None:
    """Raw pixels and random weights tell digits apart badly: what design measured, with room for the machine."""
    assert results["untrained student"]["linear_probe"] < 0.6
    assert results["raw pixels"]["linear_probe"] < 0.5
    assert 0.6 < results["raw pixels"]["knn"] < 0.95


def test_claims_follow_the_table() -> None:
    untrained, learnt = ({"knn": value, "linear_probe": value} for value in (0.45, 0.9))
    names = ("raw pixels", "untrained student", "token-wise student", "teacher (saw all labels)")
    results = dict.fromkeys(names, untrained)
    assert "What it shows: nothing" in describe(Demo(), {**results, "DTM student": untrained})
    text = describe(Demo(), {**results, "DTM student": learnt})
    assert "right on 90.0 % of the digits" in text and "45.0 %" in text
    assert "standard error of about 1.6 points" in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_demo_and_children(tmp_path: Path, number: int, code: int) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 90
    while not read_metrics(tmp_path / "dtm") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "DTM student" in output and "stopped at step" in output and "Traceback" not in output
    assert saved_steps(tmp_path / "dtm" / "checkpoints")


def test_a_failing_child_stops_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    def code(text: str) -> Sequence[str]:
        return [sys.executable, "-c", text]

    began = time.monotonic()
    with pytest.raises(FolderError, match="second ended with exit code 3"):
        run_side_by_side(
            {"first": code("import time; time.sleep(60)"), "second": code("print('oh'); raise SystemExit(3)")}
        )
    assert time.monotonic() - began < 30
    assert "oh" in capfd.readouterr().out


def test_a_held_folder_is_refused(tmp_path: Path) -> None:
    with (
        hold_folder(tmp_path),
        pytest.raises(FolderError, match="is in use by another process"),
        hold_folder(tmp_path, patience=0.1),
    ):
        pass
