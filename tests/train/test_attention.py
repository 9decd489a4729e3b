"""Attention maps: those of timm's own softmax for every family, compiled, sharded, in bfloat16; a marked patch."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, PATCHES, SIZE, SMALL, disturbed, every_family, family_arguments
from processes import run_together
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils._python_dispatch import TorchDispatchMode

from dtm_triton.train.engine.compiled import compile_blocks
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.parallel import ENTRIES, blocks_of
from dtm_triton.train.models import attention
from dtm_triton.train.models.attention import attention_map, tokens_and_attention
from dtm_triton.train.models.autoencoder import MaskedAutoencoder
from dtm_triton.train.models.student import MaskedStudent

STATISTICS = ("class_row", "row_column")
every_statistic = pytest.mark.parametrize("statistic", STATISTICS)
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {  # blocks and queries that only attention meets
    "eva-behind": ("eva02_tiny_patch14_224", {"use_post_norm": True}),
    "eva-queries-normed": ("vit_small_patch16_dinov3", {"qk_norm": True}),
    "eva-shared-keys": (
        "vit_small_patch16_dinov3",
        {"num_heads": 6, "num_kv_heads": 2, "qkv_fused": False, "attn_type": "rope"},
    ),
    "vit-behind": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock, "init_values": 0.5}),
    "vit-no-class-registers": ("vit_tiny_patch16_224", {"class_token": False, "reg_tokens": 2}),
    "eva-no-class": ("vit_pe_core_tiny_patch16_384", {"class_token": False}),
}
everything = pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])


def build(family: str, **changes: Any) -> Any:
    if family in FURTHER:
        name, kwargs = FURTHER[family][0], {**SMALL, **FURTHER[family][1]}
    else:
        name, kwargs = family_arguments(family)
    torch.manual_seed(0)
    settings = {"img_size": (12, 8), "patch_size": 2, "num_classes": 0, "global_pool": "", **kwargs, **changes}
    return disturbed(timm.create_model(name, **settings)).eval()


def images(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, 12, 8, generator=torch.Generator().manual_seed(2))


class Softmaxes(TorchDispatchMode):
    """Every result of a softmax, and the largest tensor with a row for every query."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "softmax" in str(function):
            self.results.append(result)
        return result


def weights_of_timm(model: Any) -> Tensor:
    """The last block's attention [B, A, L, L], by timm without fused attention."""
    last = model.blocks[-1].attn
    last.fused_attn = False
    try:
        with Softmaxes() as seen, torch.no_grad():
            model.forward_features(images())
    finally:
        last.fused_attn = True
    return seen.results[-1]


def queries_and_keys_of_timm(model: Any) -> tuple[Tensor, Tensor]:
    """Of the last block, as they enter fused attention."""
    given: list[tuple[Tensor, Tensor]] = []
    fused = nn.functional.scaled_dot_product_attention

    def note(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        given.append((query, key))
        return fused(query, key, value, **settings)

    nn.functional.scaled_dot_product_attention = note
    try:
        with torch.no_grad():
            model.forward_features(images())
    finally:
        nn.functional.scaled_dot_product_attention = fused
    return given[-1]


def expected_map(model: Any, statistic: str) -> Tensor:
    weights, prefix = weights_of_timm(model), model.num_prefix_tokens
    if model.cls_token is None:
        query, key = queries_and_keys_of_timm(model)
        mean = query[:, :, prefix:].mean(2)
        row = (torch.einsum("bhc,bhlc->bhl", mean, key) * model.blocks[-1].attn.scale).softmax(-1)[..., prefix:]
    else:
        row = weights[:, :, 0, prefix:]
    if statistic == "row_column":
        return (row * weights.mean(2)[..., prefix:]).mean(1)
    heads = []
    for head in row.unbind(1):
        low, high = head.min(1, keepdim=True).values, head.max(1, keepdim=True).values
        heads.append((head - low) / (high - low))
    return torch.stack(heads).mean(0)


@everything
@every_statistic
def test_maps_are_those_of_timms_softmax(family: str, statistic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ROWS", 7)  # no divisor of the tokens
    model = build(family)
    expected, found = expected_map(model, statistic), attention_map(model, images(), statistic)
    assert found.shape == (3, PATCHES) and found.dtype == torch.float32 and not found.requires_grad
    assert expected.std() > 0.05 * expected.mean(), "a map with something in it"
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=2e-5 if statistic == "row_column" else 1e-4)


@everything
@every_statistic
def test_one_pass_gives_tokens_and_map(family: str, statistic: Any) -> None:
    model = build(family, drop_path_rate=0.9).train()
    tokens, found = tokens_and_attention(model, images(), statistic)
    assert model.blocks[-1].training and torch.equal(found, attention_map(model, images(), statistic))
    with torch.no_grad():
        torch.testing.assert_close(tokens, model.eval().forward_features(images()))


@every_family
def test_networks_attend_as_their_backbones(family: str) -> None:
    name, kwargs = family_arguments(family)
    settings = {"out_features": 5, "model_kwargs": kwargs, **SIZE}
    torch.manual_seed(0)
    student = disturbed(MaskedStudent(name, drop_path=0.9, **settings))
    autoencoder = disturbed(MaskedAutoencoder(name, width=16, depth=1, heads=2, **settings))
    for network in (student, autoencoder):
        plain: Any = timm.create_model(network.model_name, **network.create_kwargs)
        plain.load_state_dict(network.backbone_state_dict())
        network.backbone.blocks[0].eval()
        before = {name: module.training for name, module in network.named_modules()}
        for statistic in STATISTICS:
            maps = network.attention(images(), statistic)
            torch.testing.assert_close(maps, attention_map(plain.eval(), images(), statistic), atol=1e-6, rtol=1e-4)
        assert {name: module.training for name, module in network.named_modules()} == before, "in eval mode only then"


def test_the_default_is_the_class_row_and_constant_heads_are_zero() -> None:
    model = build("vit")
    assert torch.equal(attention_map(model, images()), attention_map(model, images(), "class_row"))
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight[:8].zero_()  # the first of three heads asks for nothing
        model.blocks[-1].attn.qkv.bias[:8].zero_()
    maps = attention_map(model, images())
    assert maps.isfinite().all() and maps.max() <= 2 / 3 and maps.max() > 0.3
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight.zero_()
        model.blocks[-1].attn.qkv.bias.zero_()
    assert not attention_map(model, images()).any()


def test_scaled_maps_reach_from_none_to_all_in_one_head() -> None:
    maps = attention_map(build("vit", num_heads=1), images())
    assert maps.min(1).values.tolist() == [0, 0, 0] and maps.max(1).values.tolist() == [1, 1, 1]


@pytest.mark.parametrize("family", ["vit", "beit", "dinov3"])
@every_statistic
def test_a_marked_patch_is_where_attention_goes(family: str, statistic: Any) -> None:
    model = build(family)
    size = 2 * 2 * 3
    with torch.no_grad():  # the class token looks for tokens along one direction, bright patches have it
        for parameter in model.parameters():
            parameter.mul_(0.01)
        for block in model.blocks:
            block.norm1.weight.fill_(1)
            block.norm1.bias.zero_()
        model.patch_embed.proj.weight.fill_(0)
        model.patch_embed.proj.weight[0].fill_(20 / size)
        model.cls_token.fill_(0)
        model.cls_token[..., 1] = 20
        last = model.blocks[-1].attn
        query, key = (
            (last.qkv.weight[:24], last.qkv.weight[24:48])
            if last.qkv is not None
            else (last.q_proj.weight, last.k_proj.weight)
        )
        query.zero_()
        key.zero_()
        query[1::8, 1], key[1::8, 0] = 3, 3  # a channel that rotates little
    x = torch.zeros(PATCHES, 3, 12, 8)
    for place in range(PATCHES):
        row, column = 2 * (place // 4), 2 * (place % 4)
        x[place, :, row : row + 2, column : column + 2] = 1
    maps = attention_map(model, x, statistic)
    assert maps.argmax(1).tolist() == list(range(PATCHES))
    assert (maps.max(1).values > 5 * maps.mean(1)).all()


@everything
def test_bfloat16(family: str) -> None:
    model = build(family)
    expected = attention_map(model, images())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention_map(model, images())
    assert rounded.dtype == torch.float32 and (rounded - expected).abs().max() > 0
    assert (rounded - expected).abs().mean() < 0.1 * expected.std()


def test_one_row_needs_no_square_and_not_the_whole_block() -> None:
    model, calls = build("beit"), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, inputs, outputs, index=index: calls.append(index))
        block.mlp.register_forward_hook(lambda module, inputs, outputs, index=index: calls.append(-index))
        block.attn.proj.register_forward_hook(lambda module, inputs, outputs, index=index: calls.append(10 + index))
    with Softmaxes() as seen:
        attention_map(model, images())
    assert {2, -2, 12} & set(calls) == set() and {0, 1, -1, 10, 11} <= set(calls)
    assert [result.shape for result in seen.results if result.shape[-2:] != (25, 25)] == [(3, 3, 1, 25)]
    assert all(block.attn.fused_attn for block in model.blocks)
    with Softmaxes() as seen:
        attention_map(model, images(), "row_column")
    assert [tuple(result.shape) for result in seen.results][-2:] == [(3, 3, 1, 25), (3, 3, 25, 25)]


@pytest.mark.parametrize("family", ["vit-registers", "beit-both", "eva-mixed"])
def test_compiled_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    name, kwargs = family_arguments(family)
    student = disturbed(MaskedStudent(name, out_features=5, drop_path=0.5, model_kwargs=kwargs, **SIZE))
    expected = [student.attention(images(), statistic) for statistic in STATISTICS]
    compile_blocks(blocks_of(student))
    student.set_grad_checkpointing()
    for statistic, maps in zip(STATISTICS, expected, strict=True):
        torch.testing.assert_close(student.attention(images(), statistic), maps, atol=1e-6, rtol=1e-4)


def attend_in_shards(processes: Processes, folder: Path) -> None:
    """Each process asks for the maps of other images, before, between and after steps of training."""
    mesh = init_device_mesh("cpu", (processes.count,))
    for family in ("vit-no-class", "vit-registers", "beit-both", "eva-apart", "eva-mixed"):
        name, kwargs = family_arguments(family)
        for half in (False, True):
            torch.manual_seed(0)
            student = disturbed(MaskedStudent(name, out_features=5, model_kwargs=kwargs, **SIZE))
            mine = images(4)[processes.rank :: processes.count]
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                expected = [student.attention(mine, statistic) for statistic in STATISTICS]
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
            for part in (*blocks_of(student), student):
                fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            for entry in ENTRIES:
                if hasattr(student, entry):
                    register_fsdp_forward_method(student, entry)
            last = student.backbone.blocks[-1]
            for round_ in range(3):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    found = [student.attention(mine, statistic) for statistic in STATISTICS]
                    for maps, whole in zip(found, expected, strict=True):
                        error = (maps - whole).abs().mean() / whole.std()
                        assert error < (0.2 if half else 1e-4), (family, half, round_, error)
                    assert isinstance(last, FSDPModule)
                    assert all(hasattr(parameter, "full_tensor") for parameter in last.parameters()), "shards again"
                    student(mine).square().mean().backward()
                assert all(parameter.grad is not None for parameter in last.parameters())


def test_shards_attend_as_whole_weights(tmp_path: Path) -> None:
    assert "attention" in ENTRIES
    run_together(2, attend_in_shards, tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "backbone must be a VisionTransformer, Eva or Beit, got Linear"),
        (("vit_tiny_patch16_224", {"depth": 1}), "two blocks or more for attention maps, got 1"),
        (("vit_base_patch16_xp_224", {}), "blocks with one plain attention, got ParallelScalingBlock"),
        (("vit_small_patch16_18x2_224", {}), "blocks with one plain attention, got ParallelThingsBlock"),
        (("vit_tiny_patch16_224", {"attn_layer": "diff", "num_heads": 2}), "one plain attention, got Block"),
    ],
)
def test_other_models_and_statistics(model: Any, message: str) -> None:
    if isinstance(model, tuple):
        model = timm.create_model(model[0], img_size=(12, 8), patch_size=2, **{**SMALL, **model[1]})
    with pytest.raises(ValueError, match=message):
        attention_map(model, images())
    with pytest.raises(ValueError, match="statistic must be one of .* got 'column'"):
        attention_map(model, images(), "column")  # type: ignore[arg-type]
