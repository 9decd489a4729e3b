"""MaskedStudent over the timm families: masking, tokens, initialisation, names, compilation, bad input."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import pytest
import timm
import torch
from families import SIZE, every_family, family_arguments, parts
from torch import nn

from dtm_triton.groups import TokenGroups, morph_tokens
from dtm_triton.partition import Partition
from dtm_triton.train.models.student import CodeStudent, MaskedStudent, ProjectedStudent


def build(family: str = "vit", kind: type[MaskedStudent] = MaskedStudent, **options) -> Any:
    name, kwargs = family_arguments(family)
    torch.manual_seed(0)
    settings = {"out_features": 5, **SIZE, **options}
    return kind(name, model_kwargs={**kwargs, **settings.pop("model_kwargs", {})}, **settings)


def images(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 12, 8, generator=torch.Generator().manual_seed(1))


def half_masked(batch: int = 2, thrown: int = 0) -> Partition:
    return parts(batch, masked=12, thrown=thrown)


@every_family
def test_tokens_are_those_of_the_plain_model(family):
    student = build(family).eval()
    plain = timm.create_model(student.model_name, **student.create_kwargs).eval()
    plain.load_state_dict(student.backbone_state_dict(), strict=True)
    expected = plain.forward_features(images())[:, -24:]
    assert student.grid == (6, 4) and student.num_blocks == 3
    assert torch.equal(student.tokens(images()), expected)
    assert torch.equal(student(images()), student.head(expected))
    assert torch.allclose(student.features(images()), expected.mean(1))
    assert torch.equal(student(images(), parts(2, masked=0, thrown=0)), student(images()))


@every_family
def test_masked_patches_are_hidden_and_only_they(family):
    student = build(family).eval()
    x, partition = images(), half_masked()
    mask = partition.mask
    pixels = mask.view(2, 1, 6, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = torch.rand_like(x)
    assert torch.equal(student(torch.where(pixels, noise, x), partition), student(x, partition))
    # one seen patch of the first image changes: seen by the first image only
    position = int((~mask[0]).nonzero()[5])
    changed = x.clone()
    row, column = 2 * (position // 4), 2 * (position % 4)
    changed[0, :, row : row + 2, column : column + 2] += 0.5
    difference = (student(changed, partition) - student(x, partition)).abs().amax(-1)
    assert (difference[0] > 0).all() and not difference[1].any()
    hidden = student(x, parts(2, masked=24, thrown=0))
    assert torch.allclose(hidden[0], hidden[1], atol=1e-6)
    assert not torch.allclose(hidden, student(x), atol=1e-4)


@pytest.mark.parametrize("thrown", [0, 5])
def test_codes_are_of_masked_patches_morphed_among_the_kept(thrown):
    student, partition = build("beit", CodeStudent).eval(), half_masked(thrown=thrown)
    kept = 24 - thrown
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(3, 2, kept, generator=generator).argsort(-1).int() % 6
    groups = [
        TokenGroups(each, torch.stack([torch.bincount(row, minlength=6) for row in each]).int()) for each in index
    ]
    logits = student(images(), partition, groups)
    assert logits.shape == (3, 2, 12, 5)
    tokens = student.tokens(images(), partition)
    for each, found in zip(groups, logits, strict=True):
        whole = student.head(morph_tokens(tokens, each))
        for image in range(2):
            rows = [partition.kept[image].tolist().index(place) for place in partition.masked[image].tolist()]
            torch.testing.assert_close(found[image], whole[image, rows], atol=1e-5, rtol=1e-4)


def test_projections_are_of_the_mean_and_of_every_token():
    student = build("vit", ProjectedStudent, hidden=32).eval()
    for partition in (None, half_masked()):
        whole, tokens = student(images(), partition)
        seen = student.tokens(images(), partition)
        torch.testing.assert_close(whole, student.predictor(student.head(seen.mean(1))))
        torch.testing.assert_close(tokens, student.predictor(student.head(seen)))


@every_family
def test_every_parameter_takes_part(family):
    student = build(family)
    student(images(), half_masked()).square().mean().backward()
    unused = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


@every_family
def test_initialisation(family):
    student = build(family, model_kwargs={"embed_dim": 96, "num_heads": 6})
    scaled = 0
    for name, module in student.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        expected = 0.02
        if name.endswith(("attn.proj", "mlp.fc2")):
            expected /= math.sqrt(2 * (int(name.split(".")[2]) + 1))
            scaled += 1
        tolerance = 5 / math.sqrt(2 * module.weight.numel())
        assert module.weight.std().item() == pytest.approx(expected, rel=tolerance), name
        assert module.bias is None or not module.bias.any()
    assert scaled == 2 * 3
    for name, parameter in student.named_parameters():
        if name.endswith(("_token", "pos_embed")):
            assert 0.012 < parameter.std() < 0.028, name
    again = build(family, model_kwargs={"embed_dim": 96, "num_heads": 6})
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_names_without_decay():
    assert build("vit-registers").no_weight_decay() == {
        "backbone.patch_embed.mask_token",
        "backbone.cls_token",
        "backbone.reg_token",
        "backbone.pos_embed",
    }
    assert build("beit-shared").no_weight_decay() == {
        "backbone.patch_embed.mask_token",
        "backbone.cls_token",
        "backbone.rel_pos_bias.relative_position_bias_table",
    }
    tables = {f"backbone.blocks.{i}.attn.relative_position_bias_table" for i in range(3)}
    assert build("beit").no_weight_decay() >= tables


@every_family
def test_layers(family):
    student = build(family)
    layers = {name: student.layer_of(name) for name, _ in student.named_parameters()}
    assert set(layers.values()) == {0, 1, 2, 3, 4}
    assert {n for n, layer in layers.items() if layer == 4} >= {"head.weight", "head.bias", "backbone.norm.weight"}
    for name, layer in layers.items():
        if name.startswith("backbone.blocks."):
            assert layer == int(name.split(".")[2]) + 1
        elif not name.startswith(("head.", "backbone.norm.")):
            assert layer == 0, name
    assert layers["backbone.patch_embed.mask_token"] == layers["backbone.patch_embed.embed.proj.weight"] == 0
    with pytest.raises(ValueError, match="'nonsense'"):
        student.layer_of("nonsense")


def beit_v2_checkpoint() -> dict[str, torch.Tensor]:
    """The names and shapes of BEiT v2's public pre-training weights, for width 24, depth 3, a 6 x 4 grid."""
    block = {
        "gamma_1": (24,), "gamma_2": (24,), "norm1.weight": (24,), "norm1.bias": (24,), "norm2.weight": (24,),
        "norm2.bias": (24,), "attn.q_bias": (24,), "attn.v_bias": (24,), "attn.qkv.weight": (72, 24),
        "attn.proj.weight": (24, 24), "attn.proj.bias": (24,), "mlp.fc1.weight": (96, 24), "mlp.fc1.bias": (96,),
        "mlp.fc2.weight": (24, 96), "mlp.fc2.bias": (24,),
    }  # fmt: skip
    shapes = {f"blocks.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    shapes |= {"cls_token": (1, 1, 24), "mask_token": (1, 1, 24), "norm.weight": (24,), "norm.bias": (24,)}
    shapes |= {"patch_embed.proj.weight": (24, 3, 2, 2), "patch_embed.proj.bias": (24,)}
    shapes |= {"rel_pos_bias.relative_position_bias_table": (11 * 7 + 3, 3)}
    shapes |= {"rel_pos_bias.relative_position_index": (25, 25), "lm_head.weight": (8192, 24), "lm_head.bias": (8192,)}
    shapes |= {"cls_pt_layers.0.norm1.weight": (24,)}
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_public_beit_weights_load_by_their_names():
    student = build("beit-shared")
    weights = beit_v2_checkpoint()
    student.load_backbone_state_dict(weights)
    loaded = student.backbone_state_dict()
    assert len(loaded) == len(weights) - 5, "mask token, index, heads"
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
    assert torch.equal(student.backbone.patch_embed.mask_token, weights["mask_token"].flatten())
    del weights["blocks.1.attn.q_bias"]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.q_bias"):
        student.load_backbone_state_dict(weights)


def test_weights_of_a_mean_pooled_classifier_load():
    student = build("beit")
    classifier = timm.create_model(
        student.model_name, **{**student.create_kwargs, "num_classes": 7, "global_pool": "avg"}
    )
    weights = classifier.state_dict()
    assert "fc_norm.weight" in weights and "norm.weight" not in weights
    weights["fc_norm.weight"] = torch.rand(24)
    token = student.backbone.patch_embed.mask_token.clone()
    student.load_backbone_state_dict(weights)
    assert torch.equal(student.backbone.norm.weight, weights["fc_norm.weight"])
    assert torch.equal(student.backbone.patch_embed.mask_token, token), "no mask token there: ours stays"


@pytest.mark.parametrize("family", ["vit-registers", "beit-shared", "eva"])
def test_checkpointed_blocks_give_the_same_gradients(family):
    gradients = []
    for enable in (False, True):
        student = build(family)
        student.set_grad_checkpointing(enable)
        student(images(), half_masked()).square().mean().backward()
        assert student.backbone.grad_checkpointing is enable
        gradients.append([p.grad for p in student.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["vit-dynamic", "beit-both"])
def test_compiles_in_one_graph(family):
    torch._dynamo.reset()
    student = build(family)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    for batch, thrown in ((2, 0), (3, 0), (3, 5)):
        partition = half_masked(batch, thrown)
        expected = student(images(batch), partition)
        torch.testing.assert_close(compiled(images(batch), partition), expected, atol=1e-6, rtol=1e-4)


def test_distributed_training_finds_every_gradient():
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            student = nn.parallel.DistributedDataParallel(build("beit-shared"))
            for _ in range(2):  # an unused parameter is an error in the second step
                student(images(), half_masked()).square().mean().backward()
        finally:
            torch.distributed.destroy_process_group()


def test_autocast_drop_path_and_channels():
    student = build("beit", in_chans=1, drop_path=0.5)
    assert [type(block.drop_path1).__name__ for block in student.backbone.blocks] == [
        "Identity",
        "DropPath",
        "DropPath",
    ]
    assert "drop_path_rate" not in student.create_kwargs
    with torch.autocast("cpu", torch.bfloat16):
        out = student(images()[:, :1], half_masked())
    assert out.dtype == torch.bfloat16 and out.shape == (2, 24, 5)


def test_state_dict_round_trip():
    first, second = build("eva"), build("eva")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(images(), half_masked()), second.eval()(images(), half_masked()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit_huge_of_nowhere"}, "model .* 'vit_huge_of_nowhere'"),
        ({"model": "resnet18", "model_kwargs": {}, "image_size": 32, "patch_size": 32}, "model .*resnet18"),
        ({"model": "deit_tiny_distilled_patch16_224"}, "deit_tiny_distilled_patch16_224"),
        ({"image_size": 13}, "image_size .* 2, got 13"),
        ({"image_size": (12, 9)}, r"image_size .* \(12, 9\)"),
        ({"image_size": 0}, "image_size .* 0"),
        ({"model_kwargs": {"num_classes": 3}}, "model_kwargs .*num_classes"),
        ({"model_kwargs": {"patch_drop_rate": 0.25}}, "patch_drop_rate .* 0.25"),
        ({"model_kwargs": {"fc_norm": True}}, "fc_norm=False"),
        ({"model_kwargs": {"final_norm": False}}, "norm its tokens"),
    ],
)
def test_bad_arguments(arguments, message):
    settings = {"model": "vit_tiny_patch16_224", "out_features": 5, "image_size": 12, "patch_size": 2, **arguments}
    if settings["model"] != "resnet18":
        settings["model_kwargs"] = {"embed_dim": 24, "depth": 1, "num_heads": 3, **settings.get("model_kwargs", {})}
    with pytest.raises(ValueError, match=message):
        MaskedStudent(**settings)
