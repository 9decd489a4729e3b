"""The commands as people start them: as scripts, under torchrun, stopped by signals; and what they leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import STUDENT, final_state, tiny_config

from dtm_triton.train import finetune as finetune_command
from dtm_triton.train import pretrain as pretrain_command
from dtm_triton.train import probe as probe_command
from dtm_triton.train.config import OptimizerConfig, to_json
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.finetune import finetune
from dtm_triton.train.pretrain import pretrain
from dtm_triton.train.probe import exported_features, probe
from dtm_triton.train.recipes import finetune_demo

ROOT = Path(__file__).parents[2]
SCRIPTS = ("pretrain", "finetune", "probe", "demo", "bench", "shard", "loader_bench", "plan")
TINY = {
    "recipe": "demo",
    "student.model-kwargs.embed-dim": 24,
    "student.model-kwargs.depth": 1,
    "teacher.features": 8,
    "teacher.epochs": 1,
    "run.epochs": 1,
    "run.threads": 1,
    "run.log-every": 1,
    "run.batch-size": 256,
    "run.device": "cpu",
}


def environment() -> dict[str, str]:
    """Without what would let a script find the package elsewhere than in its checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(tiny_config(folder), Processes())
    return folder


def test_pretraining_leaves_everything(pretrained: Path) -> None:
    wanted = {"config.json", "finished.json", "metrics.jsonl", "curves.png", "groups.png", "masks.png"}
    assert wanted <= {path.name for path in pretrained.iterdir()}
    assert json.loads((pretrained / "config.json").read_text()) == json.loads(to_json(tiny_config(pretrained)))
    for name in ("curves", "groups", "masks"):
        with Image.open(pretrained / f"{name}.png") as picture:
            assert picture.width > 300 and len(picture.convert("L").getcolors() or [0] * 99) > 3
    config = json.loads((pretrained / "student" / "config.json").read_text())
    model = timm.create_model(config["architecture"], **config["model_args"])
    model.load_state_dict(load_file(pretrained / "student" / "model.safetensors"), strict=True)
    assert model.forward_features(torch.rand(2, 1, 12, 12)).shape[-1] == 24


def test_a_finished_run_returns_at_once(pretrained: Path) -> None:
    config = tiny_config(pretrained)
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    assert pretrain(config, Processes()) == json.loads((pretrained / "finished.json").read_text())["results"]
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before
    with pytest.raises(FolderError, match="loss.beta"):
        pretrain(replace(config, loss=replace(config.loss, beta=1.0)), Processes())


def test_probe_reads_the_export(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny_config(pretrained).data
    metrics = probe(exported_features(pretrained / "student", data, Processes()), data, Processes())
    assert 0.1 < metrics["linear_probe"] <= 1 and 0.1 < metrics["knn"] <= 1
    probe_command.main(["--weights", str(pretrained / "student"), "--device", "cpu"])
    assert f"linear probe {100 * metrics['linear_probe']:.2f} %" in capsys.readouterr().out
    for words, named in ((["--data.image-size", "14", "12"], "data.image_size"), (["--data.mean", "0.5"], "data.mean")):
        with pytest.raises(SystemExit, match=rf"{named} must be .* as .*student' was trained, got"):
            probe_command.main(["--weights", str(pretrained / "student"), "--device", "cpu", *words])
    with pytest.raises(SystemExit, match="does not exist"):
        probe_command.main(["--weights", str(pretrained / "nowhere"), "--device", "cpu"])


def test_finetuning_takes_the_pretrained_student(pretrained: Path, tmp_path: Path) -> None:
    base = finetune_demo()
    config = replace(
        base,
        student=replace(STUDENT, weights=pretrained / "student"),
        optimizer=OptimizerConfig(lr=1e-9, final_lr=0.0, layer_decay=0.5, weight_decay=0.0),
        run=replace(base.run, folder=tmp_path / "kept", epochs=1, threads=1, log_every=1),
    )
    assert finetune(config, Processes()).keys() == {"accuracy"}
    state = final_state(tmp_path / "kept")
    exported = load_file(pretrained / "student" / "model.safetensors")
    for name in ("blocks.1.mlp.fc1.weight", "norm.weight"):
        torch.testing.assert_close(state[f"objective.network.backbone.{name}"], exported[name], rtol=0, atol=1e-6)
    assert (tmp_path / "kept" / "curves.png").is_file()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    words = ["--student.weights", str(tmp_path / "none"), "--run.folder", str(tmp_path / "out"), "--run.device", "cpu"]
    with pytest.raises(SystemExit, match="student.weights .* does not exist"):
        finetune_command.main(words)


def test_image_folder_with_workers(tmp_path: Path) -> None:
    """Pre-training on an own folder, decoded by worker processes, nothing held out."""
    for label, tone in (("a", 40), ("b", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (30, 20), (tone, number * 9, 90)).save(tmp_path / "images" / label / f"{number}.jpg")
    data = {"source": "folder", "train_folder": tmp_path / "images", "channels": 3, "workers": 1, "colour_jitter": 0.4}
    data.update(mean=(0.5,) * 3, std=(0.5,) * 3)
    config = tiny_config(tmp_path / "run", data=data, epochs=2, batch_size=8)
    assert pretrain(config, Processes()) == {}
    assert len(read_metrics(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def test_commands_have_help() -> None:
    for command in (pretrain_command, finetune_command, probe_command):
        with pytest.raises(SystemExit) as stopped:
            command.main(["--help"])
        assert stopped.value.code == 0


def test_scripts_run_from_a_bare_checkout(tmp_path: Path) -> None:
    """`python train/probe.py` imports the package from its own checkout, even where another one is installed."""
    shutil.copytree(ROOT / "dtm_triton", tmp_path / "dtm_triton", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "train").symlink_to("dtm_triton/train")
    with open(tmp_path / "dtm_triton" / "train" / "recipes" / "__init__.py", "a") as file:
        file.write('PROBE["of_this_checkout"] = probe_demo\n')
    words = [sys.executable, str(tmp_path / "train" / "probe.py"), "--help"]
    run = subprocess.run(words, cwd="/", env=environment(), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "of_this_checkout" in run.stdout
    start_of_script = re.compile(r"^if not __package__:.*\n    sys.path.*$", re.MULTILINE)
    starts = {start_of_script.findall((ROOT / "train" / f"{name}.py").read_text())[0] for name in SCRIPTS}
    assert len(starts) == 1  # what holds for one script holds for all


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    words = [*words, *(f"--{name}={value}" for name, value in TINY.items()), f"--run.folder={folder}"]
    return subprocess.Popen(
        words, cwd="/", env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    process = start([sys.executable, str(ROOT / "train" / "pretrain.py"), "--loss.shared-schedules"], folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "finished: knn" in output and "images/s" in output and "s left" in output
    return folder


def test_two_processes_equal_one(one_process: Path, tmp_path: Path) -> None:
    """torchrun with two processes on gloo, the same global batch in two micro-batches each: equal to rounding."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "train" / "pretrain.py"), "--loss.shared-schedules", "--run.accumulate", "2"]
    output, _ = start([*torchrun, *script, "--teacher.weights", str(one_process / "teacher")], tmp_path).communicate()
    two, one = read_metrics(tmp_path), read_metrics(one_process)
    assert len(two) == len(one) == 6, output
    for row, other in zip(two[:-1], one[:-1], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-4)
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (tmp_path, one_process)]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "finished.json").read_text())["results"]["knn"] == pytest.approx(
        one[-1]["knn"], abs=0.02
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_command_cleanly(tmp_path: Path, number: int, code: int) -> None:
    words = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--run.checkpoint-every", "10000"]
    process = start([*words, "--loss.num-schedules", "1"], tmp_path)
    deadline = time.monotonic() + 60
    while not read_metrics(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "saved; the same command goes on from here" in output and "Traceback" not in output
    assert list((tmp_path / "checkpoints").glob("step_*/state.json"))
