"""dtm-train-bench from end to end, on a tiny recipe on the CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dtm_triton.dtm import DTMLoss
from dtm_triton.measure import ceilings
from dtm_triton.measure.released import FILES, ReleasedLoss
from dtm_triton.measure.train_record import PARTS, TrainRecord, read_train
from dtm_triton.train import bench, recipes
from dtm_triton.train.benchmark import repetitions
from dtm_triton.train.config import PretrainConfig, StudentConfig, TeacherConfig
from dtm_triton.train.data.batches import MicroBatches
from dtm_triton.train.engine import loop
from dtm_triton.train.models.student import MaskedStudent
from dtm_triton.train.models.teacher import Teacher
from dtm_triton.train.planning.sizes import count

STAND_IN = "from dtm_triton.tome import bipartite_soft_matching, merge_source, merge_wavg"
WIDTH, DEPTH, HEADS, SIDE = 24, 2, 3, 4


def tiny() -> PretrainConfig:
    """A student of two blocks on 4 x 4 patches, timm's smallest ViT as the teacher."""
    base = recipes.dtm_vit_small_patch16_in1k()
    return replace(
        base,
        data=replace(base.data, image_size=(16 * SIDE, 16 * SIDE)),
        student=StudentConfig(
            model="vit_tiny_patch16_224",
            patch_size=16,
            model_kwargs={"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS},
        ),
        teacher=TeacherConfig(kind="timm", model="test_vit", project=True),
        mask=replace(base.mask, masked=5, min_patches=2),
        run=replace(base.run, threads=1),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.PRETRAIN, "tiny", tiny)
    monkeypatch.setattr(bench, "CEILING_SECONDS", 0.0)
    monkeypatch.setattr(repetitions, "WARM_UP", 1)
    monkeypatch.setattr(ceilings, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "PRODUCT_SIZE", {"cpu": 64})


def run(folder: Path, *words: str) -> TrainRecord:
    bench.main(
        ["--device", "cpu", "--recipe", "tiny", "--batch", "4", "--repetitions", "2", "--out", str(folder), *words]
    )
    (record,) = read_train(folder)
    return record


def test_it_measures_traces_writes_and_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "traces" / "steps.json"
    record = run(tmp_path, "--steps", "3", "--trace", str(trace))
    assert [side.name for side in record.sides] == ["dtm", "token-wise"]
    assert (record.batch, record.steps, record.precision, record.processes) == (4, 3, "float32", 1)
    for side in record.sides:
        for place, step in enumerate(side.step_ms):
            parts = {part: values[place] for part, values in side.parts_ms.items()}
            assert min(parts.values()) > 0 and parts.keys() == set(PARTS)
            assert 0.9 * step < sum(parts.values()) <= step, "nothing is left out, nothing counted twice"
    printed = capsys.readouterr().out
    assert "2/2 token-wise" in printed and "part of a step" in printed and "random weights for student" in printed
    events = json.loads(trace.read_text())["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in PARTS]
    assert {event["name"] for event in named} == set(PARTS)
    named.sort(key=lambda event: event["ts"])
    for event, following in pairwise(named):
        assert event["ts"] + event["dur"] <= following["ts"] + 1, "ranges follow each other"


def test_memory_is_what_is_held_and_the_most_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def thousand(function: Callable[[], object], _: torch.device) -> int:
        function()
        return 1000

    monkeypatch.setattr(repetitions, "peak_bytes", thousand)
    record = run(tmp_path, "--steps", "1")
    size = count(tiny())
    held = 4 * (3 * size.student_parameters + size.teacher_parameters)  # weights and two moments; the teacher's weights
    for side in record.sides:
        assert held + 1000 <= side.peak_bytes < 1.02 * held + 1000, "constants of normalisation are small"


def test_operations_are_those_counted_by_hand(tmp_path: Path) -> None:
    """Every product costs 2 n m k forward, and twice that backward; images need no gradient."""

    def forward(width: int, depth: int, mlp: int, classes: int) -> tuple[int, int]:
        patches, tokens = SIDE**2, SIDE**2 + 1
        linear = tokens * width * (3 * width + width + 2 * mlp)
        attention = 2 * tokens * tokens * width
        return 2 * patches * 3 * 16 * 16 * width, 2 * depth * (linear + attention) + 2 * patches * width * classes

    record = run(tmp_path, "--steps", "1")
    embedding, rest = forward(WIDTH, DEPTH, 4 * WIDTH, 1000)
    assert record.student_flops == 2 * embedding + 3 * rest
    assert record.teacher_flops == sum(forward(64, 6, 3 * 64, 1000))


class Slow(torch.autograd.Function):
    """The identity, with a backward that takes its time."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        context.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        time.sleep(context.seconds)
        return grad, None


def slowed(function: Callable[..., Any], seconds: float, backward: float = 0.0) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        result = function(*arguments, **options)
        return Slow.apply(result, backward) if backward else result

    return wrapped


def test_every_part_gets_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is slowed by a time of its own, forward and backward apart."""
    monkeypatch.setattr(MicroBatches, "__getitem__", slowed(MicroBatches.__getitem__, 0.08))
    monkeypatch.setattr(Teacher, "forward", slowed(Teacher.forward, 0.16))
    monkeypatch.setattr(MaskedStudent, "forward", slowed(MaskedStudent.forward, 0.1, 0.14))
    monkeypatch.setattr(DTMLoss, "match", slowed(DTMLoss.match, 0.12))
    monkeypatch.setattr(DTMLoss, "forward", slowed(DTMLoss.forward, 0.1, 0.1))
    monkeypatch.setattr(loop, "clip_gradient", slowed(loop.clip_gradient, 0.4))
    record = run(tmp_path, "--steps", "1")
    wanted = {"loader": 80, "teacher": 160, "student": 240, "objective": 320, "optimiser": 400, "rest": 0}
    for part, least in wanted.items():
        assert least <= min(record.sides[0].parts_ms[part]) <= least + 80, part
    assert min(record.sides[1].parts_ms["objective"]) < 80, "token-wise targets are not matched"


def test_released_operations_take_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILES["dtm"]).parent.mkdir()
    (tmp_path / FILES["dtm"]).write_text(STAND_IN)
    monkeypatch.setattr(ReleasedLoss, "match", slowed(ReleasedLoss.match, 0.1))
    record = run(tmp_path, "--steps", "1", "--dtm", str(tmp_path))
    assert [side.name for side in record.sides] == ["dtm", "token-wise", "released"]
    assert all(len(side.step_ms) == 2 for side in record.sides)
    slow = [min(side.parts_ms["objective"]) >= 100 for side in record.sides]
    assert slow == [False, False, True], "its own operations, and in no other's turn"


def test_mistakes_end_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--recipe must be one of .*dtm_vit_base_patch16_in1k.*; got 'banana'"):
        bench.main(["--device", "cpu", "--recipe", "banana"])
    with pytest.raises(SystemExit, match="must predict a teacher's tokens, 'byol_vit_base' is for byol"):
        bench.main(["--device", "cpu", "--recipe", "byol_vit_base"])
    with pytest.raises(SystemExit, match=r"bm/merge\.py: not found; --dtm takes a checkout's root"):
        bench.main(["--device", "cpu", "--recipe", "tiny", "--dtm", str(tmp_path)])
    (tmp_path / FILES["dtm"]).parent.mkdir()
    (tmp_path / FILES["dtm"]).write_text(STAND_IN)
    monkeypatch.setitem(recipes.PRETRAIN, "tiny", lambda: replace(tiny(), loss=replace(tiny().loss, kind="cosine")))
    with pytest.raises(SystemExit, match="--dtm does not fit 'tiny': ours must be smooth_l1"):
        run(tmp_path, "--dtm", str(tmp_path))
