"""Teachers: what the targets are, where weights come from, and that nothing is trained or guessed."""

from __future__ import annotations

import pickle
import socket

import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional as F

from dtm_triton.train.models.teacher import ConvTeacher, NoWeightsError, build_teacher

CLIP = "vit_base_patch16_clip_quickgelu_224.openai"
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32, "num_classes": 8}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def plain(name: str = CLIP, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(tmp_path):
    def save(model) -> str:
        path = tmp_path / "teacher.safetensors"
        safetensors.torch.save_file(model.state_dict(), path)
        return path

    return save


def images(size=(32, 32), batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def normalised(x: torch.Tensor, mean=CLIP_MEAN, std=CLIP_STD) -> torch.Tensor:
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_clip_targets_are_projected_token_by_token(saved):
    model = plain()
    teacher = build_teacher(CLIP, weights=saved(model), project=True, model_kwargs=SMALL)
    expected = model.head(model.forward_features(normalised(images()))[:, 1:])
    assert teacher.grid == (2, 2) and teacher.out_features == 8
    assert torch.allclose(teacher(images()), expected, atol=1e-5)
    assert teacher(images()).shape == (2, 4, 8)


def test_without_projection_tokens_keep_their_width(saved):
    model = plain()
    teacher = build_teacher(CLIP, weights=saved(model), model_kwargs=SMALL)
    assert teacher.out_features == 24
    assert torch.allclose(teacher(images()), model.forward_features(normalised(images()))[:, 1:], atol=1e-5)


def test_imagenet_statistics_by_name(saved):
    model = plain()
    teacher = build_teacher(CLIP, weights=saved(model), statistics="imagenet", model_kwargs=SMALL)
    x = normalised(images(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(teacher(images()), model.forward_features(x)[:, 1:], atol=1e-5)
    assert not torch.allclose(teacher(images()), model.forward_features(normalised(images()))[:, 1:], atol=1e-3)


def test_a_norm_behind_the_pooling_is_applied_to_every_token(saved):
    model = plain("beitv2_base_patch16_224")
    assert not list(model.norm.parameters())
    teacher = build_teacher("beitv2_base_patch16_224", weights=saved(model), model_kwargs=SMALL)
    config = model.pretrained_cfg
    x = normalised(images(), config["mean"], config["std"])
    assert torch.allclose(teacher(images()), model.fc_norm(model.forward_features(x)[:, 1:]), atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "kwargs"), [(0, {"class_token": False, "global_pool": "avg"}), (4, {"reg_tokens": 3})]
)
def test_prefix_tokens_are_dropped(saved, prefix, kwargs):
    name = "vit_small_patch16_224.augreg_in1k"
    model = plain(name, **kwargs)
    assert model.num_prefix_tokens == prefix
    teacher = build_teacher(name, weights=saved(model), model_kwargs={**SMALL, **kwargs})
    assert teacher(images()).shape == (2, 4, 24)
    x = normalised(images(), (0.5,) * 3, (0.5,) * 3)
    assert torch.allclose(teacher(images()), model.fc_norm(model.forward_features(x)[:, prefix:]), atol=1e-5)


def test_grid_of_the_student(saved):
    path = saved(plain())
    teacher = build_teacher(CLIP, weights=path, grid=(3, 5), model_kwargs=SMALL)
    assert teacher.grid == (3, 5) and teacher.image_size == (48, 80)
    assert teacher(images((48, 80))).shape == (2, 15, 24)
    # another resolution is resized to the model's, 30 x 50 pixels here as with a student of patch 10
    small = images((30, 50))
    resized = F.interpolate(small, (48, 80), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(teacher(small), teacher(resized))
    assert not torch.equal(teacher(small), teacher(F.interpolate(small, (48, 80), mode="bilinear", antialias=True)))


def test_teachers_stay_frozen(saved):
    kwargs = {**SMALL, "drop_path_rate": 0.5}
    teacher = build_teacher(CLIP, weights=saved(plain()), model_kwargs=kwargs)
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    x = images().requires_grad_()
    assert not teacher(x).requires_grad
    assert torch.equal(teacher(x), teacher(x))
    assert not teacher.attention(x).requires_grad
    assert not any(module.training for module in teacher.modules())
    assert all(value.device == p.device for value in (teacher.mean, teacher.std) for p in teacher.parameters())


def openai_checkpoint() -> dict[str, torch.Tensor]:
    """The names and shapes of OpenAI's CLIP image tower, with a stray text weight, for the small model."""
    shapes = {
        "visual.class_embedding": (24,), "visual.positional_embedding": (5, 24), "visual.proj": (24, 8),
        "visual.conv1.weight": (24, 3, 16, 16), "token_embedding.weight": (10, 12),
        "visual.ln_pre.weight": (24,), "visual.ln_pre.bias": (24,),
        "visual.ln_post.weight": (24,), "visual.ln_post.bias": (24,),
    }  # fmt: skip
    for i in range(2):
        block = {
            "attn.in_proj_weight": (72, 24), "attn.in_proj_bias": (72,), "attn.out_proj.weight": (24, 24),
            "attn.out_proj.bias": (24,), "ln_1.weight": (24,), "ln_1.bias": (24,), "ln_2.weight": (24,),
            "ln_2.bias": (24,), "mlp.c_fc.weight": (96, 24), "mlp.c_fc.bias": (96,), "mlp.c_proj.weight": (24, 96),
            "mlp.c_proj.bias": (24,),
        }  # fmt: skip
        shapes |= {f"visual.transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_openai_layout(tmp_path):
    state = openai_checkpoint()
    torch.save(state, tmp_path / "clip.pt")
    teacher = build_teacher(CLIP, weights=tmp_path / "clip.pt", project=True, model_kwargs=SMALL)
    model = teacher.model
    assert torch.equal(model.head.weight, state["visual.proj"].T) and not model.head.bias.any()
    assert torch.equal(model.patch_embed.proj.weight, state["visual.conv1.weight"])
    assert torch.equal(model.cls_token.flatten(), state["visual.class_embedding"])
    blocks = "visual.transformer.resblocks.1."
    assert torch.equal(model.blocks[1].attn.qkv.weight, state[blocks + "attn.in_proj_weight"])
    assert torch.equal(model.blocks[1].mlp.fc2.bias, state[blocks + "mlp.c_proj.bias"])
    assert teacher(images()).shape == (2, 4, 8) and torch.isfinite(teacher(images())).all()
    assert model.pretrained_cfg["state_dict"] is None, "the file's tensors are not kept a second time"


def test_files_and_folders(tmp_path):
    state = plain().state_dict()
    expected = plain().forward_features(normalised(images()))[:, 1:]
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth")
    headless = {name: value for name, value in state.items() if not name.startswith("head.")}
    torch.save({f"module.{name}": value for name, value in headless.items()}, tmp_path / "b.bin")
    folder = tmp_path / "folder"
    folder.mkdir()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    for weights in (tmp_path / "a.pth", str(tmp_path / "b.bin"), folder):
        assert torch.allclose(build_teacher(CLIP, weights=weights, model_kwargs=SMALL)(images()), expected, atol=1e-5)
    torch.save(state, folder / "other.pth")
    build_teacher(CLIP, weights=folder, model_kwargs=SMALL)  # model.safetensors goes first
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    with pytest.raises(ValueError, match=r"weights .* \['one.safetensors', 'other.pth'\]"):
        build_teacher(CLIP, weights=folder, model_kwargs=SMALL)
    with pytest.raises(ValueError, match="project must be False"):
        build_teacher(CLIP, weights=tmp_path / "b.bin", project=True, model_kwargs=SMALL)


def test_weights_that_do_not_fit(tmp_path):
    state = plain().state_dict()
    missing = {name: value for name, value in state.items() if name != "blocks.1.norm2.bias"}
    torch.save(missing, tmp_path / "missing.pth")
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "extra.pth")
    torch.save(plain(embed_dim=48).state_dict(), tmp_path / "wide.pth")
    for name, message in (("missing", r"blocks\.1\.norm2\.bias"), ("extra", "extra"), ("wide", "size mismatch")):
        with pytest.raises(ValueError, match=message):
            build_teacher(CLIP, weights=tmp_path / f"{name}.pth", model_kwargs=SMALL)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_teacher(CLIP, weights=tmp_path / "nowhere.pth", model_kwargs=SMALL)
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.npz"):
        build_teacher(CLIP, weights=tmp_path / "weights.npz", model_kwargs=SMALL)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("code from a weight file was run",))


def test_weight_files_cannot_run_code(tmp_path):
    torch.save({**plain().state_dict(), "x": Harmful()}, tmp_path / "harmful.pth")
    (tmp_path / "harmful.bin").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name in ("harmful.pth", "harmful.bin"):
        with pytest.raises(ValueError, match="cannot be read as tensors only"):
            build_teacher(CLIP, weights=tmp_path / name, model_kwargs=SMALL)


def test_no_weights_and_no_network(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NoWeightsError, match=rf"weights of model '{CLIP}' .*give a local file"):
        build_teacher(CLIP, model_kwargs={"cache_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="bogus"):
        build_teacher(CLIP, model_kwargs={"cache_dir": str(tmp_path), "bogus": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit_base_patch16_klip"}, "model .* 'vit_base_patch16_klip'; near it: .*vit_base"),
        ({"model": CLIP, "statistics": "none"}, "statistics .* 'none'"),
        ({"model": CLIP, "model_kwargs": {**SMALL, "in_chans": 1}}, "statistics 'own' .* 3 channels.* takes 1"),
        ({"model": "resnet18", "model_kwargs": {"num_classes": 0}}, "plain Vision Transformer, got 'resnet18'"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    if timm.is_model(arguments["model"]):
        model = timm.create_model(arguments["model"], **arguments.get("model_kwargs", SMALL))
        torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        build_teacher(weights=tmp_path / "weights.pth", **{"model_kwargs": SMALL, **arguments})


def test_bad_images(saved):
    teacher = build_teacher(CLIP, weights=saved(plain()), model_kwargs=SMALL)
    for look in (teacher, teacher.attention):
        with pytest.raises(TypeError, match=r"images .* torch.uint8"):
            look((images() * 255).byte())
        with pytest.raises(ValueError, match=r"images must have 3 channels or one, got \[2, 2, 32, 32\]"):
            look(images()[:, :2])
    grey = images()[:, :1]
    assert torch.equal(
        teacher.attention(grey, "row_column"), teacher.attention(grey.expand(-1, 3, -1, -1), "row_column")
    )
    assert not torch.equal(teacher.attention(grey, "row_column"), teacher.attention(grey))


@pytest.mark.parametrize(("size", "patch", "channels"), [(12, 2, 1), ((12, 20), 4, 3), ((9, 6), 3, 2), (5, 1, 1)])
def test_conv_teacher_shapes(size, patch, channels):
    teacher = ConvTeacher(size, patch, in_chans=channels, num_classes=7, out_features=10)
    height, width = (size, size) if isinstance(size, int) else size
    assert teacher.grid == (height // patch, width // patch) and teacher.out_features == 10
    x = torch.rand(3, channels, height, width)
    assert teacher.tokens(x).shape == (3, teacher.grid[0] * teacher.grid[1], 10)
    assert teacher(x).shape == (3, 7)


def test_conv_teacher_tokens_keep_their_place():
    torch.manual_seed(0)
    teacher = ConvTeacher((20, 28), 2, out_features=12).eval()
    x = torch.rand(1, 1, 20, 28)
    tokens = teacher.tokens(x)
    assert torch.allclose(teacher.head(tokens.mean(1)), teacher(x), atol=1e-6)
    changed = x.clone()
    changed[..., 8:10, 20:22] += 1.0  # patch (4, 10) of 10 x 14
    difference = (teacher.tokens(changed) - tokens).abs().amax(-1).view(10, 14)
    assert difference[4, 10] > 0
    rows, columns = difference.nonzero().T
    assert rows.min() >= 4 - 3 and rows.max() <= 4 + 3 and columns.min() >= 10 - 3 and columns.max() <= 10 + 3


def test_conv_teacher_learns():
    torch.manual_seed(0)
    teacher = ConvTeacher(6, 2, num_classes=2, out_features=16)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(40):
        labels = torch.randint(0, 2, (32,))
        x = 0.3 * torch.rand(32, 1, 6, 6)
        place = torch.randint(0, 5, (32, 2))
        for i, (row, column) in enumerate(place.tolist()):  # class 0: a bar lying, class 1: standing, anywhere
            x[i, 0, row : row + (3 if labels[i] else 1), column : column + (1 if labels[i] else 3)] = 1.0
        loss = F.cross_entropy(teacher(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_conv_teacher_bad_size():
    with pytest.raises(ValueError, match=r"image_size .* 2, got \(12, 9\)"):
        ConvTeacher((12, 9), 2)
