"""docs/training.md: its commands on generated images, its scripts, the fields it names."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtm_triton.train import recipes
from dtm_triton.train.engine.checkpoint import load_plain, saved_steps
from dtm_triton.train.engine.logbook import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
SCRIPTS = ("slurm.sh", "torchrun.sh")
EPOCHS = 20  # of one step each: far more than are done between a look at the log and a signal
SMALL = shlex.split(
    f"--run.epochs={EPOCHS} --student.model-kwargs.depth=3 --data.image-size 64 64 --data.workers=1"
    " --mask.masked=8 --mask.min-patches=2 --loss.max-removed=16"
)
STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
    "scontrol": 'echo "$@" >> scontrol.txt; [ "$1" = show ] && echo localhost || true',
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str) -> None:
    path = ROOT / "docs" / "examples" / script
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0 and os.access(path, os.X_OK)
    assert f"docs/examples/{script}" in PAGE


def test_fields_and_recipes_exist() -> None:
    """Every option and every `section.field` that the page names."""
    named = set(re.findall(r"(?:--|`)((?:run|data|loss|mask|student|teacher|optimizer)\.[a-z_-]+)", PAGE))
    config = recipes.own_images()
    assert len(named) > 20
    for name in named:
        section, field = name.replace("-", "_").split(".")
        assert hasattr(getattr(config, section), field), name
    for name in re.findall(r"--recipe ([a-z]\w+)", PAGE):
        assert name in recipes.PRETRAIN


def newcomer_command(images: Path) -> list[str]:
    found = re.findall(r"^    (torchrun .*PATH/TO/IMAGES.*)$", PAGE, re.M)
    assert len(found) == 1 and found[0] in (ROOT / "README.md").read_text(), "both pages say the same"
    return shlex.split(found[0].replace("PATH/TO/IMAGES", str(images)))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the checkout's train/ and docs/, 70 images, and stand-ins for Slurm's commands."""
    for name in ("train", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    draw = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(70):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((160, 120)).save(tmp_path / "photos" / f"{number}.jpg")
    return tmp_path


def test_slurm_stops_well_and_the_newcomers_command_goes_on(place: Path) -> None:
    """Told to end, the job saves and is queued again; the page's command then finishes the run."""
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PROCESSES": "2"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    words = [*newcomer_command(place / "photos"), *SMALL]
    folder, output = place / "runs" / "own_images", place / "job.txt"
    with open(output, "w") as file:
        options = [*words[words.index("--recipe") :], f"--run.folder={folder}", "--run.log-every=1"]
        job = subprocess.Popen(
            ["bash", str(ROOT / "docs" / "examples" / "slurm.sh"), *options],
            cwd=place,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 120
    while not read_metrics(folder) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # a step is done by all processes together: both train, and both stop well
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 143, output.read_text()
    saved = load_plain(saved_steps(folder / "checkpoints")[0])["step"]
    assert f"stopped at step {saved}, saved" in output.read_text()
    assert "requeue 7" in (place / "scontrol.txt").read_text()
    run = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert saved < EPOCHS and f"goes on from step {saved} of {EPOCHS}" in run.stdout and "finished" in run.stdout
    for name in ("curves.png", "groups.png", "masks.png", "metrics.jsonl", "config.json", "student", "tensorboard"):
        assert (folder / name).exists() and name in PAGE
