"""Patches that leave a backbone: as if nobody had ever looked at them, whatever the family, however it is run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import PATCHES, SIZE, disturbed, every_family, family_arguments, looked_at, parts
from processes import run_together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtm_triton.partition import Partition
from dtm_triton.train.engine.compiled import compile_blocks
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.parallel import blocks_of
from dtm_triton.train.models.autoencoder import MaskedAutoencoder
from dtm_triton.train.models.average import frozen_copy
from dtm_triton.train.models.keeping import take
from dtm_triton.train.models.student import MaskedPatchEmbed, MaskedStudent

DECODER = {"width": 16, "depth": 1, "heads": 2}
# of each way that positions reach the blocks
WAYS = ("vit-registers", "beit", "beit-shared", "beit-both", "dinov3", "eva-mixed")
every_way = pytest.mark.parametrize("family", WAYS)


def student(family: str, **changes: Any) -> MaskedStudent:
    name, kwargs = family_arguments(family)
    torch.manual_seed(0)
    return disturbed(MaskedStudent(name, out_features=5, model_kwargs=kwargs, **{**SIZE, **changes}))


def autoencoder(family: str) -> MaskedAutoencoder:
    name, kwargs = family_arguments(family)
    torch.manual_seed(0)
    return disturbed(MaskedAutoencoder(name, out_features=5, model_kwargs=kwargs, **SIZE, **DECODER))


def images(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, 12, 8, generator=torch.Generator().manual_seed(2))


def plain(network: Any) -> Any:
    """The same weights in timm's own model."""
    model = timm.create_model(network.model_name, **network.create_kwargs).eval()
    model.load_state_dict(network.backbone_state_dict(), strict=True)
    return model


@every_family
def test_thrown_patches_are_as_if_nobody_attended_to_them(family: str) -> None:
    network, partition = student(family).eval(), parts(3, masked=7, thrown=9)
    unmodified = plain(network)
    unmodified.patch_embed = MaskedPatchEmbed(unmodified.patch_embed, 24)
    unmodified.patch_embed.mask_token = network.backbone.patch_embed.mask_token
    seen = torch.ones(3, PATCHES, dtype=torch.bool).scatter(1, partition.thrown, False)
    whole = looked_at(unmodified, (images(), partition.mask), seen)
    tokens = network.tokens(images(), partition)
    assert tokens.shape == (3, 15, 24)
    torch.testing.assert_close(tokens, take(whole, partition.kept), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(images(), partition), network.head(tokens), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(
        tokens, take(looked_at(unmodified, (images(), partition.mask), seen | True), partition.kept)
    )


@every_family
def test_an_autoencoder_sees_visible_patches_only(family: str) -> None:
    network, partition = autoencoder(family).eval(), parts(3, masked=7, thrown=9)
    seen = torch.zeros(3, PATCHES, dtype=torch.bool).scatter(1, partition.visible, True)
    whole = looked_at(plain(network), images(), seen)
    tokens = network.tokens(images(), partition)
    torch.testing.assert_close(tokens, take(whole, partition.visible), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.tokens(images()), plain(network).forward_features(images())[:, -PATCHES:])


@every_family
def test_what_is_thrown_does_not_matter_and_what_is_seen_does(family: str) -> None:
    x, partition = images(), parts(3, masked=7, thrown=9)
    for network in (student(family).eval(), autoencoder(family).eval()):
        outputs = network(x, partition)
        assert outputs.shape == (3, 15, 5)
        for part, matters in ((partition.thrown, False), (partition.masked, False), (partition.visible[:, 2:3], True)):
            chosen = torch.zeros(3, PATCHES, dtype=torch.bool).scatter(1, part, True)
            pixels = chosen.view(3, 1, 6, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
            changed = network(torch.where(pixels, 1 - x, x), partition)
            assert torch.equal(changed, outputs) is not matters
            assert not matters or (changed - outputs).abs().amax(-1).min() > 0


@every_family
def test_every_parameter_takes_part(family: str) -> None:
    for network in (student(family), autoencoder(family)):
        network(images(), parts(3, masked=7, thrown=9)).square().mean().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_family
@torch.no_grad()  # attention rounds differently where its bias has a gradient
def test_names_are_those_of_timm_and_a_copy_is_whole(family: str) -> None:
    for network in (student(family), autoencoder(family)):
        network.eval()
        unmodified = timm.create_model(network.model_name, **network.create_kwargs)
        assert network.backbone_state_dict().keys() == unmodified.state_dict().keys()
        partition = parts(3, masked=7, thrown=9)
        twin, average = copy.deepcopy(network), frozen_copy(network)
        expected = network.tokens(images(), partition)
        for copied in (twin, average):
            assert torch.equal(copied.tokens(images(), partition), expected)
            assert copied.tokens(images()).shape == (3, PATCHES, 24)
        assert network.tokens(images()).shape == (3, PATCHES, 24), "nothing stays behind"
        del network, twin
        assert torch.equal(average.tokens(images(), partition), expected)


def gradients(network: Any, partition: Partition) -> dict[str, Tensor]:
    network.zero_grad()
    network(images(), partition).square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-5, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@every_way
@pytest.mark.parametrize("kind", [student, autoencoder])
def test_recomputed_blocks_know_who_was_kept(family: str, kind: Any) -> None:
    network, partition = kind(family), parts(3, masked=7, thrown=9)
    expected = gradients(network, partition)
    network.set_grad_checkpointing(True)
    assert_close(gradients(network, partition), expected)
    # two forwards before a backward, as in an accumulated step that shares a graph
    network.zero_grad()
    losses = [network(images(), each).square().mean() for each in (partition, parts(3, 7, 9, seed=5))]
    losses[0].backward()
    assert_close({name: p.grad for name, p in network.named_parameters()}, expected)


@every_way
def test_compiled_blocks_know_who_was_kept(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiling = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiling(self, backend="aot_eager", fullgraph=True))
    for network in (student(family), autoencoder(family)):
        partition = parts(3, masked=7, thrown=9)
        expected, whole = gradients(network, partition), network.features(images())
        compile_blocks(blocks_of(network))
        for checkpointing in (False, True):
            network.set_grad_checkpointing(checkpointing)
            assert_close(gradients(network, partition), expected)
            torch.testing.assert_close(network.features(images()), whole, atol=1e-5, rtol=1e-4)


def test_a_failed_forward_leaves_nothing_behind() -> None:
    network = student("beit")
    with pytest.raises(RuntimeError):
        network(images()[..., :8].double(), parts(3, masked=7, thrown=9))
    assert network.tokens(images()).shape == (3, PATCHES, 24)


@every_way
def test_autocast_keeps_and_leaves_the_same(family: str) -> None:
    for network in (student(family), autoencoder(family)):
        partition = parts(3, masked=7, thrown=9)
        expected = network(images(), partition)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(images(), partition)
        assert outputs.dtype == torch.bfloat16
        assert (outputs - expected).abs().mean() < 0.05 * expected.abs().mean()
        outputs.float().square().mean().backward()


def train_in_two(processes: Processes, folder: Path) -> None:
    """Each process has half of the batch; gradients, averaged, are those of one process that has all of it."""
    mesh = init_device_mesh("cpu", (processes.count,))
    rows = slice(processes.rank, None, processes.count)
    partition = parts(4, masked=7, thrown=9)
    mine = Partition(*(part[rows] for part in partition))
    for family in WAYS:
        for kind in (student, autoencoder):
            expected = gradients_of(kind(family), images(4), partition)
            whole = nn.parallel.DistributedDataParallel(kind(family))
            assert_close(gradients_of(whole, images(4)[rows], mine, "module."), expected)
            shards = kind(family)
            shards.set_grad_checkpointing(True)
            for part in (*blocks_of(shards), shards):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
            assert_close(gradients_of(shards, images(4)[rows], mine), expected)


def gradients_of(network: Any, x: Tensor, partition: Partition, front: str = "") -> dict[str, Tensor]:
    for _ in range(2):  # DDP finds a parameter without a gradient in the second step
        network.zero_grad()
        network(x, partition).square().mean().backward()
    found = {name.removeprefix(front): p.grad for name, p in network.named_parameters()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}


def test_processes_and_shards_keep_the_same(tmp_path: Path) -> None:
    run_together(2, train_in_two, tmp_path)


@pytest.mark.parametrize(
    ("partition", "error", "message"),
    [
        (torch.zeros(3, 24, dtype=torch.bool), TypeError, "partition must be a Partition, got Tensor"),
        (
            parts(2, 7, 9),
            ValueError,
            r"partition must be of 3 images and 24 patches, got \[\[2, 7\], \[2, 9\], \[2, 8\]\]",
        ),
        (parts(3, 7, 9)._replace(thrown=torch.zeros(3, 8).long()), ValueError, r"24 patches, got \[\[3, 7\], \[3, 8\]"),
    ],
)
def test_bad_partitions(partition: Any, error: type[Exception], message: str) -> None:
    for network in (student("vit"), autoencoder("vit")):
        with pytest.raises(error, match=message):
            network(images(), partition)
        with pytest.raises(error, match=message):
            network.tokens(images(), partition)


def test_an_autoencoder_must_see_something() -> None:
    with pytest.raises(ValueError, match="partition must leave patches to see, got none of 24"):
        autoencoder("vit")(images(), parts(3, masked=15, thrown=9))


def test_other_models_see_all_patches() -> None:
    name, settings = (
        "vit_srelpos_small_patch16_224",
        {**SIZE, "model_kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 3}},
    )
    network = MaskedStudent(name, out_features=5, **settings)
    assert network(images(), parts(3, masked=7, thrown=0)).shape == (3, PATCHES, 5)
    with pytest.raises(ValueError, match=r"model must be a VisionTransformer, Eva or Beit .* 'vit_srelpos_small"):
        network(images(), parts(3, masked=7, thrown=9))
    with pytest.raises(ValueError, match=r"model must be able to leave patches .* 'vit_srelpos_small"):
        MaskedAutoencoder(name, out_features=5, **settings, **DECODER)
