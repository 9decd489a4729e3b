"""One process or two, whole weights or shards, recomputed or compiled: one training."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_together
from tiny import (
    assert_same_bits,
    count_exchanges,
    diverge_in_one,
    final_state,
    finetune_tiny,
    tiny_config,
    tiny_trainer,
    train_tiny,
)
from torch import Tensor, nn

from dtm_triton.train.engine.checkpoint import load_plain, saved_steps
from dtm_triton.train.engine.compiled import BufferedDropPath, compile_blocks
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.parallel import blocks_of
from dtm_triton.train.models.student import MaskedStudent

DDP: dict[str, Any] = {"strategy": "ddp"}
FSDP: dict[str, Any] = {"strategy": "fsdp"}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=2e-3, atol=3e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train_tiny(Processes(), folder, None, {})
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_together(2, train_tiny, folder, None, FSDP)
    return folder


@pytest.mark.parametrize("changes", [DDP, {**DDP, "accumulate": 2}, {**FSDP, "accumulate": 2}], ids=str)
def test_two_processes_equal_one(one: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run_together(2, train_tiny, tmp_path, None, changes)
    assert_close(final_state(tmp_path), final_state(one))
    for row, other in zip(read_metrics(tmp_path), read_metrics(one), strict=True):
        for name in {"loss", "grad_norm"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-3 if name == "loss" else 2e-2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_a_step(tmp_path: Path, strategy: str) -> None:
    run_together(2, count_exchanges, tmp_path, strategy)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_processes_bad_loss_stops_both(tmp_path: Path, strategy: str) -> None:
    run_together(2, diverge_in_one, tmp_path, strategy)


def test_shards_equal_whole_weights(one: Path, sharded: Path) -> None:
    assert_close(final_state(sharded), final_state(one))
    newest = saved_steps(sharded / "checkpoints")[0]
    files = list(newest.glob("*.safetensors"))
    assert len(files) == 2, "both processes write"
    sizes = sorted(file.stat().st_size for file in files)
    assert sizes[0] > 0.6 * sizes[1], sizes
    whole = torch.load(sharded / "whole.pt", weights_only=True)
    state = final_state(sharded)
    for name, value in whole.items():
        assert torch.equal(value, state[f"objective.network.{name}"]), name


@pytest.mark.parametrize("step", [5, 11])
def test_shards_resume_with_the_same_bits(sharded: Path, tmp_path: Path, step: int) -> None:
    run_together(2, train_tiny, tmp_path, step, FSDP)
    assert load_plain(saved_steps(tmp_path / "checkpoints")[0])["step"] == step + 2  # agreed upon one step later
    run_together(2, train_tiny, tmp_path, None, FSDP)
    assert_same_bits(final_state(tmp_path), final_state(sharded))


@pytest.mark.parametrize(
    ("before", "after"), [((2, FSDP), (1, DDP)), ((1, DDP), (2, FSDP)), ((2, DDP), (2, FSDP))], ids=str
)
def test_checkpoints_fit_other_processes_and_strategies(
    one: Path, tmp_path: Path, before: tuple[int, dict[str, Any]], after: tuple[int, dict[str, Any]]
) -> None:
    for (count, changes), stop in ((before, 7), (after, None)):
        if count == 1:
            train_tiny(Processes(), tmp_path, stop, changes)
        else:
            run_together(count, train_tiny, tmp_path, stop, changes)
    assert_close(final_state(tmp_path), final_state(one))
    steps = [row["step"] for row in read_metrics(tmp_path) if "loss" in row]
    assert steps == list(range(1, 23)), "nothing was trained twice"


def test_finetuning_over_shards_equals_one_process(tmp_path: Path) -> None:
    finetune_tiny(Processes(), tmp_path / "one", "ddp")
    run_together(2, finetune_tiny, tmp_path / "two", "fsdp")
    assert_close(final_state(tmp_path / "two"), final_state(tmp_path / "one"))
    accuracy = [read_metrics(tmp_path / name)[-1]["accuracy"] for name in ("one", "two")]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.02)


def test_recomputed_activations_change_no_bit(one: Path, tmp_path: Path) -> None:
    train_tiny(Processes(), tmp_path, None, {"activation_checkpointing": True})
    assert_same_bits(final_state(tmp_path), final_state(one))


def test_compiled_blocks_equal_plain_ones(one: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path, compile=True, epochs=1))
    assert all(block._compiled_call_impl is not None for block in blocks_of(trainer.objective))
    trainer.fit()
    plain, compiled = read_metrics(one), read_metrics(tmp_path)
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-4)
    assert "objective.network.backbone.blocks.0.attn.qkv.weight" in final_state(tmp_path)


def test_growing_drop_path_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    arguments = {"embed_dim": 24, "depth": 10, "num_heads": 3}
    student = MaskedStudent(
        "vit_tiny_patch16_224", out_features=8, image_size=8, patch_size=2, drop_path=0.5, model_kwargs=arguments
    )
    names = list(student.state_dict())
    compile_blocks(blocks_of(student))
    torch._dynamo.utils.counters.clear()
    student.train()(torch.rand(4, 3, 8, 8)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert list(student.state_dict()) == names


def test_buffered_drop_path_drops_whole_samples() -> None:
    drop, x = BufferedDropPath(0.25), torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    share = drop(x)
    assert torch.equal(share, share[:, :1, :1].expand_as(share)) and share.unique().tolist() == pytest.approx(
        [0, 4 / 3]
    )
    assert share.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x
