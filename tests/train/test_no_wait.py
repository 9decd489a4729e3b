"""A step reads nothing from the device: every objective's step runs on tensors that hold no values."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from shrunk import METHODS, shrink, shrunk_trainer, write_images

from dtm_triton.train import recipes


@pytest.mark.parametrize("method", METHODS)
def test_an_objective_never_makes_the_host_wait(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device "meta", where .item(), bool() and shapes that hang on values raise."""
    trainer = shrunk_trainer(shrink(recipes.PRETRAIN[METHODS[method]](), write_images(tmp_path / "images"), tmp_path))
    batch = {name: value.to("meta") for name, value in trainer.batches[0].items() if name != "skipped"}
    objective = trainer.objective.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no such device
    loss = objective(batch)["loss"]
    loss.backward()
    objective.after_step(0.5)
    assert loss.is_meta and all(p.grad is not None for p in objective.network.parameters() if p.requires_grad)
