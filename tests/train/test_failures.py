"""What goes wrong for people: every failure ends the real command in one line that names the thing, or in what is said
here to happen instead. Nothing begins anew in silence."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from dtm_triton.train import pretrain
from dtm_triton.train.engine import loop
from dtm_triton.train.engine.checkpoint import load_plain, saved_steps
from dtm_triton.train.engine.logbook import read_metrics

STUDENT = ["--student.model-kwargs.depth=1", "--loss.max-iterations=2"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the training."""
    monkeypatch.setattr(pretrain, "draw_run", lambda *_: None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(24):
        place = folder / ("cats", "dogs")[number % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(place / f"{number}.jpg")
    return folder


def words(folder: Path, photos: Path, *more: str) -> list[str]:
    """`dtm-pretrain` on 24 photos: 3 steps an epoch, 6 in all, a checkpoint at each."""
    run = dict(folder=folder, epochs=2, batch_size=8, checkpoint_every=1, log_every=1, threads=1)
    options = [f"--run.{name.replace('_', '-')}={value}" for name, value in run.items()]
    options += [f"--data.train-folder={photos}", "--data.image-size", "32", "32", "--data.workers=0"]
    options += ["--student.patch-size=8", "--mask.masked=6", "--teacher.kind=pixels"]
    return ["--recipe=own_images", *options, *STUDENT, *more]


@pytest.fixture(scope="module")
def stopped(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after 4 of 6 steps, at a place of its own; tests take copies."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(4, words(folder, photos))
    return folder


def stop_after(steps: int, argv: Sequence[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        step = loop.Trainer._train_step

        def counted(self: loop.Trainer, incoming: Any) -> None:
            step(self, incoming)
            if self.step == steps:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(loop.Trainer, "_train_step", counted)
        with pytest.raises(SystemExit) as ended:
            pretrain.main(argv)
    assert ended.value.code == 143


def refused(argv: Sequence[str]) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        pretrain.main(argv)
    text = ended.value.code
    assert isinstance(text, str) and text.startswith("dtm-pretrain: ") and "\n" not in text.strip(), text
    return text


def went_on(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The step that a run which finishes went on from, and what was printed."""
    pretrain.main(argv)
    text = capsys.readouterr().out
    found = re.search(r"goes on from step (\d+) of 6", text)
    assert found, text
    return int(found[1]), text


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def cut(path: Path) -> None:
    file = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def lose_a_file(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def foreign(path: Path) -> None:
    (path / "state.json").write_text('{"step": 9, "model": "somebody else\'s"}')


DAMAGES = [cut, empty, flip_a_bit, lose_a_file, foreign]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    damage: Callable[[Path], None], copy: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, before = saved_steps(copy / "checkpoints")
    wanted = load_plain(before)["step"]
    damage(newest)
    step, text = went_on(words(copy, photos), capsys)
    assert step == wanted and newest.name in text and "trying the checkpoint before it" in text
    assert [row["step"] for row in read_metrics(copy)] == list(range(1, 7))


def test_no_usable_checkpoint_is_no_new_beginning(copy: Path, photos: Path) -> None:
    for path, damage in zip(saved_steps(copy / "checkpoints"), (cut, empty), strict=True):
        damage(path)
    metrics = (copy / "metrics.jsonl").read_bytes()
    text = refused(words(copy, photos))
    assert "none of ['step_" in text and "remove them to start over" in text and str(copy) in text
    assert (copy / "metrics.jsonl").read_bytes() == metrics


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("/tmp/dtm_unpickled").write_text, ("this was code",)


def test_a_pickle_is_never_unpickled(copy: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, _ = saved_steps(copy / "checkpoints")
    for file in newest.iterdir():
        file.write_bytes(pickle.dumps(Bomb()))
    (copy / "checkpoints" / "step_000000099.pt").write_bytes(pickle.dumps(Bomb()))
    went_on(words(copy, photos), capsys)
    weights = copy / "teacher.pth"
    weights.write_bytes(pickle.dumps(Bomb()))
    text = refused(words(copy / "other", photos, *with_teacher(weights)))
    assert "teacher" in text and str(weights) in text
    assert not Path("/tmp/dtm_unpickled").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--run.seed=7", "run.seed: 0 -> 7"),
        ("--optimizer.lr=0.5", "optimizer.lr: 0.0005 -> 0.5"),
        ("--run.epochs=3", "run.epochs: 2 -> 3"),
        ("--mask.masked=5", "mask.masked: 6 -> 5"),
    ],
)
def test_a_changed_configuration_is_refused(change: str, named: str, copy: Path, photos: Path) -> None:
    text = refused(words(copy, photos, change))
    assert named in text and "give another folder" in text


@pytest.mark.parametrize("free", ["--run.checkpoint-every=2", "--run.timeout-minutes=3", "--data.workers=1"])
def test_what_touches_no_result_may_change(
    free: str, copy: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, text = went_on(words(copy, photos, free), capsys)
    assert step == 4 and "not to the same bits" not in text


def test_a_dataset_that_shrank_is_refused(copy: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "cats" / "4.jpg").unlink()
    config = json.loads((copy / "config.json").read_text())  # the folder's place is part of it: shrink in that place
    assert config["data"]["train_folder"] == str(photos)
    (photos / "cats" / "4.jpg").rename(tmp_path / "4.jpg")
    try:
        text = refused(words(copy, photos))
    finally:
        (tmp_path / "4.jpg").rename(photos / "cats" / "4.jpg")
    assert "data must be the 24 files" in text and "got 23 files" in text


def test_an_empty_class_folder_is_named(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "birds").mkdir()
    assert f"{str(tmp_path / 'photos' / 'birds')!r} holds no images" in refused(words(tmp_path, tmp_path / "photos"))


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{str(tmp_path / 'none')!r} does not exist" in refused(words(tmp_path / "run", tmp_path / "none"))


def test_corrupt_images_are_named_and_too_many_end_the_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "photos"
    shutil.copytree(photos, mine)
    (mine / "dogs" / "5.jpg").write_bytes((mine / "dogs" / "5.jpg").read_bytes()[:200])
    (mine / "dogs" / "7.jpg").write_bytes(b"not an image")
    pretrain.main(words(tmp_path / "run", mine))
    text = capsys.readouterr().out
    assert "dogs/5.jpg" in text and "dogs/7.jpg" in text and "replaced" in text
    assert read_metrics(tmp_path / "run")[-1]["skipped_images"] == 2
    for number in range(1, 24, 2):
        (mine / "dogs" / f"{number}.jpg").write_bytes(b"")
    text = refused(words(tmp_path / "other", mine))
    assert "of 24 images cannot be read, more than the 10 that data.max_corrupt allows" in text and "dogs/" in text


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of two small teachers, and of one of another width."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, width in (("one", 24), ("two", 24), ("wide", 48)):
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=width, depth=1, num_heads=3)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder


def with_teacher(weights: Path) -> list[str]:
    arguments = ("--teacher.model-kwargs", "img_size", "64", "embed_dim", "24", "depth", "1", "num_heads", "3")
    return ["--teacher.kind=timm", "--teacher.model=vit_tiny_patch16_224", f"--teacher.weights={weights}", *arguments]


def test_teacher_weights(photos: Path, teachers: Path, tmp_path: Path) -> None:
    """Missing, cut off, of another model, and other ones than the run began with."""
    weights = tmp_path / "weights.safetensors"
    argv = words(tmp_path / "run", photos, *with_teacher(weights))
    text = refused(argv)
    assert "teacher" in text and str(weights) in text
    content = (teachers / "one.safetensors").read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert str(weights) in refused(argv)
    shutil.copy(teachers / "wide.safetensors", weights)
    assert str(weights) in refused(argv)
    shutil.copy(teachers / "one.safetensors", weights)
    stop_after(2, argv)
    shutil.copy(teachers / "two.safetensors", weights)
    assert "teacher.weights must be the" in refused(argv)


def test_places_that_cannot_be_written(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "run", Path("/proc/run"), Path("/proc/self/run")):
        assert str(folder) in refused(words(folder, photos)), folder
