"""Losses that are not finite and losses that jump, seen without waiting for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_trainer

from dtm_triton.train.engine.checkpoint import FolderError, saved_steps
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.skipped import SkippedImages
from dtm_triton.train.engine.watch import DECAY, SETTLED, SPIKE, Watch

CPU = torch.device("cpu")
FINE = torch.tensor(1.0)


def settled(level: float = 1.0) -> Watch:
    watch = Watch(CPU)
    for step in range(SETTLED):
        watch.look(step, torch.tensor(level), FINE)
    return watch


def test_the_mean_follows_the_loss() -> None:
    watch, losses = Watch(CPU), torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.5
    mean = 0.0
    for step, loss in enumerate(losses):
        watch.look(step, loss, FINE)
        mean += max(1 / (step + 1), 1 - DECAY) * (loss.item() - mean)
    assert watch.usual[0].item() == pytest.approx(mean, rel=1e-6) and watch.spike() is None


def test_only_the_first_spike_is_told_and_once() -> None:
    watch = settled(2.0)
    watch.look(70, torch.tensor(SPIKE * 2.0 * 0.999), FINE)
    assert watch.spike() is None
    watch.look(71, torch.tensor(9.0), FINE)
    watch.look(72, torch.tensor(90.0), FINE)
    step, loss, usual = watch.spike() or (0, 0, 0)
    assert (step, loss) == (71, 9.0) and 2.0 < usual < 2.2
    assert watch.spike() is None
    watch.look(73, torch.tensor(90.0), FINE)
    assert (watch.spike() or (0,))[0] == 73


def test_a_spike_hardly_moves_what_is_usual() -> None:
    watch = settled()
    watch.look(60, torch.tensor(1e6), FINE)
    assert watch.usual[0].item() == pytest.approx(1 + (1 - DECAY) * (SPIKE - 1))


def test_young_runs_have_no_spikes() -> None:
    watch = Watch(CPU)
    for step in range(SETTLED):
        watch.look(step, torch.tensor(100.0 if step % 7 == 6 else 1.0), FINE)
    assert watch.spike() is None


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_after_a_step_that_is_not_finite_everything_is_broken(norm: float) -> None:
    watch = settled()
    assert watch.bad_step() == -1
    before = watch.usual.clone()
    assert watch.look(80, torch.tensor(float("nan")), torch.tensor(norm)) == 1
    assert watch.look(81, torch.tensor(1e9), FINE) == 1
    assert watch.bad_step() == 80 and torch.equal(watch.usual, before) and watch.spike() is None


def test_the_loop_tells_a_spike_and_keeps_the_checkpoint_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path, epochs=6, checkpoint_every=10, log_every=4))
    forward = trainer.objective.forward

    def jump(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = forward(batch)
        return {"loss": results["loss"] * (50 if trainer.step == 57 else 1)}

    trainer.objective.forward = jump  # type: ignore[method-assign]
    trainer.fit()
    output = capsys.readouterr().out
    assert "at step 57 where" in output and "step_000000050 before it is kept" in output
    assert "at step 57" in (tmp_path / "checkpoints" / "step_000000050" / "before_spike").read_text()
    assert [path.name for path in saved_steps(tmp_path / "checkpoints")] == [
        "step_000000066",
        "step_000000060",
        "step_000000050",
    ]
    assert read_metrics(tmp_path)[-1]["step"] == 66


def test_too_many_unreadable_images_stop() -> None:
    skipped = SkippedImages(lambda number: f"image {number}", total=1500, share=0.01)
    assert skipped.limit == 15
    skipped.note(torch.tensor([3, -1, 3, 4]))
    assert skipped.fresh == {3, 4}
    assert skipped.tell(skipped.fresh) == "2 images cannot be read and were replaced: image 3, image 4"
    skipped.note(torch.tensor([3, 4]))
    assert skipped.fresh == set() and skipped.tell([]) is None
    assert skipped.tell([5]) == "1 image cannot be read and was replaced: image 5"
    with pytest.raises(FolderError, match=r"16 of 1500 images cannot be read, more than the 15 .*image 6, .*, \.\.\."):
        skipped.tell(range(6, 19))
