"""Training on a GPU: no step waits for it, a stopped run ends with the same bits, options do not change the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from on_gpu import DEVICE, needs_gpu
from shrunk import FULL_SCALE, shrink, shrunk_trainer, write_images
from tiny import assert_same_bits, final_state, stop_at

from dtm_triton.train import recipes
from dtm_triton.train.data.batches import training_loader
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.stop import Stopped

pytestmark = needs_gpu

EACH = [name for name in FULL_SCALE if not name.endswith(("_released", "_paper"))]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", EACH)
def test_no_step_waits(name: str, images: Path, tmp_path: Path) -> None:
    config = shrink(recipes.PRETRAIN[name](), images, tmp_path, epochs=3)
    trainer = shrunk_trainer(config, Processes(device=DEVICE))
    with training_loader(trainer.batches, 0, trainer.total, workers=0, pin=True) as loader:
        for _ in range(3):  # kernels are compiled, memory and moments are allocated
            trainer._train_step(loader)
        with no_waiting():
            trainer._train_step(loader)


def test_a_stopped_run_ends_with_the_same_bits(images: Path, tmp_path: Path) -> None:
    for folder, stop in (("whole", None), ("parts", 1), ("parts", None)):
        config = shrink(recipes.PRETRAIN["data2vec_vit_base"](), images, tmp_path / folder, deterministic=True)
        trainer = shrunk_trainer(config, Processes(device=DEVICE))
        if stop is None:
            trainer.fit()
            continue
        stop_at(trainer, stop)
        with pytest.raises(Stopped):
            trainer.fit()
    assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


@pytest.mark.parametrize("options", [{"compile": True}, {"activation_checkpointing": True}], ids=str)
def test_options_change_rounding_only(images: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    losses = []
    for folder, changes in (("plain", {}), ("changed", options)):
        config = shrink(recipes.PRETRAIN["mae_clip_vit_base"](), images, tmp_path / folder, log_every=1, **changes)
        shrunk_trainer(config, Processes(device=DEVICE)).fit()
        losses.append([row["loss"] for row in read_metrics(tmp_path / folder) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
